"""Adapter folders of all PEFT kinds: loading, merging and export, against PEFT's own forward.

The truth of a folder is the plain forward of the model that wrote it. Kinds that change an end of
the model are tested on tied ends, and every third of the others on one family.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapter_kinds import FAMILIES, KINDS, inputs_of, load_base, logps, save_base, save_trained
from family_cases import made
from huggingface_hub import constants
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlms import make
from transformers import AutoModelForImageTextToText, AutoTokenizer

from realign import cache, export, train
from realign.data.records import write_pairs
from realign.digits import ASSETS
from realign.evaluate import __main__ as evaluate
from realign.modeling import merging, model_files
from realign.modeling.loading import load_model, load_processor, load_trained
from realign.pairs.__main__ import main as pairs_main
from realign.training.export import export_whole

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
ROUNDING = (
    1e-4  # nats; measured: 2e-5 by merging in fp32, 0.5 to 34 where a shared end is changed twice
)
UNMERGED = {"LoRA, lora_bias", "BEFT", "Lily"}  # PEFT cannot merge these, or only into biases
AT_ENDS = [kind for kind in KINDS if any(word in kind for word in ("lm_head", "embed", "end"))]
OTHERS = [kind for kind in KINDS if kind not in AT_ENDS]
SAMPLE = [
    *((kind, ("smolvlm", "gemma3")[i % 2]) for i, kind in enumerate(AT_ENDS)),
    *((kind, FAMILIES[i % 4]) for i, kind in enumerate(OTHERS) if i % 3 == 0 or kind in UNMERGED),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Look names that are no folder up in the cache only, since the network takes 20 s to fail."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: (base folder, inputs of an image and a text)}."""
    root = tmp_path_factory.mktemp("bases")
    return {f: (save_base(f, root / f), inputs_of(make(f)[1])) for f in FAMILIES}


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """(folder of a LoRA on smolvlm, its log-probs)."""
    base, inputs = bases["smolvlm"]
    folder = tmp_path_factory.mktemp("adapter")
    return folder, logps(save_trained(base, "LoRA", folder), inputs)


@pytest.mark.parametrize(("kind", "family"), SAMPLE)
def test_a_kind_is_loaded_and_merged_as_in_peft(bases, tmp_path, kind, family):
    base, inputs = bases[family]
    truth = logps(save_trained(base, kind, tmp_path / "adapter"), inputs)
    assert (truth - logps(load_base(base), inputs)).abs().max() > 0.01
    assert torch.equal(logps(load_trained(tmp_path / "adapter"), inputs), truth)
    if kind in UNMERGED:
        with pytest.raises(ValueError, match="cannot be merged into this base .*Keep it as an ad"):
            load_model(tmp_path / "adapter")
    else:
        merged = load_model(tmp_path / "adapter")
        assert (logps(merged, inputs) - truth).abs().max() < ROUNDING
        assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("family", ["smolvlm", "gemma3"])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("LoRA, lm_head", False),
        ("LoRA, embed_tokens", False),
        ("LoRA, modules_to_save lm_head", False),
        ("LoRA, both ends, tied", True),
        ("LoRA, modules_to_save tied", True),
        ("Trainable tokens", True),
        ("LoRA", True),
    ],
)
def test_an_export_has_two_ends_where_they_differ(bases, tmp_path, kind, tied, family):
    base, inputs = bases[family]
    truth = logps(save_trained(base, kind, tmp_path / "adapter"), inputs)
    folder = export_whole(str(tmp_path / "adapter"), tmp_path / "whole")
    loaded = load_base(folder)  # by transformers only
    assert (logps(loaded, inputs) - truth).abs().max() < ROUNDING
    ends = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == tied
    given = json.loads((folder / "config.json").read_text())
    flags = [part.get("tie_word_embeddings") for part in (given, given["text_config"])]
    assert flags[0] == tied and (tied or not flags[1])
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied)


