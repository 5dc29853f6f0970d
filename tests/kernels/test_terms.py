"""The links: options that no preset uses, special cases, and invalid fields."""

import itertools
import math
from dataclasses import MISSING, dataclass, fields, replace

import pytest
import torch

import realign_kernels as rk
from realign_kernels import objectives
from realign_kernels.objectives import (
    AnchorProbability,
    AnchorSigmoid,
    AnchorSquared,
    LeafValues,
    LinearSigmoid,
    MarginDifference,
    NegativeLogLikelihood,
    OddsRatio,
    PairDiscoPOP,
    PairExo,
    PairHinge,
    PairProbability,
    PairRobust,
    PairSigmoid,
    PairSquared,
    PlackettLuce,
    SoftmaxNegatives,
    Term,
)

LINKS = {
    term.name: term
    for term in (
        PairSigmoid(name="sigmoid", positive=0, negative=1),
        PairHinge(name="hinge", positive=0, negative=1),
        PairSquared(name="squared", positive=0, negative=1),
        PairRobust(name="robust", positive=0, negative=1),
        PairProbability(name="probability", positive=0, negative=1),
        PairExo(name="exo", positive=0, negative=1),
        PairDiscoPOP(name="discopop", positive=0, negative=1, tau=0.5),
        OddsRatio(name="odds", positive=0, negative=1),
        AnchorSigmoid(name="anchor", leaf=0),
        AnchorSquared(name="anchor_squared", leaf=0, target=0.25),
        AnchorProbability(name="anchor_probability", leaf=0),
        NegativeLogLikelihood(name="nll", leaf=2),
        SoftmaxNegatives(name="softmax", positive=0, negatives=(1, 2), omegas=(0.5, 2.0)),
        PlackettLuce(name="plackett_luce", ranking=(2, 0, 1)),
        MarginDifference(name="difference", first=(0, 1), second=(2, 3)),
        LinearSigmoid(name="linear", coefficients=((0, 2.0), (1, -1.0), (2, -1.0))),
    )
}
REWARDS = torch.tensor([[0.7, -2.0], [0.2, 1.5], [-0.4, 0.3], [1.1, -0.6]], dtype=torch.float64)
COUNTS = torch.tensor([[2, 3], [1, 4], [5, 2], [2, 2]])
SHIFT = 0.375


def values_of(rewards):
    """Values of four leaves, whose log-probs are the rewards minus 3."""
    return LeafValues(rewards, rewards - 3, torch.full_like(rewards, -9), COUNTS, SHIFT)


def nll(z: float) -> float:
    return math.log1p(math.exp(-z))


def sig(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def by_hand(a, b, c, d, n):
    """Formulas over rewards a, b, c, d: LINKS, then options that no preset uses."""
    q, odds = sig(a - b), [math.exp((x - 3) / m) for x, m in zip((a, b), n, strict=False)]
    odds = [p / (1 - p) for p in odds]
    mixed = sig((a - b) / 0.5)
    soft = 0.5 * math.exp(b - a) + 2 * math.exp(c - a)
    first = math.exp(c) / (math.exp(a) + math.exp(b) + math.exp(c))
    second = math.exp(a) / (math.exp(a) + math.exp(b))
    return [
        (LINKS["sigmoid"], nll(a - b)),
        (LINKS["hinge"], max(0.0, 1 - (a - b))),
        (LINKS["squared"], (a - b - 0.5) ** 2),
        (LINKS["robust"], (0.9 * nll(a - b) - 0.1 * nll(b - a)) / 0.8),
        (LINKS["probability"], sig(b - a)),
        (LINKS["exo"], q * math.log(q / 0.999) + (1 - q) * math.log((1 - q) / 0.001)),
        (LINKS["discopop"], (1 - mixed) * nll(a - b) + mixed * math.exp(b - a)),
        (LINKS["odds"], nll(math.log(odds[0] / odds[1]))),
        (LINKS["anchor"], nll(a)),
        (LINKS["anchor_squared"], (a - 0.25) ** 2),
        (LINKS["anchor_probability"], sig(-a)),
        (LINKS["nll"], (3 - c) / n[2]),
        (replace(LINKS["sigmoid"], target=0.5), nll(a - b - 0.5)),
        (replace(LINKS["anchor"], shifted=True), nll(a - SHIFT)),
        (replace(LINKS["anchor"], shifted=True, delta=1.0, below=True), nll(SHIFT + 1 - a)),
        (replace(LINKS["anchor_probability"], leaf=3, below=True), sig(d)),
        (LINKS["softmax"], math.log(1 + soft)),
        (LINKS["plackett_luce"], -math.log(first) - math.log(second)),
        (LINKS["difference"], ((a - b) - (c - d)) ** 2),
        (LINKS["linear"], nll(2 * a - b - c)),
        (replace(LINKS["sigmoid"], label_smoothing=0.3), 0.7 * nll(a - b) + 0.3 * nll(b - a)),
        (replace(LINKS["hinge"], target=0.4), max(0.0, 0.4 - (a - b))),
        (replace(LINKS["squared"], target=-2.0), (a - b + 2) ** 2),
        (replace(LINKS["anchor"], leaf=2, delta=0.5), nll(c - 0.5)),
        (replace(LINKS["anchor"], leaf=2, delta=0.5, below=True), nll(0.5 - c)),
        (replace(LINKS["softmax"], omegas=None), math.log(1 + math.exp(b - a) + math.exp(c - a))),
        (replace(LINKS["softmax"], negatives=(3,), omegas=None), nll(a - d)),
        (replace(LINKS["plackett_luce"], ranking=(3, 1)), nll(d - b)),
        (replace(LINKS["difference"], second=(0, 2)), (c - b) ** 2),
        (replace(LINKS["linear"], coefficients=((3, -1.5),)), nll(-1.5 * d)),
    ]


@pytest.mark.parametrize("case", range(len(by_hand(0, 0, 0, 0, (1, 1, 1, 1)))))
def test_link_is_its_formula(case):
    columns = [
        by_hand(*column, counts)[case]
        for column, counts in zip(REWARDS.T.tolist(), COUNTS.T.tolist(), strict=True)
    ]
    term = columns[0][0]
    expected = torch.tensor([value for _, value in columns], dtype=torch.float64)
    torch.testing.assert_close(term(values_of(REWARDS)), expected, rtol=1e-12, atol=0)
    rewards = REWARDS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: term(values_of(x)), rewards)
    (gradient,) = torch.autograd.grad(term(values_of(rewards)).sum(), rewards)
    assert set((gradient != 0).any(1).nonzero()[:, 0].tolist()) <= set(term.leaves)


