"""The fused loss against the objective and autograd, in fp64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, loss

import realign_kernels as rk
from realign_kernels import objectives
from realign_kernels.objectives import (
    AnchorSigmoid,
    Leaf,
    LinearSigmoid,
    PairRobust,
    PairSigmoid,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:.*encountered:RuntimeWarning"
    ),  # from numpy in the interpreter
]
NAN, INF = float("nan"), float("inf")
LEAVES = tuple(Leaf(f"response_{i}", "image") for i in range(5))
PAIR = PairSigmoid(name="plain", positive=0, negative=1)
SIMPO = objectives.simpo(2.0, gamma=1.5)
MPO = objectives.mpo(0.3, 0.7, 0.4, 0.9)
FUSED = {
    "dpo": objectives.dpo(),
    "cdpo": objectives.cdpo(0.3, label_smoothing=0.2),
    "robust": objectives.robust(0.3, label_smoothing=0.2),
    "rdpo": objectives.rdpo(0.3, visual_weight=0.5),
    "mdpo": objectives.mdpo(0.2, 0.7, 1.3, delta=0.4),
    "mfpo": objectives.mfpo(delta=-0.4),
    "svco": objectives.svco(0.3),
    "ovip": objectives.ovip(0.3),
    "chip": objectives.chip(0.3),
    "released": objectives.released(0.3, 0.5),
    "nca_pair": objectives.nca_pair(0.3),
    "bco_pair": objectives.bco_pair(0.3),
    "sigmoid_norm": objectives.sigmoid_norm(2.0),
    "rpo": objectives.rpo(0.3, nll_weight=0.6),
    "mpo": MPO,
    "simpo": SIMPO,
    "cpo": objectives.cpo(0.3, nll_weight=0.6),
    "sft": objectives.sft(),
}
OBJECTIVES = FUSED | {
    "weight 0": objectives.rdpo(visual_weight=0.0),
    "sum": objectives.get("sft+sigmoid+bco_pair", (1, 0.8, 0.2)),
    "five leaves": objectives.Objective(
        "five",
        LEAVES,
        (
            PairSigmoid(name="a", positive=4, negative=0, weight=0.25),
            AnchorSigmoid(name="b", leaf=3, delta=-1.0),
            PairSigmoid(name="c", positive=4, negative=2, target=0.7, label_smoothing=0.3),
            AnchorSigmoid(name="d", leaf=1, delta=0.5, below=True, shifted=True),
            AnchorSigmoid(name="e", leaf=2, reward="mean_logp", below=True, weight=0.5),
            PairRobust(name="f", positive=0, negative=3, reward="logp"),
            LinearSigmoid(name="g", coefficients=((2, 0.5), (4, -1.5)), reward="mean_log_ratio"),
        ),
        1.0,
    ),
}
for name in (
    "cdpo",
    "robust",
    "nca_pair",
    "bco_pair",
    "sigmoid_norm",
    "rpo",
    "mpo",
    "simpo",
    "cpo",
):
    OBJECTIVES[f"visual {name}"] = objectives.with_visual(FUSED[name], 0.6)
REFUSED = {
    "hinge": "'text' (PairHinge)",
    "ipo": "'text' (PairSquared)",
    "ipo_norm": "'text' (PairSquared)",
    "exo_pair": "'text' (PairExo)",
    "sppo_hard": "'chosen' (AnchorSquared)",
    "apo_zero": "'chosen' (AnchorProbability)",
    "apo_down": "'chosen' (AnchorProbability)",
    "discopop": "'text' (PairDiscoPOP)",
    "orpo": "'odds_ratio' (OddsRatio)",
    "adavip": "'text_and_visual' (SoftmaxNegatives)",
    "mispdpo": "'visual' (SoftmaxNegatives)",
    "lpoi": "'visual' (PlackettLuce)",
    "symmpo": "'margin' (MarginDifference)",
}


@pytest.fixture(autouse=True)
def interpreted():
    with tc.interpreted():
        yield


def make(leaves, examples, rows, *, order="mixed"):
    g = torch.Generator().manual_seed(0)
    sequences = leaves * examples
    ids = torch.randint(sequences, (rows,), generator=g)
    ids[:sequences] = torch.arange(sequences)
    ids = ids[torch.randperm(rows, generator=g)] if order == "mixed" else ids.sort().values
    logps = -torch.rand(rows, generator=g) * 6
    table = -torch.rand(leaves, examples, generator=g) * 6 * rows / sequences
    return [t.to(DEVICE) for t in (logps, ids, table)]


def expected(logps, ids, table, objective, reduction):
    leaf = logps.double().requires_grad_()
    sums = leaf.new_zeros(table.numel()).index_add(0, ids, leaf).view(table.shape)
    counts = torch.bincount(ids, minlength=table.numel()).view(table.shape)
    wide = objective(sums, table.double(), reduction, counts)
    wide.loss.sum().backward()
    return wide, leaf.grad


def check(output, logps, ids, table, objective, reduction="mean", atol=1e-9):
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
        torch.testing.assert_close(value.double(), exact.detach(), rtol=3e-7, atol=atol, msg=name)
    assert torch.equal(output.counts, wide.token_counts)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_against_autograd(objective):
    case = make(len(objective.leaves), 2, 60)
    objective = objective.at(0.3)
    check(loss.preference_sums(*case, objective), *case, objective)
    # Far values, with rewards of 1e4 and the shift on the device. beta is fp32 in the kernel, so
    # a margin near 0 has an error of 6e-8 times its rewards.
    objective = objective.at(torch.tensor(-700.5, dtype=torch.float64, device=DEVICE))
    case[0], case[2] = 3000 * case[0], 3000 * case[2].flip(0)
    output = loss.preference_sums(*case, objective, reduction="sum")
    check(output, *case, objective, "sum", atol=1e-4 * objective.beta)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction):
    case = make(3, 3, 120)
    output = loss.preference_sums(*case, FUSED["mdpo"], reduction=reduction)
    check(output, *case, FUSED["mdpo"], reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_shift_on_the_device_equals_the_same_number(dtype):
    case = make(2, 2, 60)
    on_device = MPO.at(torch.tensor(-0.75, dtype=dtype, device=DEVICE))
    outputs = [loss.preference_sums(*case, objective) for objective in (on_device, MPO.at(-0.75))]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert outputs[0].loss != loss.preference_sums(*case, MPO).loss


def test_without_a_reference_its_values_are_not_used():
    case = make(2, 2, 60)
    for name in ("simpo", "cpo", "sft"):
        case[2] = torch.full_like(case[2], NAN)[: len(FUSED[name].leaves)]
        case[1] %= case[2].numel()
        check(loss.preference_sums(*case, FUSED[name]), *case, FUSED[name])


def test_a_response_without_tokens_reaches_only_the_loss_of_its_example():
    """The trained head calls the kernel with the rows of a few examples at a time."""
    logps, ids, table = make(2, 3, 60)
    part = ids % 3 == 1
    expected = loss.preference_sums(logps, ids, table, SIMPO).coefficients[part]
    output = loss.preference_sums(logps[part], ids[part], table, SIMPO)
    assert torch.equal(output.coefficients, expected)
    assert output.term_losses.isnan().tolist() == [[True, False, True]]


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
@pytest.mark.parametrize("name", ["dpo", "bco_pair"])
def test_large_margins(name, margin):
    """Losses and derivatives keep their relative accuracy down to the range limit of fp32."""
    terms = {"dpo": 1, "bco_pair": 2}[name]
    logps = torch.tensor([margin, 0.0 if name == "dpo" else -margin], device=DEVICE)
    zero = torch.zeros(2, 1, device=DEVICE)
    objective = objectives.get(name, beta=1.0)
    output = loss.preference_sums(logps, torch.arange(2, device=DEVICE), zero, objective)
    e = math.exp(-abs(margin))
    exact = terms * (max(-margin, 0) + math.log1p(e))
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


def test_every_preset_is_fused_or_refused_with_its_term():
    assert {*FUSED, *REFUSED} == set(objectives.PRESETS)
    for name, term in REFUSED.items():
        assert loss.encode(objectives.get(name)) == f"term {term} has no fused kernel"


def test_subclasses_and_stop_gradients_are_refused():
    class Mine(PairSigmoid):
        def __call__(self, values):
            return values.rewards[0]

    class Wider(objectives.Objective):
        pass

    plain = objectives.dpo()
    mine = Mine(name="pair", positive=0, negative=1)
    detached = (plain.leaves[0]._replace(detached=True), plain.leaves[1])
    assert "'pair' (Mine)" in loss.encode(replace(plain, terms=(mine,)))
    assert "'pair' (Mine)" in loss.encode(replace(plain, terms=(PAIR, mine)))
    assert "Wider 'dpo'" in loss.encode(Wider("dpo", plain.leaves, plain.terms))
    assert "detached=True" in loss.encode(replace(plain, leaves=detached))


def test_fields_that_the_kernel_does_not_know_are_refused(monkeypatch):
    """The fields may be added later to a term, an objective or a leaf."""

    @dataclass(frozen=True, kw_only=True)
    class Changed(PairSigmoid):
        margin_floor: float = 0.0

    plain = objectives.dpo()
    changed = Changed(name="x", positive=0, negative=1)
    monkeypatch.setitem(loss.LINKS, Changed, loss.LINKS[PairSigmoid])
    assert loss.encode(replace(plain, terms=(changed,))) == "term 'x' (Changed) has no fused kernel"
    wider = replace(plain, name="wider")
    object.__setattr__(wider, "extra", 1)
    assert loss.encode(wider) == "Objective 'wider' has no fused kernel"
    monkeypatch.setattr(loss, "LEAF_FIELDS", {"response", "image", "detached"})
    assert "Leaf(" in loss.encode(replace(plain, name="leaf"))


def test_explain_states_the_path_of_the_loss(monkeypatch):
    monkeypatch.delenv("REALIGN_BACKEND", raising=False)
    line = rk.explain("cuda", torch.bfloat16, SIMPO)
    begin = "realign_kernels: backend triton for bfloat16 on cuda ("
    assert line.startswith(begin) and line.endswith("; loss simpo: one fused kernel")
    reason = "term 'odds_ratio' (OddsRatio) has no fused kernel"
    line = rk.explain("cuda", torch.bfloat16, objectives.orpo())
    assert line.endswith(f"; loss orpo: torch operations ({reason})")
