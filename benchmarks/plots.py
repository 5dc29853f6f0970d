"""The pictures of docs/benchmarks.md, from the rows of one run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.results import Entry, over_limit

INK, QUIET, GRID = "#1d2129", "#6b7280", "#e5e7eb"
COLOURS = {
    "ours": "#c2410c",
    "ours, torch backend": "#f0a27a",
    "GEMMs alone": "#111827",
    "eager logits": "#2563eb",
    "F.linear_cross_entropy": "#0d9488",
    "TRL chunked log-prob": "#7c3aed",
    "Liger DPO, two calls": "#ca8a04",
    "CCE": "#64748b",
    "TRL DPO": "#7c3aed",
    "TRL DPO, labelled rows": "#a78bfa",
    "released, three sequences": "#2563eb",
    "ours, vocabulary-parallel": "#c2410c",
    "ours, data-parallel": "#f0a27a",
}
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 160, "font.size": 9, "font.family": "DejaVu Sans",
    "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK, "xtick.color": QUIET,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 8.5,
}  # fmt: skip
MARKERS = "osD^vPX*"


def colour(name: str) -> str:
    """The colour a contestant has in every picture."""
    return COLOURS.get(name, QUIET)


def save(figure, path: Path) -> None:
    """Writes a picture; the same run gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)


