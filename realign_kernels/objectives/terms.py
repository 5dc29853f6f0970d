"""Terms: losses of the values of a few leaves.

Each is a frozen dataclass and a pure function of `LeafValues` (L, B) that returns (B,). Values and
gradients are finite and accurate for large rewards (1e4 in fp32). Terms therefore subtract rewards
first, then apply a log-sigmoid, or a log-sum-exp relative to the largest entry. They never compute
the exp of a reward.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

REWARDS = ("log_ratio", "mean_log_ratio", "logp", "mean_logp")
"""Kinds of rewards, each times beta.

- log_ratio: log-prob of the policy minus that of the reference, summed over tokens (DPO)
- mean_log_ratio: the same per token
- logp: log-prob of the policy, summed over tokens (CPO)
- mean_logp: the same per token (SimPO)

The last two need no reference. The two means need token counts.
"""


class LeafValues(NamedTuple):
    """Values of all leaves of a batch, as a term reads them. L is leaves, B examples."""

    rewards: Tensor
    """(L, B), of the kind that the term's `reward` names."""
    logps: Tensor
    """(L, B) log-probs of the policy, summed over tokens. Detached leaves have no gradient."""
    reference_logps: Tensor
    """(L, B) the same of the reference. Not meaningful for a term without a reference."""
    token_counts: Tensor | None
    """(L, B). Not None if the term's `reward` is a mean."""
    shift: Tensor | float
    """Running mean of rewards, `Objective.shift`."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One comparison of leaves. A pure function: `LeafValues` (L, B) -> loss (B,), unweighted.

    Entry b of the loss may depend only on column b of the values. The reason is that the fused head
    finishes an example before it computes the next. A term thus cannot mix examples, for example to
    center rewards over the batch.

    Fields are numbers, strings or tuples of them, so that terms can be compared and hashed. A
    subclass names its fields with leaf indices in `leaf_fields`. If it has further checks, it calls
    super().__post_init__() first.
    """

    leaf_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a leaf index or a tuple of leaf indices."""

    name: str
    """Name under which the loss of this term is reported."""
    weight: float = 1.0
    """Factor in the sum of terms. A term of weight 0 is computed for the report only."""
    reward: str = "log_ratio"
    """Kind of the rewards that the term compares, one of `REWARDS`."""

    def __post_init__(self) -> None:
        right = self.reward in REWARDS
        self._require(right, "reward", f"one of {', '.join(REWARDS)}")
        for field in fields(self):
            _check_value(f"{field.name} of term {self.name!r}", getattr(self, field.name))
            if field.type in (int, float, "int", "float"):
                self._require(
                    isinstance(getattr(self, field.name), numbers.Real), field.name, "a number"
                )
        self._require(self.weight >= 0, "weight", "finite and >= 0")
        leaves = self.leaves
        if not leaves:
            raise ValueError(
                f"term {self.name!r} reads no leaf. Name its fields with leaf indices in "
                f"{type(self).__name__}.leaf_fields."
            )
        for leaf in leaves:
            if not isinstance(leaf, int) or isinstance(leaf, bool) or leaf < 0:
                raise ValueError(
                    f"term {self.name!r} reads leaf {leaf!r}, but an index must be an int >= 0"
                )
        if len(set(leaves)) < len(leaves):
            raise ValueError(
                f"term {self.name!r} reads a leaf twice, {leaves}, and so compares it with "
                "itself. Give each leaf once."
            )

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the leaves that the term reads."""
        values = [getattr(self, name) for name in self.leaf_fields]
        return tuple(i for v in values for i in (v if isinstance(v, tuple) else (v,)))

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on log-probs of the reference."""
        return self.reward in ("log_ratio", "mean_log_ratio")

    @property
    def needs_counts(self) -> bool:
        """Whether the loss depends on token counts."""
        return self.reward in ("mean_log_ratio", "mean_logp")

    @property
    def needs_shift(self) -> bool:
        """Whether the loss depends on `LeafValues.shift`."""
        return False

    @property
    def uses_beta(self) -> bool:
        """Whether the loss depends on beta."""
        return True

    def moved(self, places: Mapping[int, int]) -> Self:
        """The same term with other leaf indices. Indices that are not keys stay.

        Raises:
            ValueError: the class reads leaves that `leaf_fields` does not name.
        """

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return places.get(value, value)

        moved = replace(self, **{name: move(getattr(self, name)) for name in self.leaf_fields})
        if moved.leaves != move(self.leaves):
            raise ValueError(
                f"term {self.name!r} reads leaves {self.leaves}, but its leaf_fields are "
                f"{self.leaf_fields}. Name all fields with leaf indices in leaf_fields."
            )
        return moved

    def __call__(self, values: LeafValues) -> Tensor:
        raise NotImplementedError

    def _require(self, right: bool, name: str, rule: str) -> None:
        if not right:
            raise ValueError(
                f"{name} of term {self.name!r} must be {rule}, got {getattr(self, name)!r}"
            )


@dataclass(frozen=True, kw_only=True)
class _Pair(Term):
    """A link over the margin of two leaves, r[positive] - r[negative]."""

    leaf_fields: ClassVar = ("positive", "negative")

    positive: int
    negative: int

    def margin(self, values: LeafValues) -> Tensor:
        return values.rewards[self.positive] - values.rewards[self.negative]


@dataclass(frozen=True, kw_only=True)
class PairSigmoid(_Pair):
    """-log sigmoid(m), m = r[positive] - r[negative] - target: DPO (2305.18290, eq. 7).

    With label_smoothing e it is conservative DPO, which assumes that a fraction e of the pairs is
    flipped: -(1 - e) log sigmoid(m) - e log sigmoid(-m). Source: Mitchell, A note on DPO with noisy
    preferences, 2023.
    """

    label_smoothing: float = 0.0
    """In [0, 0.5)."""
    target: float = 0.0
    """Margin at which the loss is log 2, gamma of SimPO (2405.14734)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)")

    def __call__(self, values: LeafValues) -> Tensor:
        margin = self.margin(values)
        if self.target != 0:
            margin = margin - self.target
        loss = -F.logsigmoid(margin)
        if self.label_smoothing == 0:
            return loss
        flipped = F.logsigmoid(-margin)
        return (1 - self.label_smoothing) * loss - self.label_smoothing * flipped


