"""Varlen attention over forests: the operator, its CUDA arguments, and models that use it."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from family_cases import (
    CPU,
    FAMILIES,
    LOGP_TOLERANCE,
    assert_same_gradients,
    encoded,
    forest_loss,
    gradients,
    lines,
    true_loss,
    truth,
    with_lora,
)
from tiny_vlms import make
from torch._subclasses.fake_tensor import FakeTensorMode

from realign.modeling import attention, tree_attention, varlen_attention
from realign.modeling.forest import build_batch
from realign.modeling.model import ForestModel
from realign.modeling.varlen_attention import Spans, forest_attention, sequences
from realign.training import fsdp, memory

OPERATOR = torch.ops.realign.forest_attention.default
CAUSAL = [name for name in FAMILIES if name not in ("gemma3", "paligemma", "qwen3_5")]
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # for values of size 1: 80 and 2.5 roundings

# Rows of trees of (root, leaf, leaf, ...), and the number of columns of a row.
LAYOUTS = {
    "one leaf": ((((5, 3),),), 8),
    "one token each": ((((1, 1),),), 2),
    "many leaves": ((((4, 3, 1, 1, 6, 2, 5, 1),),), 23),
    "short roots": ((((1, 4, 2), (1, 1), (1, 1, 1, 1)),), 13),
    "padding": ((((7, 2, 3),),), 20),
    "one further token": ((((3, 2, 1), (2, 1, 1)),), 10),
    "rows": ((((6, 3, 2), (2, 5)), ((9, 1, 1, 1),), ((1, 2),)), 18),
}


def states(rows, heads, groups, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads, 8), (rows, groups, 8), (rows, groups, 8)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def dense_mask(trees, columns):
    """(T, T) bool, token by token: real, in the same segment or the root, and not later."""
    owners = []  # (tree, segment) of each token
    for row, inside in enumerate(trees):
        part = [
            ((row, number), segment)
            for number, sizes in enumerate(inside)
            for segment, size in enumerate(sizes)
            for _ in range(size)
        ]
        owners += part + [None] * (columns - len(part))
    seen = torch.zeros(len(owners), len(owners), dtype=torch.bool)
    for q, of_query in enumerate(owners):
        for k, of_key in enumerate(owners[: q + 1]):
            if of_query and of_key and of_query[0] == of_key[0]:
                seen[q, k] = of_key[1] in (0, of_query[1])
    return seen


def dense(query, key, value, seen, scale=0.3):
    """The truth in fp64: a masked softmax over all T tokens, with zeros for padding."""
    q, k, v = (t.double().transpose(0, 1) for t in (query, key, value))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    real = seen.any(1)
    return (F.softmax(scores.where(real[:, None], 0), -1) * real[:, None] @ v).transpose(0, 1)


def assert_is_the_truth(trees, columns, heads, groups, dtype, device="cpu"):
    inputs = states(len(trees) * columns, heads, groups, dtype)
    moved = [t.detach().to(device).requires_grad_() for t in inputs]
    out, _ = forest_attention(*moved, *sequences(trees, columns).to(device), 0.3)
    expected = dense(*inputs, dense_mask(trees, columns))
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    found = [out, *torch.autograd.grad(out, moved, grad.to(device))]
    for got, true in zip(
        found, [expected, *torch.autograd.grad(expected, inputs, grad.double())], strict=True
    ):
        assert got.dtype == dtype
        bound = EPSILON[dtype] * max(1, true.abs().max())
        assert (got.cpu() - true).abs().max() <= bound
    padding = ~dense_mask(trees, columns).any(1)
    assert all(not t.cpu()[padding].any() for t in found)
    return found


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_a_masked_softmax(name, groups):
    assert_is_the_truth(*LAYOUTS[name], 4, groups, torch.float32)
    assert_is_the_truth(*LAYOUTS[name], 4, groups, torch.bfloat16)


def test_gradients_of_the_reference_are_numeric_ones():
    for name in ("short roots", "rows"):
        trees, columns = LAYOUTS[name]
        inputs = states(len(trees) * columns, 2, 1, torch.float64)
        parts = sequences(trees, columns)

        def out(*inputs, parts=parts):
            return forest_attention(*inputs, *parts, 0.3)[0]

        assert torch.autograd.gradcheck(out, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["many leaves", "rows"])
def test_operator_is_a_torch_operator(name):
    trees, columns = LAYOUTS[name]
    parts = sequences(trees, columns)
    inputs = states(len(trees) * columns, 4, 2)
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    for some in (inputs, [t.requires_grad_() for t in strided]):
        torch.library.opcheck(OPERATOR, (*some, *parts, 0.3))
    out, lse = forest_attention(*inputs, *parts, 0.3)
    assert not lse.requires_grad
    args = (torch.ones_like(out), *(t.detach() for t in (*inputs, out)), lse, *parts, 0.3)
    torch.library.opcheck(torch.ops.realign.forest_attention_backward.default, args)


# --- CUDA's kernel: its arguments, checked by a stand-in ---


class StandIn:
    """torch's flash operators, which check their arguments and compute the reference."""

    def __init__(self, monkeypatch, dtype):
        self.dtype, self.calls = dtype, []
        for name in ("_flash_attention_forward", "_flash_attention_backward"):
            self.calls.append([])
            schema = getattr(torch.ops.aten, name).default._schema
            kernel = getattr(self, name[17:])
            monkeypatch.setattr(torch.ops.aten, name, self._checked(schema, kernel, self.calls[-1]))
        pair = varlen_attention.KERNELS["cuda"]
        monkeypatch.setitem(varlen_attention.KERNELS, "cpu", pair)

    def _checked(self, schema, kernel, calls):
        kinds = {"Tensor": torch.Tensor, "Optional[Tensor]": torch.Tensor, "int": int}
        kinds |= {"float": float, "bool": bool, "Optional[float]": float}

        def call(*args, **kwargs):
            names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
            given = dict(zip(names, args, strict=len(args) > len(names))) | kwargs
            for argument in schema.arguments:
                if argument.name in given:
                    assert type(given[argument.name]) is kinds[str(argument.type)], argument
                else:
                    assert argument.has_default_value(), argument
            self._check(**given)
            calls.append(given["is_causal"])
            return kernel(**given)

        return call

    def _check(self, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, **rest):
        floats = [query, key, value, *(rest[n] for n in ("out", "grad_out") if n in rest)]
        assert all(t.dtype == self.dtype and t.stride(-1) == 1 and t.ndim == 3 for t in floats)
        for ends, most, tokens in ((cum_seq_q, max_q, query), (cum_seq_k, max_k, key)):
            assert ends.dtype == torch.int32 and ends.is_contiguous()
            assert ends.device == query.device
            assert int(ends[0]) == 0 and int(ends[-1]) == len(tokens)
            assert int(ends.diff().min()) >= 1 and int(ends.diff().max()) == most
        assert not is_causal or torch.equal(cum_seq_q, cum_seq_k)
        assert rest["dropout_p"] == 0 and rest["scale"] == 0.3

    def forward(self, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, **given):
        assert not given["return_debug_mask"]
        spans = Spans(cum_seq_q, cum_seq_k, max_q, max_k)
        settings = given["scale"], given["is_causal"]
        out, lse = varlen_attention.reference(query, key, value, spans, *settings)
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty(()), torch.empty(0)

    def backward(self, grad_out, query, key, value, out, logsumexp, rng_state, **given):
        assert logsumexp.is_contiguous() and logsumexp.dtype == torch.float32
        assert logsumexp.shape == (out.shape[1], len(out))
        assert torch.get_deterministic_debug_mode() == 2
        assert rng_state.dtype == torch.uint64 and not rng_state.any()
        spans = Spans(*(given[name] for name in ("cum_seq_q", "cum_seq_k", "max_q", "max_k")))
        settings = spans, given["scale"], given["is_causal"]
        states = grad_out, query, key, value, out, logsumexp
        return varlen_attention.reference_backward(*states, *settings)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_cuda_kernel_gets_the_arguments_it_documents(name, groups, monkeypatch):
    kernel = StandIn(monkeypatch, torch.bfloat16)
    before = torch.get_deterministic_debug_mode()
    found = assert_is_the_truth(*LAYOUTS[name], 4, groups, torch.bfloat16)
    further = any(len(tree) > 2 for row in LAYOUTS[name][0] for tree in row)
    assert kernel.calls == [[True, False] if further else [True]] * 2
    assert torch.get_deterministic_debug_mode() == before == 0
    assert all(t.is_contiguous() for t in found)


