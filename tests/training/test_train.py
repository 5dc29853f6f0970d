"""Training: equal curves for equivalent settings, and errors before the first step."""

import shutil

import numpy as np
import pytest
from runs import CURVE_TOLERANCE, arguments, curve, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
)

from realign.config import parse
from realign.data.records import write_pairs
from realign.digits import ASSETS
from realign.modeling.loading import load_processor
from realign.train import main
from realign.training.schedule import learning_rate


@pytest.fixture(scope="module")
def plain(pairs_file, tmp_path_factory):
    """An uninterrupted run in one process: its folder and curve."""
    output = tmp_path_factory.mktemp("plain")
    return output, run(pairs_file, output, "--save-every", 2)


def test_accumulation_and_row_length_change_nothing(pairs_file, plain, tmp_path):
    entries = run(pairs_file, tmp_path, "--micro-batch-size", 3, "--row-tokens", 200)
    assert np.abs(curve(entries) - curve(plain[1])).max() < CURVE_TOLERANCE


def test_the_first_step_against_the_formula(pairs_file, plain):
    """At the reference all rewards are 0, so each of rDPO's two terms has the loss ln 2."""
    first = plain[1][0]
    assert first["loss"] == pytest.approx(2 * np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["learning_rate"] == pytest.approx(5e-5)
    last = plain[1][-1]
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], abs=1e-9
    )
    assert last["rewards/visual_margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/visual"], abs=1e-9
    )


def test_an_adapter_finds_its_base_from_anywhere(pairs_file, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(ASSETS)
    monkeypatch.chdir(tmp_path)
    run(pairs_file, tmp_path / "run", "--model", "base", steps=1)
    monkeypatch.chdir("/")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")


def test_bf16_follows_fp32(pairs_file, plain, tmp_path):
    entries = run(pairs_file, tmp_path / "plain", "--dtype", "bf16")
    # bf16 has 8 bits: log-probs near -30 are off by up to 0.2, times beta 0.1.
    assert np.abs(curve(entries) - curve(plain[1])).max() < 0.03


@pytest.mark.parametrize("name", ["dpo", "mdpo"])
def test_other_objectives_train(pairs_file, tmp_path, name):
    entries = run(pairs_file, tmp_path, "--objective", name, steps=2)
    terms = {"dpo": 1, "mdpo": 3}[name]
    assert entries[0]["loss"] == pytest.approx(terms * np.log(2), abs=1e-6)
    assert ("rewards/visual" in entries[0]) == (name == "mdpo")


def test_learning_rate_warms_up_and_falls():
    config = parse(["--learning-rate", "2", "--warmup", "0.1"])
    rates = [learning_rate(step, 100, config.optim) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10 * 2)
    assert rates[10:] == pytest.approx(1 + np.cos(np.pi * np.arange(90) / 90))


# --- bad input ---


def broken_model(folder, edit):
    """A copy of the digits model with edited weights."""
    shutil.copytree(ASSETS, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_finite_are_an_error_before_any_step(pairs_file, tmp_path):
    def edit(weights):
        weights[next(k for k in weights if k.endswith("model.norm.weight"))][0] = float("nan")

    model = broken_model(tmp_path / "nan", edit)
    with pytest.raises(ValueError, match="of a plain forward are NaN or infinite. Check the model"):
        run(pairs_file, tmp_path / "out", "--model", model)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def text_only(folder):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    load_processor(ASSETS).tokenizer.save_pretrained(folder)
    return folder


def test_settings_and_models_that_cannot_be_trained(pairs_file, tmp_path, capsys):
    """A plan reports the same errors."""
    empty = tmp_path / "empty.parquet"
    write_pairs(empty, [])
    cases = [
        (["--model", text_only(tmp_path / "llama")], "text-only model"),
        (["--model", tmp_path / "nowhere"], "there is no folder"),
        (["--objective", "kto"], "objective is 'kto'; it must be one of dpo, rdpo, mdpo"),
        (["--max-response-tokens", "5"], r"chosen response has 17 tokens; the limit is 5"),
        (["--pairs", tmp_path / "none.parquet"], "there is nothing at"),
        (["--pairs", empty], "holds no records"),
        (["--cpu-offload"], "--cpu-offload would have no effect: there is no GPU"),
        (["--attention", "flex"], "--attention is 'flex', whose kernels have a backward on CUDA"),
    ]
    ranks = ["--fsdp", "--nproc-per-node", "2", "--dry-run"]
    planned = [
        ([*ranks, "--batch-size", "7"], "--batch-size 7 does not divide among 2 ranks"),
        ([*ranks, "--replicas", "3"], "--replicas is 3, which does not divide 2"),
    ]
    planned += [([*more, "--dry-run"], message) for more, message in cases]
    capsys.readouterr()
    for more, message in [*cases, *planned]:
        output = tmp_path / "out"
        assert main(arguments(pairs_file, output, *more)) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and shown.count("\n") == 1
        assert message in shown
        assert not (output / "metrics.jsonl").exists()
