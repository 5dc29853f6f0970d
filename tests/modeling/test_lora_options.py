"""Layers of LoRA by name, dropout, rsLoRA and DoRA: formulas by hand, stock PEFT, and refusals."""

import re

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from test_lora_targets import randomized, score
from tiny_vlms import make
from torch import nn
from transformers import AutoModelForImageTextToText

from realign.digits import ASSETS
from realign.modeling import quantized
from realign.modeling.loading import add_lora, load_model, load_trained

RANK, ALPHA = 4, 24
IDS = torch.randint(5, 30, (2, 9), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "dropout": {"dropout": 0.3},
    "rsLoRA": {"rslora": True},
    "DoRA": {"dora": True},
    "all": {"dropout": 0.3, "rslora": True, "dora": True},
}


def adapted_names(vlm):
    """Names of the layers with LoRA, without PEFT's parts."""
    names = (n for n, m in vlm.named_modules() if isinstance(m, LoraLayer))
    return {name.replace(".base_layer", "") for name in names}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj,v_proj", r"model\.language_model\..*\.[qv]_proj"),  # the tower has them, too
        ("layers.0.mlp.down_proj, o_proj", r"model\.language_model\..*(0\.mlp\.down_proj|o_proj)"),
        ("out_proj", r"model\.vision_tower\..*\.out_proj"),
        ("q_proj,multi_modal_projector.linear_1", r"model\.language_model\..*q_proj|.*linear_1"),
        (r".*\.layers\.[12]\..*q_proj", r".*\.layers\.[12]\..*q_proj"),
        ("all-linear", r"model\.language_model\..*_proj"),
    ],
)
def test_layers_are_chosen_by_names_or_an_expression(targets, expected, tmp_path):
    """In lists, a name of the language model is not searched elsewhere. PEFT loads the result."""
    vlm = load_model(ASSETS)
    linear = {n for n, m in vlm.named_modules() if isinstance(m, nn.Linear)}
    wanted = {name for name in linear if re.fullmatch(expected, name)}
    adapted = randomized(add_lora(vlm, RANK, ALPHA, targets=targets))
    assert adapted_names(vlm) == wanted and wanted
    found = score(vlm, IDS)
    adapted.save_pretrained(tmp_path)
    fresh = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
    assert adapted_names(PeftModel.from_pretrained(fresh, tmp_path).base_model.model) == wanted
    assert (score(load_model(tmp_path), IDS) - found).abs().max() < 1e-4


@pytest.mark.parametrize("targets", ["q_proj,nope", "nope", r".*\.nope|q_proj"])
def test_an_unknown_name_lists_the_layers(targets):
    with pytest.raises(ValueError, match=r"nope") as refused:
        add_lora(load_model(ASSETS), RANK, ALPHA, targets=targets)
    text = str(refused.value)
    assert "language model: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj." in text
    assert "Elsewhere: fc1, fc2, k_proj, linear_1, linear_2, lm_head, out_proj" in text


def test_experts_are_chosen_by_name_and_refuse_dropout_and_dora():
    vlm, _ = make("qwen3_vl_moe")
    add_lora(vlm, RANK, ALPHA, targets="q_proj,experts.down_proj")
    names = adapted_names(vlm)
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "experts"}
    assert sum("down_proj" in n for n, p in vlm.named_parameters() if "lora_A" in n) == 0
    for options, flag in (({"dora": True}, "--use-dora"), ({"dropout": 0.1}, "--lora-dropout")):
        message = rf"{flag} does not work on fused experts.*--lora-targets k_proj,o_proj,q_proj"
        with pytest.raises(ValueError, match=message):
            add_lora(make("qwen3_vl_moe")[0], RANK, ALPHA, **options)
        add_lora(make("qwen3_vl_moe")[0], RANK, ALPHA, targets="q_proj", **options)
    with pytest.raises(ValueError, match="--use-dora does not work on the output head"):
        add_lora(load_model(ASSETS), RANK, ALPHA, targets="q_proj,lm_head", dora=True)
    with pytest.raises(ValueError, match="adapts model.multi_modal_projector.linear_1, which --pr"):
        options = {"targets": "linear_1", "save": ["model.multi_modal_projector"]}
        add_lora(load_model(ASSETS), RANK, ALPHA, **options)


def test_rslora_scales_experts_like_linear_layers():
    """alpha / sqrt(rank) in each layer, though an expert has half the rank."""
    vlm, _ = make("qwen3_vl_moe")
    add_lora(vlm, 8, ALPHA, rslora=True)
    layers = [m for m in vlm.modules() if isinstance(m, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {8, 4}
    scales = [layer.scaling["default"] for layer in layers]
    assert scales == pytest.approx([ALPHA / 8**0.5] * len(layers))


def by_hand(vlm, options):
    """A plain model whose weights have the formulas of LoRA, rsLoRA and DoRA."""
    plain, state = load_model(ASSETS), dict(vlm.named_parameters())
    scale = ALPHA / (RANK**0.5 if options.get("rslora") else RANK)
    with torch.no_grad():
        for name in adapted_names(vlm):
            layer = plain.get_submodule(name)
            a, b = (state[f"{name}.lora_{k}.default.weight"] for k in "AB")
            layer.weight += scale * b @ a
            if options.get("dora"):
                size = layer.weight.pow(2).sum(1).sqrt()
                magnitude = state[f"{name}.lora_magnitude_vector.default.weight"]
                layer.weight *= (magnitude / size)[:, None]
    return plain


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_its_formula_and_is_read_by_peft(variant, tmp_path):
    options = VARIANTS[variant]
    vlm = load_model(ASSETS).eval()
    base = score(vlm, IDS)
    adapted = add_lora(vlm, RANK, ALPHA, **options).eval()
    assert (score(vlm, IDS) - base).abs().max() < 1e-4  # no change before the first step
    randomized(adapted)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "magnitude" in name:
                value *= 1 + 0.2 * torch.rand_like(value)
        found = score(vlm, IDS)
        adapted.save_pretrained(tmp_path)
        fresh = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
        for model in (
            by_hand(vlm, options),
            PeftModel.from_pretrained(fresh, tmp_path),
            load_trained(tmp_path),
            load_model(tmp_path),  # merged
        ):
            assert (score(model, IDS) - found).abs().max() < 1e-3 < 0.1 < (found - base).abs().max()
    adapted.train()
    drops = (score(vlm, IDS) - found).abs().max() > 1e-2
    assert drops == ("dropout" in options)


@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_variants_on_quantized_weights_equal_those_on_dequantized_ones(method):
    """Dropout draws the same masks on both."""
    vlm = load_model(ASSETS, quantize=method)
    plain = load_model(ASSETS)
    with torch.no_grad():
        for name, layer in vlm.named_modules():
            if quantized.is_quantized(layer):
                weight = quantized.dequantized(layer, torch.float32)
                plain.get_submodule(name).weight.copy_(weight)
    results = []
    for model in (vlm, plain):
        torch.manual_seed(1)
        randomized(add_lora(model, RANK, ALPHA, **VARIANTS["all"])).train()
        torch.manual_seed(2)
        out = score(model, IDS)
        out[..., 3].sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) > 60
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))
