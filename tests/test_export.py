"""`python -m realign.export`: the merged folder against the adapter under PEFT, and its card."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import arguments
from transformers import AutoModelForImageTextToText

from realign import export
from realign.config import parse
from realign.digits import ASSETS
from realign.train import train

RATES = {"hallucination_rate": {"value": 0.113, "low": 0.106, "high": 0.12}}


@pytest.fixture(scope="module")
def adapter(pairs_file, tmp_path_factory):
    """A trained adapter, whose weights differ from the base's by more than rounding."""
    output = tmp_path_factory.mktemp("run") / "run"
    train(parse(arguments(pairs_file, output, "--learning-rate", "1e-2", steps=3)))
    return output / "model"


@pytest.mark.parametrize(
    ("dtype", "close"), [("fp32", 1e-6), ("bf16", 2**-8), (None, 2**-8)]
)  # the digits base is kept in bf16
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
    # An adapter that changes nothing would pass as well.
    assert max(float((truth[n] - plain[n]).abs().max()) for n in plain) > 1e-2

    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "| hallucination rate | 11.3 % [10.6, 12.0] |" in card.text
    assert card.text.index("## Evaluation") < card.text.index("## Versions")
    assert "| objective | rdpo |" in card.text and "PeftModel" not in card.text
    assert not list(tmp_path.glob(".*partial"))


def test_the_adapter_of_another_trainer_loses_its_card(adapter, tmp_path, capsys):
    """PEFT writes a card of its own, which goes on speaking of an adapter."""
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(ASSETS), adapter)
    model.save_pretrained(tmp_path / "foreign")
    words = ["--model", str(tmp_path / "foreign"), "--output", str(tmp_path / "merged")]
    assert export.main(words) == 0
    assert not (tmp_path / "merged" / "README.md").exists()
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    (tmp_path / "metrics.json").write_text(json.dumps(RATES))
    again = ["--output", str(tmp_path / "again"), "--metrics", str(tmp_path / "metrics.json")]
    assert export.main([*words[:2], *again]) == 1
    assert "has no model card of ours" in capsys.readouterr().err


def test_what_cannot_be_exported_is_told_and_nothing_written(adapter, tmp_path, capsys):
    def refused(*words):
        assert export.main(words) == 1
        return capsys.readouterr().err

    target = tmp_path / "merged"
    assert "--output is missing" in refused("--model", str(adapter))
    assert "--model is missing" in refused("--output", str(target))
    to = ("--model", str(adapter), "--output", str(target))
    assert "dtype is 'fp8'" in refused(*to, "--dtype", "fp8")
    bad = tmp_path / "bad.json"
    assert "realign.evaluate --output writes it" in refused(*to, "--metrics", str(bad))
    bad.write_text('{"f1": 0.5}')
    assert "holds no rates" in refused(*to, "--metrics", str(bad))
    good = tmp_path / "good.json"
    good.write_text(json.dumps(RATES))
    no_card = ("--model", str(ASSETS), "--output", str(target), "--metrics", str(good))
    assert "has no model card" in refused(*no_card)
    assert not target.exists() and not list(tmp_path.glob(".*partial"))
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    assert "not empty" in refused(*to)
    assert (target / "thesis.tex").read_text() == "mine"
