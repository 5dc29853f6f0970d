"""`python -m realign.export`: the merged folder against the adapter under PEFT, and its card."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import arguments
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from realign import export
from realign.config import parse
from realign.digits import ASSETS
from realign.modeling.loading import load_model, load_processor
from realign.train import train
from realign.training import export as training_export
from realign.training.export import export_whole

RATES = {"hallucination_rate": {"value": 0.113, "low": 0.106, "high": 0.12}}


@pytest.fixture(scope="module")
def adapter(pairs_file, tmp_path_factory):
    """A trained adapter, whose weights differ from the base's by more than rounding."""
    output = tmp_path_factory.mktemp("run") / "run"
    train(parse(arguments(pairs_file, output, "--learning-rate", "1e-2", steps=3)))
    return output / "model"


@pytest.mark.parametrize(
    ("dtype", "close"), [("fp32", 1e-6), ("bf16", 2**-8), (None, 2**-8)]
)  # the digits base is stored in bf16
def test_a_merged_folder_is_the_adapter_under_peft(adapter, tmp_path, dtype, close, capsys):
    metrics, folder = tmp_path / "metrics.json", tmp_path / "merged"
    metrics.write_text(json.dumps(RATES))
    words = ["--model", str(adapter), "--output", str(folder), "--metrics", str(metrics)]
    assert export.main(words + (["--dtype", dtype] if dtype else [])) == 0
    assert f"wrote {folder}" in capsys.readouterr().out
    kept = AutoModelForImageTextToText.from_pretrained(folder)
    assert kept.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    base = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    truth = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    for name, value in kept.state_dict().items():
        assert torch.allclose(value.float(), truth[name], rtol=close, atol=1e-6), name
    # Without this, an adapter without effect would pass.
    assert max(float((truth[n] - plain[n]).abs().max()) for n in plain) > 1e-2

    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "| hallucination rate | 11.3 % [10.6, 12.0] |" in card.text
    assert card.text.index("## Evaluation") < card.text.index("## Versions")
    assert "| objective | rdpo |" in card.text and "PeftModel" not in card.text
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_run_keeps_the_dtype_of_its_base(adapter, pairs_file, tmp_path, dtype):
    """The compute dtype has no effect, and exporting the run's adapter gives the same model."""
    base, run = tmp_path / "base", tmp_path / "run"
    load_model(ASSETS, dtype).save_pretrained(base)
    load_processor(ASSETS).save_pretrained(base)
    computed = "bf16" if dtype == torch.float32 else "fp32"
    flags = ["--model", str(base), "--learning-rate", "1e-2", "--dtype", computed, "--merge"]
    train(parse(arguments(pairs_file, run, *flags, steps=3)))
    kept = load_file(run / "model" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {dtype}
    if computed == "fp32":  # as the adapter was
        words = ["--model", str(adapter), "--output", str(tmp_path / "exported")]
        assert export.main(words) == 0
        exported = load_file(tmp_path / "exported" / "model.safetensors")
        assert exported.keys() == kept.keys()
        for name, value in exported.items():
            assert torch.allclose(value.float(), kept[name].float(), rtol=2**-7, atol=1e-6), name


FIGURES = [
    (
        {"POPE": [{"file": "random", "rule": "word", "questions": 8, "accuracy": 0.5, "F1": 0.4}]},
        """POPE:

| file | rule | questions | accuracy | F1 |
| --- | --- | --- | --- | --- |
| random | word | 8 | 50.00 % | 40.00 % |""",
    ),
    (
        {
            "MME": [
                {"rule": "word", "group": "cognition", "score": 290.123, "accuracy": None},
                {"rule": "word", "group": "code_reasoning", "score": 55.0, "accuracy": 0.125},
            ],
            "CHAIR": [{"captions": 4, "CHAIR-s": float("nan")}],
        },
        """MME:

| rule | group | score | accuracy |
| --- | --- | --- | --- |
| word | cognition | 290.12 |  |
| word | code_reasoning | 55.00 | 12.50 % |

CHAIR:

| captions | CHAIR-s |
| --- | --- |
| 4 | nan % |""",
    ),
]


@pytest.mark.parametrize(("scores", "shown"), FIGURES, ids=["one", "several"])
def test_benchmark_figures_in_a_card(tmp_path, scores, shown):
    file = tmp_path / "figures.json"
    file.write_text(json.dumps({"model": "runs/rdpo/model", "scores": {"parts": scores}}))
    assert export.evaluation_of(file) == shown


def test_the_current_folder_is_not_replaced(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for output in (".", str(tmp_path)):
        assert export.main(["--model", str(adapter), "--output", output]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: --output is {output!r}, the current folder")
        assert "./merged" in printed
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(".*partial"))


def test_the_adapter_of_another_trainer_loses_its_card(adapter, tmp_path, capsys):
    """PEFT's own card describes an adapter, so it is not kept."""
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(ASSETS), adapter)
    model.save_pretrained(tmp_path / "foreign")
    words = ["--model", str(tmp_path / "foreign"), "--output", str(tmp_path / "merged")]
    assert export.main(words) == 0
    assert not (tmp_path / "merged" / "README.md").exists()
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    (tmp_path / "metrics.json").write_text(json.dumps(RATES))
    again = ["--output", str(tmp_path / "again"), "--metrics", str(tmp_path / "metrics.json")]
    assert export.main([*words[:2], *again]) == 1
    assert "has no model card of this project" in capsys.readouterr().err


def test_a_missing_card_is_reported(adapter, tmp_path, capsys):
    export_to = ["--output", str(tmp_path / "plain")]
    assert export.main(["--model", str(ASSETS), *export_to]) == 0
    line = f"{tmp_path / 'plain'} has no model card: {ASSETS} has none\n"
    assert line in capsys.readouterr().out
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    (foreign / "README.md").write_text("---\nlibrary_name: peft\n---\n# Mine\n")
    assert export.main(["--model", str(foreign), "--output", str(tmp_path / "merged")]) == 0
    assert "is by another trainer and describes an adapter\n" in capsys.readouterr().out
    assert export.main(["--model", str(adapter), "--output", str(tmp_path / "own")]) == 0
    assert "no model card" not in capsys.readouterr().out


def test_the_card_is_kept_from_windows_and_from_the_hub(adapter, tmp_path, monkeypatch):
    def card_of(model, name):
        export_whole(model, tmp_path / name)
        return (tmp_path / name / "README.md").read_text()

    expected = card_of(str(adapter), "plain")
    assert "library_name: transformers" in expected and "PeftModel" not in expected
    windows = shutil.copytree(adapter, tmp_path / "windows")
    text = (adapter / "README.md").read_bytes()
    (windows / "README.md").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert card_of(str(windows), "converted") == expected
    cached = {("team/windows", "README.md"): str(windows / "README.md")}
    monkeypatch.setattr(training_export, "find_file", lambda *asked: cached[asked])
    assert training_export.read_card("team/windows").encode() == text


def test_metrics_replace_the_earlier_ones(adapter, tmp_path):
    model, file = str(adapter), tmp_path / "metrics.json"
    for name, value in (("first", 0.5), ("second", 0.25), ("third", 0.25)):
        file.write_text(json.dumps({"rate": {"value": value, "low": 0, "high": 1}}))
        to = ["--output", str(tmp_path / name), "--metrics", str(file)]
        assert export.main(["--model", model, *to]) == 0
        model = str(tmp_path / name)
    card = (tmp_path / "third" / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and "| rate | 25.0 %" in card and "50.0 %" not in card
    assert card == (tmp_path / "second" / "README.md").read_text()
    first = (tmp_path / "first" / "README.md").read_text()
    assert card == first.replace("50.0 %", "25.0 %")


def test_an_export_removes_no_folder_but_its_own(tmp_path, monkeypatch):
    mine = tmp_path / ".merged.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    export_whole(str(ASSETS), tmp_path / "merged")
    assert (mine / "thesis.tex").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".merged.partial", "merged"]
    target = tmp_path / "raced"

    def load(model):
        """Another export of the same name ends during this one."""
        monkeypatch.undo()
        export_whole(model, target)
        (target / "first").touch()
        return load_model(model)

    monkeypatch.setattr(training_export, "load_model", load)
    with pytest.raises(ValueError, match="another process wrote files to"):
        export_whole(str(ASSETS), target)
    assert (target / "first").exists() and (target / "model.safetensors").exists()
    assert not list(tmp_path.glob(".raced*"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export_whole(str(ASSETS), tmp_path / "link")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_invalid_exports_are_reported_and_write_nothing(adapter, tmp_path, capsys):
    def refused(*words):
        assert export.main(words) == 1
        return capsys.readouterr().err

    target = tmp_path / "merged"
    assert "--output is missing" in refused("--model", str(adapter))
    assert "--model is missing" in refused("--output", str(target))
    to = ("--model", str(adapter), "--output", str(target))
    assert "dtype is 'fp8'" in refused(*to, "--dtype", "fp8")
    bad = tmp_path / "bad.json"
    assert "Run realign.evaluate with --output" in refused(*to, "--metrics", str(bad))
    for text in (
        '{"f1": 0.5}',
        "{}",
        "[1]",
        '{"scores": {}}',
        '{"scores": {"word": {"f1": 1}}}',
        '{"scores": {"parts": {"x": []}}}',
        '{"scores": {"parts": {"x": [{"a": 1}, {"b": 1}]}}}',
    ):
        bad.write_text(text)
        printed = refused(*to, "--metrics", str(bad))
        assert "holds no figures" in printed and "such as pope.json" in printed
    good = tmp_path / "good.json"
    good.write_text(json.dumps(RATES))
    no_card = ("--model", str(ASSETS), "--output", str(target), "--metrics", str(good))
    assert "has no model card" in refused(*no_card)
    assert not target.exists() and not list(tmp_path.glob(".*partial"))
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    assert "not empty" in refused(*to)
    assert (target / "thesis.tex").read_text() == "mine"