def test_compiled_equals_eager():
    """Every link in one graph, with a detached leaf, every kind of reward and a shift."""
    leaves = (*objectives.symmpo().leaves[:3], objectives.Leaf("chosen", "image", detached=True))
    kinds = itertools.cycle(objectives.REWARDS[1:])
    terms = [
        replace(term, reward="mean_logp" if name in ("odds", "nll") else next(kinds))
        for name, term in LINKS.items()
    ]
    terms.append(replace(LINKS["anchor"], name="shifted", shifted=True))
    objective = rk.Objective("compiled", leaves, tuple(terms), 0.5)

    def losses(logps):
        shifted = objective.at(torch.tensor(0.25, dtype=torch.float64))
        out = shifted(logps - 3, torch.zeros_like(logps), "mean", COUNTS)
        return out.loss, out.term_losses

    eager, compiled = (REWARDS.clone().requires_grad_() for _ in range(2))
    found = torch.compile(losses, fullgraph=True, backend="aot_eager")(compiled)
    torch.testing.assert_close(found, losses(eager), rtol=1e-13, atol=0)
    found[0].backward()
    losses(eager)[0].backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", LINKS)
def test_no_number_may_be_nan_or_infinite(name):
    term, refused = LINKS[name], []
    for field, bad in itertools.product(fields(term), (math.nan, math.inf, -math.inf)):
        value = getattr(term, field.name)
        if isinstance(value, float):
            changed = bad
        elif field.name == "omegas":
            changed = (1.0, bad)
        elif field.name == "coefficients":
            changed = (*value[:-1], (2, bad))
        else:
            continue
        with pytest.raises(ValueError, match=f"{field.name} of term '{name}' must be finite, got"):
            replace(term, **{field.name: changed})
        refused.append(field.name)
    assert "weight" in refused


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_no_setting_of_a_preset_may_be_nan_or_infinite(name):
    numbers = [k for k, default in objectives.settings(name).items() if isinstance(default, float)]
    assert "beta" in numbers or name == "sft"
    for setting, bad in itertools.product(numbers, (math.nan, math.inf, -math.inf)):
        with pytest.raises(ValueError, match="finite"):
            objectives.get(name, **{setting: bad})


@dataclass(frozen=True, kw_only=True)
class Forgetful(Term):
    """A term that does not name its field with a leaf index."""

    leaf: int = 0


