"""Paired comparison of two models: McNemar's test and a bootstrap interval of the difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """The second model against the first on the same questions.

    Attributes:
        questions: number of questions.
        first, second: shares of right answers.
        difference: second - first.
        low, high: 95 % percentile bootstrap interval of the difference, over questions or clusters.
        gained: questions that only the second model answered right.
        lost: questions that only the first model answered right.
        p: McNemar's exact two-sided p-value, the binomial test of gained against lost. It assumes
            independent questions.
    """

    questions: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float

    def __str__(self) -> str:
        return (
            f"{100 * self.first:.2f} % -> {100 * self.second:.2f} %: {100 * self.difference:+.2f} "
            f"points [{100 * self.low:+.2f}, {100 * self.high:+.2f}]; {self.gained} gained, "
            f"{self.lost} lost of {self.questions}; McNemar p = {self.p:.2g}"
        )


def compare(
    first: np.ndarray,  # (questions,) bool
    second: np.ndarray,  # (questions,) bool
    *,
    clusters: np.ndarray | None = None,  # (questions,)
    seed: int = 0,
) -> Comparison:
    """Compare the right answers of two models.

    Args:
        first: whether the answers of the first model are right.
        second: the same for the second model, for the same questions in the same order.
        clusters: group of each question, such as its image. Questions about one image are not
            independent, so the bootstrap draws clusters. None draws questions.
        seed: seed of the bootstrap.

    Raises:
        ValueError: without questions, or for different numbers of answers.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"there are {first.shape} and {second.shape} answers. Give one answer of each model to "
            "every question."
        )
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    change = second.astype(float) - first
    low, high = _interval(change, clusters, np.random.default_rng(seed))
    return Comparison(
        questions=len(first),
        first=float(first.mean()),
        second=float(second.mean()),
        difference=float(change.mean()),
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        p=float(p),
    )


def _interval(
    values: np.ndarray, clusters: np.ndarray | None, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean, resampling clusters."""
    sums, sizes = values, np.ones(len(values))
    if clusters is not None:
        _, place = np.unique(np.asarray(clusters), return_inverse=True)
        sums, sizes = np.bincount(place, values), np.bincount(place).astype(float)
    draws = []
    for _ in range(RESAMPLES):
        pick = rng.integers(len(sums), size=len(sums))
        draws.append(sums[pick].sum() / sizes[pick].sum())
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
