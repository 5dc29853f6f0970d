"""Paired comparison of models on the same questions: tests, bootstrap intervals and Holm.

Questions about one image are not independent. The bootstrap draws images, and the sign-flip test
exchanges the two models for whole images. McNemar's test assumes independent questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
"""Samples of the bootstrap, and random flips for graded scores."""
_PICKS = 20_000  # clusters drawn at once: ten times faster than one sample of 500 at a time
_DIGITS = 9  # Sums of graded scores are rounded, because 0.3 + 0.3 + 0.3 is not 0.9.


@dataclass(frozen=True)
class Comparison:
    """The second model against the first on the same questions.

    Attributes:
        questions: number of questions.
        first, second: mean scores: shares of right answers, if scores are 0 or 1.
        interval: 95 % percentile bootstrap interval of `second`, over questions or clusters. It is
            nan for a single cluster.
        difference: second - first.
        low, high: the same interval of the difference.
        gained: questions whose score rose: those that only the second model answered right.
        lost: questions whose score fell.
        p: McNemar's exact two-sided p-value, the binomial test of gained against lost. It assumes
            independent questions. It is nan for scores between 0 and 1.
        flip_p: p-value of `sign_flip` over clusters.
    """

    questions: int
    first: float
    second: float
    interval: tuple[float, float]
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float
    flip_p: float

    def __str__(self) -> str:
        graded = np.isnan(self.p)
        test = f"sign-flip p = {self.flip_p:.2g}" if graded else f"McNemar p = {self.p:.2g}"
        return (
            f"{100 * self.first:.2f} % -> {100 * self.second:.2f} %: {100 * self.difference:+.2f} "
            f"points [{100 * self.low:+.2f}, {100 * self.high:+.2f}]; {self.gained} gained, "
            f"{self.lost} lost of {self.questions}; {test}"
        )


def compare(
    first: np.ndarray,  # (questions,)
    second: np.ndarray,  # (questions,)
    *,
    clusters: np.ndarray | None = None,  # (questions,)
    seed: int = 0,
) -> Comparison:
    """Compare the answers of two models.

    Args:
        first: scores of the first model in [0, 1], or whether its answers are right.
        second: the same for the second model, for the same questions in the same order.
        clusters: group of each question, such as its image. Questions about one image are not
            independent, so the bootstrap draws clusters. None draws questions.
        seed: seed of the bootstrap and of random flips.

    Raises:
        ValueError: without questions, for different numbers of answers, or for a score outside
            [0, 1].
    """
    return compare_all([first, second], clusters=clusters, seed=seed)[1]


def compare_all(
    scores: Sequence[np.ndarray],  # of each model, (questions,)
    *,
    clusters: np.ndarray | None = None,  # (questions,)
    seed: int = 0,
) -> list[Comparison]:
    """Compare every model with the first one, and the first with itself; see `compare`.

    Raises:
        ValueError: like `compare`.
    """
    rows = [np.asarray(row, float) for row in scores]
    first = rows[0]
    if any(row.shape != first.shape for row in rows) or first.ndim != 1 or not len(first):
        shapes = " and ".join(str(row.shape) for row in rows)
        raise ValueError(
            f"there are {shapes} answers. Give one answer of each model to every question."
        )
    models = np.stack(rows)
    if not ((models >= 0) & (models <= 1)).all():
        bad = models[~((models >= 0) & (models <= 1))][0]
        raise ValueError(f"a score is {bad}; scores must be from 0 to 1.")
    graded = ((models > 0) & (models < 1)).any()
    changes = models - first
    ends = _intervals(np.concatenate([models, changes]), clusters, seed)
    compared = []
    for second, change, own, (low, high) in zip(
        models, changes, ends[: len(models)], ends[len(models) :], strict=True
    ):
        gained, lost = int((change > 0).sum()), int((change < 0).sum())
        p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        compared.append(
            Comparison(
                questions=len(first),
                first=float(first.mean()),
                second=float(second.mean()),
                interval=(float(own[0]), float(own[1])),
                difference=float(change.mean()),
                low=float(low),
                high=float(high),
                gained=gained,
                lost=lost,
                p=float("nan") if graded else float(p),
                flip_p=sign_flip(change, clusters, seed),
            )
        )
    return compared


def sign_flip(
    change: np.ndarray,  # (questions,)
    clusters: np.ndarray | None = None,  # (questions,)
    seed: int = 0,
) -> float:
    """Sign-flip permutation test of a mean difference of 0.

    If the models are equally good, exchanging them for an image changes only the sign of its sum.
    The p-value is the share of all flips whose total is at least as far from 0. It is exact for
    scores of 0 and 1, where McNemar's exact test is the case of one question for each image. For
    other scores it is an estimate from random flips, unless the images are few. The estimate is
    twice the smaller share of the two sides.

    Args:
        change: score of the second model minus that of the first for each question.
        clusters: group of each question, whose signs are flipped together. None flips questions.
        seed: seed of the random flips.

    Returns:
        The two-sided p-value.
    """
    sums = _sums(change, clusters).round(_DIGITS)
    sums = sums[sums != 0]
    if len(sums) < 2:  # both flips of one image are equally far from 0
        return 1.0
    if (sums % 1 == 0).all():
        return _exact(sums.astype(int))
    return float(
        stats.permutation_test(
            (sums,),
            lambda x, axis: x.sum(axis).round(_DIGITS),
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=100,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def holm(p: Sequence[float]) -> list[float]:
    """Apply Holm's correction (Scandinavian Journal of Statistics 6, 1979). nan stays nan."""
    numbers = np.array(p, float)
    order = [i for i in np.argsort(numbers) if not np.isnan(numbers[i])]
    adjusted, highest = np.full(len(numbers), np.nan), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * numbers[i]))
        adjusted[i] = highest
    return adjusted.tolist()