def test_a_cast_model_has_the_buffers_of_one_loaded_in_that_dtype(bases, adapter):
    """`Module.to` would also round the rotary frequencies."""
    merged = load_model(adapter[0], torch.bfloat16)
    options = {"dtype": torch.bfloat16}
    plain = AutoModelForImageTextToText.from_pretrained(bases["smolvlm"][0], **options)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    truth = dict(plain.named_buffers())
    assert torch.float32 in {buffer.dtype for buffer in truth.values()}
    for name, buffer in merged.named_buffers():
        assert buffer.dtype == truth[name].dtype and torch.equal(buffer, truth[name]), name


def test_a_cast_keeps_what_the_class_keeps_in_fp32(tmp_path):
    """As from_pretrained: routers of GLM-4.5V and ERNIE 4.5 VL have such weights."""
    model = load_model(ASSETS)
    name = next(name for name, _ in model.named_parameters() if name.endswith("norm.weight"))
    with torch.no_grad():
        model.get_parameter(name).add_(1e-4 * torch.randn(model.get_parameter(name).shape))
    model._keep_in_fp32_modules_strict = {"norm.weight"}
    exact = model.get_parameter(name).detach().clone()
    merging.cast(model, torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert name in kept and all("norm.weight" in n for n in kept)
    assert torch.equal(model.get_parameter(name), exact)


def test_a_merge_that_gives_another_model_is_refused(bases, tmp_path, monkeypatch):
    """Merging as PEFT does, into a weight that both ends share."""
    save_trained(bases["smolvlm"][0], "LoRA, lm_head", tmp_path)
    monkeypatch.setattr(merging, "_split_ends", lambda model: False)
    with pytest.raises(ValueError, match=r"merging an adapter of PEFT's kind LORA changed .* nats"):
        load_model(tmp_path)


def broken(folder, to, **changes):
    """A copy of an adapter with changed fields in its configuration."""
    shutil.copytree(folder, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base: base_model_name_or_path is None"),
        ({"base_model_name_or_path": ""}, "names no base"),
        ({"base_model_name_or_path": "../x"}, r"names the base '../x', and there is no such fold"),
        ({"base_model_name_or_path": "/gone/base"}, "no such folder in .* absolute path"),
        ({"base_model_name_or_path": "gone-base"}, "from gone-base, the base that .* names"),
        ({"peft_type": "NEW"}, "not a configuration that PEFT .* reads .*install the version"),
        ({"peft_type": None}, "not a configuration that PEFT"),
        ({"scales_by": 3}, "unknown: scales_by"),
        ({"target_modules": ["k_proj"]}, "does not fit its base .*weights are missing"),
        ({"target_modules": ["nothing"]}, "does not fit its base .*not found"),
        ({"r": 8}, "does not fit its base .*size mismatch"),
    ],
)
def test_an_invalid_adapter_is_refused(adapter, tmp_path, changes, message):
    folder = broken(adapter[0], tmp_path / "broken", **changes)
    for load in (load_model, load_trained):
        with pytest.raises(ValueError, match=message):
            load(folder)


def test_an_adapter_on_the_hub_finds_its_base(bases, adapter, tmp_path, monkeypatch):
    """From a snapshot in the cache of huggingface_hub, without network."""
    base, inputs = bases["smolvlm"]
    folder = broken(adapter[0], tmp_path / "adapter", base_model_name_or_path="team/base")
    for name, source in (("adapter", folder), ("base", base)):
        place = tmp_path / "hub" / f"models--team--{name}"
        shutil.copytree(source, place / "snapshots" / "0123456789abcdef")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0123456789abcdef")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert merging.adapter_base("team/adapter") == "team/base"
    assert torch.equal(logps(load_trained("team/adapter"), inputs), adapter[1])
    assert (logps(load_model("team/adapter"), inputs) - adapter[1]).abs().max() < ROUNDING
    assert hasattr(load_processor("team/adapter"), "image_processor")


