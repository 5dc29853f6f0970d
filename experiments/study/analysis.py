"""Statistics of the runs: means over seeds with intervals, and paired tests between arms.

Each seed has its own base, pairs and order of training, so seeds are the independent units. Scenes
are not independent, because all models are evaluated on the same ones. Intervals and tests are
Student's, over seeds. They are exact if the differences are normal, and wide for few seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from experiments.study.testbed import TUNING_SEED
from realign.evaluate.paired import holm

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval. The interval of a single seed is nan."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The second arm minus the first, over the seeds of both arms.

    Attributes:
        first, second: names of the arms.
        mean: mean of the differences, with its interval.
        p: two-sided p-value of the paired t-test, nan for a single seed.
        adjusted: p-value after Holm's correction over all comparisons of the table.
        seeds: number of seeds.
    """

    first: str
    second: str
    mean: Mean
    p: float
    adjusted: float
    seeds: int


def values(results: Results, arm: str, metric: str) -> dict[int, float]:
    """Return seed -> metric of an arm, without tuning runs."""
    return {
        r["seed"]: r["metrics"][metric]
        for r in results
        if r["arm"] == arm and r["seed"] != TUNING_SEED and metric in r["metrics"]
    }


def complete(results: Results, names: Iterable[str]) -> bool:
    """Return whether all these arms have results."""
    return all(values(results, name, "hallucination_rate") for name in names)


def mean(numbers: Iterable[float]) -> Mean:
    """Return the mean and its 95 % interval by Student's t.

    Raises:
        ValueError: if there are no numbers.
    """
    samples = np.array(list(numbers), float)
    if not len(samples):
        raise ValueError("There are no results to average. Run the study first.")
    value = float(samples.mean())
    if len(samples) == 1:
        return Mean(value, np.nan, np.nan)
    half = stats.t.ppf(0.975, len(samples) - 1) * samples.std(ddof=1) / len(samples) ** 0.5
    return Mean(value, value - float(half), value + float(half))


def differences(
    results: Results, pairs: Iterable[tuple[str, str]], metric: str
) -> list[Difference]:
    """Compare arms on a metric, paired by seed. Pairs without a common seed are omitted."""
    compared = []
    for first, second in pairs:
        a, b = values(results, first, metric), values(results, second, metric)
        if not (seeds := sorted(a.keys() & b.keys())):
            continue
        change = [b[s] - a[s] for s in seeds]
        p = _paired_p(change)
        compared.append(Difference(first, second, mean(change), p, np.nan, len(seeds)))
    adjusted = holm([d.p for d in compared])
    return [replace(one, adjusted=p) for one, p in zip(compared, adjusted, strict=True)]


def together(runs: Iterable[Results], pair: tuple[str, str], metric: str) -> Mean:
    """Return the second arm minus the first over several runs of the same seeds.

    Runs of one seed start from the same state, so their average counts once.
    """
    by_seed: dict[int, list[float]] = {}
    for results in runs:
        a, b = (values(results, arm, metric) for arm in pair)
        for seed in a.keys() & b.keys():
            by_seed.setdefault(seed, []).append(b[seed] - a[seed])
    return mean(float(np.mean(changes)) for changes in by_seed.values())


def _paired_p(change: Sequence[float]) -> float:
    """Return the p-value of a mean difference of 0. It is 1 or 0 if all differences are equal."""
    if len(change) < 2:
        return float("nan")
    if np.ptp(change) == 0:
        return 1.0 if change[0] == 0 else 0.0
    return float(stats.ttest_1samp(change, 0).pvalue)