PAIR = {"name": "t", "positive": 0, "negative": 1}
MISTAKES = [
    (PairSigmoid, PAIR | {"weight": -1}, r"weight of term 't' must be finite and >= 0, got -1"),
    (PairSigmoid, PAIR | {"weight": "1"}, r"weight of term 't' must be a number, got '1'"),
    (PairSigmoid, PAIR | {"weight": torch.ones(())}, r"weight of term 't' .* Got a Tensor"),
    (PairSigmoid, PAIR | {"label_smoothing": 0.5}, r"label_smoothing of .* in \[0, 0.5\), got 0.5"),
    (PairSigmoid, PAIR | {"label_smoothing": -0.1}, r"label_smoothing of .* got -0.1"),
    (PairSigmoid, PAIR | {"negative": 0}, r"'t' reads a leaf twice, \(0, 0\)"),
    (PairSigmoid, PAIR | {"negative": -1}, r"'t' reads leaf -1, but an index must be"),
    (PairSigmoid, PAIR | {"negative": 1.0}, r"'t' reads leaf 1.0"),
    (PairSigmoid, PAIR | {"reward": "ratio"}, r"reward of .* one of log_ratio, .* got 'ratio'"),
    (PairRobust, PAIR | {"label_smoothing": 0.5}, r"label_smoothing of .* in \[0, 0.5\), got 0.5"),
    (PairExo, PAIR | {"label_smoothing": 0}, r"label_smoothing of .* in \(0, 0.5\), got 0"),
    (PairDiscoPOP, PAIR | {"tau": 1.5}, r"tau of term 't' must be in \(0, 1\], got 1.5"),
    (OddsRatio, PAIR | {"reward": "logp"}, r"reward of term 't' must be mean_logp, got 'logp'"),
    (PairHinge, PAIR | {"target": 0}, r"target of term 't' must be finite and > 0, got 0"),
    (AnchorSigmoid, {"name": "t", "leaf": 0, "delta": None}, r"delta .* a number, got None"),
    (SoftmaxNegatives, {"name": "t", "positive": 0, "negatives": ()}, r"negatives .* got \(\)"),
    (
        SoftmaxNegatives,
        {"name": "t", "positive": 0, "negatives": [1, 2]},
        r"negatives of term 't' must be a tuple of leaf indices, got \[1, 2\]",
    ),
    (
        SoftmaxNegatives,
        {"name": "t", "positive": 0, "negatives": (1, 2), "omegas": (1.0,)},
        r"omegas of term 't' must be a tuple of 2 numbers, one per negative, got \(1.0,\)",
    ),
    (
        SoftmaxNegatives,
        {"name": "t", "positive": 0, "negatives": (1,), "omegas": (0.0,)},
        r"omegas of term 't' must be finite and > 0 .* got \(0.0,\)",
    ),
    (SoftmaxNegatives, {"name": "t", "positive": 0, "negatives": (1, 0)}, r"a leaf twice"),
    (Forgetful, {"name": "t"}, r"'t' reads no leaf. Name .* in Forgetful.leaf_fields"),
    (PlackettLuce, {"name": "t", "ranking": (0,)}, r"ranking .* two or more .* got \(0,\)"),
    (PlackettLuce, {"name": "t", "ranking": (0, 1, 0)}, r"a leaf twice"),
    (MarginDifference, {"name": "t", "first": (0, 0), "second": (1, 2)}, r"first .* \(0, 0\)"),
    (MarginDifference, {"name": "t", "first": (0, 1), "second": (1,)}, r"second .* \(1,\)"),
    (LinearSigmoid, {"name": "t", "coefficients": ()}, r"coefficients .* \(leaf, factor\)"),
    (LinearSigmoid, {"name": "t", "coefficients": ((0, 0.0),)}, r"factors other than 0, got"),
    (LinearSigmoid, {"name": "t", "coefficients": (0, 1)}, r"coefficients .* got \(0, 1\)"),
]


@pytest.mark.parametrize(("link", "given", "message"), MISTAKES, ids=[m for *_, m in MISTAKES])
def test_mistakes_are_named(link, given, message):
    with pytest.raises(ValueError, match=message):
        link(**given)


def test_terms_are_values():
    """Terms with equal fields are equal, also as dictionary keys."""
    for name, term in LINKS.items():
        assert {replace(term): name}[term] == name and replace(term, weight=2.0) != term
        required = [f.name for f in fields(term) if f.default is MISSING]
        assert required[0] == "name"


def test_leaf_fields_name_every_leaf():
    """A sum of objectives changes indices by leaf_fields."""

    @dataclass(frozen=True, kw_only=True)
    class Hidden(PairSigmoid):
        third: int = 2

        @property
        def leaves(self):
            return (self.positive, self.negative, self.third)

    for term in LINKS.values():
        moved = term.moved({i: i + 4 for i in range(4)})
        assert moved.leaves == tuple(leaf + 4 for leaf in term.leaves)
        inputs = values_of(torch.cat([torch.full_like(REWARDS, torch.nan), REWARDS]))
        inputs = inputs._replace(token_counts=torch.cat([COUNTS, COUNTS]))
        assert torch.equal(moved(inputs), term(values_of(REWARDS)))
    with pytest.raises(ValueError, match=r"reads leaves \(0, 1, 2\), but its leaf_fields are"):
        Hidden(name="x", positive=0, negative=1).moved({2: 5})


def test_the_odds_ratio_is_finite_at_its_limits():
    """A response that is certain, and one whose probability underflows."""
    logps = torch.tensor([[0.0, -1e-8, -1e4], [-1e4, 0.0, 0.0]], requires_grad=True)
    values = LeafValues(logps, logps, logps, torch.ones(2, 3), 0.0)
    loss = LINKS["odds"](values)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert loss[0] == 0 and loss[2] > 1e4
