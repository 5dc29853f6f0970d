"""Generated blocks of docs/study.md and the README, from the results of the study."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from benchmarks.tables import table
from experiments.study.analysis import (
    Difference,
    Mean,
    Results,
    complete,
    differences,
    mean,
    together,
    values,
)
from experiments.study.arms import (
    ARMS_OF,
    COMPARISONS,
    HIGHEST,
    LOSS_COMPARISONS,
    LOSS_RUNS,
    LOSS_SECTIONS,
    LOSSES,
    LOWEST,
    PRIMARY,
    SECTIONS,
)
from experiments.study.plots import curves_of
from experiments.study.runs import best_rate, tuning_of
from experiments.study.testbed import TUNING_SEED, Testbed
from realign_kernels import objectives

COLUMNS = {
    "hallucination_rate": "misnamed, %",
    "hallucination_rate_biased": "where the prior holds, %",
    "exact_captions": "captions right, %",
    "f1": "yes/no F1, %",
    "rewards/margins": "margin, text",
    "rewards/visual_margins": "margin, visual",
}
_SHARES = ("hallucination_rate", "hallucination_rate_biased", "exact_captions", "f1")
_MARGINS = ("rewards/margins", "rewards/visual_margins")
CLEAR = 0.05  # a difference of losses is clear if its corrected p-value is below
_TITLES = {
    "dpo": "DPO",
    "rdpo": "rDPO",
    "mpo": "MPO",
    "simpo": "SimPO",
    "rdpo mpo": "rDPO over MPO's terms",
    "rdpo simpo": "rDPO over SimPO's term",
}
_PER_TOKEN = {
    arm.name for arm in LOSSES if objectives.get(arm.link or arm.objective).reward != "log_ratio"
}
"""Arms whose rewards are no log-ratios. Their margins are not comparable with others."""


def finding(images: str, results: Results) -> str:
    """Return the finding of a run in three sentences. Their words depend on the numbers."""
    (difference,) = differences(results, [PRIMARY], "hallucination_rate")
    by_seed = [values(results, name, "hallucination_rate") for name in ("base", *PRIMARY)]
    base, dpo, rdpo = (mean(rates.values()) for rates in by_seed)
    fewer = sum(by_seed[2][s] < by_seed[1][s] for s in by_seed[2].keys() & by_seed[1].keys())
    compared = _compared(images, _word(difference.mean), dpo, rdpo)
    return (
        f"The model misnames {compared}. The difference is "
        f"{_points(difference.mean)} points. It is below 0 for {fewer} of {difference.seeds} "
        f"seeds. The base misnames {_percent(base.value)} %."
    )


def findings(
    results_of: Mapping[str, Results], testbeds: Mapping[str, Testbed]
) -> dict[str, list[str]]:
    """Return the findings for each kind of images: over all its runs, then of each run."""
    sentences: dict[str, list[str]] = {}
    for images, runs in _runs_by_images(results_of, testbeds).items():
        by_run = [finding(images, results) for results in runs.values()]
        if len(runs) == 1:
            sentences[images] = by_run
            continue
        change, dpo, rdpo = _over_runs(runs)
        sentences[images] = [
            f"Over {len(runs)} runs of the same seeds the model misnames "
            f"{_compared(images, _word(change), dpo, rdpo)}. The difference is "
            f"{_points(change)} points, "
            "averaged by seed.",
            *(
                f"In the run `{n}`, {s[0].lower()}{s[1:]}"
                for n, s in zip(runs, by_run, strict=True)
            ),
        ]
    return sentences


def summary(results_of: Mapping[str, Results], testbeds: Mapping[str, Testbed]) -> str:
    """Return the block `study` of the README: findings for each kind of images and on negatives.

    Args:
        results_of: name of a run -> its results.
        testbeds: name of a run -> its testbed.
    """
    sentences = []
    start = "In [the study](docs/study.md) (95 % intervals in brackets), the model misnames"
    for images, runs in _runs_by_images(results_of, testbeds).items():
        change, dpo, rdpo = _over_runs(runs)
        seeds = {s for r in runs.values() for s in values(r, "rdpo", "hallucination_rate")}
        times = f"{len(runs)} runs of the same " if len(runs) > 1 else ""
        sentences.append(
            f"{start} {_compared(images, _word(change), dpo, rdpo)} ({_points(change)} points, "
            f"{times}{len(seeds)} seeds)."
        )
        start = "It misnames"
    random = {
        name: d.mean
        for name, results in results_of.items()
        if name not in LOSS_RUNS
        for d in differences(results, [("rdpo random", "rdpo")], "hallucination_rate")
    }
    if better := [f"`{name}`" for name, change in random.items() if change.high < 0]:
        runs_better = ", ".join(better)
        sentences.append(
            f"Retrieved negatives are clearly better than random ones in {runs_better}."
        )
    elif random:
        sentences.append("Retrieved negatives are not clearly better than random ones in any run.")
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False, break_long_words=False)


def _runs_by_images(
    results_of: Mapping[str, Results], testbeds: Mapping[str, Testbed]
) -> dict[str, dict[str, Results]]:
    """Return kind of images -> name of a run of all methods -> its results."""
    runs: dict[str, dict[str, Results]] = {}
    for name, bed in testbeds.items():
        if name in LOSS_RUNS:
            continue
        runs.setdefault(bed.images, {})[name] = results_of[name]
    return runs


def _over_runs(runs: Mapping[str, Results]) -> tuple[Mean, Mean, Mean]:
    """Return the difference of the primary comparison over runs, and the means of both arms."""
    first, second = (
        mean(v for r in runs.values() for v in values(r, arm, "hallucination_rate").values())
        for arm in PRIMARY
    )
    return together(runs.values(), PRIMARY, "hallucination_rate"), first, second


def _compared(
    images: str, word: str, first: Mean, second: Mean, names: tuple[str, str] = PRIMARY
) -> str:
    before, after = (_TITLES[name] for name in names)
    return (
        f"{word} {images} after {after} than after {before}: {_percent(second.value)} against "
        f"{_percent(first.value)} %"
    )


def _word(change: Mean) -> str:
    """Compare the second arm with the first in words. A single seed has no clear difference."""
    if change.high < 0 or change.low > 0:  # False for nan
        return "fewer" if change.value < 0 else "more"
    return "neither clearly fewer nor clearly more"


def loss_findings(results_of: Mapping[str, Results], testbeds: Mapping[str, Testbed]) -> list[str]:
    """Return a sentence for each tested pair of each run that compares losses."""
    sentences = []
    for run in (name for name in LOSS_RUNS if name in results_of):
        results = results_of[run]
        for d in differences(results, LOSS_COMPARISONS, "hallucination_rate"):
            names = (d.first, d.second)
            first, second = (mean(values(results, n, "hallucination_rate").values()) for n in names)
            compared = _compared(testbeds[run].images, _corrected_word(d), first, second, names)
            sentences.append(
                f"In the run `{run}`, the model misnames {compared}. The difference is "
                f"{_points(d.mean)} points."
            )
    return sentences


def _corrected_word(difference: Difference) -> str:
    """Compare the second arm with the first in words, by the corrected p-value."""
    if difference.adjusted < CLEAR:  # False for nan
        return "fewer" if difference.mean.value < 0 else "more"
    return "neither clearly fewer nor clearly more"


def blocks(results_of: Mapping[str, Results], testbeds: Mapping[str, Testbed]) -> dict[str, str]:
    """Return the blocks of docs/study.md: the findings, and the tables of each run by its name.

    With a run that compares losses, the block `losses` has the findings of these runs. The blocks
    of those that are missing then report that.

    Args:
        results_of: name of a run -> its results.
        testbeds: name of a run -> its testbed.
    """
    sentences = [s for group in findings(results_of, testbeds).values() for s in group]
    tables = {n: run_block(n, results_of[n], testbeds[n].images) for n in results_of}
    groups = {"findings": sentences, "losses": loss_findings(results_of, testbeds)}
    listed = {n: "\n".join(f"- {s}" for s in group) for n, group in groups.items() if group}
    if any(name in LOSS_RUNS for name in results_of):
        absent = {name: "This run has not been made." for name in LOSS_RUNS}
        tables = absent | tables
    return listed | tables


def run_block(name: str, results: Results, images: str) -> str:
    """Return plots, tables, paired tests and learning rates of a run, for arms with results."""
    arms = [arm.name for arm in ARMS_OF.get(name, ARMS_OF[images])]
    sections = LOSS_SECTIONS if name in LOSS_RUNS else SECTIONS
    parts = []
    if missing := [arm for arm in arms if not complete(results, [arm])]:
        parts.append(f"This run has no results for: {', '.join(missing)}.")
    parts.append(f"![Misnamed images of every arm](study/{name}.png)")
    shown: set[str] = set()
    for title, names in sections.items():
        names = [n for n in names if n in (*arms, "base")]
        if complete(results, names) and set(names) - shown:
            parts += [f"### {title}", _table(results, names)]
        shown |= set(names)
    if drawn := curves_of(results):
        parts.append(f"![Misnamed images over {' and '.join(drawn)}](study/{name}-curves.png)")
    tested = ([], LOSS_COMPARISONS) if name in LOSS_RUNS else ([PRIMARY], COMPARISONS)
    if tests := _comparisons(results, *tested):
        parts += ["### Paired tests", tests]
    if tuning_of(results):
        parts += ["### Learning rates", _tuning(results)]
    return "\n\n".join(parts)


def _table(results: Results, names: Sequence[str]) -> str:
    lines = []
    for name in names:
        cells = []
        for metric in COLUMNS:
            shown = metric not in _MARGINS or name not in _PER_TOKEN
            by_seed = values(results, name, metric) if shown else {}
            cells.append(_shown(mean(by_seed.values()), 100 if metric in _SHARES else 1)
                         if by_seed else "")  # fmt: skip
        lines.append([name, *cells, _pairs(results, name)])
    return table(["", *COLUMNS.values(), "pairs"], lines)


def _pairs(results: Results, name: str) -> str:
    """Return the number of training pairs of an arm, as a mean over seeds."""
    used = [
        r["settings"]["pairs_used"]
        for r in results
        if r["arm"] == name and r["seed"] != TUNING_SEED and "pairs_used" in r["settings"]
    ]
    return f"{sum(used) / len(used):.0f}" if used else ""


def _comparisons(
    results: Results, uncorrected: Sequence[tuple[str, str]], corrected: Sequence[tuple[str, str]]
) -> str:
    lines = []
    for d in differences(results, uncorrected, "hallucination_rate"):
        lines.append([d.first, d.second, _points(d.mean), f"{d.p:.2g}", ""])
    for d in differences(results, corrected, "hallucination_rate"):
        lines.append([d.first, d.second, _points(d.mean), f"{d.p:.2g}", f"{d.adjusted:.2g}"])
    columns = ["first", "second", "second - first, points", "p", "p, Holm"]
    return table(columns, lines) if lines else ""


def _tuning(results: Results) -> str:
    tuning = tuning_of(results)
    rates = sorted({rate for tried in tuning.values() for rate in tried})
    lines = []
    for name, tried in tuning.items():
        cells = [_percent(tried[rate]) if rate in tried else "" for rate in rates]
        best = rates.index(best_rate(tried))
        cells[best] = f"**{cells[best]}**"
        lines.append([name, *cells])
    ends = {}
    for name, tried in tuning.items():
        if (rate := best_rate(tried)) in (LOWEST, HIGHEST):
            ends.setdefault(rate, []).append(name)
    notes = [
        f"Best at {rate:g}, the {'lowest' if rate == LOWEST else 'highest'} rate tried: "
        f"{', '.join(ends[rate])}."
        for rate in sorted(ends)
    ]
    columns = ["misnamed, %", *(f"{rate:g}" for rate in rates)]
    return "\n\n".join([table(columns, lines), *notes])


def _shown(average: Mean, scale: float) -> str:
    digits = 1 if scale == 100 else 2
    numbers = (average.value, average.low, average.high)
    value, low, high = (f"{scale * x:.{digits}f}" for x in numbers)
    return value if math.isnan(average.low) else f"{value} [{low}, {high}]"


def _points(average: Mean) -> str:
    value, low, high = (f"{100 * x:+.1f}" for x in (average.value, average.low, average.high))
    return value if math.isnan(average.low) else f"{value} [{low}, {high}]"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"