def factors(axis, values: Sequence[float]) -> None:
    """A logarithmic axis of factors with plain numbers."""
    ticks = [t for t in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if t <= 1.3 * max(values)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def ranking(ax, title: str, rows: list[tuple[str, tuple[float, float, float]]], line: str) -> None:
    """A line a contestant from 1 to its factor, with quartiles; least first.

    Points, not bars: a bar on a logarithmic axis has no honest length. Factors below 6 get
    a linear axis from 0, and bars.
    """
    rows = sorted(rows, key=lambda row: -row[1][1])
    everything = [part for _, three in rows for part in three]
    linear = max(everything) < 6
    for place, (name, (low, middle, high)) in enumerate(rows):
        if linear:
            ax.barh(place, middle, height=0.6, color=colour(name))
        else:
            ax.plot([1, middle], [place, place], color=colour(name), linewidth=2.5)
            ax.plot([middle], [place], "o", color=colour(name), markersize=7)
        ax.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
        shown = max(high, middle)
        if linear:
            shown = (1 if 0.7 < shown < 1 else shown) + 0.015 * max(everything)  # not on the line
        else:
            shown = max(shown, 1) * 1.14
        ax.text(shown, place, f"{middle:.2f}", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    for label, (name, _) in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if name.startswith("ours") else "normal")
    if linear:
        ax.set_xlim(0, 1.12 * max(everything))
    else:
        ax.set_xscale("log")
        ax.set_xlim(min(0.85 * min(everything), 0.8), 1.6 * max(everything))
        factors(ax.xaxis, everything)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.axvline(1, color=INK, linewidth=1.0, zorder=1)
    ax.grid(axis="y", visible=False)
    ax.set_title(title)
    ax.set_xlabel(line)


def rankings(panels, line: str, path: Path, columns: int = 2) -> None:
    """Panels of `ranking`; a panel is (title, rows)."""
    with plt.rc_context(STYLE):
        lines = -(-len(panels) // columns)
        height = sum(
            0.75 + 0.25 * max(len(rows) for _, rows in panels[i * columns : (i + 1) * columns])
            for i in range(lines)
        )
        figure, axes = plt.subplots(
            lines, columns, figsize=(5.2 * columns, height), squeeze=False, layout="constrained"
        )
        for ax, (title, rows) in zip(axes.flat, panels, strict=False):
            ranking(ax, title, rows, line)
        for ax in list(axes.flat)[len(panels) :]:
            ax.axis("off")
        save(figure, path)


def limit_panels(groups: dict[str, list[Entry]]) -> list[tuple[str, list]]:
    """A panel for each group that has a limit."""
    found = ((name, over_limit(entries)) for name, entries in groups.items())
    return [(name.removeprefix("head, "), list(rows.items())) for name, rows in found if rows]


def lines(ax, series: dict[str, list[tuple[float, float]]]) -> None:
    """A line a contestant over a logarithmic plane; names at their right ends where they fit."""
    for place, (name, points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True)
        ours = name.startswith("ours")
        ax.plot(
            x, y, label=name, color=colour(name), linewidth=2.4 if ours else 1.4,
            marker=MARKERS[place % len(MARKERS)], markersize=4.5, zorder=3 if ours else 2,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    values = sorted({x for points in series.values() for x, _ in points})
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    plain(ax.yaxis)


def plain(axis) -> None:
    """A logarithmic axis with five ticks in every decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def memory(groups: dict[str, list[Entry]], path: Path) -> None:
    """Peak memory against image tokens, a panel for each head and dtype."""
    panels: dict[str, dict[str, list]] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        series = panels.setdefault("{head}, {dtype}".format(**entry.case), {})
        point = (entry.case["image_tokens"], entry.bytes / 2**20)
        series.setdefault(entry.contestant, []).append(point)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(5.4 * len(panels), 3.9), squeeze=False, layout="constrained"
        )
        for ax, (title, series) in zip(axes.flat, panels.items(), strict=True):
            lines(ax, series)
            ax.set_title(title)
            ax.set_xlabel("image tokens in each sequence")
            ax.set_ylabel("peak memory beyond inputs and gradients, MiB")
        _legend(figure, axes)
        save(figure, path)


def _legend(figure, axes) -> None:
    """One legend for all panels, below them."""
    found = {}
    for ax in axes.flat:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4)


def error_against_time(groups: dict[str, list[Entry]], path: Path) -> None:
    """Error of hidden's gradient against time over the limit; a panel a dtype, all shapes in it."""
    panels: dict[str, list[tuple[str, float, float]]] = {}
    for entries in groups.values():
        times = over_limit(entries)
        for entry in entries:
            if entry.contestant in times and "gradient" in entry.error:
                point = (entry.contestant, times[entry.contestant][1], entry.error["gradient"])
                panels.setdefault(entry.case["dtype"], []).append(point)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(5.2 * len(panels), 3.9), squeeze=False, layout="constrained"
        )
        for ax, (dtype, points) in zip(axes.flat, panels.items(), strict=True):
            names = list(dict.fromkeys(name for name, *_ in points))
            for place, name in enumerate(names):
                own = [(x, y) for who, x, y in points if who == name]
                ax.scatter(
                    *zip(*own, strict=True), label=name, color=colour(name), s=34,
                    marker=MARKERS[place % len(MARKERS)], edgecolor="white", linewidth=0.6,
                    zorder=3,
                )  # fmt: skip
            ax.set_xscale("log")
            ax.set_yscale("log")
            factors(ax.xaxis, [x for _, x, _ in points])
            plain(ax.yaxis)
            ax.set_title(dtype)
            ax.set_xlabel("time over that of the GEMMs alone")
            ax.set_ylabel("relative error of the gradient against fp64")
        _legend(figure, axes)
        save(figure, path)


def scaling(groups: dict[str, list[Entry]], path: Path) -> None:
    """Time against N, T, V and ranks, a panel each."""
    panels: dict[str, dict[str, list]] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        if entry.case["axis"] == "ranks" and entry.case["head"] != "trainable":
            continue  # one head is enough for a picture
        series = panels.setdefault(entry.case["axis"], {})
        point = (entry.case["value"], 1e3 * entry.median)
        series.setdefault(entry.contestant, []).append(point)
    names = {
        "N": "response rows N",
        "V": "vocabulary V",
        "T": "positions in each sequence T, 64 of them response",
        "ranks": "ranks, one thread each",
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10.4, 7.4), squeeze=False, layout="constrained")
        for ax, (axis, series) in zip(axes.flat, panels.items(), strict=False):
            lines(ax, series)
            ax.set_title(names.get(axis, axis))
            ax.set_xlabel(names.get(axis, axis))
            ax.set_ylabel("forward and backward, ms")
        for ax in list(axes.flat)[len(panels) :]:
            ax.axis("off")
        _legend(figure, axes)
        save(figure, path)
