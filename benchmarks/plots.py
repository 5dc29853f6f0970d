"""Charts of docs/benchmarks.md."""

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.results import LIMIT, Groups, Quartiles

INK, QUIET, GRID = "#1d2129", "#6b7280", "#e5e7eb"
COLOURS = {
    "ours": "#c2410c",
    "ours, torch backend": "#f0a27a",
    LIMIT: "#111827",
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
    "figure.dpi": 100, "savefig.dpi": 160, "font.size": 10, "font.family": "DejaVu Sans",
    "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK, "xtick.color": QUIET,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 9.5,
}  # fmt: skip
MARKERS = "osD^vPX*"
RATIOS = (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
Points = dict[str, list[tuple[float, float]]]
"""Points (x, y) by contestant."""
TIMES = "time, theirs / ours (ours: 1x)"
ONE = (1.0, 1.0, 1.0)


@contextlib.contextmanager
def drawn(count: int, height: float, path: Path, columns: int = 2) -> Iterator[tuple[Figure, list]]:
    """Yields (figure, axes) of `count` panels and saves them, with the same bytes for one run."""
    with plt.rc_context(STYLE):
        lines = -(-count // columns)
        size = (5.2 * columns, height * lines)
        figure, axes = plt.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for ax in axes.flat[count:]:
            ax.axis("off")
        yield figure, axes.flat[:count]
        figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Software": None})
        plt.close(figure)


def plain(axis, locator=None) -> None:
    """Formats a logarithmic axis with plain numbers."""
    axis.set_major_locator(locator or LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def rankings(panels: dict[str, dict[str, Quartiles]], title: str, path: Path) -> None:
    """Draws the ratio of each contestant with its quartiles, on a logarithmic axis."""
    height = 0.75 + 0.27 * max(map(len, panels.values()))
    with drawn(len(panels), height, path) as (figure, axes):
        figure.suptitle(f"{title}: {TIMES}", x=0.01, ha="left", fontsize=12, weight="bold")
        for ax, (name, rows) in zip(axes, panels.items(), strict=True):
            rows = sorted(rows.items(), key=lambda row: -row[1][1])
            for place, (contestant, (low, middle, high)) in enumerate(rows):
                colour = COLOURS.get(contestant, QUIET)
                spread = [[middle - low], [high - middle]]
                ax.plot([1, middle], [place, place], color=colour, linewidth=2.5)
                ax.errorbar(middle, place, xerr=spread, fmt="o", color=colour, ecolor=INK)
                ax.text(1.1 * max(high, 1), place, f"{middle:.2f}x", va="center", fontsize=9)
            ax.set_yticks(range(len(rows)), [contestant for contestant, _ in rows])
            ax.set_ylim(-0.6, len(rows) - 0.4)
            most = max(high for _, (_, _, high) in rows)
            least = min(low for _, (low, _, _) in rows)
            ax.set_xscale("log")
            ax.set_xlim(min(0.85 * least, 0.8), 1.6 * most)
            plain(ax.xaxis, FixedLocator([tick for tick in RATIOS if tick <= 1.3 * most]))
            ax.axvline(1, color=INK, linewidth=1.0, zorder=1)
            ax.grid(axis="y", visible=False)
            ax.set_title(textwrap.fill(name, 44))


def curves(
    panels: dict[str, Points], x: str | None, y: str, path: Path, line: str = "-", columns: int = 2
) -> None:
    """Draws the points of each contestant on logarithmic axes; x None: the panel's title."""
    with drawn(len(panels), 3.8, path, columns) as (figure, axes):
        handles = {}
        for ax, (title, points) in zip(axes, panels.items(), strict=True):
            for place, (name, found) in enumerate(points.items()):
                ours = name.startswith("ours")
                (handles[name],) = ax.plot(
                    *zip(*sorted(found), strict=True), linestyle=line,
                    color=COLOURS.get(name, QUIET),
                    linewidth=2.4 if ours else 1.4, marker=MARKERS[place % len(MARKERS)],
                    markersize=5, zorder=3 if ours else 2,
                )  # fmt: skip
            values = sorted({value for found in points.values() for value, _ in found})
            ax.set_xscale("log")
            ax.set_yscale("log")
            plain(ax.xaxis, None if line == "none" else FixedLocator(values))
            plain(ax.yaxis)
            ax.set_title(title)
            ax.set_xlabel(x or title)
            ax.set_ylabel(y)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


def _panels(groups: Groups, title, point) -> dict[str, Points]:
    """Points by `title(entry)` and contestant, without entries for which either is None."""
    panels: dict[str, Points] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        if (panel := title(entry)) and (found := point(entry)):
            panels.setdefault(panel, {}).setdefault(entry.contestant, []).append(found)
    return panels


def _ratios(groups: Groups, prefix: str) -> dict[str, dict[str, Quartiles]]:
    """Quartiles of theirs / ours by group, without the prefix of its name, and contestant."""
    return {
        name.removeprefix(prefix): {e.contestant: e.ratio or ONE for e in entries}
        for name, entries in groups.items()
    }


def head(groups: Groups, folder: Path) -> None:
    """Draws the time over ours, and the error of the gradient against that time."""
    raced = {
        name: entries
        for name, entries in groups.items()
        if any(entry.role == "limit" for entry in entries)
    }
    rankings(_ratios(raced, "head, "), "Head, forward and backward", folder / "head.png")

    def point(entry):
        return "gradient" in entry.error and ((entry.ratio or ONE)[1], entry.error["gradient"])

    labels = TIMES, "relative error of the gradient against fp64"
    panels = _panels(raced, lambda entry: entry.case["dtype"], point)
    curves(panels, *labels, folder / "error.png", line="none")


def memory(groups: Groups, folder: Path) -> None:
    """Draws peak memory against image tokens, with a panel per head and dtype."""
    panels = _panels(
        groups,
        lambda entry: "{head}, {dtype}".format(**entry.case),
        lambda entry: (entry.case["image_tokens"], entry.bytes / 2**20),
    )
    y = "peak memory beyond inputs and gradients, MiB"
    curves(panels, "image tokens in each sequence", y, folder / "memory.png", columns=len(panels))


def step(groups: Groups, folder: Path) -> None:
    """Draws the time of a step over ours."""
    panels = _ratios(groups, "step, ")
    panels = {name.replace("1 example(s)", "1 example").replace("(s)", "s"): rows
              for name, rows in panels.items()}  # fmt: skip
    rankings(panels, "Training step", folder / "step.png")


AXES = {
    "N": "response rows N",
    "V": "vocabulary V",
    "T": "positions in each sequence T, 64 of them response",
    "ranks": "ranks, one thread each",
}


def scaling(groups: Groups, folder: Path) -> None:
    """Draws time against N, T, V and ranks (trained head), with a panel each."""

    def title(entry):
        axis, head = entry.case["axis"], entry.case["head"]
        return None if axis == "ranks" and head != "trainable" else AXES[axis]

    panels = _panels(groups, title, lambda e: (e.case["value"], 1e3 * e.median))
    curves(panels, None, "forward and backward, ms", folder / "scaling.png")


DRAW = {"head": head, "memory": memory, "step": step, "scaling": scaling}
