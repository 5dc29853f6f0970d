"""Training with --quantize: the same bits after a resume, and export into the plain base."""

import json
import shutil
import signal

import pytest
import torch
from peft import PeftModel
from runs import arguments, assert_same_run, run
from test_resume import Signalled
from transformers import AutoModelForImageTextToText

from realign import cache
from realign.config import QUANTIZE, parse
from realign.digits import ASSETS
from realign.modeling import quantized
from realign.modeling.loading import load_model
from realign.train import main
from realign.training.dry_run import Plan


@pytest.fixture(scope="module", params=QUANTIZE)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def finished(method, pairs_file, tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp(f"quantized-{method}")
    given = ("--quantize", method, "--save-every", 2, "--learning-rate", 1e-3, "--merge")
    entries = run(pairs_file, output, *given)
    assert entries[0]["rewards/margins"] == 0  # policy and reference are the same model
    assert entries[-1]["loss"] < entries[0]["loss"]
    return output


def test_a_stopped_run_resumes_with_the_same_bits(
    method, finished, pairs_file, tmp_path, monkeypatch
):
    more = ("--save-every", 2, "--learning-rate", 1e-3, "--merge")
    given = arguments(pairs_file, tmp_path, "--quantize", method, *more)
    Signalled(monkeypatch, 3, signal.SIGTERM)
    assert main(given) == 0
    for words, change in [
        ([], f"quantize ('{method}' -> None)"),
        (["--quantize", "8bit" if method == "4bit" else "4bit"], f"quantize ('{method}' -> "),
    ]:
        with pytest.raises(ValueError, match="different settings") as refused:
            run(pairs_file, tmp_path, *words, *more, "--resume")
        assert change in str(refused.value)
    assert main([*given, "--resume"]) == 0
    assert_same_run(tmp_path, finished)


def test_the_adapter_is_merged_into_the_base_without_quantization(
    method, finished, pairs_file, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    given = ["--quantize", method, "--save-every", 2, "--learning-rate", 1e-3]
    assert main([*arguments(pairs_file, tmp_path / "again", *given), "--resume"]) == 0
    adapter = tmp_path / "again" / "model"
    assert "was merged" not in capsys.readouterr().out
    assert f"| base while training | quantized to {method} |" in (adapter / "README.md").read_text()
    base = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
    truth = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    merged = AutoModelForImageTextToText.from_pretrained(finished / "model")
    assert merged.dtype == torch.bfloat16 and not hasattr(merged, "hf_quantizer")
    assert "quantization_config" not in json.loads((finished / "model/config.json").read_text())
    for name, value in merged.state_dict().items():
        assert torch.allclose(value.float(), truth[name], rtol=2**-8, atol=1e-6), name
    plain = load_model(ASSETS).state_dict()
    assert max((truth[name] - plain[name]).abs().max() for name in plain) > 1e-3


def test_the_cache_command_fills_what_training_reads(pairs_file, tmp_path, capsys):
    method = "4bit"
    words = ["--pairs", str(pairs_file), "--reference-cache", str(tmp_path / "cache")]
    words += ["--quantize", method, "--dtype", "fp32", "--quiet"]
    assert cache.main(["fill", *words]) == 0
    capsys.readouterr()
    given = [*arguments(pairs_file, tmp_path / "run", steps=1), *words[2:]]
    assert main([*given, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    distinct = plan.split("references")[1].split()[0]
    assert f"{distinct} distinct leaves, {distinct} of them known" in plan
    assert main(given) == 0
    out = capsys.readouterr().out
    total = out.split(" leaves known")[0].split()[-1]
    assert f"{total} of {total} leaves known" in out
    assert f"the language model is quantized: {method} for 100.0% of" in out


def test_the_plan_counts_quantized_weights(pairs_file, tmp_path):
    words = arguments(pairs_file, tmp_path, "--dtype", "bf16")
    plain = Plan(parse(words), pairs_file).memory_parts()
    whole = sum(p.nbytes for p in load_model(ASSETS, torch.bfloat16).parameters())
    for method, bytes_of_a_weight in (("4bit", 2), ("8bit", 6)):
        found = Plan(parse([*words, "--quantize", method]), pairs_file).memory_parts()
        vlm = load_model(ASSETS, torch.bfloat16, quantize=method)
        stored = sum(p.nbytes for p in vlm.parameters())
        scales = quantized.scales(vlm).items()
        stored += sum(t.nbytes for name, t in scales if name.endswith(("absmax", "SCB")))
        assert found["weights"] == pytest.approx(stored + plain["weights"] - whole, rel=0.01)
        assert found["dequantized weight"] == 128 * 256 * bytes_of_a_weight
        assert found["activations, gradients"] == plain["activations, gradients"]
