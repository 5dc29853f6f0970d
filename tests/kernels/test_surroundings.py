"""The head in various contexts: torch defaults, checkpointing, nested calls, scaled losses."""

import itertools
import pickle

import kernel_cases as kc
import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import realign_kernels as rk
from realign_kernels import objectives
from realign_kernels.backends import cpp as cpp_backend

VOCABULARY, WIDTH = 101, 33


def batch(dtype=torch.float32, examples=4, length=7):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, examples, length, WIDTH, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, hidden.shape[:3], generator=g)
    labels[:, :, :2] = -100
    references = torch.full((3, examples), -60.0, dtype=torch.float32)
    return hidden.to(dtype), weight.to(dtype), labels, references


def step(hidden, weight, labels, references, trainable, around=None, **settings):
    """Loss and gradients. `around` wraps the function of hidden and weight."""
    h = hidden.clone().requires_grad_()
    w = weight.clone().requires_grad_(trainable)

    def loss(h, w):
        return rk.rdpo_loss(h, w, labels, references, **settings).loss

    value = around(loss, h, w) if around else loss(h, w)
    value.backward()
    return [value.detach(), h.grad, *([w.grad] if trainable else [])]


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(cpu_backend, default, trainable):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = batch(dtype)
        expected = step(*inputs, trainable, chunk_rows=21)
        torch.set_default_dtype(default)
        try:
            found = step(*inputs, trainable, chunk_rows=21)
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_device_context_changes_nothing(trainable):
    inputs = batch()
    expected = step(*inputs, trainable)
    cpp_backend._memory.buffer = None
    with torch.device("meta"):
        found = step(*inputs, trainable)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("chunk_rows", [None, 21])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_activation_checkpointing(cpu_backend, trainable, chunk_rows):
    inputs = batch()
    expected = step(*inputs, trainable, chunk_rows=chunk_rows)
    for reentrant, early_stop in itertools.product((True, False), repeat=2):

        def around(loss, h, w, reentrant=reentrant):
            return checkpoint(loss, h, w, use_reentrant=reentrant)

        with set_checkpoint_early_stop(early_stop):
            found = step(*inputs, trainable, around, chunk_rows=chunk_rows)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_checkpointing_computes_each_product_twice(monkeypatch):
    calls = []
    original = cpp_backend.CppKernels.gemm

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(cpp_backend.CppKernels, "gemm", counted)
    inputs = batch()
    step(*inputs, True, chunk_rows=21)
    plain = len(calls)
    step(*inputs, True, lambda f, *a: checkpoint(f, *a, use_reentrant=False), chunk_rows=21)
    assert len(calls) - plain <= 2 * plain


def test_a_term_may_call_the_head():
    """The inner call must not overwrite the chunk of the outer call, which is still in use."""
    hidden, weight, labels, references = batch()
    term = objectives.PairSigmoid(name="pair", positive=0, negative=1)

    class Nested(objectives.PairSigmoid):
        def __call__(self, rewards):
            with torch.no_grad():
                rk.linear_logprobs(-hidden, weight, labels)
            return super().__call__(rewards)

    nested = Nested(name="pair", positive=0, negative=1)
    grads = []
    for kind in (term, nested):
        w = weight.clone().requires_grad_()
        rk.linear_preference_loss(hidden[:2], w, labels[:2], references[:2], [kind]).loss.backward()
        grads.append(w.grad)
    assert torch.equal(*grads)


def test_a_large_chunk_is_not_kept():
    hidden, weight, labels, _ = batch()
    rk.linear_logprobs(hidden, weight, labels)
    assert cpp_backend._memory.buffer.numel() >= 60 * VOCABULARY * 4
    rows, vocabulary = 600, cpp_backend.KEPT // (4 * 500)
    big = torch.randn(rows, 1), torch.randn(vocabulary, 1)
    rk.linear_logprobs(*big, torch.zeros(rows, dtype=torch.int64), chunk_rows=rows)
    kept = cpp_backend._memory.buffer
    assert kept is None or kept.numel() <= cpp_backend.KEPT


