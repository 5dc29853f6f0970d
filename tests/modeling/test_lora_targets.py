"""LoRA on fused experts: exact, on all layers, through training, resuming and export."""

import copy
import shutil

import pytest
import torch
from family_cases import made
from forked_ranks import run_command, run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from runs import assert_same_run, curve, weights
from tiny_vlms import _llava, _text, make
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.integrations import moe

from realign import export
from realign.config import parse
from realign.data.records import write_pairs
from realign.files import read_jsonl
from realign.modeling import lora_experts, lora_targets
from realign.modeling.loading import adapters_off, add_lora, load_model, load_trained
from realign.train import train

RANK, ALPHA, ACTIVE = 8, 24, 2
NAMES = (
    "qwen3_vl_moe", "qwen3_5_moe", "internvl-qwen3_moe", "internvl-gpt_oss", "glm4v_moe",
    "gemma4-moe", "kimi_k25", "ernie4_5_vl_moe", "aria",
)  # fmt: skip
IDS = torch.randint(20, 30, (2, 12), generator=torch.Generator().manual_seed(0))
FUSED = ("gate_up_proj", "down_proj")


def randomized(adapted):
    """The adapters with random factors B, which PEFT sets to zero."""
    torch.manual_seed(0)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    return adapted


def factors_of(adapted):
    """name of a base weight -> its factors A and B, from the names of PEFT's state dict."""
    found = {}
    for name, value in adapted.named_parameters():
        if ".lora_" in name:
            place, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
            found.setdefault(place, {})[kind[0]] = value
    named = {}
    for place, pair in found.items():
        if place.endswith("experts"):  # the outer wrapper is that of the first parameter by name
            place += ".down_proj" if f"{place}.base_layer" in found else ".weight"
        elif place.endswith("experts.base_layer"):
            place = place.removesuffix("base_layer") + "gate_up_proj"
        else:
            place += ".weight"
        named[place] = pair
    return named


def slices(factor_a, factor_b, experts):
    """The factors of each expert. PEFT counts experts fastest in B, and slowest in A."""
    rank = len(factor_a) // experts
    for i in range(experts):
        yield factor_a[i * rank : (i + 1) * rank], factor_b[:, i::experts]


def merged_by_hand(plain, factors):
    """Add (alpha / rank) B A to each weight of a model without adapters, expert by expert."""
    with torch.no_grad():
        for name, pair in factors.items():
            weight = plain.get_parameter(name)
            experts = weight if weight.dim() == 3 else weight[None]
            for own, (a, b) in zip(
                experts, slices(pair["A"], pair["B"], len(experts)), strict=True
            ):
                change = ALPHA / RANK * b @ a
                own += change if change.shape == own.shape else change.T
    return plain


