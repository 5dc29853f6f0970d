"""`python -m realign.evaluate handoff`: commands and configuration for other evaluation tools."""

import json
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlms import make

from realign.digits import ASSETS
from realign.evaluate import __main__ as evaluate
from realign.evaluate import handoff, kits
from realign.modeling.layouts import TESTED

EXAMPLE = Path(__file__).parents[2] / "examples" / "lmms_eval"

# From the sources of lmms-eval 0.7.3 and VLMEvalKit: types that a wrapper or class loads.
WRAPPERS = {
    "llava_hf": ["llava", "llava_next", "llava_onevision"],
    "qwen2_vl": ["qwen2_vl"],
    "qwen2_5_vl": ["qwen2_5_vl"],
    "qwen3_vl": ["qwen3_vl", "qwen3_vl_moe"],
    "qwen3_5": ["qwen3_5", "qwen3_5_moe"],
    "gemma3": ["gemma3"],
    "gemma4": ["gemma4", "gemma4_unified"],
    "internvl_hf": ["internvl"],
    "glm4v": ["glm46v", "glm4v_moe"],
    "mistral3_vl": ["mistral3"],
    "lfm2_5_vl": ["lfm2_vl"],
    "idefics2": ["idefics2"],
    "vllm": ["smolvlm", "paligemma", "glm4v"],
}
CLASSES = {
    "LLaVA_OneVision_HF": ["llava_onevision"],
    "Qwen2VLChat": ["qwen2_vl", "qwen2_5_vl"],
    "Qwen3VLChat": ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"],
    "Gemma3": ["gemma3"],
    "Gemma4": ["gemma4"],
    "PaliGemma": ["paligemma"],
    "SmolVLM2": ["smolvlm"],
    "LFM2VL": ["lfm2_vl"],
    "MiniCPM_V_4_6": ["minicpmv4_6"],
    "GLMThinking": ["glm4v", "glm4v_moe"],
}
NAMES = {  # parts of paths that a kit needs to choose the class
    "qwen3_vl_moe": "A3B",
    "qwen3_5_moe": "A3B",
    "glm46v": "GLM-4.6V-Flash",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
}


def _pairs(table):
    return [(kind, name) for name, kinds in table.items() for kind in kinds]


@pytest.fixture
def hand_off(monkeypatch, tmp_path):
    """Hand off a model of any type without weights. Returns commands by their title, and files."""

    def run(kind, name="", base="org/base"):
        folder, base = tmp_path / f"my model{name}", base + name
        config = SimpleNamespace(model_type=kind, dtype=torch.bfloat16)
        monkeypatch.setattr(handoff, "adapter_base", lambda path: base if path == "run" else None)
        monkeypatch.setattr(handoff, "from_pretrained", lambda *_, **__: config)
        monkeypatch.setattr(handoff, "export_whole", lambda _, output: output)
        folder.mkdir()
        text = handoff.hand_off("run", folder)
        commands = dict(re.findall(r"^([\w-]+, \w+): (python .*)$", text, re.M))
        words = {title: shlex.split(command) for title, command in commands.items()}
        return SimpleNamespace(text=text, words=words, base=base, folder=folder)

    return run


def _options(words):
    """The options of a command as a dictionary."""
    flags = [word for word in words if word.startswith("--")]
    return {flag: words[words.index(flag) + 1] for flag in flags}


def test_tables_name_tested_types_only():
    assert {*kits.LMMS, *kits.VLMEVAL} <= set(TESTED)
    assert {kind: route.name for kind, route in kits.VLMEVAL.items()} == dict(_pairs(CLASSES))
    own = {kind: name for kind, name in _pairs(WRAPPERS) if name != "vllm"}
    assert {kind: route.name for kind, route in kits.LMMS.items()} == own


@pytest.mark.parametrize(("kind", "wrapper"), _pairs(WRAPPERS))
def test_lmms_eval_gets_the_same_command_for_both_models(kind, wrapper, hand_off):
    found = hand_off(kind, NAMES.get(kind, ""))
    both = {name: _options(found.words[f"lmms-eval, {name}"]) for name in ("base", "aligned")}
    arguments, outputs = {}, set()
    for name, path in (("base", found.base), ("aligned", str(found.folder))):
        assert both[name]["--model"] == wrapper
        assert both[name]["--tasks"] == "pope_full,mme"
        first, *rest = both[name].pop("--model_args").split(",")
        assert first == f"{'model' if wrapper == 'vllm' else 'pretrained'}={path}"
        arguments[name] = rest
        outputs.add(both[name].pop("--output_path"))
    assert both["base"] == both["aligned"] and arguments["base"] == arguments["aligned"]
    assert ("device_map=auto" in arguments["base"]) == (wrapper not in ("vllm", "lfm2_5_vl"))
    assert ("enable_thinking=False" in arguments["base"]) == (wrapper == "qwen3_5")
    scores = f"{found.folder}-scores/lmms-eval"
    assert outputs == {f"{scores}/base", f"{scores}/aligned"}


