"""Terms: losses of the rewards of a few leaves.

Each is a frozen dataclass and a pure function of rewards (L, B) that returns (B,). Values and
gradients are finite and accurate for large rewards (1e4 in fp32). Terms therefore subtract rewards
first, then apply a log-sigmoid, or a log-sum-exp relative to the largest entry. They never compute
the exp of a reward.
"""

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Term:
    """One comparison of rewards. A pure function: rewards (L, B) -> loss (B,), unweighted.

    Entry b of the loss may depend only on column b of the rewards. The reason is that the fused
    head finishes an example before it computes the next. A term thus cannot mix examples, for
    example to center rewards over the batch.

    Fields are numbers, strings or tuples of them, so that terms can be compared and hashed. A
    subclass with further checks calls super().__post_init__() first.
    """

    name: str
    """Name under which the loss of this term is reported."""
    weight: float = 1.0
    """Factor in the sum of terms. 0 disables the term."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_value(f"{field.name} of term {self.name!r}", getattr(self, field.name))
            if field.type in (int, float, "int", "float"):
                self._require(
                    isinstance(getattr(self, field.name), numbers.Real), field.name, "a number"
                )
        self._require(self.weight >= 0, "weight", "finite and >= 0")
        leaves = self.leaves
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
        """Indices of the leaves that the term reads, each once."""
        raise NotImplementedError

    def __call__(self, rewards: Tensor) -> Tensor:
        raise NotImplementedError

    def _require(self, right: bool, name: str, rule: str) -> None:
        if not right:
            raise ValueError(
                f"{name} of term {self.name!r} must be {rule}, got {getattr(self, name)!r}"
            )


@dataclass(frozen=True, kw_only=True)
class _Pair(Term):
    """A link over the margin of two leaves, r[positive] - r[negative]."""

    positive: int
    negative: int

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.positive, self.negative)

    def margin(self, rewards: Tensor) -> Tensor:
        return rewards[self.positive] - rewards[self.negative]


@dataclass(frozen=True, kw_only=True)
class PairSigmoid(_Pair):
    """-log sigmoid(m), m = r[positive] - r[negative]: Bradley-Terry, DPO (2305.18290, eq. 7).

    With label_smoothing e it is conservative DPO, which assumes that a fraction e of the pairs is
    flipped: -(1 - e) log sigmoid(m) - e log sigmoid(-m). Source: Mitchell, A note on DPO with noisy
    preferences, 2023.
    """

    label_smoothing: float = 0.0
    """In [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)")

    def __call__(self, rewards: Tensor) -> Tensor:
        margin = self.margin(rewards)
        loss = -F.logsigmoid(margin)
        if self.label_smoothing == 0:
            return loss
        flipped = F.logsigmoid(-margin)
        return (1 - self.label_smoothing) * loss - self.label_smoothing * flipped


@dataclass(frozen=True, kw_only=True)
class PairHinge(_Pair):
    """max(0, target - m), m = r[positive] - r[negative]: SLiC's link (2305.10425)."""

    target: float = 1.0
    """Margin above which the loss is 0. Must be > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.target > 0, "target", "finite and > 0")

    def __call__(self, rewards: Tensor) -> Tensor:
        return F.relu(self.target - self.margin(rewards))


@dataclass(frozen=True, kw_only=True)
class PairSquared(_Pair):
    """(m - target)^2, m = r[positive] - r[negative]: IPO's link (2310.12036, eq. 17).

    IPO is written in log-ratios, r / beta: (m / beta - 1 / (2 beta))^2. In rewards that is
    (m - 1/2)^2 / beta^2, so its target is 1/2 and its weight 1 / beta^2.
    """

    target: float = 0.5
    """Target margin of the regression."""

    def __call__(self, rewards: Tensor) -> Tensor:
        return (self.margin(rewards) - self.target) ** 2


@dataclass(frozen=True, kw_only=True)
class AnchorSigmoid(Term):
    """-log sigmoid(r[leaf] - delta): keeps one reward above delta (mDPO, 2406.11839).

    With `below` it is -log sigmoid(delta - r[leaf]) and keeps the reward below delta.
    """

    leaf: int
    delta: float = 0.0
    below: bool = False

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.leaf,)

    def __call__(self, rewards: Tensor) -> Tensor:
        above = rewards[self.leaf] - self.delta
        return -F.logsigmoid(-above if self.below else above)


@dataclass(frozen=True, kw_only=True)
class SoftmaxNegatives(Term):
    """-log sigmoid(-log sum_j omega_j exp(r[j] - r[positive])) over the negatives j.

    Compares one positive with several negatives at once: AdaViP (2504.15619), MISP-DPO
    (2509.25717). It equals log(1 + sum_j omega_j exp(r[j] - r[positive])). With one negative it is
    PairSigmoid.
    """

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

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.positive, *self.negatives)

    def __call__(self, rewards: Tensor) -> Tensor:
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

    ranking: tuple[int, ...]

    def __post_init__(self) -> None:
        right = _is_tuple(self.ranking, least=2)
        self._require(right, "ranking", "a tuple of two or more leaf indices, best first")
        super().__post_init__()

    @property
    def leaves(self) -> tuple[int, ...]:
        return self.ranking

    def __call__(self, rewards: Tensor) -> Tensor:
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
        return tuple(dict.fromkeys((*self.first, *self.second)))  # margins may share a leaf

    def __call__(self, rewards: Tensor) -> Tensor:
        (a, b), (c, d) = self.first, self.second
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

    def __call__(self, rewards: Tensor) -> Tensor:
        parts = [factor * rewards[leaf] for leaf, factor in self.coefficients]
        return -F.logsigmoid(torch.stack(parts).sum(0))


def _log_one_plus_exps(gaps: list[Tensor]) -> Tensor:
    """log(1 + sum_j exp(gaps[j])), accurate for gaps of any size.

    logsumexp has the gradient exp(gap - logsumexp). At gaps of 2e4 in fp32 the rounding of that
    difference changes the gradient by up to 1e-3. Relative to the largest gap it is exact.
    """
    stacked = torch.stack(gaps)
    largest = stacked.detach().amax(0)
    return -F.logsigmoid(-(largest + (stacked - largest).logsumexp(0)))


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