def _exact(
    sums: np.ndarray,  # (clusters,) int, without zeros
) -> float:
    """Exact p-value of the sign-flip test of whole numbers.

    Half of the clusters of one size are negative on average. Their number is binomial, and the
    distributions of the sizes are convolved.
    """
    total, sizes = int(np.abs(sums).sum()), np.abs(sums)
    chances = np.ones(1)  # of the sum of the negative sizes
    for size, number in zip(*np.unique(sizes, return_counts=True), strict=True):
        of_size = np.zeros(size * number + 1)
        of_size[::size] = stats.binom.pmf(np.arange(number + 1), number, 0.5)
        chances = np.convolve(chances, of_size)
    distances = np.abs(total - 2 * np.arange(total + 1))
    return min(1.0, float(chances[distances >= abs(int(sums.sum()))].sum()))


def _sums(
    values: np.ndarray,  # (..., questions)
    clusters: np.ndarray | None,  # (questions,)
) -> np.ndarray:
    """Sums over the questions of each cluster, (..., clusters)."""
    if clusters is None:
        return values
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    return np.apply_along_axis(lambda row: np.bincount(place, row), -1, values)


def _intervals(
    values: np.ndarray,  # (means, questions)
    clusters: np.ndarray | None,  # (questions,)
    seed: int,
) -> np.ndarray:
    """Percentiles 2.5 and 97.5 of the means of rows, resampling clusters, (means, 2)."""
    rng = np.random.default_rng(seed)
    sums, sizes = _sums(values, clusters), _sums(np.ones(values.shape[1]), clusters)
    table = np.vstack([sums, sizes]).T.copy()  # (clusters, means + 1)
    if len(table) == 1:
        return np.full((len(values), 2), np.nan)
    number = len(table)
    batch = min(RESAMPLES, max(1, _PICKS // number))
    starts = number * np.arange(batch)[:, None]
    draws = []
    for _ in range(-(-RESAMPLES // batch)):
        picks = rng.integers(number, size=(batch, number)) + starts
        times = np.bincount(picks.ravel(), minlength=batch * number).reshape(batch, number)
        draws.append(times @ table)
    means = np.concatenate(draws)[:RESAMPLES]
    return np.percentile(means[:, :-1] / means[:, -1:], [2.5, 97.5], axis=0).T
