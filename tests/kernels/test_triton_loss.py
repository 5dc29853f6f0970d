"""The fused loss against the objective and autograd, in fp64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, loss

from realign_kernels import objectives
from realign_kernels.objectives import AnchorSigmoid, Leaf, PairSigmoid

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:.*encountered:RuntimeWarning"
    ),  # from numpy in the interpreter
]
NAN, INF = float("nan"), float("inf")
LEAVES = tuple(Leaf(f"response_{i}", "image") for i in range(5))
PAIR = PairSigmoid(name="plain", positive=0, negative=1)
OBJECTIVES = {
    "dpo": objectives.dpo(),
    "rdpo": objectives.rdpo(0.3, visual_weight=0.5),
    "mdpo": objectives.mdpo(0.2, 0.7, 1.3, delta=0.4),
    "weight 0": objectives.rdpo(visual_weight=0.0),
    "five leaves": objectives.Objective(
        "five",
        LEAVES,
        (
            PairSigmoid(name="a", positive=4, negative=0, weight=0.25),
            AnchorSigmoid(name="b", leaf=3, delta=-1.0),
            PairSigmoid(name="c", positive=4, negative=2),
        ),
        1.0,
    ),
}


@pytest.fixture(autouse=True)
def interpreted():
    with tc.interpreted():
        yield


def make(leaves, examples, rows, *, order="mixed"):
    g = torch.Generator().manual_seed(0)
    sequences = leaves * examples
    ids = torch.arange(rows) % sequences
    ids = ids[torch.randperm(rows, generator=g)] if order == "mixed" else ids.sort().values
    logps = -torch.rand(rows, generator=g) * 6
    table = -torch.rand(leaves, examples, generator=g) * 6 * rows / sequences
    return [t.to(DEVICE) for t in (logps, ids, table)]


def expected(logps, ids, table, objective, reduction):
    leaf = logps.double().requires_grad_()
    sums = leaf.new_zeros(table.numel()).index_add(0, ids, leaf).view(table.shape)
    wide = objective(sums, table.double(), reduction)
    wide.loss.sum().backward()
    return wide, leaf.grad


def check(output, logps, ids, table, objective, reduction="mean"):
    wide, grad = expected(logps, ids, table, objective, reduction)
    pairs = {
        "loss": (output.loss, wide.loss.sum()),
        "coefficients": (output.coefficients, grad),
        "sums": (output.sums, wide.logps),
        "rewards": (output.rewards, wide.rewards),
        "term_losses": (output.term_losses, wide.term_losses),
    }
    for name, (value, exact) in pairs.items():
        assert value.dtype == torch.float32 and value.shape == exact.shape, name
        torch.testing.assert_close(value.double(), exact.detach(), rtol=3e-7, atol=1e-9, msg=name)
    counts = torch.bincount(ids, minlength=table.numel()).view(table.shape)
    assert torch.equal(output.counts, counts)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_autograd(objective, reduction):
    case = make(len(objective.leaves), 3, 120)
    output = loss.preference_sums(*case, objective, reduction=reduction)
    check(output, *case, objective, reduction)


@pytest.mark.parametrize("rows", [9, 255, 256, 257, 700])
@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_rows_in_any_number_and_order(rows, order):
    objective = objectives.rdpo()
    case = make(3, 2, rows, order=order)
    check(loss.preference_sums(*case, objective), *case, objective)


@pytest.mark.parametrize("examples", [1, 20])
def test_more_and_fewer_examples_than_a_block(examples, monkeypatch):
    monkeypatch.setattr(loss, "LOSS_BLOCK", 16)
    objective = objectives.dpo()
    case = make(2, examples, 4 * examples)
    check(loss.preference_sums(*case, objective), *case, objective)


def test_sums_of_many_tokens_are_exact():
    """A policy near its reference: rewards are small differences of sums near -7500."""
    objective = objectives.dpo(1.0)
    case = make(2, 1, 5000)
    case[2] = expected(*case, objective, "sum")[0].logps.detach() - 1e-3
    output = loss.preference_sums(*case, objective)
    check(output, *case, objective)
    again = loss.preference_sums(*case, objective)
    assert all(torch.equal(one, other) for one, other in zip(output, again, strict=True))


@pytest.mark.parametrize("margin", [-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4])
def test_large_margins(margin):
    """Losses and derivatives keep their relative accuracy down to the range limit of fp32."""
    objective = objectives.dpo(1.0)
    logps = torch.tensor([margin, 0.0], device=DEVICE)
    zero = torch.zeros(2, 1, device=DEVICE)
    output = loss.preference_sums(logps, torch.arange(2, device=DEVICE), zero, objective)
    e = math.exp(-abs(margin))
    exact = max(-margin, 0) + math.log1p(e)
    slope = (1 if margin < 0 else e) / (1 + e)
    assert output.loss.item() == pytest.approx(exact, rel=1e-6, abs=1e-38)
    assert output.coefficients.tolist() == pytest.approx([-slope, slope], rel=1e-6, abs=1e-38)


def test_strided_inputs():
    objective = objectives.dpo()
    logps, ids, table = make(2, 3, 60)
    wide = [torch.stack([t, t], 1)[:, 0] for t in (logps, ids)]
    output = loss.preference_sums(*wide, table.T.contiguous().T, objective)
    check(output, logps, ids, table, objective)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_values_reach_only_the_loss_of_their_example(value):
    logps, ids, table = make(2, 3, 60)
    row = int((ids % 3 == 1).nonzero()[0])
    logps[row] = value
    output = loss.preference_sums(logps, ids, table, objectives.dpo())
    assert output.term_losses[0].isfinite().tolist()[::2] == [True, True]
    assert not output.sums.isfinite().all()
    if math.isnan(value):
        assert output.loss.isnan() and output.coefficients[row].isnan()


def test_no_examples():
    empty = torch.zeros(0, device=DEVICE)
    args = (empty, empty.long(), torch.zeros(2, 0, device=DEVICE), objectives.dpo())
    output = loss.preference_sums(*args, reduction="sum")
    assert output.loss == 0 and output.sums.shape == (2, 0)


def test_supported_objectives():
    @dataclass(frozen=True, kw_only=True)
    class Mine(PairSigmoid):
        def __call__(self, values):
            return values.rewards[0]

    @dataclass(frozen=True)
    class Wider(objectives.Objective):
        extra: int = 0

    plain = objectives.dpo()
    for name in ("dpo", "rdpo", "mdpo"):
        assert loss.supports(objectives.get(name))
    mine = Mine(name="pair", positive=0, negative=1)
    refused = [
        objectives.Objective("mine", plain.leaves, (mine,)),
        objectives.Objective("both", plain.leaves, (mine, PAIR)),
        Wider("wider", plain.leaves, plain.terms),
        objectives.cdpo(),
        objectives.hinge(),
        objectives.ipo(),
        objectives.sigmoid_norm(),
        objectives.simpo(),
        objectives.bco_pair(),
        replace(plain, leaves=(plain.leaves[0]._replace(detached=True), plain.leaves[1])),
        replace(plain, terms=(AnchorSigmoid(name="anchor", leaf=0, below=True),)),
    ]
    for objective in refused:
        assert not loss.supports(objective), objective


def test_an_unknown_field_is_not_supported():
    @dataclass(frozen=True, kw_only=True)
    class Changed(PairSigmoid):
        margin_floor: float = 0.0

    term = Changed(name="x", positive=0, negative=1)
    assert not loss._known(term, "name", "weight", "positive", "negative")
