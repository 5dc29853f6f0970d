"""Quantized base weights: values, gradients and the layers kept whole, against bitsandbytes."""

import importlib.util

import bitsandbytes as bnb
import pytest
import torch
from runs import encoded
from test_forest import LOGP_TOLERANCE, separate_logps
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from realign.cache import FillConfig
from realign.config import QUANTIZE, parse
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.modeling import quantized
from realign.modeling.forest import build_batch
from realign.modeling.loading import (
    adapters_off,
    add_lora,
    check_unquantized,
    load_model,
    load_processor,
)
from realign.modeling.merging import adapter_base
from realign.modeling.model import ForestModel
from realign.modeling.reference_logps import description, fingerprint, weights_digest
from realign_kernels import objectives

CPU = torch.device("cpu")


def rounded(weight: torch.Tensor, method: str) -> torch.Tensor:
    """A weight after quantization by bitsandbytes: NF4, or int8 per row, from fp16."""
    if method == "4bit":
        packed, state = bnb.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True
        )
        return bnb.functional.dequantize_4bit(packed, state)
    whole, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    return whole * (scale / 127)[:, None]


def dequantized_model(method: str, dtype=torch.float32):
    """The plain model with the weights that quantization leaves."""
    vlm = load_model(ASSETS, dtype, "sdpa")
    for layer in vlm.model.language_model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = rounded(layer.weight.data, method).to(dtype)
    return vlm


@pytest.fixture(scope="module", params=QUANTIZE)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def data(pairs_file):
    return encoded(read_pairs(pairs_file)[:4])


def test_log_probs_are_those_of_the_dequantized_weights(method, data):
    examples, store = data
    model = ForestModel(load_model(ASSETS, quantize=method)).eval()
    batch = build_batch(examples, store, row_tokens=100)
    with torch.no_grad():
        found = batch.leaf_sums(model.logps(batch))
        truth = separate_logps(dequantized_model(method), examples, store)
        plain = separate_logps(load_model(ASSETS), examples, store)
    assert (found - truth).abs().max() < LOGP_TOLERANCE
    assert (found - plain).abs().max() > 20 * LOGP_TOLERANCE  # so the rounding shows