@dataclass(frozen=True, kw_only=True)
class PairRobust(_Pair):
    """[-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e): robust DPO (2403.00409).

    m = r[positive] - r[negative]. It is an unbiased estimate of DPO's loss if a fraction e of the
    pairs is flipped. It can be negative.
    """

    label_smoothing: float = 0.1
    """e, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)")

    def __call__(self, values: LeafValues) -> Tensor:
        e, margin = self.label_smoothing, self.margin(values)
        return (e * F.logsigmoid(-margin) - (1 - e) * F.logsigmoid(margin)) / (1 - 2 * e)


@dataclass(frozen=True, kw_only=True)
class PairHinge(_Pair):
    """max(0, target - m), m = r[positive] - r[negative]: SLiC's link (2305.10425)."""

    target: float = 1.0
    """Margin above which the loss is 0. Must be > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.target > 0, "target", "finite and > 0")

    def __call__(self, values: LeafValues) -> Tensor:
        return F.relu(self.target - self.margin(values))


@dataclass(frozen=True, kw_only=True)
class PairSquared(_Pair):
    """(m - target)^2, m = r[positive] - r[negative]: IPO's link (2310.12036, eq. 17).

    IPO is written in log-ratios, r / beta: (m / beta - 1 / (2 beta))^2. In rewards that is
    (m - 1/2)^2 / beta^2, so its target is 1/2 and its weight 1 / beta^2.
    """

    target: float = 0.5
    """Target margin of the regression."""

    def __call__(self, values: LeafValues) -> Tensor:
        return (self.margin(values) - self.target) ** 2


@dataclass(frozen=True, kw_only=True)
class PairProbability(_Pair):
    """sigmoid(-m), m = r[positive] - r[negative]: the second part of APO-down (2408.06266, eq. 8).

    It is the probability of the opposite preference. Unlike -log sigmoid(m), it is bounded.
    """

    def __call__(self, values: LeafValues) -> Tensor:
        return torch.sigmoid(-self.margin(values))


@dataclass(frozen=True, kw_only=True)
class PairExo(_Pair):
    """KL(q || p) of q = (sigmoid(m), sigmoid(-m)) and p = (1 - e, e): EXO (2402.00856, eq. 16).

    m = r[positive] - r[negative].
    """

    label_smoothing: float = 1e-3
    """e, in (0, 0.5). The paper recommends 1e-3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.label_smoothing < 0.5, "label_smoothing", "in (0, 0.5)")

    def __call__(self, values: LeafValues) -> Tensor:
        margin, e = self.margin(values), self.label_smoothing
        chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-e))
        return chosen + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(e))


