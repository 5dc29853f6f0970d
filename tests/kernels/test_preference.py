"""rdpo_loss and linear_preference_loss against plain PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, FLOOR, error

import realign_kernels as rk
from realign_kernels import objectives

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXAMPLES, LENGTH, WIDTH = 3, 5, 16
VOCABULARY = 97  # at least 64 columns, for the four chains of the AVX-512 row kernel
NAN = float("nan")
TRAINS = pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])


class Batch:
    """hidden (L, B, T, H), head, labels with ragged responses, reference (L, B).

    Example 0 has responses of one token.
    """

    def __init__(self, trains, dtype=torch.float32, leaves=3, device="cpu"):
        g = torch.Generator().manual_seed(0)
        shape = (leaves, EXAMPLES, LENGTH)
        hidden = torch.randn(*shape, WIDTH, generator=g, dtype=torch.float64)
        weight = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64) / 4
        bias = torch.randn(VOCABULARY, generator=g, dtype=torch.float64)
        lengths = torch.randint(1, LENGTH + 1, shape[:2], generator=g)
        lengths[:, 0] = 1
        labels = torch.randint(VOCABULARY, shape, generator=g)
        labels[torch.arange(LENGTH) >= lengths[..., None]] = -100
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        reference = torch.randn(leaves, EXAMPLES, generator=g, dtype=torch.float64) - 5 * lengths
        self.labels, self.reference = labels.to(device), reference.to(device, wide)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight, self.bias = (
            t.to(device, dtype).requires_grad_(trains) for t in (weight, bias)
        )
        self.leaves = [self.hidden, self.weight, self.bias][: 3 if trains else 1]

    def ours(self, objective=None, **changes):
        inputs = (self.hidden, self.weight, self.labels, self.reference)
        if objective is None:
            return rk.rdpo_loss(*inputs, bias=self.bias, **changes)
        return rk.linear_preference_loss(*inputs, objective, bias=self.bias, **changes)

    def packed(self, order, **changes):
        """The loss of the flat rows `order`."""
        ids = torch.arange(self.reference.numel(), device=order.device).repeat_interleave(LENGTH)
        ids = ids.masked_fill(self.labels.flatten() == -100, 10**6)[order].int()  # not read
        weights = changes.pop("token_weights", None)
        return rk.linear_preference_loss(
            self.hidden.flatten(0, 2)[order],
            self.weight,
            self.labels.flatten()[order].int(),
            self.reference,
            changes.pop("objective", objectives.rdpo()),
            bias=self.bias,
            sequence_ids=ids,
            token_weights=None if weights is None else weights.flatten()[order],
            **changes,
        )

    def by_hand(self, reduction="mean", token_weights=None, beta=0.1, visual_weight=1.0):
        """The paper's loss and log-probs with all logits, in fp64."""
        tokens = self.tokens([False] * 3)
        if token_weights is not None:
            tokens = tokens * token_weights.double()
        sums = torch.where(self.labels == -100, 0, tokens).sum(-1)
        s_w, s_l, s_v = sums - self.reference
        text = -torch.log(torch.sigmoid(beta * (s_w - s_l)))
        losses = text - visual_weight * torch.log(torch.sigmoid(beta * (s_w - s_v)))
        return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction](), sums

    def tokens(self, rivals):
        """fp64 log-prob of each label, or of the strongest other token in leaves of `rivals`."""
        logits = F.linear(*(t.double() for t in (self.hidden, self.weight, self.bias)))
        target = self.labels.clamp(min=0)[..., None]
        strongest = logits.scatter(-1, target, -torch.inf).argmax(-1, keepdim=True)
        flags = torch.tensor(rivals, device=logits.device)[:, None, None, None]
        target = torch.where(flags, strongest, target)
        return logits.log_softmax(-1).gather(-1, target).squeeze(-1)

    def agrees(self, value, expected, tolerance=2e-6, **options):
        """Gradients of the two scalars."""
        for a, b in zip(
            torch.autograd.grad(value, self.leaves, **options),
            torch.autograd.grad(expected, self.leaves, retain_graph=True),
            strict=True,
        ):
            assert error(a, b) < tolerance


@TRAINS
@pytest.mark.parametrize(
    ("name", "chunk_rows"), [("rdpo", 3), ("rdpo", None), ("released", 16)], ids=str
)
def test_examples_shorter_and_longer_than_a_chunk(setting, name, chunk_rows, trains):
    by_chunks(setting, objectives.get(name), chunk_rows, trains)


