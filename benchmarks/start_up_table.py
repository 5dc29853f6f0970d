"""Tables of `start_up` results: `python -m benchmarks.start_up_table FOLDER`.

A figure is the median of a setting's repeats. Times count from the end of the imports: those of the
slowest rank, and CPU seconds of all ranks. Memory is the peak of the largest rank. Slopes are drawn
through the smallest and the largest number of records, and extended to other numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

SETTING = ("family", "kind", "ranks")
RUNS = (
    *SETTING, "cache", "up to", "records", "imports s", "s", "CPU s", "CPU ms/record",
    "first step s", "pass CPU ms/leaf", "peak MiB", "peak MiB of first step",
)  # fmt: skip
EXTENDED = (83_000, 1_000_000)
"""Records of RLAIF-V, and a million."""
SLOPES = (
    *SETTING, "cache", "up to", "records", "ms/record", "CPU ms/record", "MiB/record",
    *(f"{what} at {count:,}" for what in ("s", "CPU s", "MiB") for count in EXTENDED),
)  # fmt: skip
TRL = ("TRL records", "cache", "data set s (CPU)", "trainer", "first batch", "peak MiB")
WAITS = ("family", "workers", "step s", "share of waits", "median wait ms", "CPU ms")

Ranks = list[dict[str, Any]]  # the marks of each rank
Row = list[str]


def span(runs: list[Ranks], place: str) -> tuple[float, float]:
    """Seconds from the end of the imports to a mark, and CPU seconds."""

    def since(marks: dict[str, Any], clock: str) -> float:
        return marks[place][clock] - marks["imports"][clock]

    walls = [max(since(marks, "wall") for marks in ranks) for ranks in runs]
    return median(walls), median(sum(since(marks, "cpu") for marks in ranks) for ranks in runs)


def peak(runs: list[Ranks], place: str) -> float:
    """Peak memory up to a mark in MiB."""
    return median(max(marks[place]["VmHWM"] for marks in ranks) for ranks in runs)


def start_row(runs: list[Ranks], place: str, count: int) -> Row:
    """The columns of `RUNS` from `records` on, up to a mark: records read, or `set_up` done."""
    wall, cpu = span(runs, place)
    imports = median(ranks[0]["imports"]["wall"] for ranks in runs)
    row = [f"{count:,}", *(f"{number:.1f}" for number in (imports, wall, cpu))]
    row += [f"{1000 * cpu / count:.2f}"]
    done = [ranks for ranks in runs if "first_step" in ranks[0] and place == "set_up"]
    parts = [marks["batches"] for ranks in done for marks in ranks if marks["batches"]["leaves"]]
    # With made-up log-probs, the time to the first step lacks a part of the reference pass.
    row += [f"{span(done, 'first_step')[0]:.1f}" if done and not parts else ""]
    leaf = [1000 * part["cpu_seconds"] / part["leaves"] for part in parts]
    row += [f"{median(leaf):.1f}" if leaf else "", f"{peak(runs, place):,.0f}"]
    return row + [f"{peak(done, 'first_step'):,.0f}" if done else ""]


def slope_row(points: list[tuple[int, list[Ranks]]], place: str) -> Row:
    """The columns of `SLOPES` from `records` on, for (records, runs) points."""
    (few, low), (many, high) = (find(points, key=lambda one: one[0]) for find in (min, max))
    ends = [(*span(runs, place), peak(runs, place)) for runs in (low, high)]
    slopes = [(b - a) / (many - few) for a, b in zip(*ends, strict=True)]
    row = [f"{few:,} to {many:,}", *(f"{1000 * slope:.3f}" for slope in slopes[:2])]
    row += [f"{slopes[2]:.3f}"]
    for start, slope in zip(ends[0], slopes, strict=True):
        row += [f"{start + slope * (count - few):,.0f}" for count in EXTENDED]
    return row


def table(folder: Path) -> str:
    """Markdown tables of all results in a folder: starts, slopes, TRL, waits."""
    rows: dict[tuple[str, ...], list[Row]] = {RUNS: [], SLOPES: [], TRL: [], WAITS: []}
    points: dict[tuple[str, ...], list[tuple[int, list[Ranks]]]] = {}
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        setting, by_cache = found["setting"], {}
        for run in found["runs"]:
            by_cache.setdefault(run["cache"], []).append(run["ranks"])
        for cache, runs in by_cache.items():
            if setting["what"] == "start":
                count = int(setting["count"])
                for place in (name for name in ("records", "set_up") if name in runs[0][0]):
                    key = (*(setting[name] for name in SETTING), cache, place)
                    points.setdefault(key, []).append((count, runs))
                    rows[RUNS].append([*key, *start_row(runs, place, count)])
            elif setting["what"] == "trl":
                places = [span(runs, place) for place in ("data_set", "trainer", "first_batch")]
                figures = [f"{wall:.2f} ({cpu:.2f})" for wall, cpu in places]
                rows[TRL].append(
                    [setting["count"], cache, *figures, f"{peak(runs, 'first_batch'):,.0f}"]
                )
            else:
                waits = [ranks[0]["wait"] for ranks in runs]
                share, *rest = (
                    median(one[name] for one in waits) for name in ("share", "median_ms", "cpu_ms")
                )
                named = [setting[name] for name in ("family", "workers", "step_seconds")]
                rows[WAITS].append([*named, f"{100 * share:.1f} %", *(f"{ms:.0f}" for ms in rest)])
    rows[SLOPES] = [
        [*key, *slope_row(found, key[-1])] for key, found in points.items() if len(found) > 1
    ]
    return "\n\n".join(markdown(head, found) for head, found in rows.items() if found)


def markdown(head: tuple[str, ...], rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