def test_a_log_prob_is_the_same_beside_any_others(method, data):
    """bitsandbytes' own int8 product depends on outliers of the whole batch."""
    examples, store = data
    model = ForestModel(load_model(ASSETS, quantize=method)).eval()
    sums = []
    with torch.no_grad():
        for part in (examples, examples[:1]):
            batch = build_batch(part, store, row_tokens=100)
            sums.append(batch.leaf_sums(model.logps(batch))[:, 0])
    assert (sums[0] - sums[1]).abs().max() < LOGP_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_lora_are_those_of_the_dequantized_weights(method, data, dtype):
    examples, store = data
    objective, grads, adapters_without = objectives.rdpo(), [], []
    for vlm in (load_model(ASSETS, dtype, quantize=method), dequantized_model(method, dtype)):
        model = ForestModel(vlm, dtype=dtype)
        torch.manual_seed(0)
        add_lora(vlm, 4, 8)
        for name, value in vlm.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.05)
        batch = build_batch(examples, store, row_tokens=100)
        model.train()  # bitsandbytes repacks weights in evaluation on some CPUs
        reference = torch.full((3, len(examples)), -20.0)
        model(batch, objective, reference).loss.backward()
        grads.append([p.grad.float() for p in vlm.parameters() if p.grad is not None])
        with adapters_off(vlm), torch.no_grad():
            adapters_without.append(model.eval().logps(batch))
    assert len(grads[0]) == len(grads[1]) == 2 * 7 * 4
    bound = 1e-4 if dtype == torch.float32 else 0.06
    for ours, true in zip(*grads, strict=True):
        assert (ours - true).norm() <= bound * true.norm()
    assert torch.allclose(*adapters_without, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_evaluation_before_training_keeps_the_gradient(method):
    layer = load_model(ASSETS, quantize=method).model.language_model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True
    x = torch.randn(5, 128)
    with torch.no_grad():
        before = layer.eval()(x)
    x.requires_grad_()
    out = layer.train()(x)
    assert torch.equal(out, before)
    (grad,) = torch.autograd.grad(out.sum(), x)
    weight = quantized.dequantized(layer, torch.float32)
    assert torch.allclose(grad, weight.sum(0).expand(5, -1), atol=1e-5)


def test_the_backward_keeps_no_dequantized_weight(method):
    vlm = load_model(ASSETS, torch.bfloat16, quantize=method)
    layer = add_lora(vlm, 4, 8).base_model.model.model.language_model.layers[0].mlp.up_proj
    saved = []
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert max(t.numel() for t in saved) <= 4 * 256  # B, and neither the weight nor its copy
    assert {t.dtype for t in saved} == {torch.bfloat16}  # PEFT's forward keeps the input in fp32


def test_only_linear_layers_of_the_language_model_are_quantized(method):
    vlm = load_model(ASSETS, torch.bfloat16, quantize=method)
    plain = load_model(ASSETS, torch.bfloat16)
    found = {name for name, m in vlm.named_modules() if quantized.is_quantized(m)}
    assert found == {
        name
        for name, m in plain.named_modules()
        if isinstance(m, nn.Linear) and name.startswith("model.language_model.")
    }
    assert len(quantized.linears(plain)) == len(found) == 28
    assert vlm.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(vlm.lm_head.weight, plain.lm_head.weight)
    assert quantized.summary(vlm, method) == f"{method} for 100.0% of the weights in its layers"
    scales = quantized.scales(vlm)
    weights = [p.numel() for p in map(lambda m: m.weight, quantized.linears(plain))]
    stored = sum(p.nbytes for n, p in vlm.named_parameters() if n.removesuffix(".weight") in found)
    kept = ("absmax", "SCB")  # the rest is a table or a description of the same size for any layer
    stored += sum(t.nbytes for name, t in scales.items() if name.endswith(kept))
    assert quantized.stored_bytes(sum(weights), method) == pytest.approx(stored, rel=0.04)


def test_fingerprints_differ_and_the_dry_run_knows_them():
    processor, seen = load_processor(ASSETS), []
    plain = load_model(ASSETS)
    meta = load_model(ASSETS, meta=True)
    for method in (None, *QUANTIZE):
        vlm = load_model(ASSETS, quantize=method)
        parts = fingerprint(vlm, processor, torch.float32, CPU, quantize=method)
        planned = description(meta, processor, torch.float32, CPU, quantize=method)
        assert {k: v for k, v in parts.items() if k != "weights"} == planned
        seen.append(parts)
    assert "quantize" not in seen[0]
    assert seen[1]["quantize"] == f"4bit: nf4, double quantization, bitsandbytes {bnb.__version__}"
    assert len({parts["weights"] for parts in seen}) == 3
    assert len({parts.get("quantize") for parts in seen}) == 3
    vlm = load_model(ASSETS, quantize="4bit")
    layer = vlm.model.language_model.layers[0].self_attn.q_proj
    layer.weight.quant_state.state2.absmax *= 2  # a scale of the scales, in no state dict
    assert weights_digest(vlm) not in (seen[1]["weights"], weights_digest(plain))


def test_quantization_that_cannot_be_trained_is_named(tmp_path, monkeypatch):
    for words, message in [
        (["--quantize", "2bit"], "^--quantize is '2bit'; it must be one of 4bit, 8bit"),
        (["--quantize", "4bit", "--tune", "full"], "stay frozen, and --tune full trains"),
        (["--quantize", "4bit", "--fsdp"], "works in one process, since --fsdp"),
        (["--quantize", "4bit", "--compile"], "--compile cannot trace the layers that --quantize"),
        (["--quantize", "8bit", "--cpu-offload"], "--cpu-offload cannot shard or move"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(words)
    with pytest.raises(ValueError, match="--fsdp"):
        FillConfig(pairs="x", quantize="4bit", fsdp=True)
    load_model(ASSETS, quantize="4bit").save_pretrained(tmp_path / "stored")
    with pytest.raises(ValueError, match="are stored quantized .bitsandbytes."):
        check_unquantized(tmp_path / "stored", None)
    check_unquantized(ASSETS, "4bit")
    adapter = tmp_path / "adapter"
    add_lora(load_model(ASSETS), 2, 2).save_pretrained(adapter)
    assert adapter_base(adapter)
    with pytest.raises(ValueError, match="is an adapter, and merging it needs the weights that"):
        load_model(adapter, quantize="4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed. Run `pip install 'realign.quantize.'`"):
        parse(["--quantize", "4bit"])