@pytest.mark.parametrize("setting", ["cpp-cpu-float32", f"triton-{DEVICE}-float32"], indirect=True)
def test_counts_of_examples_shorter_than_a_chunk(setting):
    """With a trained head, and losses from torch operations and from the fused kernel."""
    by_chunks(setting, objectives.mpo().at(0.3), 8, True)


def by_chunks(setting, objective, chunk_rows, trains):
    """Rows are packed in random order, with token weights."""
    batch = Batch(trains, setting.dtype, len(objective.leaves), setting.device)
    g = torch.Generator().manual_seed(1)
    weights = torch.rand(batch.labels.shape, generator=g).to(setting.device)
    tokens = batch.tokens([leaf.rival for leaf in objective.leaves]) * weights
    sums = torch.where(batch.labels == -100, 0, tokens).sum(-1)
    counts = (batch.labels != -100).sum(-1)
    expected = objective(sums, batch.reference.double(), "mean", counts)
    order = torch.randperm(batch.labels.numel(), generator=g).to(setting.device)
    out = batch.packed(order, objective=objective, token_weights=weights, chunk_rows=chunk_rows)
    floor = 8 * FLOOR[setting.dtype]
    assert error(out.loss, expected.loss) <= floor and error(out.logps, sums) <= floor
    batch.agrees(out.loss, expected.loss, 2 * floor)


def preset_from_hidden_states(setting, name, reduction):
    """Value, outputs, and a gradient through the loss and through out.logps."""
    objective = objectives.get(name)
    batch = Batch(False, setting.dtype, len(objective.leaves), setting.device)
    tokens = batch.tokens([leaf.rival for leaf in objective.leaves])
    counts = (batch.labels != -100).sum(-1)
    sums = torch.where(batch.labels == -100, 0, tokens).sum(-1)
    expected = objective(sums, batch.reference.double(), reduction, counts)
    found = batch.ours(objective, reduction=reduction)
    floor = 8 * FLOOR[setting.dtype]
    for field in ("loss", "logps", "rewards", "term_losses"):
        assert error(getattr(found, field), getattr(expected, field)) <= floor, field
    assert torch.equal(found.token_counts, counts)
    both = (3 * out.loss.sum() + (out.logps**2).mean() / 100 for out in (found, expected))
    batch.agrees(*both, floor)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [("mdpo", "mean"), ("mdpo", "none"), ("released", "mean"), ("ipo", "none"), ("mpo", "mean")],
)
def test_objectives_with_and_without_fused_loss(setting, name, reduction):
    preset_from_hidden_states(setting, name, reduction)


@pytest.mark.parametrize("setting", ["torch-cpu-float64"], indirect=True)
@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_preset(setting, name):
    preset_from_hidden_states(setting, name, "sum")


@TRAINS
def test_rdpo_is_the_papers_loss(trains):
    for beta, visual_weight in ((0.01, 1.0), (0.1, 0.0), (0.1, 0.5), (1.0, 1.0), (10.0, 0.5)):
        batch = Batch(trains, torch.float64)
        out = batch.ours(beta=beta, visual_weight=visual_weight)
        loss, _ = batch.by_hand(beta=beta, visual_weight=visual_weight)
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-13)
        batch.agrees(out.loss, loss, 1e-9)


def test_output_is_what_trl_logs():
    batch = Batch(False)
    out = batch.ours(beta=0.3)
    assert out._fields == ("loss", "logps", "rewards", "token_counts")
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.rewards, 0.3 * (out.logps - batch.reference).detach())
    assert torch.equal(out.token_counts, (batch.labels != -100).sum(-1))
    assert out.token_counts.dtype == torch.int64
    assert out.logps.requires_grad and not out.rewards.requires_grad
    _, sums = batch.by_hand()
    torch.testing.assert_close(out.logps.double(), sums, rtol=1e-5, atol=1e-5)


