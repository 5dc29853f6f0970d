"""The operators: opcheck, and torch.compile against eager mode."""

import kernel_cases as kc
import pytest
import torch

import realign_kernels as rk
from realign_kernels import reference


@pytest.mark.parametrize(
    ("frozen", "softcap", "temperature", "ignored"),
    [(True, 5.0, 0.7, 0.3), (False, 5.0, 0.7, 0.3), (False, None, 1.0, 2.0)],
)
@pytest.mark.parametrize("device", kc.DEVICES)
def test_opcheck_linear_logprobs(device, frozen, ignored, softcap, temperature):
    case = kc.make_case(9, 8, 11, torch.float32, bias=True, ignored=ignored, device=device)
    weight, bias = (t.requires_grad_(not frozen) for t in (case.weight, case.bias))
    args = (case.hidden.requires_grad_(), weight, case.labels, bias, None, softcap, temperature)
    args = (*args, -100, 4, "", frozen)
    torch.library.opcheck(torch.ops.realign.linear_logprobs, args)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (True, True, True)])
@pytest.mark.parametrize("device", kc.DEVICES)
def test_opcheck_linear_logprobs_backward(device, wanted):
    case = kc.make_case(9, 8, 11, torch.bfloat16, bias=True, device=device)
    args = (case.upstream.float(), case.hidden.T.contiguous().T, case.weight, case.labels)
    args = (*args, case.bias, None, 1.0, -100, 4, "", list(wanted), "")
    torch.library.opcheck(torch.ops.realign.linear_logprobs_backward, args)


@pytest.mark.parametrize("device", kc.DEVICES)
def test_opcheck_sequence_sums(device):
    logps = torch.randn(9, device=device, requires_grad=True)
    labels = torch.tensor([0, -100, 1, 1, 1, 1, 1, 1, 1], device=device)
    ids = torch.tensor([0, -5, 1, 2, 3, 4, 5, 5, 0], device=device)
    args = (logps, labels, ids, torch.zeros(3, 2, device=device), -100)
    torch.library.opcheck(torch.ops.realign.sequence_sums, args)


def test_sequence_sums_is_the_specification():
    g = torch.Generator().manual_seed(0)
    logps = torch.randn(50, generator=g).requires_grad_()
    labels = torch.where(torch.rand(50, generator=g) < 0.3, -100, 1)
    ids = torch.randint(6, (50,), generator=g)
    sums, counts = torch.ops.realign.sequence_sums(logps, labels, ids, torch.zeros(3, 2), -100)
    plain = logps.detach().double().requires_grad_()
    expected, expected_counts = reference.sequence_sums(plain, labels, ids, 6)
    torch.testing.assert_close(sums.flatten().double(), expected)
    assert torch.equal(counts.flatten(), expected_counts)
    scale = torch.arange(1.0, 7.0)
    (sums.flatten() * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(logps.grad.double(), plain.grad)


def losses(hidden, weight, labels, ref, bias):
    out = rk.rdpo_loss(hidden, weight, labels, ref, bias=bias, temperature=0.9)
    tokens = rk.linear_logprobs(hidden, weight, labels, bias=bias, softcap=9.0)
    return out, tokens


@pytest.mark.parametrize(("backend", "trainable"), [("aot_eager", False), ("inductor", True)])
@pytest.mark.parametrize("device", kc.DEVICES)
def test_compiled_equals_eager_in_one_graph(device, trainable, backend):
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    g = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(3, 2, 4, 8, generator=g),
        torch.randn(11, 8, generator=g),
        torch.randint(11, (3, 2, 4), generator=g),
        torch.randn(3, 2, generator=g),
        torch.randn(11, generator=g),
    )
    results = []
    for call in (losses, compiled):
        hidden, weight, labels, ref, bias = (t.to(device, copy=True) for t in inputs)
        labels[0, 0, 1:] = -100
        hidden.requires_grad_()
        weight.requires_grad_(trainable)
        bias.requires_grad_(trainable)
        out, tokens = call(hidden, weight, labels, ref, bias)
        (out.loss + tokens.exp().sum()).backward()
        grads = [t.grad for t in (hidden, weight, bias) if t.requires_grad]
        results.append([*out, tokens, *grads])
        assert isinstance(out, rk.RDPOOutput)
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_compiled_code_still_checks_values_and_obeys_use_backend(monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile(rk.rdpo_loss, fullgraph=True, backend="aot_eager")
    hidden, weight = torch.randn(3, 2, 4, 8), torch.randn(11, 8)
    labels, ref = torch.randint(11, (3, 2, 4)), torch.zeros(3, 2)
    compiled(hidden, weight, labels, ref)
    with pytest.raises(ValueError, match=r"24 labels are outside \[0, 11\)"):
        compiled(hidden, weight, labels + 11, ref)
    with pytest.raises(rk.NonFiniteError, match="hidden holds NaN"):
        compiled(hidden * float("nan"), weight, labels, ref)
    with pytest.raises(rk.NonFiniteError, match="reference_logps holds NaN"):
        compiled(hidden, weight, labels, ref * float("nan"))

    calls = []
    monkeypatch.setattr(reference, "linear_logits", lambda *a: calls.append(1) or a[0] @ a[1].T)
    with rk.use_backend("reference"):
        compiled(hidden, weight, labels, ref)
    assert calls


def test_compiled_with_symbolic_shapes_and_settings():
    """dynamic=True makes numbers symbolic, which math.isfinite does not support."""
    loss = rk.RDPOLoss(beta=0.3, temperature=0.7, softcap=9.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for examples in (2, 5):
        hidden = torch.randn(3, examples, 4, 8, requires_grad=True)
        labels = torch.randint(31, (3, examples, 4))
        inputs = hidden, torch.randn(31, 8), labels, torch.zeros(3, examples)
        found, plain = compiled(*inputs).loss, loss(*inputs).loss
        torch.testing.assert_close(found, plain)
        grads = (torch.autograd.grad(one, hidden)[0] for one in (found, plain))
        torch.testing.assert_close(*grads)
