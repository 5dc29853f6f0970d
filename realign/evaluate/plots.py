"""Forest plot of a comparison: differences to the first model with their intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from realign.evaluate.paired import Comparison
from realign.evaluate.tables import one_line
from realign.files import replacing

PLOTS = (".png", ".svg", ".pdf")
"""Suffixes of a plot."""
_WIDTH = 3.5  # Inches: a column of a paper.
_LINE, _GAP, _ENDS = 0.13, 0.12, 0.55  # Inches of an interval, between rules, of title and axis.
_FONT = 8.0  # Points.
_LONGEST = 40  # Characters of a line at this width.
_PIXELS = 60_000  # Matplotlib draws at most 65,535 in one direction.

# Okabe and Ito's colours for colour-blind readers, in this order of distinct greys. In grey, the
# markers separate the models, too. Their numbers have no common factor, so 35 pairs differ.
_COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73")
_MARKERS = "osD^vPX"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        file: name of the answers file, or of its benchmark.
        rule: the rule that scores the answers.
        model: name of the model.
        found: the model against the first one. The first model is compared with itself.
        adjusted: `flip_p` after Holm's correction over the table. nan for the first model.
    """

    file: str
    rule: str
    model: str
    found: Comparison
    adjusted: float


def forest(file: str | Path, rows: Sequence[Row]) -> None:
    """Draw and save the differences of each file and rule, with 95 % intervals.

    Args:
        file: file to write, whose suffix names a format of matplotlib.
        rows: rows of the comparison. Rows of the first model are not drawn.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [row for row in rows if not math.isnan(row.adjusted)]
    models = list(dict.fromkeys(row.model for row in drawn))
    groups: dict[str, list[str]] = {}
    for row in drawn:
        if row.rule not in (rules := groups.setdefault(row.file, [])):
            rules.append(row.rule)
    step = _LINE * len(models) + _GAP
    heights = [step * len(rules) for rules in groups.values()]
    names = [_lines(name) for name in models]
    legend = 0.15 * sum(name.count("\n") + 1 for name in names) + 0.1
    titles = {name: _lines(name) for name in groups}
    ends = sum(0.13 * title.count("\n") + 0.3 for title in titles.values())
    height = sum(heights) + ends + legend + _ENDS
    with matplotlib.rc_context(
        {"font.size": _FONT, "svg.hashsalt": "realign", "svg.fonttype": "none"}
    ):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ]
        marks: dict[str, Any] = {}
        for axes, (name, rules) in zip(panels, groups.items(), strict=True):
            axes.axvline(0, color="#555555", lw=0.8, zorder=1)
            for row in (row for row in drawn if row.file == name):
                number = models.index(row.model)
                place = step * rules.index(row.rule) + _LINE * (number - (len(models) - 1) / 2)
                marks[row.model] = _interval(axes, row, place, number)
            axes.set_ylim(step * (len(rules) - 0.5), -step / 2)
            axes.set_yticks([step * place for place in range(len(rules))], rules)
            axes.set_title(titles[name], loc="left", fontsize=_FONT, parse_math=False)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#dddddd", lw=0.5)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            for edge in range(1, len(rules)):
                axes.axhline(step * (edge - 0.5), color="#dddddd", lw=0.5)
        label = _lines(f"points above {rows[0].model}, 95 % interval")
        panels[-1].set_xlabel(label, parse_math=False)
        # A label that starts with an underscore would be left out.
        shown = figure.legend(
            list(marks.values()), ["."] * len(marks), loc="outside upper left", frameon=False
        )
        for text, name in zip(shown.get_texts(), names, strict=True):
            text.set(text=name, parse_math=False)
        suffix = Path(file).suffix[1:].lower()
        date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        with replacing(file) as out:
            dpi = min(300, int(_PIXELS / height))
            figure.savefig(out, format=suffix, dpi=dpi, metadata=date, facecolor="white")


def _interval(axes: Any, row: Row, place: float, number: int) -> Any:
    """Draw one difference. Returns its mark for the legend."""
    found, colour = row.found, _COLOURS[number % len(_COLOURS)]
    axes.plot([100 * found.low, 100 * found.high], [place] * 2, color=colour, lw=1.2)
    marker = _MARKERS[number % len(_MARKERS)]
    (mark,) = axes.plot(
        [100 * found.difference], [place], marker, color=colour, ms=4, mec="white", mew=0.4
    )
    return mark


def _lines(name: str) -> str:
    """A name on one or more lines that fit the plot."""
    return "\n".join(textwrap.wrap(one_line(name), _LONGEST)) or name
