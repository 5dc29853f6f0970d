"""The loss under what callers do to it: odd weights, second backwards, gradients from two sides."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error

import realign_kernels as rk

EXAMPLES, LENGTH, WIDTH, VOCABULARY = 3, 4, 7, 19
NAN = float("nan")
TRAINS = pytest.mark.parametrize("trains", [True, False], ids=["trainable", "frozen"])


class Batch:
    """hidden (3, B, T, H), weight, bias, labels (3, B, T), reference (3, B); head trains or not."""

    def __init__(self, trains, dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        shape = (3, EXAMPLES, LENGTH)
        self.hidden = torch.randn(*shape, WIDTH, generator=g).to(dtype).requires_grad_()
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype).requires_grad_(trains)
        self.bias = torch.randn(VOCABULARY, generator=g).to(dtype).requires_grad_(trains)
        self.labels = torch.randint(VOCABULARY, shape, generator=g)
        self.labels[..., 1:][torch.rand(3, EXAMPLES, LENGTH - 1, generator=g) < 0.4] = -100
        self.reference = torch.randn(3, EXAMPLES, generator=g) - 9
        self.leaves = [self.hidden, self.weight, self.bias][: 3 if trains else 1]

    def ours(self, chunk_rows=13, **changes):
        inputs = (self.hidden, self.weight, self.labels, self.reference)
        return rk.rdpo_loss(*inputs, bias=self.bias, chunk_rows=chunk_rows, **changes)

    def by_hand(self, reduction="mean", token_weights=None):
        """loss and logps, with a graph, in fp64."""
        hidden, weight, bias = (t.double() for t in (self.hidden, self.weight, self.bias))
        logps = F.linear(hidden, weight, bias).log_softmax(-1)
        logps = logps.gather(-1, self.labels.clamp(min=0)[..., None]).squeeze(-1)
        if token_weights is not None:
            logps = logps * token_weights.double()
        sums = torch.where(self.labels == -100, 0, logps).sum(-1)
        margins = 0.1 * (sums - self.reference)
        losses = -F.logsigmoid(margins[0] - margins[1:]).sum(0)
        return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction](), sums

    def agrees(self, value, expected, tolerance=2e-6, **options):
        """Gradients of the two scalars."""
        for a, b in zip(
            torch.autograd.grad(value, self.leaves, **options),
            torch.autograd.grad(expected, self.leaves, retain_graph=True),
            strict=True,
        ):
            assert error(a, b) < tolerance


@TRAINS
def test_backward_twice(cpu_backend, trains):
    batch = Batch(trains)
    out, (loss, _) = batch.ours(), batch.by_hand()
    for factor in (1.0, 3.0, 0.5):
        batch.agrees(factor * out.loss, factor * loss, retain_graph=True)
    loss.backward()
    expected = [leaf.grad.clone() for leaf in batch.leaves]
    batch = Batch(trains)
    out = batch.ours()
    for times in (1, 2, 3):  # a gradient that was given away is not given again
        out.loss.backward(retain_graph=True)
        for leaf, once in zip(batch.leaves, expected, strict=True):
            assert error(leaf.grad, times * once) < 2e-6


@TRAINS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_from_the_loss_and_from_the_logps(cpu_backend, reduction, trains):
    batch = Batch(trains)
    loss, logps = batch.by_hand(reduction)
    part = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    for use_loss, use_logps in ((1, 0), (0, 1), (1, 1)):
        for again in (False, True):
            out = batch.ours(reduction=reduction)
            assert out.loss.shape == loss.shape
            value = use_loss * out.loss.sum() + use_logps * (out.logps * part).sum()
            expected = use_loss * loss.sum() + use_logps * (logps * part).sum()
            batch.agrees(value, expected, retain_graph=again)
            if again:
                batch.agrees(value, expected)
    margins = 2 * (out.logps[0] - out.logps[1]).mean()  # as a trainer may add a penalty
    batch = Batch(trains)
    out, (loss, logps) = batch.ours(), batch.by_hand()
    margins = (out.logps[0] - out.logps[1]).square().mean()
    batch.agrees(out.loss + margins, loss + (logps[0] - logps[1]).square().mean())


@TRAINS
def test_no_second_derivative_and_it_says_so(cpu_backend, trains):
    batch = Batch(trains)
    with pytest.raises(RuntimeError, match="no second derivative: call backward without"):
        torch.autograd.grad(batch.ours().loss, batch.hidden, create_graph=True)


@TRAINS
def test_only_some_inputs_train(cpu_backend, trains):
    for flags in itertools.product((False, True), repeat=3):
        batch = Batch(True)
        tensors = (batch.hidden, batch.weight, batch.bias)
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        batch.leaves = [t for t in tensors if t.requires_grad]
        out = batch.ours(reduction="mean" if trains else "none")
        assert out.loss.requires_grad == any(flags)
        loss, _ = batch.by_hand("mean" if trains else "none")
        torch.testing.assert_close(out.loss.double(), loss)
        if any(flags):
            batch.agrees(out.loss.sum(), loss.sum())


@TRAINS
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int64", "bool"])
def test_token_weights_of_any_dtype(cpu_backend, dtype, trains):
    batch = Batch(trains)
    g = torch.Generator().manual_seed(4)
    weights = (torch.rand(batch.labels.shape, generator=g) * 3).to(getattr(torch, dtype))
    for reduction in ("mean", "none"):
        out = batch.ours(token_weights=weights, reduction=reduction)
        loss, logps = batch.by_hand(reduction, token_weights=weights)
        torch.testing.assert_close(out.logps.double(), logps, rtol=1e-5, atol=1e-5)
        batch.agrees(out.loss.sum() + out.logps.sum(), loss.sum() + logps.sum())


@TRAINS
def test_token_weights_that_are_not_finite(cpu_backend, trains):
    batch = Batch(trains)
    ignored = batch.labels == -100
    weights = torch.rand(batch.labels.shape)
    loss, logps = batch.by_hand(token_weights=weights)
    for poison in (NAN, float("inf")):
        out = batch.ours(token_weights=weights.masked_fill(ignored, poison))
        batch.agrees(out.loss + out.logps.sum(), loss + logps.sum(), retain_graph=True)
        batch.agrees(out.loss + out.logps.sum(), loss + logps.sum())
        row = int((~ignored).flatten().nonzero()[3])
        broken = weights.clone().flatten()
        broken[row] = poison
        with pytest.raises(rk.NonFiniteError, match=rf"token_weights.*\[{row}\]") as caught:
            batch.ours(token_weights=broken.view(weights.shape))
        assert caught.value.rows == [row]


@TRAINS
def test_half_gradients_survive_a_loss_scale(trains):
    """GradScaler multiplies the loss so that fp16 gradients do not underflow."""
    batch = Batch(trains, torch.float16)
    batch.reference = batch.reference - 90 * torch.tensor([[1.0], [-1], [-1]])
    out, (loss, _) = batch.ours(), batch.by_hand()
    assert 0 < loss < 1e-6
    batch.agrees(2.0**20 * out.loss, 2.0**20 * loss, tolerance=5e-3)


@TRAINS
def test_rewards_of_wide_references(cpu_backend, trains):
    """fp64 references beside fp32 inputs, and int32 labels and sequence numbers, in any order."""
    batch = Batch(trains)
    loss, logps = batch.by_hand()
    order = torch.randperm(batch.labels.numel(), generator=torch.Generator().manual_seed(2))
    ids = torch.arange(3 * EXAMPLES).repeat_interleave(LENGTH)[order].int()
    ids[batch.labels.flatten()[order] == -100] = 10**6  # not read
    hidden, labels = batch.hidden.flatten(0, 2)[order], batch.labels.flatten()[order].int()
    inputs = (hidden, batch.weight, labels, batch.reference.double())
    out = rk.rdpo_loss(*inputs, bias=batch.bias, sequence_ids=ids, chunk_rows=5)
    torch.testing.assert_close(out.logps.double(), logps, rtol=1e-5, atol=1e-5)
    batch.agrees(out.loss, loss)
