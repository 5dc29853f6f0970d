"""Computation of layers: checkpointing, compilation, offload, attention kinds, liger."""

import copy
import pickle
import sys
import types

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from runs import CURVE_TOLERANCE, encoded
from torch import nn
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as hf_flex
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from realign import distributed
from realign.config import parse
from realign.digits import ASSETS
from realign.modeling import attention, norms
from realign.modeling.forest import build_batch
from realign.modeling.loading import add_lora, load_model
from realign.modeling.model import ForestModel
from realign.training import fsdp, liger

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(pairs_file):
    """(examples, store) of the digit pairs."""
    return encoded(pairs_file)


def forest_model(tune="full", attention="tree", layers=4):
    vlm = load_model(ASSETS, attention=attention)
    vlm.model.language_model.layers = vlm.model.language_model.layers[:layers]
    model = ForestModel(vlm)
    if tune == "lora":
        torch.manual_seed(0)
        add_lora(vlm, 8, 16.0)
    return model.train()


def gradients(model, batch):
    """Log-probs, and the gradients of their sum, by parameter."""
    model.zero_grad()
    logps = model.logps(batch)
    logps.sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    """Log-probs (sums of up to 30 nats) and gradients agree up to rounding."""
    (logps, grads), (truth, exact) = found, expected
    assert (logps - truth).abs().max() < 1e-5
    for name, value in exact.items():
        assert (grads[name] - value).abs().max() <= CURVE_TOLERANCE * value.abs().max(), name


def saved_bytes(model, batch):
    """Bytes that autograd saves between forward and backward, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = model.logps(batch)
    logps.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_checkpointed_layers_give_the_same_bits_and_keep_less(digits, tune):
    examples, store = digits
    batch = build_batch(examples[:6], store, row_tokens=60)
    plain, wrapped = forest_model(tune), forest_model(tune)
    names = list(wrapped.state_dict())
    layers = fsdp.trained_layers(wrapped)
    assert len(layers) == 4  # of the language model; the tower is frozen
    fsdp.wrap_layers(layers, compiled=False, checkpointed=True)
    (logps, grads), (truth, expected) = gradients(wrapped, batch), gradients(plain, batch)
    assert torch.equal(logps, truth) and grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert list(wrapped.state_dict()) == names
    # A layer keeps only its input, a tenth of all its tensors. The rest belongs to the head.
    assert saved_bytes(wrapped, batch) < 0.15 * saved_bytes(plain, batch)


@torch._inductor.config.patch(compile_threads=1)  # no worker processes, which would import torch
def test_compiled_layers_change_nothing_beyond_rounding(digits):
    """With inductor, which compiles for half a minute, so for one layer and one attention."""
    examples, store = digits
    plain, compiled = (forest_model(attention="flash", layers=1) for _ in range(2))
    layers = fsdp.trained_layers(compiled)
    fsdp.wrap_layers(layers, compiled=True, checkpointed=True)
    for part in (examples[:6], examples[6:9]):
        batch = build_batch(part, store, row_tokens=60)
        assert_close(gradients(compiled, batch), gradients(plain, batch))


def test_batches_of_other_shapes_compile_nothing_again(digits, monkeypatch):
    """Two graphs: under LoRA only the first layer's input has no gradient."""
    examples, store = digits
    counter = torch._dynamo.testing.CompileCounter()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counter, **how))
    plain, model = (forest_model("lora", "sdpa", layers=2) for _ in range(2))
    fsdp.wrap_layers(fsdp.trained_layers(model), compiled=True, checkpointed=True)
    shapes = set()
    for size in (2, 5, 8, 11):
        batch = build_batch(examples[:size], store, row_tokens=50 + 7 * size)
        shapes.add(tuple(batch.input_ids.shape))
        assert_close(gradients(model, batch), gradients(plain, batch))
    assert len(shapes) == 4
    assert counter.frame_count == 2


def test_offloaded_parameters_train_the_same(digits):
    """On a mesh of one CPU, where offload copies nothing. It has not been run on a GPU."""
    examples, store = digits
    batch = build_batch(examples[:4], store, row_tokens=60)
    weights = []
    try:
        device = distributed.start(single=True)
        for offload in (False, True):
            model = forest_model("lora")
            fsdp.shard(model, device, torch.float32, cpu_offload=offload)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-3)
            for _ in range(2):
                model.logps(batch).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            weights.append([p.full_tensor() for p in trained])
    finally:
        distributed.stop()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# --- attention ---


@pytest.mark.parametrize("kind", ["sdpa", "eager", "flex"])
def test_every_attention_equals_attention_by_tree(digits, kind, monkeypatch):
    if kind == "flex":  # unfused, with the backward that torch does not support on a CPU
        monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
        monkeypatch.setattr(
            hf_flex,
            "compile_friendly_flex_attention",
            lambda *args, training, **options: torch_flex.flex_attention(*args, **options),
        )
    examples, store = digits
    batch = build_batch(examples[:6], store, row_tokens=200)  # several trees in a row
    expected = gradients(forest_model(), batch)
    assert_close(gradients(forest_model(attention=kind), batch), expected)