def score(vlm, ids):
    return vlm(input_ids=ids, use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("ours", [True, False], ids=["factors", "peft"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_is_on_every_linear_layer_and_expert_and_exact(name, ours, monkeypatch):
    """Outputs and gradients equal those of weights that are merged by hand, in fp64."""
    vlm, _ = make(name, attention="eager")
    # torch has grouped products in fp32 and lower only.
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    plain = copy.deepcopy(vlm.double())
    plain.config.get_text_config()._experts_implementation = "eager"
    calls = []
    forward = lora_experts.experts_forward
    monkeypatch.setattr(
        lora_experts, "experts_forward", lambda *given: calls.append(1) or forward(*given)
    )
    if not ours:
        monkeypatch.setattr(lora_experts, "_factors", lambda *_: None)
    modules = vlm.model.get_decoder().named_modules()  # Gemma 4's routers are linear
    linear = {n for n, m in modules if isinstance(m, nn.Linear) and "router" not in n}
    fused = [n for n, _ in vlm.model.get_decoder().named_parameters() if n.endswith(FUSED)]
    adapted = add_lora(vlm, RANK, ALPHA)
    before = score(plain, IDS)
    assert (score(vlm, IDS) - before).abs().max() < 1e-12
    whole = [m for m in vlm.modules() if isinstance(getattr(m, "base_layer", None), nn.Linear)]
    assert all("forward" in vars(m) for m in whole) and len(whole) == len(linear)
    factors = factors_of(randomized(adapted).double())
    prefix = "model.language_model."
    wanted = {f"{prefix}{n}.weight" for n in linear} | {prefix + n for n in fused}
    assert set(factors) == wanted and len(fused) >= 2
    for place, pair in factors.items():
        experts = len(plain.get_parameter(place)) if place.endswith(FUSED) else 1
        rank = RANK // ACTIVE if experts > 1 else RANK
        assert pair["A"].shape[0] == pair["B"].shape[1] == rank * experts
    merged_by_hand(plain, factors).requires_grad_(True)
    found, true = score(vlm, IDS), score(plain, IDS)
    assert bool(calls) == ours
    assert (found - true).abs().max() < 1e-10 < 0.1 < (true - before).abs().max()
    found[..., 5].sum().backward()
    true[..., 5].sum().backward()
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    seen = 0
    for place, pair in factors.items():
        weight = plain.get_parameter(place)
        if weight.grad is None:  # experts of image tokens (Ernie)
            assert pair["A"].grad is None and "vision_moe" in place
            continue
        grads = weight.grad if weight.dim() == 3 else weight.grad[None]
        parts = slices(pair["A"], pair["B"], len(grads))
        own = slices(pair["A"].grad, pair["B"].grad, len(grads))
        for grad, (a, b), (a_grad, b_grad) in zip(grads, parts, own, strict=True):
            grad = ALPHA / RANK * (grad if grad.shape == (len(b), a.shape[1]) else grad.T)
            assert (b.T @ grad - a_grad).abs().max() < 1e-10 * largest
            assert (grad @ a.T - b_grad).abs().max() < 1e-10 * largest
            seen += bool(grad.any())
    assert seen > len(linear)
    assert [n for n, p in vlm.named_parameters() if p.requires_grad and ".lora_" not in n] == []


def test_no_sum_of_weights_is_kept_for_the_backward(monkeypatch):
    """PEFT keeps one per parameter of fused experts."""
    kept = []
    for way in ("factors", "peft"):
        vlm, _ = make("qwen3_vl_moe")
        add_lora(vlm, RANK, ALPHA)
        weights = {p.data_ptr() for p in vlm.parameters()}
        sizes = {
            p.numel() for n, p in vlm.named_parameters() if "experts.base" in n and p.dim() == 3
        }
        large = set()

        def note(tensor, weights=weights, sizes=sizes, large=large):
            if tensor.numel() in sizes and tensor.dim() == 3 and tensor.data_ptr() not in weights:
                large.add(tensor.data_ptr())
            return tensor

        if way == "peft":
            monkeypatch.setattr(lora_experts, "_factors", lambda *_: None)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = score(vlm, IDS).sum()
        kept.append(len(large))
        loss.backward()
    assert kept == [0, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_in_low_precision_err_like_pefts(dtype, monkeypatch):
    """Outputs and gradients of one module, against fp64; adapters in fp32 beside the base."""
    found = {}
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 32, generator=generator).to(dtype)
    weights, index = torch.rand(40, 4, generator=generator).topk(2)
    upstream = torch.randn(40, 32, generator=generator)
    for way, kind in (("true", torch.float64), ("factors", dtype), ("peft", dtype)):
        vlm, _ = make("internvl-gpt_oss")
        experts = randomized(add_lora(vlm, RANK, ALPHA)).base_model.model.model.language_model
        experts = experts.layers[0].mlp.experts.to(dtype).to(kind)
        with monkeypatch.context() as patch:
            if way != "factors":
                patch.setattr(lora_experts, "_factors", lambda *_: None)
            if way == "true":
                patch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
            else:
                for name, value in experts.named_parameters():
                    value.data = value.data.float() if ".lora_" in f".{name}" else value.data
            rows = inputs.to(kind).requires_grad_()
            out = experts(rows, index, weights.to(kind))
            out.backward(upstream.to(kind))
        learned = [p.grad for p in experts.parameters() if p.requires_grad]
        assert len(learned) == 4 and out.dtype == kind
        found[way] = [out, rows.grad, *learned]
    for own, theirs, true in zip(found["factors"], found["peft"], found["true"], strict=True):
        errors = [float((some.double() - true).norm() / true.norm()) for some in (own, theirs)]
        assert errors[0] <= 2 * errors[1] + 1e-6


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "internvl-gpt_oss"])
def test_adapters_on_experts_are_saved_read_merged_and_switched_off(name, tmp_path):
    """Stock PEFT reads them too, also where it renames targets (glm4v_moe)."""
    vlm, _ = make(name)
    vlm.save_pretrained(tmp_path / "base")
    vlm = load_model(tmp_path / "base")
    base = score(vlm, IDS)
    adapted = randomized(add_lora(vlm, RANK, ALPHA))
    with torch.no_grad():
        found = score(vlm, IDS)
        with adapters_off(vlm):
            assert torch.equal(score(vlm, IDS), base)
        assert torch.equal(score(vlm, IDS), found)
        adapted.save_pretrained(tmp_path / "adapter")
        fresh = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        for loaded in (
            load_trained(tmp_path / "adapter"),
            load_model(tmp_path / "adapter"),
            PeftModel.from_pretrained(fresh, tmp_path / "adapter"),
        ):
            assert (score(loaded, IDS) - found).abs().max() < 1e-4 < (found - base).abs().max()


def test_the_line_names_the_share_that_learns():
    vlm, _ = make("glm4v_moe")
    language = vlm.model.language_model
    whole = sum(p.numel() for p in language.parameters())
    add_lora(vlm, RANK, ALPHA)
    kinds = ("proj.base_layer.weight", "proj.weight", "_up_proj", "down_proj")
    covered = sum(
        p.numel()
        for n, p in language.named_parameters()
        if ".lora_" not in n and (n.endswith(kinds) or "experts.base" in n)
    )
    learned = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    assert lora_targets.share(vlm) == (
        f"adapters train {learned / 1e6:.4g} M weights, on {covered / whole:.1%} of the language "
        f"model's {whole / 1e6:.4g} M: 14 of 14 linear layers, 1 of 1 modules of fused experts; "
        "routers stay frozen"
    )
    vlm, _ = make("qwen3_vl_moe")
    get_peft_model(vlm, LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj"))
    assert ": 4 of 8 linear layers, 0 of 2 modules of fused experts" in lora_targets.share(vlm)
    vlm, _ = make("qwen3_vl_moe")
    get_peft_model(vlm, LoraConfig(target_modules=["q_proj"], target_parameters=["gate.weight"]))
    assert lora_targets.share(vlm).endswith("2 of 8 linear layers, 0 of 2 modules of fused experts")


class Unknown(nn.Module):
    """Experts that transformers does not call by its interface."""

    def __init__(self, width):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, width, width))

    def forward(self, x):
        return x @ self.weights[0]


