"""linear_logprobs: values and gradients against fp64, and the rows it must not read."""

import kernel_cases as kc
import pytest
import torch
import torch.nn.functional as F

import realign_kernels as rk
from realign_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(1, 5, 2), (7, 5, 97), (7, 64, 1003), (33, 64, 97), (33, 5, 1003), (33, 64, 1003)]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "temperature": 1.7, "softcap": 8.0},
}


def split(head):
    return {"bias": head.get("bias", False)}, {k: v for k, v in head.items() if k != "bias"}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", kc.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_stay_within_the_error_budget(shape, dtype, frozen):
    case = kc.make_case(*shape, dtype, bias=True)
    if shape[0] == 1:
        case = case._replace(labels=case.labels.clamp(min=0))
    result = kc.ours(case, frozen=frozen, chunk_rows=8)
    kc.within_budget(result, kc.eager(case, dtype), kc.truth(case), dtype)
    assert result.logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.hidden.dtype == dtype
    assert (result.weight is None) == frozen


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", kc.DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_bias_softcap_and_temperature(head, dtype, frozen):
    made, called = split(head)
    case = kc.make_case(33, 64, 1003, dtype, **made)
    result = kc.ours(case, frozen=frozen, chunk_rows=8, **called)
    kc.within_budget(result, kc.eager(case, dtype, **called), kc.truth(case, **called), dtype)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend, head):
    made, called = split(head)
    case = kc.make_case(6, 5, 11, torch.float64, **made)
    leaves = [t.requires_grad_() for t in case[:3] if t is not None]

    def call(hidden, weight, bias=None):
        return rk.linear_logprobs(hidden, weight, case.labels, bias=bias, chunk_rows=4, **called)

    with rk.use_backend(backend):
        assert torch.autograd.gradcheck(call, leaves)
        fixed = [t.detach() for t in leaves[1:]]
        assert torch.autograd.gradcheck(lambda hidden: call(hidden, *fixed), leaves[:1])


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_specification_is_log_softmax(head):
    made, called = split(head)
    case = kc.make_case(33, 5, 97, torch.float64, **made)
    exact = kc.truth(case, **called)
    logps = reference.linear_logprobs(*case[:2], case.labels, case.bias, **called)
    assert kc.error(logps, exact.logps) < 1e-14


@pytest.mark.parametrize("trains", ["hidden", "weight", "bias"])
def test_one_trainable_input_gets_its_gradient_and_no_other(trains):
    case = kc.make_case(33, 64, 97, torch.float32, bias=True)
    exact = kc.truth(case)
    inputs = {name: getattr(case, name).clone() for name in ("hidden", "weight", "bias")}
    inputs[trains].requires_grad_()
    logps = rk.linear_logprobs(**inputs, labels=case.labels)
    (logps * case.upstream.float()).sum().backward()
    assert kc.error(inputs[trains].grad, getattr(exact, trains)) < 1e-5
    assert all(t.grad is None for name, t in inputs.items() if name != trains)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("lead", [10, 13, 16])
