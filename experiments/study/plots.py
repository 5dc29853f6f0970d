"""Plots of the study."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from experiments.study.analysis import Results, complete, mean, values
from experiments.study.arms import BETAS, LOSS_SECTIONS, SECTIONS, WEIGHTS

CURVES = {
    "weight of the visual term": {
        "rdpo": {1.0: "rdpo"} | {weight: f"rdpo weight {weight:g}" for weight in WEIGHTS}
    },
    "beta": {
        name: {0.1: name} | {beta: f"{name} beta {beta:g}" for beta in BETAS}
        for name in ("dpo", "rdpo")
    },
}
"""Axis -> line -> position on the axis -> arm."""


def _save(figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def draw(file: Path, results: Results) -> None:
    """Draw the misnamed images of every arm, with intervals as bars and seeds as dots."""
    groups = (*SECTIONS.values(), *LOSS_SECTIONS.values())
    names = list(dict.fromkeys(name for group in groups for name in group))
    names = [name for name in names if values(results, name, "hallucination_rate")][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(names) + 1))
    for place, name in enumerate(names):
        percentages = [100 * v for v in values(results, name, "hallucination_rate").values()]
        average = mean(percentages)
        colour = "tab:orange" if name.startswith("rdpo") else "tab:blue"
        if not math.isnan(average.low):
            axes.plot([average.low, average.high], [place, place], color=colour, lw=2)
        axes.plot(percentages, [place] * len(percentages), ".", color=colour, alpha=0.4)
        axes.plot([average.value], [place], "o", color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("misnamed on unbiased scenes, %; bar: 95 % interval over seeds")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlim(left=0)
    _save(figure, file)


def curves_of(results: Results) -> dict[str, dict[str, dict[float, str]]]:
    """Return the entries of `CURVES` with results for every arm."""
    return {
        axis: lines
        for axis, lines in CURVES.items()
        if complete(results, [arm for arms in lines.values() for arm in arms.values()])
    }


def draw_curves(file: Path, results: Results) -> None:
    """Draw the misnamed images over the visual weight and over beta, if all arms have results."""
    if not (drawn := curves_of(results)):
        return
    size = (4 * len(drawn), 3)
    figure, panels = pyplot.subplots(1, len(drawn), figsize=size, sharey=True, squeeze=False)
    for axes, (axis, lines) in zip(panels[0], drawn.items(), strict=True):
        for name, arms in lines.items():
            xs = sorted(arms)
            means = [mean(values(results, arms[x], "hallucination_rate").values()) for x in xs]
            colour = "tab:orange" if name == "rdpo" else "tab:blue"
            axes.plot(xs, [100 * m.value for m in means], "o-", color=colour, label=name)
            axes.fill_between(
                xs,
                [100 * m.low for m in means],
                [100 * m.high for m in means],
                color=colour,
                alpha=0.2,
            )
        if axis == "beta":
            axes.set_xscale("log")
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0, 0].set_ylabel("misnamed, %")
    _save(figure, file)
