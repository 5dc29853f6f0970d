"""Generated blocks of docs/study.md, from the results of the study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.tables import table
from experiments.study.analysis import (
    Mean,
    Results,
    complete,
    differences,
    mean,
    together,
    values,
)
from experiments.study.arms import ARMS_OF, COMPARISONS, HIGHEST, LOWEST, PRIMARY, SECTIONS
from experiments.study.plots import curves_of
from experiments.study.runs import best_rate, tuning_of
from experiments.study.testbed import TUNING_SEED, Testbed

COLUMNS = {
    "hallucination_rate": "misnamed, %",
    "hallucination_rate_biased": "where the prior holds, %",
    "exact_captions": "captions right, %",
    "f1": "yes/no F1, %",
    "rewards/margins": "margin, text",
    "rewards/visual_margins": "margin, visual",
}
_SHARES = ("hallucination_rate", "hallucination_rate_biased", "exact_captions", "f1")


def finding(pictures: str, results: Results) -> str:
    """Finding of a testbed in one sentence, in words that follow from the numbers."""
    (one,) = differences(results, [PRIMARY], "hallucination_rate")
    by_seed = [values(results, name, "hallucination_rate") for name in ("base", *PRIMARY)]
    base, dpo, rdpo = (mean(rates.values()) for rates in by_seed)
    fewer = sum(by_seed[2][s] < by_seed[1][s] for s in by_seed[2].keys() & by_seed[1].keys())
    gap = one.mean
    return (
        f"After rDPO the model misnames {_word(gap)} {pictures} than after DPO: "
        f"{_percent(rdpo.value)} against {_percent(dpo.value)} %, a difference of "
        f"{_points(gap)} points over {one.seeds} seeds, fewer in {fewer} of them; the base "
        f"misnames {_percent(base.value)} %."
    )


def findings(found: Mapping[str, Results], testbeds: Mapping[str, Testbed]) -> dict[str, list[str]]:
    """Findings for each kind of images: a sentence over all its runs, then of each run."""
    said: dict[str, list[str]] = {}
    for pictures in dict.fromkeys(bed.pictures for bed in testbeds.values()):
        runs = {name: found[name] for name, bed in testbeds.items() if bed.pictures == pictures}
        of_one = [finding(pictures, results) for results in runs.values()]
        if len(runs) == 1:
            said[pictures] = of_one
            continue
        gap = together(runs.values(), PRIMARY, "hallucination_rate")
        dpo, rdpo = (
            mean(v for r in runs.values() for v in values(r, arm, "hallucination_rate").values())
            for arm in PRIMARY
        )
        said[pictures] = [
            f"Over {len(runs)} runs of the same seeds the model misnames {_word(gap)} {pictures} "
            f"after rDPO than after DPO: {_percent(rdpo.value)} against {_percent(dpo.value)} %, a "
            f"difference of {_points(gap)} points, averaged by seed.",
            *(
                f"In the run `{n}`: {s[0].lower()}{s[1:]}"
                for n, s in zip(runs, of_one, strict=True)
            ),
        ]
    return said


def _word(gap: Mean) -> str:
    """How the second compares; without an interval nothing is clear."""
    if gap.high < 0 or gap.low > 0:  # nan compares as False
        return "fewer" if gap.value < 0 else "more"
    return "neither clearly fewer nor clearly more"


def blocks(found: Mapping[str, Results], testbeds: Mapping[str, Testbed]) -> dict[str, str]:
    """Generated blocks of docs/study.md: the findings, and the tables of each run by its name.

    Args:
        found: name of a run -> its results.
        testbeds: name of a run -> its testbed.
    """
    sentences = [s for said in findings(found, testbeds).values() for s in said]
    tables = {name: run_block(name, found[name], testbeds[name].pictures) for name in found}
    return {"findings": "\n".join(f"- {sentence}" for sentence in sentences)} | tables


def run_block(name: str, results: Results, pictures: str) -> str:
    """Plots, tables, paired tests and learning rates of a run, as far as its arms were run."""
    arms = [arm.name for arm in ARMS_OF[pictures]]
    parts = []
    if lacking := [arm for arm in arms if not complete(results, [arm])]:
        parts.append(f"Not run here: {', '.join(lacking)}.")
    parts.append(f"![every arm](study/{name}.png)")
    shown: set[str] = set()
    for title, names in SECTIONS.items():
        names = [n for n in names if n in (*arms, "base")]
        if complete(results, names) and set(names) - shown:
            parts += [f"### {title}", _table(results, names)]
        shown |= set(names)
    if drawn := curves_of(results):
        parts.append(f"![{' and '.join(drawn)}](study/{name}-curves.png)")
    parts += ["### Paired tests", _comparisons(results)]
    if tuning_of(results):
        parts += ["### Learning rates", _tuning(results)]
    return "\n\n".join(parts)


def _table(results: Results, names: Sequence[str]) -> str:
    lines = []
    for name in names:
        cells = []
        for metric in COLUMNS:
            found = values(results, name, metric)
            cells.append(_shown(mean(found.values()), 100 if metric in _SHARES else 1)
                         if found else "")  # fmt: skip
        lines.append([name, *cells, _pairs(results, name)])
    return table(["", *COLUMNS.values(), "pairs"], lines)


def _pairs(results: Results, name: str) -> str:
    """Of how many pairs an arm's runs are, on average over seeds."""
    used = [
        r["settings"]["pairs_used"]
        for r in results
        if r["arm"] == name and r["seed"] != TUNING_SEED and "pairs_used" in r["settings"]
    ]
    return f"{sum(used) / len(used):.0f}" if used else ""


def _comparisons(results: Results) -> str:
    lines = []
    for d in differences(results, [PRIMARY], "hallucination_rate"):
        lines.append([d.first, d.second, _points(d.mean), f"{d.p:.2g}", ""])
    for d in differences(results, COMPARISONS, "hallucination_rate"):
        lines.append([d.first, d.second, _points(d.mean), f"{d.p:.2g}", f"{d.adjusted:.2g}"])
    return table(["first", "second", "second - first, points", "p", "p, Holm"], lines)


def _tuning(results: Results) -> str:
    tuning = tuning_of(results)
    rates = sorted({rate for tried in tuning.values() for rate in tried})
    lines = []
    for name, tried in tuning.items():
        cells = [_percent(tried[rate]) if rate in tried else "" for rate in rates]
        taken = rates.index(best_rate(tried))
        cells[taken] = f"**{cells[taken]}**"
        lines.append([name, *cells])
    ends = {}
    for name, tried in tuning.items():
        if (rate := best_rate(tried)) in (LOWEST, HIGHEST):
            ends.setdefault(rate, []).append(name)
    said = [f"At {rate:g}, the last tried: {', '.join(ends[rate])}." for rate in sorted(ends)]
    columns = ["misnamed, %", *(f"{rate:g}" for rate in rates)]
    return "\n\n".join([table(columns, lines), *said])


def _shown(found: Mean, scale: float) -> str:
    digits = 1 if scale == 100 else 2
    value, low, high = (f"{scale * x:.{digits}f}" for x in (found.value, found.low, found.high))
    return value if math.isnan(found.low) else f"{value} [{low}, {high}]"


def _points(found: Mean) -> str:
    value, low, high = (f"{100 * x:+.1f}" for x in (found.value, found.low, found.high))
    return value if math.isnan(found.low) else f"{value} [{low}, {high}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