def test_weights_without_a_module_are_refused(adapter, tmp_path):
    folder = broken(adapter[0], tmp_path / "more")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    more = {name.replace("layers.0", "layers.7"): weights[name].clone()}
    save_file(weights | more, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit its base .*0 .* missing and 1 are unknown"):
        load_trained(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        load_trained(folder)


@pytest.mark.parametrize("kept", ["shared", "of layers"])
def test_a_shared_weight_may_have_one_of_its_names(bases, tmp_path, kept):
    """RandLoRA's layers share tensors that also have a name in the model. Either one suffices."""
    base, inputs = bases["llava"]
    truth = logps(save_trained(base, "RandLoRA", tmp_path), inputs)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    shared = {"base_model.randlora_A", "base_model.randlora_B"}
    of_layers = {name for name in weights if name.endswith(("randlora_A", "randlora_B"))} - shared
    assert shared < weights.keys() and of_layers
    fewer = weights.keys() - (shared if kept == "of layers" else of_layers)
    save_file({name: weights[name] for name in fewer}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logps(load_trained(tmp_path), inputs), truth)
    none = fewer - shared - of_layers
    save_file({name: weights[name] for name in none}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="weights are missing"):
        load_trained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_damaged_weights_are_one_line(bases, adapter, pairs_file, tmp_path, size, capsys):
    folder = broken(adapter[0], tmp_path / "adapter")
    os.truncate(folder / "adapter_model.safetensors", size)
    for load in (load_model, load_trained):
        with pytest.raises(ValueError, match=f"the adapter {folder} is damaged .*header"):
            load(folder)
    base = shutil.copytree(bases["smolvlm"][0], tmp_path / "base")
    os.truncate(base / "model.safetensors", size)
    capsys.readouterr()
    files = ["--pairs", str(pairs_file), "--output", str(tmp_path / "run")]
    for command, words in ((evaluate.main, []), (train.main, files)):
        assert command(["--model", str(base), *words]) == 1
        errors = capsys.readouterr().err.splitlines()
        assert errors[-1].startswith(f"error: the weights of {base} are damaged (")


def test_the_adapter_of_a_base_that_was_resized_is_refused(adapter, tmp_path):
    folder = broken(adapter[0], tmp_path / "resized")
    tokenizer = make("smolvlm")[1].tokenizer
    tokenizer.save_pretrained(folder)
    assert torch.equal(logps(load_trained(folder), inputs_of(make("smolvlm")[1])), adapter[1])
    tokenizer.add_tokens([f"<new {i}>" for i in range(200)])
    tokenizer.save_pretrained(folder)
    for load in (load_model, load_trained):
        with pytest.raises(ValueError, match=r"has \d+ tokens, and its base .* has 128 embeddings"):
            load(folder)


def test_an_adapter_on_an_adapter_or_on_a_revision_is_refused(adapter, tmp_path):
    named = {"base_model_name_or_path": "some/model", "revision": "v2"}
    folder = broken(adapter[0], tmp_path / "revision", **named)
    for load in (load_model, load_trained, load_processor):
        with pytest.raises(ValueError, match="names revision 'v2' of its base some/model"):
            load(folder)
    folder = broken(adapter[0], tmp_path / "second", base_model_name_or_path=str(adapter[0]))
    with pytest.raises(ValueError, match="is an adapter itself. Merge the base"):
        load_trained(folder)


OUTSIDE = sorted(
    set(PEFT_TYPE_TO_CONFIG_MAPPING) - {config.peft_type for config in KINDS.values()}
)  # fmt: skip


@pytest.mark.parametrize("kind", [*OUTSIDE, "activated"])
def test_kinds_that_act_outside_of_modules_are_refused(adapter, tmp_path, kind, monkeypatch):
    changes = {"peft_type": kind, "task_type": "CAUSAL_LM"}
    if kind == "activated":
        changes = {"alora_invocation_tokens": [5]}
    folder = broken(adapter[0], tmp_path / "kind")
    fields = {"base_model_name_or_path": str(tmp_path)} | changes
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | fields))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: 1 / 0)
    named = "LORA with alora" if kind == "activated" else PeftType(kind).value
    for load in (load_model, load_trained, load_processor):
        with pytest.raises(ValueError, match=f"PEFT's kind {named}.*neither trained, evaluated no"):
            load(folder)