def test_routers_and_unknown_weights_stay_frozen_and_a_wrong_wrapping_is_an_error(monkeypatch):
    vlm, _ = make("qwen3_vl_moe")
    first, second = vlm.model.language_model.layers
    vlm.model.language_model.per_layer_projection = nn.Linear(32, 32)  # Gemma 4, beside its layers
    first.router = nn.Module()
    first.router.proj = nn.Linear(32, 4)  # Gemma 4's router is linear
    second.gate = nn.Linear(32, 32)  # not as wide as there are experts
    second.more = Unknown(32)
    add_lora(vlm, RANK, ALPHA)
    assert type(first.router.proj) is nn.Linear and type(second.gate) is not nn.Linear
    line = lora_targets.share(vlm)
    assert line.endswith("10 of 10 linear layers, 2 of 2 modules of fused experts; routers stay "
                         "frozen; 3-D weights of Unknown have no adapter")  # fmt: skip
    chosen = lora_targets.config_for
    for field, value, problem in (
        ("target_modules", ["q_proj"], "missing model.language_model"),
        ("target_modules", r".*\.(\w+_proj|qkv)", "on others model.visual.*qkv.weight"),
        ("target_parameters", ["experts.down_proj"], "missing .*experts.gate_up_proj"),
    ):
        vlm, _ = make("qwen3_vl_moe")

        def changed(*given, field=field, value=value):
            config = chosen(*given)
            setattr(config, field, value)
            return config

        monkeypatch.setattr(lora_targets, "config_for", changed)
        with pytest.raises(ValueError, match=rf"of 'qwen3_vl_moe' than it was given: {problem}"):
            add_lora(vlm, RANK, ALPHA)