def test_the_block_mask_equals_the_forests(digits):
    examples, store = digits
    budget = attention.row_budget("flex_attention", examples[:12])
    batch = build_batch(examples[:12], store, row_tokens=budget)
    mask = attention.forest_mask(batch, "flex_attention", torch.float32)
    rows, _, tokens, _ = mask.shape
    assert rows == 1 and tokens > 512  # all trees in one row
    places = torch.arange(tokens)
    found = mask.mask_mod(0, 0, places[:, None], places[None])
    assert torch.equal(found, batch.attention_mask()[0, 0])
    assert mask.sparsity() > 50  # percent of skipped blocks


def test_row_budget_depends_on_the_attention(digits):
    examples, store = digits
    longest = max(example.longest_tree for example in examples)
    assert attention.row_budget("sdpa", examples) == longest < 100
    assert attention.row_budget("flex_attention", examples) == 8192
    batch = build_batch(examples, store, row_tokens=attention.row_budget("tree", examples))
    assert batch.segment.shape[0] == 1 and (batch.segment >= 0).float().mean() > 0.95


# --- RMSNorm by torch's fused operator ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_errs_no_more_than_that_of_transformers(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, 1e-5)
    nn.init.normal_(norm.weight)
    fused, exact = copy.deepcopy(norm), copy.deepcopy(norm)
    norms.use(nn.ModuleList([fused]))
    hidden, grad = torch.randn(2, 2, 40, 64, dtype=torch.float64)
    x = hidden.requires_grad_()
    truth = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * exact.weight.double()
    wide = [truth.detach(), *torch.autograd.grad(truth, x, grad)]

    def errors(module):
        x = hidden.detach().to(dtype).requires_grad_()
        out = module.to(dtype)(x)
        found = [out, *torch.autograd.grad(out, x, grad.to(dtype))]
        assert all(t.dtype == dtype for t in found)
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, wide, strict=True)]

    ours, theirs = errors(fused), errors(norm)
    assert all(a <= 1.1 * b + 1e-7 for a, b in zip(ours, theirs, strict=True))
    assert max(ours) < (1e-6 if dtype == torch.float32 else 6e-3)


def test_rms_norms_that_are_not_plain_are_not_replaced():
    gemma, layer_norm, llama = GemmaRMSNorm(16), nn.LayerNorm(4), LlamaRMSNorm(8)
    norms.use(nn.ModuleList([gemma, layer_norm, llama]))  # Gemma adds 1 to the weight
    assert ["forward" in vars(m) for m in (gemma, layer_norm, llama)] == [False, False, True]
    hidden = torch.randn(3, 8).bfloat16()  # under autocast the weight has a wider dtype
    assert torch.equal(llama(hidden), LlamaRMSNorm.forward(llama, hidden))
    assert llama(hidden).dtype == torch.float32
    # Norms without a weight, or with the user's own forward, are not replaced either.
    bare, patched = nn.RMSNorm(8, elementwise_affine=False), LlamaRMSNorm(8)
    patched.forward = lambda hidden: hidden + 1
    norms.use(nn.ModuleList([bare, patched]))
    assert "forward" not in vars(bare) and torch.equal(
        patched(torch.ones(8)), torch.full((8,), 2.0)
    )


def test_a_pickled_rms_norm_is_that_of_transformers():
    norm = LlamaRMSNorm(8)
    norms.use(nn.ModuleList([norm]))
    loaded = pickle.loads(pickle.dumps(norm))
    hidden = torch.randn(3, 8)
    assert torch.equal(loaded(hidden), LlamaRMSNorm.forward(norm, hidden))
    assert loaded.forward.__self__ is loaded and loaded.forward.__func__ is LlamaRMSNorm.forward


# --- liger, by its definition, since the kernels need CUDA ---


@pytest.fixture
def ops(monkeypatch):
    """A `liger_kernel.ops` in plain torch, with the signatures of liger-kernel 0.8.5."""

    def norm(x, weight, epsilon, offset, casting, in_place, row_mode):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (offset + weight)

    def gate(a, b, gate_multiplier, down_multiplier):
        return nn.functional.silu(a) * b

    module = types.ModuleType("liger_kernel.ops")
    module.LigerRMSNormFunction = types.SimpleNamespace(apply=norm)
    module.LigerSiLUMulFunction = types.SimpleNamespace(apply=gate)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)
    return module


def test_liger_replaces_modules_with_equal_results(digits, ops):
    examples, store = digits
    batch = build_batch(examples[:4], store, row_tokens=60)
    plain, model = forest_model("lora"), forest_model("lora")
    line = liger.use(fsdp.trained_layers(model), CPU)
    assert line == "liger: 4 LlamaMLP, 8 LlamaRMSNorm"
    others = [m for m in plain.modules() if type(m).__name__ in ("LlamaMLP", "LlamaRMSNorm")]
    assert {getattr(m.forward, "__module__", "") for m in others} == {
        "realign.modeling.norms", LlamaMLP.__module__,
    }  # fmt: skip
    assert_close(gradients(model, batch), gradients(plain, batch))


def test_liger_leaves_modules_with_other_results(ops):
    gemma = GemmaRMSNorm(16)
    assert liger.use([gemma], CPU) == "liger: 1 GemmaRMSNorm"  # weight + 1
    mlp = forest_model(layers=1).vlm.model.language_model.layers[0].mlp
    mlp.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="liger would have no effect"):
        liger.use([mlp, nn.LayerNorm(4)], CPU)
    assert "forward" not in vars(mlp)


def test_scale_settings_name_the_kernels_of_a_layer():
    given = [[], ["--compile"], ["--liger"]]
    assert [parse(g).scale.kernels for g in given] == ["eager", "compiled", "liger"]