def test_gradient_of_confident_tokens(lead, frozen, dtype):
    """1 - p is 2e-2 to 5e-5. One-hot hidden states keep the logits exact in half precision."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=g, dtype=torch.float64).to(dtype)
    weight[torch.arange(64), torch.arange(64)] = lead
    hidden, labels = torch.eye(64, dtype=dtype), torch.arange(64)
    case = kc.Case(hidden, weight, None, labels, torch.ones(64, dtype=torch.float64))
    exact, result = kc.truth(case), kc.ours(case, frozen=frozen)

    def relative(grad):
        return float(((grad.double() - exact.hidden).norm(dim=1) / exact.hidden.norm(dim=1)).max())

    assert relative(result.hidden) < 5e-3
    assert float((result.logps / exact.logps - 1).abs().max()) < 1e-5
    if lead == 16 and dtype == torch.bfloat16:
        p = F.softmax((hidden @ weight.T).float(), 1).to(dtype)
        assert relative(weight[labels] - p @ weight) > 0.3, "the test no longer bites"


def test_log_probs_of_certain_and_hopeless_labels():
    logits = torch.tensor([[60.0, 0.0, 1.0], [-500.0, 0.0, 1.0], [30.0, 0.0, 1.0]])
    logps = rk.linear_logprobs(logits, torch.eye(3), torch.zeros(3, dtype=torch.int64))
    exact = F.logsigmoid(logits[:, 0].double() - logits[:, 1:].double().logsumexp(1))
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=0)


def test_ignored_rows_may_hold_anything_and_get_zero():
    case = kc.make_case(33, 64, 97, torch.float32)
    ignored = case.labels == -100
    clean = kc.ours(case)
    hidden = case.hidden.clone()
    hidden[ignored] = float("nan")
    for frozen in (True, False):
        poisoned = case._replace(
            hidden=hidden, upstream=case.upstream.masked_fill(ignored, float("nan"))
        )
        result = kc.ours(poisoned, frozen=frozen)
        assert torch.equal(result.logps, clean.logps)
        assert (result.logps[ignored] == 0).all()
        assert (result.hidden[ignored] == 0).all()
        assert not result.hidden.isnan().any()
        if not frozen:
            assert torch.equal(result.weight, clean.weight)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_score(rows, frozen):
    case = kc.make_case(rows, 8, 11, torch.float32, bias=True, ignored=2.0)
    result = kc.ours(case, frozen=frozen)
    assert torch.equal(result.logps, torch.zeros(rows))
    assert torch.equal(result.hidden, torch.zeros(rows, 8))
    if not frozen:
        assert not result.weight.any() and not result.bias.any()


def test_vocabulary_of_one():
    case = kc.make_case(7, 5, 1, torch.float32, bias=True, ignored=0)
    result = kc.ours(case)
    for value in result:
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_a_bias_of_minus_infinity_removes_tokens(frozen):
    case = kc.make_case(7, 5, 11, torch.float64, bias=True, ignored=0)
    case = case._replace(labels=case.labels.clamp(max=4))
    case.bias[5:] = float("-inf")
    kept = case._replace(weight=case.weight[:5], bias=case.bias[:5])
    result, exact = kc.ours(case, frozen=frozen), kc.truth(kept)
    assert kc.error(result.logps, exact.logps) < 1e-14
    assert kc.error(result.hidden, exact.hidden) < 1e-14


def test_leading_shape_strides_and_label_dtype_do_not_matter():
    case = kc.make_case(24, 8, 11, torch.float32)
    flat = rk.linear_logprobs(*case[:2], case.labels)
    hidden = case.hidden.reshape(2, 3, 4, 8).transpose(0, 1)
    labels = case.labels.reshape(2, 3, 4).transpose(0, 1).int()
    hidden.requires_grad_()
    weight = case.weight.T.contiguous().T.requires_grad_()
    shaped = rk.linear_logprobs(hidden, weight, labels)
    torch.testing.assert_close(shaped.transpose(0, 1).reshape(-1), flat)
    shaped.sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
    single = rk.linear_logprobs(case.hidden[0], case.weight, case.labels[0])
    assert single.shape == ()


def test_any_ignore_index():
    case = kc.make_case(9, 8, 11, torch.float32, ignored=0)
    labels = case.labels.clone()
    labels[::2] = 0
    expected = reference.linear_logprobs(*case[:2], labels, ignore_index=0)
    torch.testing.assert_close(rk.linear_logprobs(*case[:2], labels, ignore_index=0), expected)


def test_chunks_do_not_change_the_result():
    case = kc.make_case(33, 64, 97, torch.float64, bias=True)
    whole = kc.ours(case, softcap=8.0)
    for rows in (1, 5, 32, 1000):
        for value, expected in zip(kc.ours(case, softcap=8.0, chunk_rows=rows), whole, strict=True):
            assert kc.error(value, expected) < 1e-14


def test_one_log_prob_whatever_needs_gradient():
    case = kc.make_case(33, 64, 97, torch.bfloat16)
    results = [kc.ours(case, frozen=frozen).logps for frozen in (True, False)]
    results.append(rk.linear_logprobs(*case[:2], case.labels))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("trainable", [True, False])
def test_autocast_casts_like_a_linear_layer(trainable):
    case = kc.make_case(33, 64, 97, torch.float32, bias=True)
    half = kc.ours(case._replace(**{n: getattr(case, n).bfloat16() for n in case._fields[:3]}))
    hidden = case.hidden.bfloat16().requires_grad_()
    weight, bias = case.weight.clone().requires_grad_(trainable), case.bias.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = rk.linear_logprobs(hidden, weight, case.labels, bias=bias)
    (logps * case.upstream.float()).sum().backward()
    assert torch.equal(logps, half.logps)
    if trainable:
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, half.weight.float())
    double = kc.make_case(9, 8, 11, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rk.linear_logprobs(*double[:2], double.labels).dtype == torch.float64


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_does_not_reach_into_a_backend(backend, trainable):
    case = kc.make_case(9, 8, 11, torch.bfloat16)

    def run():
        hidden = case.hidden.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_(trainable)
        logps = rk.linear_logprobs(hidden, weight, case.labels)
        logps.sum().backward()
        return logps, hidden.grad

    with rk.use_backend(backend):
        outside = run()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_second_derivative_is_refused():
    case = kc.make_case(7, 5, 11, torch.float64)
    for frozen in (True, False):
        hidden = case.hidden.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_(not frozen)
        loss = rk.linear_logprobs(hidden, weight, case.labels).square().sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True)