def words(folder, output, *more):
    given = {
        "--model": folder / "base", "--pairs": folder / "pairs.parquet", "--output": output,
        "--batch-size": 2, "--steps": 4, "--learning-rate": 1e-2, "--lora-rank": 4,
        "--reference-cache": folder / "reference", "--save-every": 2, "--dtype": "fp32",
    }  # fmt: skip
    return [str(word) for word in (*sum(given.items(), ()), "--quiet", *more)]


def test_two_ranks_train_the_same_experts(tmp_path):
    processor = made("llava")[0]  # other processors need torchvision in the ranks
    mixtral = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    text = _text(processor, model_type="mixtral", **mixtral)
    config = AutoConfig.for_model("llava", **_llava(processor) | {"text_config": text})
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(config)
    vlm.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write_pairs(tmp_path / "pairs.parquet", made("llava")[1])
    one, two = tmp_path / "one", tmp_path / "two"
    train(parse(words(tmp_path, one, "--micro-batch-size", 1)))
    given = words(tmp_path, two, "--micro-batch-size", 1, "--fsdp")
    run_ranks(run_command, 2, str(tmp_path / "log"), "realign.train", given)
    found, true = (curve(read_jsonl(output / "metrics.jsonl")) for output in (two, one))
    assert abs(found - true).max() < 1e-4 < abs(true[0] - true[-1])


@pytest.mark.parametrize("way", [(), ("--fsdp", "--activation-checkpointing")], ids=["one", "fsdp"])
def test_training_resumes_and_exports_with_experts(way, tmp_path, capsys):
    vlm, processor = make("qwen3_vl_moe")
    vlm.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write_pairs(tmp_path / "pairs.parquet", made("qwen3_vl_moe")[1])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(parse(words(tmp_path, whole, *way)))
    shown = capsys.readouterr().out
    assert "2 of 2 modules of fused experts; routers stay frozen" in shown
    losses = curve(read_jsonl(whole / "metrics.jsonl"))
    assert losses[0] == pytest.approx(2 * torch.tensor(2.0).log().item(), abs=1e-5) != losses[-1]
    trained = weights(whole)
    assert (
        sum(".experts." in n and "lora_B" in n and bool(v.any()) for n, v in trained.items()) == 4
    )
    shutil.copytree(whole, stopped)
    for part in ("model", "checkpoints/step-000004"):
        shutil.rmtree(stopped / part)
    train(parse(words(tmp_path, stopped, *way, "--resume")))
    assert_same_run(stopped, whole, steps=4)
    assert export.main(["--model", str(whole / "model"), "--output", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        found = score(load_trained(whole / "model"), IDS)
        exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert (score(exported, IDS) - found).abs().max() < 1e-4
        assert (score(vlm, IDS) - found).abs().max() > 1e-3