@dataclass(frozen=True, kw_only=True)
class PairDiscoPOP(_Pair):
    """-(1 - a) log sigmoid(m) + a exp(-m), a = sigmoid(m / tau): DiscoPOP (2406.08414, eq. 5).

    m = r[positive] - r[negative].
    """

    tau: float = 0.05
    """Width of the change from the logistic to the exponential loss, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Above 1, the product with the exponential is unbounded for negative margins.
        self._require(0 < self.tau <= 1, "tau", "in (0, 1]")

    def __call__(self, values: LeafValues) -> Tensor:
        margin = self.margin(values)
        modulation = margin / self.tau
        exponential = torch.exp(F.logsigmoid(modulation) - margin)
        return exponential - torch.sigmoid(-modulation) * F.logsigmoid(margin)


@dataclass(frozen=True, kw_only=True)
class AnchorSigmoid(Term):
    """-log sigmoid(r[leaf] - delta): keeps one reward above delta (mDPO, 2406.11839).

    With `below` it is -log sigmoid(delta - r[leaf]) and keeps the reward below delta. With
    `shifted`, `LeafValues.shift` is added to delta (BCO, 2404.04656).
    """

    leaf_fields: ClassVar = ("leaf",)

    leaf: int
    delta: float = 0.0
    below: bool = False
    shifted: bool = False

    @property
    def needs_shift(self) -> bool:
        return self.shifted

    def __call__(self, values: LeafValues) -> Tensor:
        above = values.rewards[self.leaf] - self.delta
        if self.shifted:
            above = above - values.shift
        return -F.logsigmoid(-above if self.below else above)


@dataclass(frozen=True, kw_only=True)
class AnchorSquared(Term):
    """(r[leaf] - target)^2: a regression of one reward, SPPO (2405.00675, eq. 4.7)."""

    leaf_fields: ClassVar = ("leaf",)

    leaf: int
    target: float = 0.0

    def __call__(self, values: LeafValues) -> Tensor:
        return (values.rewards[self.leaf] - self.target) ** 2


@dataclass(frozen=True, kw_only=True)
class AnchorProbability(Term):
    """sigmoid(-r[leaf]), with `below` sigmoid(r[leaf]): APO (2408.06266, eq. 7 and 8)."""

    leaf_fields: ClassVar = ("leaf",)

    leaf: int
    below: bool = False

    def __call__(self, values: LeafValues) -> Tensor:
        reward = values.rewards[self.leaf]
        return torch.sigmoid(reward if self.below else -reward)


@dataclass(frozen=True, kw_only=True)
class _PerToken(Term):
    """A term of log-probs per token, without a reference and without beta."""

    reward: str = "mean_logp"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.reward == "mean_logp", "reward", "mean_logp")

    @property
    def uses_beta(self) -> bool:
        return False

    def means(self, values: LeafValues) -> list[Tensor]:
        """Log-prob per token of each leaf, (B,)."""
        assert values.token_counts is not None
        return [values.logps[leaf] / values.token_counts[leaf] for leaf in self.leaves]


@dataclass(frozen=True, kw_only=True)
class NegativeLogLikelihood(_PerToken):
    """-log p[leaf] / tokens: the loss of supervised fine-tuning on one leaf, per token.

    RPO (2404.19733) adds it to DPO's loss. TRL and InternVL average over the tokens of a batch
    instead, so that a longer response has a larger weight. The two are equal for equal lengths.
    """

    leaf_fields: ClassVar = ("leaf",)

    leaf: int

    def __call__(self, values: LeafValues) -> Tensor:
        (mean,) = self.means(values)
        return -mean


@dataclass(frozen=True, kw_only=True)
class OddsRatio(_PerToken, _Pair):
    """-log sigmoid(log odds[positive] - log odds[negative]): ORPO (2403.07691, eq. 7).

    odds = p / (1 - p), where p is the geometric mean of a response's token probabilities. It does
    not depend on beta.
    """

    def __call__(self, values: LeafValues) -> Tensor:
        positive, negative = map(_log_odds, self.means(values))
        return -F.logsigmoid(positive - negative)


@dataclass(frozen=True, kw_only=True)
class SoftmaxNegatives(Term):
    """-log sigmoid(-log sum_j omega_j exp(r[j] - r[positive])) over the negatives j.

    Compares one positive with several negatives at once: AdaViP (2504.15619), MISP-DPO
    (2509.25717). It equals log(1 + sum_j omega_j exp(r[j] - r[positive])). With one negative it is
    PairSigmoid.
    """

    leaf_fields: ClassVar = ("positive", "negatives")

    positive: int
    negatives: tuple[int, ...]
    omegas: tuple[float, ...] | None = None
    """A factor > 0 for each negative. None means 1 for all."""

    def __post_init__(self) -> None:
        self._require(_is_tuple(self.negatives, least=1), "negatives", "a tuple of leaf indices")
        super().__post_init__()
        if self.omegas is not None:
            count = len(self.negatives)
            right = _is_tuple(self.omegas) and len(self.omegas) == count
            self._require(right, "omegas", f"a tuple of {count} numbers, one per negative")
            right = all(isinstance(o, numbers.Real) and o > 0 for o in self.omegas)
            self._require(right, "omegas", "finite and > 0 (leave a negative out instead of 0)")

    def __call__(self, values: LeafValues) -> Tensor:
        rewards = values.rewards
        omegas = self.omegas or (1.0,) * len(self.negatives)
        gaps = [
            rewards[negative] - rewards[self.positive] + math.log(omega)
            for negative, omega in zip(self.negatives, omegas, strict=True)
        ]
        return _log_one_plus_exps(gaps)


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(Term):
    """-sum_k log(exp r[k] / sum_{j at or after k} exp r[j]) over a ranking of leaves, best first.

    The negative log-likelihood that drawing without replacement gives this order: LPOI
    (2505.21061). With two leaves it is PairSigmoid.
    """

    leaf_fields: ClassVar = ("ranking",)

    ranking: tuple[int, ...]

    def __post_init__(self) -> None:
        right = _is_tuple(self.ranking, least=2)
        self._require(right, "ranking", "a tuple of two or more leaf indices, best first")
        super().__post_init__()

    def __call__(self, values: LeafValues) -> Tensor:
        rewards = values.rewards
        draws = [
            _log_one_plus_exps([rewards[other] - rewards[drawn] for other in self.ranking[k + 1 :]])
            for k, drawn in enumerate(self.ranking[:-1])
        ]
        return torch.stack(draws).sum(0)


@dataclass(frozen=True, kw_only=True)
class MarginDifference(Term):
    """((r[a] - r[b]) - (r[c] - r[d]))^2 with first = (a, b), second = (c, d).

    Penalizes a difference between two margins: SymMPO's margin consistency (2506.11712).
    """

    leaf_fields: ClassVar = ("first", "second")

    first: tuple[int, int]
    second: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            pair = getattr(self, name)
            right = _is_tuple(pair) and len(pair) == 2 and pair[0] != pair[1]
            self._require(right, name, "a tuple of two different leaf indices")
        super().__post_init__()

    @property
    def leaves(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(super().leaves))  # margins may share a leaf

    def __call__(self, values: LeafValues) -> Tensor:
        rewards, (a, b), (c, d) = values.rewards, self.first, self.second
        return ((rewards[a] - rewards[b]) - (rewards[c] - rewards[d])) ** 2


@dataclass(frozen=True, kw_only=True)
class LinearSigmoid(Term):
    """-log sigmoid(sum_i c_i r[i]): one sigmoid over any linear combination, as in CHiP.

    CHiP (2501.16629) adds two margins under one sigmoid: coefficients ((0, 2), (1, -1), (2, -1)).
    """

    coefficients: tuple[tuple[int, float], ...]
    """(leaf, factor) pairs."""

    def __post_init__(self) -> None:
        right = _is_tuple(self.coefficients, least=1)
        right = right and all(_is_tuple(pair) and len(pair) == 2 for pair in self.coefficients)
        self._require(right, "coefficients", "a tuple of (leaf, factor) tuples")
        super().__post_init__()
        right = all(isinstance(f, numbers.Real) and f != 0 for _, f in self.coefficients)
        self._require(right, "coefficients", "(leaf, factor) with factors other than 0")

    @property
    def leaves(self) -> tuple[int, ...]:
        return tuple(leaf for leaf, _ in self.coefficients)

    def moved(self, places: Mapping[int, int]) -> Self:
        pairs = tuple((places.get(leaf, leaf), factor) for leaf, factor in self.coefficients)
        return replace(self, coefficients=pairs)

    def __call__(self, values: LeafValues) -> Tensor:
        parts = [factor * values.rewards[leaf] for leaf, factor in self.coefficients]
        return -F.logsigmoid(torch.stack(parts).sum(0))


def _log_one_plus_exps(gaps: list[Tensor]) -> Tensor:
    """log(1 + sum_j exp(gaps[j])), accurate for gaps of any size.

    logsumexp has the gradient exp(gap - logsumexp). At gaps of 2e4 in fp32 the rounding of that
    difference changes the gradient by up to 1e-3. Relative to the largest gap it is exact.
    """
    stacked = torch.stack(gaps)
    largest = stacked.detach().amax(0)
    return -F.logsigmoid(-(largest + (stacked - largest).logsumexp(0)))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, accurate for p near 0 and near 1, and finite for p = 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    near_one = logp > -math.log(2)
    # Both branches have finite gradients, since `where` would turn inf * 0 into NaN.
    small, large = logp.where(near_one, -1.0), logp.where(~near_one, -1.0)
    rest = torch.where(near_one, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
    return logp - rest


def _is_tuple(value: Any, least: int = 0) -> bool:
    return isinstance(value, tuple) and len(value) >= least


def _is_finite(value: Any) -> bool:
    return -math.inf < value < math.inf


def _check_value(name: str, value: Any) -> None:
    """Check that a value is a finite number, a string, None, or a tuple of these."""
    if isinstance(value, tuple):
        for entry in value:
            _check_value(name, entry)
    elif isinstance(value, numbers.Real):
        if not _is_finite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
    elif not (value is None or isinstance(value, str)):
        raise ValueError(
            f"{name} must consist of numbers, strings and tuples, so that it can be hashed. Got a "
            f"{type(value).__name__}."
        )