@pytest.mark.parametrize("inside", ["model", "checkpoint-2/mine"])
def test_a_run_in_place_of_its_model_is_refused_before_a_model_is_loaded(
    adapter, tmp_path, inside, monkeypatch, capsys, pairs_file
):
    run, place = tmp_path / "run", tmp_path / "run" / inside
    shutil.copytree(adapter[0], place)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: 1 / 0)
    (tmp_path / "pope.json").write_text(
        '{"question_id": 1, "image": "a.jpg", "text": "is it a dog?", "label": "yes"}\n'
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    model, output = ["--model", str(run)], ["--output", str(tmp_path / "new")]
    pairs = ["--pairs", str(pairs_file)]
    asked = [str(tmp_path / "pope.json"), *model, "--image-folder", str(tmp_path), *output]
    data = ["--data", str(pairs_file), "--output", str(tmp_path / "new.parquet")]
    for main, words in (
        (train.main, [*model, *pairs, *output]),
        (train.main, [*model, *pairs, *output, "--dry-run"]),
        (cache.main, ["fill", *model, *pairs]),
        (pairs_main, [*data, *model]),
        (pairs_main, [*data, "--refill", "prompt", "--engine", f"transformers:{run}"]),
        (evaluate.main, model),
        (evaluate.main, ["pope", *asked]),
        (evaluate.main, ["handoff", *model, "--output", str(tmp_path / "whole")]),
        (export.main, [*model, "--output", str(tmp_path / "whole")]),
    ):
        assert main(words) == 1, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{run} holds no model itself. Pass one of the models in it: {place}." in error


def test_a_tokenizer_beside_an_adapter_is_no_processor(bases, adapter, tmp_path):
    folder = broken(adapter[0], tmp_path / "adapter")
    AutoTokenizer.from_pretrained(bases["smolvlm"][0]).save_pretrained(folder)
    assert hasattr(load_processor(folder), "image_processor")  # of the base


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "adapter that untied"])
def test_a_full_run_saves_and_exports_what_it_trained(bases, tmp_path, monkeypatch, tied):
    """transformers loads both ends, which learn separately where a merged adapter untied them."""
    base, inputs = bases["smolvlm"]
    save_trained(base, "LoRA, lm_head", tmp_path / "adapter")
    write_pairs(tmp_path / "pairs.parquet", made("smolvlm")[1])
    kept, real = {}, train.export_trained

    def keep(folder, model, *args, **options):
        kept["truth"] = logps(model.vlm, inputs)
        return real(folder, model, *args, **options)

    monkeypatch.setattr(train, "export_trained", keep)
    model, run = base if tied else tmp_path / "adapter", tmp_path / "run"
    words = ["--model", model, "--pairs", tmp_path / "pairs.parquet", "--output", run]
    words += ["--steps", 1, "--batch-size", 2, "--tune", "full", "--learning-rate", 1e-2, "--quiet"]
    assert train.main([str(word) for word in words]) == 0
    before = load_base(base)
    export_whole(str(run / "model"), tmp_path / "whole")
    for folder in (run / "model", tmp_path / "whole"):
        loaded = load_base(folder)
        assert torch.equal(logps(loaded, inputs), kept["truth"])
        ends = [getattr(loaded, f"get_{end}_embeddings")().weight for end in ("input", "output")]
        assert (ends[0] is ends[1]) == tied
        assert all((e - before.get_input_embeddings().weight).abs().max() > 5e-3 for e in ends)


def test_the_page_has_every_kind_of_peft():
    """A kind that a new PEFT adds must first be tested."""
    text = PAGE.read_text(encoding="utf-8").split("## Every kind")[1]
    names = {kind.split(",")[0] for kind in KINDS} | {kind.value for kind in OUTSIDE}
    assert [name for name in sorted(names) if name not in text] == []


def test_a_missing_folder_is_refused_without_a_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()  # an owner's other models may be in a folder of that name
    monkeypatch.setattr(model_files, "cached_file", None)  # a request would fail
    for name in ("./none", "a/b/c", str(tmp_path / "none"), "~/none"):
        with pytest.raises(ValueError, match=f"there is no folder {name}. Pass a folder"):
            merging.adapter_base(name)
    merging.check_folder("owner/name")  # a name on the Hub
    merging.check_folder("gpt2")
