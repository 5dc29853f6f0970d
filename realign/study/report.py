"""The page and the plots of the study, made of its results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.study.analysis import Mean, Results, differences, mean, values
from realign.study.arms import COMPARISONS, LEARNING_RATES, SECTIONS, TUNED
from realign.study.testbed import TUNING_SEED

COLUMNS = {
    "hallucination_rate": "misnamed digits, %",
    "exact_captions": "captions right, %",
    "f1": "yes/no F1, %",
    "rewards/margins": "margin, text",
    "rewards/visual_margins": "margin, visual",
}
_SHARES = ("hallucination_rate", "exact_captions", "f1")


def finding(results: Results) -> str:
    """The study's finding in one sentence, in words that follow from the numbers."""
    (one,) = differences(results, [("dpo", "rdpo")], "hallucination_rate")
    dpo, rdpo = (mean(values(results, name, "hallucination_rate").values()) for name in
                 ("dpo", "rdpo"))  # fmt: skip
    gap, word = one.mean, "neither clearly fewer nor clearly more"
    if gap.high < 0 or gap.low > 0:  # nan compares as False
        word = "fewer" if gap.value < 0 else "more"
    return (
        f"After rDPO the model misnames {word} digits than after DPO: {_percent(rdpo.value)} "
        f"against {_percent(dpo.value)} %, a difference of {_points(gap)} points over "
        f"{one.seeds} seeds."
    )


def page(results: Results, bed: Mapping[str, Any]) -> str:
    """The text of docs/study.md."""
    seeds = sorted({r["seed"] for r in results} - {TUNING_SEED})
    parts = [_HEAD.format(finding=finding(results), count=len(results), seeds=len(seeds), **bed)]
    parts += [_base(results), "![arms](study/arms.png)", ""]
    for title, names in SECTIONS.items():
        parts += [f"## {title}", "", _table(results, names), ""]
    parts += ["## Paired tests", "", _TESTS, "", _comparisons(results), ""]
    parts += ["## Learning rates", "", _RATES, "", _tuning(results), ""]
    return "\n".join(parts)


def draw(file: Path, results: Results) -> None:
    """Every arm's misnamed digits with its interval, the seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(["base", *(n for group in SECTIONS.values() for n in group)]))
    names = [name for name in names if values(results, name, "hallucination_rate")][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(names) + 1))
    for place, name in enumerate(names):
        found = [100 * v for v in values(results, name, "hallucination_rate").values()]
        middle = mean(found)
        colour = "tab:orange" if name.startswith("rdpo") else "tab:blue"
        if not math.isnan(middle.low):
            axes.plot([middle.low, middle.high], [place, place], color=colour, lw=2)
        axes.plot(found, [place] * len(found), ".", color=colour, alpha=0.4)
        axes.plot([middle.value], [place], "o", color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("misnamed digits on unbiased scenes, %; bar: 95 % interval over seeds")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlim(left=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _base(results: Results) -> str:
    found = mean(values(results, "base", "hallucination_rate").values())
    return f"The bases misname {_shown(found, 100)} % of the digits.\n"


def _table(results: Results, names: Sequence[str]) -> str:
    lines = [["", *COLUMNS.values()]]
    for name in names:
        cells = []
        for metric in COLUMNS:
            found = values(results, name, metric)
            cells.append(_shown(mean(found.values()), 100 if metric in _SHARES else 1)
                         if found else "")  # fmt: skip
        lines.append([name, *cells])
    return _markdown(lines)


def _comparisons(results: Results) -> str:
    lines = [["first", "second", "second - first, points", "p", "p, Holm"]]
    for d in differences(results, COMPARISONS, "hallucination_rate"):
        lines.append([d.first, d.second, _points(d.mean), f"{d.p:.2g}", f"{d.adjusted:.2g}"])
    return _markdown(lines)


def _tuning(results: Results) -> str:
    tuned = {
        (r["arm"], r["learning_rate"]): r["metrics"]["hallucination_rate"]
        for r in results
        if r["seed"] == TUNING_SEED and r["learning_rate"]
    }
    lines = [["misnamed digits, %", *(f"{rate:g}" for rate in LEARNING_RATES)]]
    for arm in TUNED:
        found = [tuned.get((arm.name, rate)) for rate in LEARNING_RATES]
        best = min((v for v in found if v is not None), default=None)
        cells = ["" if v is None else _percent(v) for v in found]
        marked = [f"**{c}**" if v == best else c for c, v in zip(cells, found, strict=True)]
        lines.append([arm.name, *marked])
    return _markdown(lines)


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

{finding}

Written by `python -m realign.study`, which repeats every run; `study/runs.jsonl` keeps all {count}
of them with settings, metrics and what each model said, scene by scene.

**Testbed.** Scenes of four real handwritten digits with pixel noise of {noise} grey levels. In the
scenes that a base is pretrained on ({base_steps} steps) the right digit of a row follows from the
left one in {follow:.0%} of rows; in the test scenes ({scenes}, of digits never trained on) it does
not, and a base that leans on the prior misnames digits. All of this was fixed by looking at bases
alone. Each of the {seeds} seeds has a base, pairs ({records} scenes) and an order of its own;
training is {steps} steps of {batch_size}, LoRA of rank {lora_rank}. The learning rate of each
method, and of rDPO with each kind of negative, is the best of the same four on a seed that is not
reported; arms that vary something else take the rate of their method.

Numbers are means over seeds with Student's 95 % interval. One word of a caption is masked unless
said otherwise. SymMPO's response to the retrieved image is that scene's caption; mDPO's negative is
a crop.
"""
_TESTS = (
    "The comparisons were chosen before any arm was run. Differences are paired by seed; p is of "
    "the paired t-test, then after Holm's correction for all of them. Below 0 the second misnames "
    "fewer."
)
_RATES = "Misnamed digits on the tuning seed; the rate in bold is taken."
