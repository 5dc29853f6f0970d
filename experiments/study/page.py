"""The page of the study, made of its results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    """What came out on a testbed in one sentence, in words that follow from the numbers."""
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
    """What came out for each kind of pictures: a sentence over all its runs, then of each run."""
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


def page(found: Mapping[str, Results], testbeds: Mapping[str, Testbed]) -> str:
    """The text of docs/study.md.

    Args:
        found: name of a run -> its results.
        testbeds: name of a run -> what it was judged on.
    """
    count = sum(len(results) for results in found.values())
    sentences = [s for said in findings(found, testbeds).values() for s in said]
    said = "\n".join(f"- {sentence}" for sentence in sentences)
    bed, ends = next(iter(testbeds.values())), {"lowest": LOWEST, "highest": HIGHEST}
    parts = [_HEAD.format(findings=said, count=count, bed=bed, **ends)]
    ran = {bed.pictures for bed in testbeds.values()}
    if absent := [pictures for pictures in ARMS_OF if pictures not in ran]:
        parts += [f"Not run yet: {', '.join(absent)}.", ""]
    for name, results in found.items():
        seeds = {r["seed"] for r in results} - {TUNING_SEED}
        pictures = testbeds[name].pictures
        about = (_ABOUT[pictures] if name == pictures else _AGAIN).format(
            bed=testbeds[name], seeds=len(seeds), pictures=pictures
        )
        parts += [f"## {name.replace('-', ', ').capitalize()}", "", about]
        arms = {arm.name for arm in ARMS_OF[pictures]}
        if lacking := [a.name for a in ARMS_OF[pictures] if not complete(results, [a.name])]:
            parts += [f"Not run here: {', '.join(lacking)}.", ""]
        parts += [f"![every arm](study/{name}.png)", ""]
        shown: set[str] = set()
        for title, names in SECTIONS.items():
            names = [n for n in names if n in arms | {"base"}]
            if complete(results, names) and set(names) - shown:
                parts += [f"### {title}", "", _table(results, names), ""]
            shown |= set(names)
        if drawn := curves_of(results):
            parts += [f"![{' and '.join(drawn)}](study/{name}-curves.png)", ""]
        parts += ["### Paired tests", "", _TESTS, "", _comparisons(results), ""]
        if tuning_of(results):
            parts += ["### Learning rates", "", _RATES, "", _tuning(results), ""]
    return "\n".join(parts)


def _table(results: Results, names: Sequence[str]) -> str:
    lines = [["", *COLUMNS.values(), "pairs"]]
    for name in names:
        cells = []
        for metric in COLUMNS:
            found = values(results, name, metric)
            cells.append(_shown(mean(found.values()), 100 if metric in _SHARES else 1)
                         if found else "")  # fmt: skip
        lines.append([name, *cells, _pairs(results, name)])
    return _markdown(lines)


def _pairs(results: Results, name: str) -> str:
    """Of how many pairs an arm's runs are, on average over seeds."""
    used = [
        r["settings"]["pairs_used"]
        for r in results
        if r["arm"] == name and r["seed"] != TUNING_SEED and "pairs_used" in r["settings"]
    ]
    return f"{sum(used) / len(used):.0f}" if used else ""


def _comparisons(results: Results) -> str:
    lines = [["first", "second", "second - first, points", "p", "p, Holm"]]
    for d in differences(results, [PRIMARY], "hallucination_rate"):
        lines.append([d.first, d.second, _points(d.mean), f"{d.p:.2g}", ""])
    for d in differences(results, COMPARISONS, "hallucination_rate"):
        lines.append([d.first, d.second, _points(d.mean), f"{d.p:.2g}", f"{d.adjusted:.2g}"])
    return _markdown(lines)


def _tuning(results: Results) -> str:
    tuning = tuning_of(results)
    rates = sorted({rate for tried in tuning.values() for rate in tried})
    lines = [["misnamed, %", *(f"{rate:g}" for rate in rates)]]
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
    return "\n\n".join([_markdown(lines), *said])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def _shown(found: Mean, scale: float) -> str:
    digits = 1 if scale == 100 else 2
    value, low, high = (f"{scale * x:.{digits}f}" for x in (found.value, found.low, found.high))
    return value if math.isnan(found.low) else f"{value} [{low}, {high}]"


def _points(found: Mean) -> str:
    value, low, high = (f"{100 * x:+.1f}" for x in (found.value, found.low, found.high))
    return value if math.isnan(found.low) else f"{value} [{low}, {high}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


_HEAD = """# The study

{findings}

`python -m experiments.study` repeats every run; `study/*.jsonl` keeps all {count} of them with
settings, metrics and what each model said, scene by scene. Page and plots are made of them alone.
Means hide the seeds; the plots show them. The digits take some two and a half hours on two cores
(AVX2), the photographs took 36 minutes (AVX-512).

A scene shows four pictures of ten kinds, which the number words name. In the scenes that a base is
pretrained on ({bed.base_steps} steps) the right picture of a row follows from the left one in
{bed.follow:.0%} of rows. In the test scenes ({bed.scenes}, of pictures never trained on) it does
not, and a base that leans on the prior misnames pictures; where it does, the prior helps
({bed.biased_scenes} more scenes, also of pictures never trained on). Each seed has a base, pairs
(of {bed.records} scenes) and an order of its own; training is {bed.steps} steps of
{bed.batch_size} pairs, LoRA of rank {bed.lora_rank}: equal steps, not equal compute, as rDPO reads
three sequences for DPO's two.

Each method, each kind of negative and each way to make pairs has a learning rate of its own: the
best of four, and of further ones by factors of two where the best is an end, from {lowest:g} to
{highest:g}, on a seed that is not reported; below its table stands whose best is one of these two.
That seed has other test scenes of the same test pictures. Arms that vary weight, beta or k take the
rate of their method.

Numbers are means over seeds with Student's 95 % interval: over bases, pairs and trainings, not over
scenes, which are the same for all. One word of a caption is masked unless said otherwise. SymMPO's
response to the retrieved image is that scene's caption; mDPO's negative is a crop. Margins are of
rewards and so scale with beta; those of `released` are no log-ratios and say nothing.
"""
_ABOUT = {
    "digits": """\
Handwritten digits with pixel noise of {bed.noise} grey levels; {seeds} seeds. Noise, prior and
length of pretraining were fixed by looking at bases alone. How DPO and rDPO do on the easier digits
of the demo was known.
""",
    "photographs": """\
Patches of ten photographs of scikit-image (brick, gravel, a cat, a cup of coffee, stars, tissue, a
retina, a rocket, the moon, cells; four are grey) with noise of {bed.noise}; {seeds} seeds. Test
patches come from stripes of the photographs that are not trained on. Photographs and noise were
fixed by small classifiers and bases alone.
""",
}
_AGAIN = """\
The {pictures} once more, {seeds} seeds, with the learning rates that the first run found, on a CPU
with AVX-512 where the first had AVX2 alone. Its sums round otherwise, which a thousand steps of
pretraining amplify: the bases are others.
"""
_TESTS = (
    "Differences are paired by seed; p is of the paired t-test. The first line is the question of "
    "the study. The others were chosen before any arm was run on this testbed; their p is "
    "corrected together, by Holm. Below 0 the second misnames fewer."
)
_RATES = "Misnamed pictures on the tuning seed; the rate in bold is taken."
