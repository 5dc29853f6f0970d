"""Report of the demo, report.png: rates, training curves, a pair, and captions of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realign.digits.scenes import CELL, WORDS, digits_in
from realign.evaluate import Rate

NOISY = "noisy model input"
"""Title of the images that are drawn pixel by pixel. Others are smoothed."""
_COLOURS = {"base": "#7a7a7a", "dpo": "#c96a12", "rdpo": "#1f6fb4"}
_NAMES = {"base": "base", "dpo": "DPO", "rdpo": "rDPO"}
_WRONG, _WRONG_FILL, _GREY = "#b3001b", "#ffdfe2", "#555555"
_FONT = 13.0  # points: 13 pixels where the report is shown 900 pixels wide
_WIDTH, _PIXELS = 12.6, 1400  # inches, pixels
_CHARTS, _CELLS, _HEADS, _TITLE = 3.5, 1.87, 0.3, 0.6  # inches of charts, rows and titles


@dataclass(frozen=True)
class Panel:
    """A row of the report: images and the digits that captions name.

    Attributes:
        truth: the true caption. Other digits are marked as wrong.
        cells: title of a cell -> an image, or a caption.
    """

    truth: str
    cells: Mapping[str, Image.Image | str]


def draw(
    path: Path,
    results: Mapping[str, Mapping[str, Rate]],
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    pair: Panel,
    scenes: Sequence[Panel],
) -> None:
    """Draw and save the report, 1400 pixels wide.

    Args:
        path: PNG file to write.
        results: model name -> metric -> rate.
        logs: objective -> entries of its metrics.jsonl.
        pair: a training pair.
        scenes: test scenes with the captions of the models, in equal cells.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    heights = [_CHARTS, *_heights([pair]), *_heights(scenes)]
    with plt.rc_context({"font.size": _FONT, "axes.titlesize": _FONT + 1}):
        size, dpi = (_WIDTH, sum(heights)), _PIXELS / _WIDTH
        figure = plt.figure(figsize=size, dpi=dpi, facecolor="white")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
        charts, *sections = parts[:, 0]
        bottom = 0.32 if len(results) > 3 else 0.18  # names of several seeds are turned
        grid = charts.add_gridspec(1, 3, left=0.06, right=0.98, bottom=bottom, top=0.88, wspace=0.3)
        _rates(charts.add_subplot(grid[0]), results)
        _curves(charts.add_subplot(grid[1]), logs, "margins", "Reward margin")
        _curves(charts.add_subplot(grid[2]), logs, "accuracies", "Pairs ranked correctly")
        _title(sections[0], "A training pair. The rejected response differs in the red digit.")
        _row(sections[1], pair, heads=True)
        if scenes:
            title = "The first unseen scenes on which the models differ. Wrong digits are red."
            _title(sections[2], title)
        for section, panel in zip(sections[3:], scenes, strict=True):
            _row(section, panel, heads=panel is scenes[0])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        plt.close(figure)
    few = drawn.quantize(256, kmeans=3, dither=Image.Dither.NONE)  # a third of the bytes
    few.save(path, optimize=True)


def _heights(panels: Sequence[Panel]) -> list[float]:
    """Heights of a title and of rows."""
    if not panels:
        return []
    return [_TITLE, _HEADS + _CELLS, *[_CELLS] * (len(panels) - 1)]


def _title(section: Any, text: str) -> None:
    section.text(0.01, 0.35, text, fontsize=_FONT + 2, weight="bold", va="center")


def _rates(axes: Any, results: Mapping[str, Mapping[str, Rate]]) -> None:
    rates = [rates["hallucination_rate"] for rates in results.values()]
    names = [_NAMES[name.split()[0]] + name.removeprefix(name.split()[0]) for name in results]
    spread = [
        [100 * (r.value - r.low) for r in rates],
        [100 * (r.high - r.value) for r in rates],
    ]
    colours = [_COLOURS[name.split()[0]] for name in results]
    places = range(len(names))
    axes.bar(places, [100 * r.value for r in rates], yerr=spread, color=colours, capsize=5)
    if several := len(names) > 3:  # of several seeds, without room for their figures
        axes.set_xticks(places, names, rotation=90)
    else:
        axes.set_xticks(places, names)
    for i, rate in enumerate([] if several else rates):
        text = f"{100 * rate.value:.1f} %"
        axes.text(i, 100 * rate.high + 0.6, text, ha="center", fontsize=_FONT + 2)
    axes.set_ylabel("digits misnamed (%)")
    axes.set_title("Hallucination on unseen scenes", weight="bold")
    axes.set_ylim(0, 1.18 * max(100 * r.high for r in rates) + 1)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Any, logs: Mapping[str, Sequence[Mapping[str, float]]], metric, title) -> None:
    for name, entries in logs.items():
        steps = [entry["step"] for entry in entries]
        for side, style in (("", "-"), ("visual_", "--")):
            key = f"rewards/{side}{metric}"
            if key in entries[0]:
                values = [entry[key] for entry in entries]
                label = f"{_NAMES[name]}, {'visual' if side else 'text'} side"
                axes.plot(steps, values, style, color=_COLOURS[name], label=label, linewidth=1.6)
    axes.set_xlabel("training step")
    axes.set_title(title, weight="bold")
    axes.legend(frameon=False, fontsize=_FONT - 1)
    axes.spines[["top", "right"]].set_visible(False)


def _row(section: Any, panel: Panel, *, heads: bool) -> None:
    """Draw cells from left to right: images, and digits where captions place them."""
    top = 1 - (_HEADS * heads + 0.04) / (_CELLS + _HEADS * heads)
    grid = section.add_gridspec(
        1, len(panel.cells), left=0.01, right=0.99, bottom=0.03, top=top, wspace=0.05
    )
    true = digits_in(panel.truth)
    for place, (title, content) in zip(grid, panel.cells.items(), strict=True):
        axes = section.add_subplot(place)
        if heads:
            axes.set_title(title, fontsize=_FONT, pad=5)
        axes.set(xticks=[], yticks=[], aspect="equal")
        if isinstance(content, str):
            _words(axes, digits_in(content), true)
        else:
            noisy = title.startswith(NOISY)
            axes.imshow(content, interpolation="nearest" if noisy else "bicubic")
            axes.axhline(CELL - 0.5, color=_COLOURS["rdpo"], linewidth=0.8)
            axes.axvline(CELL - 0.5, color=_COLOURS["rdpo"], linewidth=0.8)


def _words(axes: Any, named: Sequence[int | None], true: Sequence[int | None]) -> None:
    """Write four digits as words in the quadrants that they are named for."""
    axes.set(xlim=(0, 2), ylim=(2, 0))
    for i, (digit, right) in enumerate(zip(named, true, strict=True)):
        y, x = divmod(i, 2)
        wrong = digit != right
        fill = _WRONG_FILL if wrong else "#f4f4f4"
        axes.fill_between([x, x + 1], y, y + 1, color=fill, linewidth=0)
        axes.text(
            x + 0.5,
            y + 0.5,
            "none" if digit is None else WORDS[digit],
            ha="center",
            va="center",
            color=_WRONG if wrong else "black",
            weight="bold" if wrong else "normal",
        )
    axes.axhline(1, color="white", linewidth=2)
    axes.axvline(1, color="white", linewidth=2)
    for spine in axes.spines.values():
        spine.set_color(_GREY)