def test_cuda_kernel_is_called_as_torch_declares_it():
    """With torch's own shape rules for these operators, on CUDA tensors without storage."""
    trees, columns = LAYOUTS["rows"]
    parts = sequences(trees, columns)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        query, key = torch.empty(len(parts.more), 4, 8).half(), torch.empty(15, 2, 8).half()
        ends = torch.empty(2, 3, dtype=torch.int32)
        spans = varlen_attention.Spans(*ends, parts.longest_more, parts.longest_root)
        out, lse = varlen_attention.flash(query, key, key, spans, 0.3, False)
        states = query, query, key, key, out, lse
        grads = varlen_attention.flash_backward(*states, spans, 0.3, False)
        rows = torch.empty(54, 4, 8).half(), torch.empty(54, 2, 8).half()
        declared = forest_attention(rows[0], rows[1], rows[1], *parts, 0.3)
    assert [t.shape for t in (out, *grads)] == [query.shape, query.shape, key.shape, key.shape]
    assert [t.device.type for t in (out, *declared)] == ["cuda"] * 3
    assert (lse.shape, lse.dtype) == ((4, len(parts.more)), declared[1].dtype)
    assert declared[1].shape == (4, len(parts.real))
    assert (out.dtype, declared[0].shape) == (declared[0].dtype, rows[0].shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: the flash kernel itself")
def test_cuda_kernel_is_a_masked_softmax_and_repeats():
    for layout in LAYOUTS.values():
        for groups in (4, 2):
            runs = []
            for _ in range(2):
                torch.manual_seed(0)
                runs.append(assert_is_the_truth(*layout, 4, groups, torch.bfloat16, "cuda"))
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- models ---


@pytest.mark.parametrize("family", CAUSAL)
def test_forests_by_the_operator_are_separate_forwards(family):
    """Log-probs and gradients of every causal family, against transformers and `tree`."""
    found = {}
    for kind in ("flash", "tree"):
        vlm, _ = make(family, attention=kind)
        model = ForestModel(vlm)
        assert model.attention == attention.IMPLEMENTATIONS[kind]
        examples, store = encoded(family, model)
        loss, targets = forest_loss(model, examples, store)
        found[kind] = loss.item(), gradients(vlm)
    vlm.zero_grad()
    logps = truth(vlm, family, examples)
    true = true_loss(logps, targets)
    true.backward()
    assert found["flash"][0] == pytest.approx(true.item(), rel=1e-5)
    assert found["flash"][0] == pytest.approx(found["tree"][0], rel=1e-6)
    assert assert_same_gradients(found["flash"][1], gradients(vlm)) >= 21
    assert_same_gradients(found["flash"][1], found["tree"][1])


def test_log_probs_by_the_operator_in_rows_with_padding():
    vlm, _ = make("qwen2_vl", attention="flash")
    model = ForestModel(vlm).eval()
    examples, store = encoded("qwen2_vl", model)
    with torch.no_grad():
        true = truth(vlm, "qwen2_vl", examples)
        for row_tokens in (1, 150, 4096):
            batch = build_batch(examples, store, row_tokens=row_tokens)
            assert (batch.sequences.real is None) == (len(batch.input_ids) == 1)
            assert (batch.leaf_sums(model.logps(batch)) - true).abs().max() < LOGP_TOLERANCE


def test_compiled_layers_keep_the_forest_and_compile_once(monkeypatch):
    """Four layouts compile one whole graph for each kind of layer: the operator hides the mask."""
    counter = torch._dynamo.testing.CompileCounter()
    compiler = torch.compile

    def counted(forward, **how):
        return compiler(forward, backend=counter, fullgraph=True, **how)

    monkeypatch.setattr(torch, "compile", counted)
    plain = with_lora("llava", "flash")
    vlm, model, examples, store = with_lora("llava", "flash")
    fsdp.wrap_layers(fsdp.trained_layers(model), compiled=True, checkpointed=True)
    layouts = set()
    for first, last in ((0, 1), (0, 3), (2, 4), (0, 4)):
        batch = build_batch(examples[first:last], store, row_tokens=4096)
        layouts.add(batch.trees)
        for some in (vlm, plain[0]):
            some.zero_grad()
        out, true = model.logps(batch), plain[1].logps(batch)
        assert (out - true).abs().max() < 1e-5
        out.sum().backward()
        true.sum().backward()
        assert_same_gradients(gradients(vlm), gradients(plain[0]))
    assert len(layouts) == 4
    assert counter.frame_count == 2  # LoRA: the first layer's input has no gradient


# --- choice of the implementation ---


def test_tree_uses_the_operator_where_its_kernel_runs(monkeypatch):
    bf16, fp32, cuda = torch.bfloat16, torch.float32, torch.device("cuda")
    assert attention.choose("tree", CPU, bf16) == ("tree", None)
    assert attention.choose("sdpa", cuda, bf16) == ("sdpa", None)
    name, why = attention.choose("tree", CPU, fp32, compiled=True)
    assert (name, why) == ("sdpa", "attention by tree is sdpa under --compile: there is no GPU")
    with pytest.raises(ValueError, match="fp16 or bf16, and there is no GPU. Use --attention tree"):
        attention.choose("flash", CPU, bf16)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for compiled in (False, True):
        name, why = attention.choose("tree", cuda, bf16, compiled=compiled)
        assert name == "flash" and why.endswith("one operator a layer: torch.bfloat16 on CUDA")
    assert attention.choose("flash", cuda, torch.float16) == ("flash", None)
    assert attention.choose("tree", cuda, fp32) == ("tree", None)
    with pytest.raises(ValueError, match="dtype is torch.float32"):
        attention.choose("flash", cuda, fp32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    assert attention.choose("tree", cuda, bf16) == ("tree", None)
    assert varlen_attention.missing(cuda, bf16) == "T4 is older than compute capability 8.0"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert varlen_attention.missing(cuda, bf16) == "this build of torch has no flash kernel"


def test_models_that_are_not_causal_get_sdpa_and_a_line_reports_it():
    model = ForestModel(make("gemma3", attention="flash")[0]).eval()
    assert model.attention == "sdpa"
    examples, store = encoded("gemma3", model)
    assert build_batch(examples, store, row_tokens=4096).sequences is None
    (line,) = lines(model, examples, store)
    assert line == "attention is sdpa: not every layer has full causal attention"
    vlm, _ = make("llava", attention="tree")
    vlm.model.get_decoder().config.attention_dropout = 0.1
    assert ForestModel(vlm).instead == "it has dropout"


@pytest.mark.parametrize(("width", "attends"), [(8, "tree_varlen"), (12, "tree"), (264, "tree")])
def test_unsupported_head_widths_attend_by_calls(width, attends):
    """FlashAttention 2 supports widths up to 256 in steps of 8."""
    vlm, _ = make("llava", attention="flash")
    vlm.model.get_decoder().config.head_dim = width
    model = ForestModel(vlm)
    assert model.attention == vlm.model.get_decoder().config._attn_implementation == attends
    assert model.instead == (None if attends == "tree_varlen" else f"its heads are {width} wide")


def test_queries_that_autocast_left_in_fp32_get_the_dtype_of_values(monkeypatch):
    StandIn(monkeypatch, torch.bfloat16)
    trees, columns = LAYOUTS["rows"]
    query, key, value = (t.detach().view(3, 18, -1, 8).transpose(1, 2) for t in states(54, 4, 2))
    parts, module = sequences(trees, columns), torch.nn.Identity()
    mask = tree_attention.no_mask(CPU)
    out, _ = tree_attention.forest_attention(
        module, query, key, value.bfloat16(), mask, sequences=parts, scaling=0.3
    )
    assert (out.shape, out.dtype) == ((3, 18, 4, 8), torch.bfloat16)
    calls, _ = tree_attention.forest_attention(
        module, query, key, value, mask, trees=trees, scaling=0.3
    )
    assert (out - calls).abs().max() < EPSILON[torch.bfloat16]


def test_a_layer_that_drops_the_sequences_is_refused():
    mask = tree_attention.no_mask(CPU)
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="does not pass trees to attention"):
        tree_attention.forest_attention(torch.nn.Identity(), states, states, states, mask)


def test_a_dry_run_goes_through_the_operator():
    """Forward and backward on fake tensors in bf16, as in the plan of a run."""
    vlm, _ = make("llava", attention="flash")
    model = ForestModel(vlm, dtype=torch.bfloat16)
    examples, store = encoded("llava", model)
    batch = build_batch(examples, store, row_tokens=4096)
    model.to("meta")
    with memory.fake_tensors(CPU):
        memory.give_fake_storage(model, CPU, torch.bfloat16)
        step = memory.measure(model, batch, CPU, forwards=1, ranks=1, sharded=False)
    assert step.training > step.gradients > 0 and step.reference > 0