@TRAINS
def test_backward_twice(cpu_backend, trains):
    batch = Batch(trains)
    out, (loss, _) = batch.ours(chunk_rows=13), batch.by_hand()
    for factor in (1.0, 3.0, 0.5):
        batch.agrees(factor * out.loss, factor * loss, retain_graph=True)
    expected = [g.clone() for g in torch.autograd.grad(loss, batch.leaves, retain_graph=True)]
    out = batch.ours(chunk_rows=13)
    for times in (1, 2, 3):  # a gradient that was passed on is not passed again
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
            out = batch.ours(reduction=reduction, chunk_rows=13)
            assert out.loss.shape == loss.shape
            value = use_loss * out.loss.sum() + use_logps * (out.logps * part).sum()
            expected = use_loss * loss.sum() + use_logps * (logps * part).sum()
            batch.agrees(value, expected, retain_graph=again)
            if again:
                batch.agrees(value, expected)


@TRAINS
def test_no_second_derivative(cpu_backend, trains):
    batch = Batch(trains)
    with pytest.raises(RuntimeError, match="no second derivative. Call backward without"):
        torch.autograd.grad(batch.ours().loss, batch.hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_some_inputs_train(cpu_backend, reduction):
    for flags in itertools.product((False, True), repeat=3):
        batch = Batch(True)
        tensors = (batch.hidden, batch.weight, batch.bias)
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        batch.leaves = [t for t in tensors if t.requires_grad]
        out, (loss, _) = batch.ours(reduction=reduction, chunk_rows=13), batch.by_hand(reduction)
        assert out.loss.requires_grad == any(flags)
        torch.testing.assert_close(out.loss.double(), loss)
        if any(flags):
            batch.agrees(out.loss.sum(), loss.sum())


@TRAINS
def test_token_weights_of_any_dtype(cpu_backend, trains):
    batch = Batch(trains)
    g = torch.Generator().manual_seed(4)
    wide = torch.rand(batch.labels.shape, generator=g) * 3
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
    for dtype, reduction in itertools.product(dtypes, ("mean", "none")):
        weights = wide.to(dtype)
        out = batch.ours(token_weights=weights, reduction=reduction, chunk_rows=13)
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
def test_packed_rows_of_other_dtypes(cpu_backend, trains):
    """fp64 references with fp32 inputs, int32 labels and sequence numbers, in random order."""
    batch = Batch(trains)
    loss, logps = batch.by_hand()
    batch.reference = batch.reference.double()
    order = torch.randperm(batch.labels.numel(), generator=torch.Generator().manual_seed(2))
    kept = (batch.labels.flatten()[order] != -100) | (order % 2 == 0)  # without some ignored rows
    out = batch.packed(order[kept], chunk_rows=5)
    torch.testing.assert_close(out.logps.double(), logps, rtol=1e-5, atol=1e-5)
    batch.agrees(out.loss, loss)


@TRAINS
def test_no_examples(cpu_backend, trains):
    for reduction in ("sum", "none"):
        hidden = torch.zeros(3, 0, 2, 4, requires_grad=True)
        weight = torch.zeros(6, 4, requires_grad=trains)
        labels = torch.zeros(3, 0, 2, dtype=torch.long)
        out = rk.rdpo_loss(hidden, weight, labels, torch.zeros(3, 0), reduction=reduction)
        assert out.loss.sum() == 0 and out.logps.shape == (3, 0)
        out.loss.sum().backward()
        assert hidden.grad.shape == hidden.shape


def test_head_settings_reach_the_head():
    batch = Batch(False, torch.float64)
    head = {"softcap": 5.0, "temperature": 0.7, "chunk_rows": 5, "ignore_index": 7}
    batch.labels = torch.where(batch.labels == -100, 7, batch.labels)
    inputs = (batch.hidden, batch.weight, batch.labels)
    sums = rk.linear_logprobs(*inputs, bias=batch.bias, **head).sum(-1)
    torch.testing.assert_close(batch.ours(**head).logps, sums)


def test_module_is_the_function():
    batch = Batch(False, torch.float64)
    settings = {
        "beta": 0.2,
        "visual_weight": 0.5,
        "softcap": 6.0,
        "temperature": 0.9,
        "chunk_rows": 7,
        "reduction": "sum",
    }
    module = rk.RDPOLoss(**settings)
    inputs = (batch.hidden, batch.weight, batch.labels, batch.reference)
    for a, b in zip(module(*inputs, bias=batch.bias), batch.ours(**settings), strict=True):
        assert torch.equal(a, b)
    assert "beta=0.2" in repr(module)
    with pytest.raises(ValueError, match="beta must be"):
        rk.RDPOLoss(beta=-1)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        rk.RDPOLoss(reduction="avg")