@pytest.mark.parametrize("scale", [1 / 3, 0.7])
def test_a_scaled_loss_rounds_the_gradient_of_hidden_once(scale):
    hidden, weight, labels, references = batch(torch.bfloat16, examples=16, length=20)
    exact = hidden.double().requires_grad_()
    logps = torch.log_softmax(exact @ weight.double().T, -1)
    logps = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    (objectives.rdpo()(logps.sum(-1), references.double()).loss * scale).backward()
    found = hidden.clone().requires_grad_()
    head = weight.clone().requires_grad_()
    (rk.rdpo_loss(found, head, labels, references).loss * scale).backward()
    rounded = (exact.grad.bfloat16().double() - exact.grad).norm()
    assert (found.grad.double() - exact.grad).norm() < 1.1 * rounded


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_view_without_its_last_position(trainable):
    hidden, weight, labels, references = batch(length=8)
    view, short = hidden[:, :, :-1], labels[:, :, :-1]
    found = step(view, weight, short, references, trainable)
    base = hidden.clone().requires_grad_()
    w = weight.clone().requires_grad_(trainable)
    rk.rdpo_loss(base[:, :, :-1], w, short, references).loss.backward()
    assert torch.equal(base.grad[:, :, :-1], found[1]) and not base.grad[:, :, -1].any()


class Mean(objectives.PairSigmoid):
    def __call__(self, values):
        return super().__call__(values).mean()


class Centred(objectives.PairSigmoid):
    def __call__(self, values):
        centred = values.rewards - values.rewards.mean(1, keepdim=True)
        return super().__call__(values._replace(rewards=centred))


def test_a_term_must_return_a_loss_per_example():
    hidden, weight, labels, references = batch()
    for trainable in (False, True):
        w = weight.clone().requires_grad_(trainable)
        args = (hidden[:2], w, labels[:2], references[:2])
        with pytest.raises(ValueError, match=r"term 'pair' returned shape \(\), .*, \(\d,\)"):
            rk.linear_preference_loss(*args, [Mean(name="pair", positive=0, negative=1)])
    centred = [Centred(name="pair", positive=0, negative=1)]
    with pytest.raises(ValueError, match="a function of the rewards of one example"):
        rk.linear_preference_loss(*args, centred, chunk_rows=20)


def test_a_non_finite_error_can_be_pickled():
    with pytest.raises(rk.NonFiniteError) as caught:
        rk.linear_logprobs(torch.full((2, 3), torch.nan), torch.randn(4, 3), torch.tensor([0, 1]))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.rows == [0, 1]


@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode_is_refused(frozen):
    case = kc.make_case(4, 5, 11, torch.float32)
    weight = case.weight.requires_grad_(not frozen)
    with pytest.raises(ValueError, match="hidden carries a tangent, .* forward-mode"):
        torch.func.jvp(
            lambda h: rk.linear_logprobs(h, weight, case.labels).sum(),
            (case.hidden,),
            (torch.ones_like(case.hidden),),
        )


def test_gradient_memory_is_reused_once_it_is_free():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 1, 2, 64, generator=g)
    weight = torch.randn(40000, 64, generator=g).requires_grad_()  # 10 MB, from the pool
    labels, references = torch.randint(40000, (3, 1, 2), generator=g), torch.zeros(3, 1)

    def gradient(scale):
        weight.grad = None
        rk.rdpo_loss(hidden * scale, weight, labels, references).loss.backward()
        return weight.grad

    first = gradient(1.0)
    copy, address = first.clone(), first.data_ptr()
    second = gradient(2.0)
    assert second.data_ptr() != address and torch.equal(first, copy)
    del first
    third = gradient(1.0)
    assert third.data_ptr() == address and torch.equal(third, copy)