@pytest.mark.parametrize(("kind", "name"), _pairs(CLASSES))
def test_vlmevalkit_gets_the_same_settings_for_both_models(kind, name, hand_off):
    found = hand_off(kind, NAMES.get(kind, ""))
    options = _options(found.words["VLMEvalKit, both"])
    assert options["--judge"] == "exact_matching"
    config = json.loads(Path(options["--config"]).read_text())
    before, after = config["model"].values()
    assert list(config["model"]) == [found.base.split("/")[-1], found.folder.name]
    assert (before.pop("model_path"), after.pop("model_path")) == (found.base, str(found.folder))
    assert before == after and before.pop("class") == name
    expected = {  # of vlmeval/config.py
        "qwen2_vl": {"min_pixels": 1003520, "max_pixels": 12845056},
        "qwen2_5_vl": {"min_pixels": 1003520, "max_pixels": 12845056, "use_custom_prompt": False},
        "minicpmv4_6": {"use_upsize": False},
    }
    if name == "Qwen3VLChat":
        found = tuple(before[key] for key in ("temperature", "top_p", "max_new_tokens"))
        assert found == ((0.7, 0.8, 16384) if "vl" in kind else (1.0, 0.95, 32768))
        assert not before["use_custom_prompt"] and before["use_vllm"]
    else:
        assert before == expected.get(kind, {})
    assert config["data"]["POPE"] == {"class": "ImageYORNDataset", "dataset": "POPE"}
    assert config["data"]["MMStar"] == {"class": "ImageMCQDataset", "dataset": "MMStar"}
    assert len(config["data"]) == 7


def test_models_of_one_name_have_two_entries(hand_off):
    found = hand_off("gemma3", base="org/my model")
    config = json.loads((found.folder / "vlmevalkit.json").read_text())
    assert list(config["model"]) == ["my model-base", "my model"]


@pytest.mark.parametrize(
    ("kind", "name", "kit"),
    [
        ("qwen3_vl", "A3B", "lmms-eval"),
        ("qwen3_vl_moe", "", "lmms-eval"),
        ("qwen3_5", "A3B", "lmms-eval"),
        ("qwen3_5_moe", "", "lmms-eval"),
        ("glm46v", "", "lmms-eval"),
        ("glm4v_moe", "Flash", "lmms-eval"),
        ("gemma3", "a,b", "lmms-eval"),
        ("gemma3", "it's", "lmms-eval"),
        ("gemma3", "[x]", "lmms-eval"),
        ("llava", "", "VLMEvalKit"),
        ("qwen2_vl", "Omni", "VLMEvalKit"),
        ("qwen2_5_vl", "omni", "VLMEvalKit"),
        ("qwen3_vl", "Omni", "VLMEvalKit"),
        ("glm4v", "GLM-4.5V", "VLMEvalKit"),
        ("glm4v_moe", "", "VLMEvalKit"),
        ("molmo2", "", "VLMEvalKit"),
    ],
)
def test_a_path_that_a_kit_misreads_gets_no_command(kind, name, kit, hand_off):
    found = hand_off(kind, name)
    assert not any(title.startswith(kit) for title in found.words)
    assert f"{kit}: no c" in found.text
    assert kit == "lmms-eval" or not (found.folder / "vlmevalkit.json").exists()


def test_an_adapter_names_its_base(other, tmp_path, capsys):
    merged = tmp_path / "the merged"
    words = ["handoff", "--model", str(other["adapter"]), "--output", str(merged)]
    assert evaluate.main(words) == 0
    printed = capsys.readouterr().out
    for path in (ASSETS, merged):
        argument = shlex.quote(f"pretrained={path},device_map=auto")
        assert f"lmms_eval --model llava_hf --model_args {argument} --tasks" in printed
    weights = load_file(merged / "model.safetensors")
    assert weights.keys() == load_file(ASSETS / "model.safetensors").keys()
    assert evaluate.main(words) == 1
    assert "not empty. Name another --output" in capsys.readouterr().err


def test_a_whole_model_needs_its_base(other, tmp_path, capsys):
    whole, adapter = str(other["merged"]), str(other["adapter"])
    vlm, _ = make("gemma3")
    vlm.config.save_pretrained(tmp_path / "gemma3")
    output = tmp_path / "out"
    for model, more, message in (
        (whole, [], f"--base: {whole} holds whole weights, which name no base. Pass the folder"),
        (whole, ["--base", ""], "holds whole weights, which name no base"),
        (whole, ["--base", adapter], f"--base: {adapter} is an adapter. Merge it"),
        (whole, ["--base", whole], f"--base: {whole} is also --model"),
        (whole, ["--base", str(tmp_path / "none")], f"there is no folder {tmp_path / 'none'}"),
        (whole, ["--base", str(tmp_path / "gemma3")], "gemma3 has type gemma3, and "),
        (adapter, ["--base", str(ASSETS)], f"is an adapter and names its base {ASSETS}. Omit"),
    ):
        words = ["handoff", "--model", model, "--output", str(output), *more]
        assert evaluate.main(words) == 1
        assert message in capsys.readouterr().err
        assert not output.exists()
    link = tmp_path / "Base-A3B"
    link.symlink_to(ASSETS)
    words = ["handoff", "--model", whole, "--base", str(link), "--output", str(output)]
    assert evaluate.main(words) == 0
    assert f"pretrained={link},device_map" in capsys.readouterr().out


def test_the_example_asks_ten_questions_about_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["make_digits.py", "digits"])
    runpy.run_path(str(EXAMPLE / "make_digits.py"))
    docs = [json.loads(line) for line in Path("digits/pope.json").read_text().splitlines()]
    assert [doc["label"] for doc in docs] == ["yes", "no"] * 5
    task = runpy.run_path(str(EXAMPLE / "digits_task.py"))
    assert [task["images"](doc)[0].size for doc in docs] == [(16, 16)] * 10
    scores = [task["score"](docs[0], [text])["digits_accuracy"] for text in (" Yes\n", "no", "")]
    assert scores == [1, 0, 0]


def test_the_commands_are_kept_in_the_folder(hand_off):
    found = hand_off("llava_onevision")
    kept = (found.folder / "commands.txt").read_text()
    assert kept.rstrip("\n") == found.text.split("\n", 1)[1]
