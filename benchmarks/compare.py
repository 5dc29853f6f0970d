"""Regression gate: `python -m benchmarks.compare OLD.json NEW.json`.

Times of two runs differ on a shared machine. So the gate compares ratios, theirs / ours, which are
measured in turns within one run. If ours takes 20 % longer, all ratios of its group fall by that
factor. The change of a group is the geometric mean over its contestants, except those that run our
code.

- A change is flagged if it exceeds the threshold. With a single ratio the limit is three times the
  threshold, because other work on the machine slows down several threads more than one.
- A group without ratios is compared by time, corrected for the machine's drift. Its limit is ten
  times the threshold: times of 0.1 s have differed by half between quiet runs.
- A peak is flagged if it exceeds both the threshold and 1 MiB, and an error if it doubles.
- A missing benchmark of ours is flagged.

Exit codes: 0 if nothing is flagged, 1 if something is, 2 if the files cannot be compared.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import results
from benchmarks.results import Entry, Run

LEAST_BYTES = 2**20
"""Smallest flagged growth of a peak. Peaks of small cases differ by half of it between runs."""
OF_OURS = ("ours", "bare forward")
"""Prefixes of contestants that run our code."""
THRESHOLD = 0.1


class Change(NamedTuple):
    """Change of ours in one group, new over old: 1.2 is 20 % longer, or 20 % more."""

    group: str
    factor: float
    flagged: bool
    measure: str


def pairs(old: Run, new: Run) -> list[tuple[Entry, Entry]]:
    """Pairs (old, new) of entries with the same case."""
    found = ((entry, new.find(*entry.key)) for entry in old.entries)
    return [(b, a) for b, a in found if a is not None and a.case == b.case]


def changes(old: Run, new: Run, threshold: float = THRESHOLD) -> Iterator[Change]:
    """Yields the change of each shared group, peak and error, and missing benchmarks."""
    shared, groups = pairs(old, new), {}
    for pair in shared:
        if pair[0].suite != "memory":
            groups.setdefault(pair[0].group, []).append(pair)
    others = [a.median / b.median for b, a in shared if b.role != "ours" and b.suite != "memory"]
    drift = float(np.median(others)) if others else 1.0
    for group, members in groups.items():
        logs = [
            math.log(b.ratio[1] / a.ratio[1])  # theirs / ours falls if ours takes longer
            for b, a in members
            if b.ratio and a.ratio and not b.contestant.startswith(OF_OURS)
        ]
        if logs:
            factor, limit = math.exp(np.mean(logs)), threshold * (3 if len(logs) == 1 else 1)
            yield Change(group, factor, factor > 1 + limit, f"{len(logs)} ratios")
            continue
        for before, after in members:
            if before.role == "ours":
                factor = after.median / before.median / drift
                yield Change(group, factor, factor > 1 + 10 * threshold, "time less drift")
    for before, after in shared:
        if before.role != "ours":
            continue
        if before.bytes and after.bytes:
            factor, more = after.bytes / before.bytes, after.bytes - before.bytes
            flagged = factor > 1 + threshold and more > LEAST_BYTES
            yield Change(before.group, factor, flagged, "peak memory")
        for name, was in before.error.items():
            if was > 0:
                factor = after.error.get(name, 0.0) / was
                yield Change(before.group, factor, factor > 2, f"error of {name}")
    for entry in old.entries:
        if entry.role == "ours" and new.find(*entry.key) is None:
            yield Change(entry.group, math.nan, True, "gone")


def report(old: Run, new: Run, threshold: float = THRESHOLD) -> tuple[str, bool]:
    """Text of the report, and whether anything is flagged."""
    lines = [
        f"{run.name}: {run.date}, commit {run.commit}, {run.machine['cpu']}, load "
        + (f"{run.machine['load']:.1f}" if "load" in run.machine else "unknown")
        for run in (old, new)
    ]
    found = list(changes(old, new, threshold))
    flagged = [change for change in found if change.flagged]
    lines += [f"{100 * (c.factor - 1):+7.1f} %  {c.group} ({c.measure})" for c in flagged]
    off = [abs(a.ratio[1] / b.ratio[1] - 1) for b, a in pairs(old, new) if a.ratio and b.ratio]
    if off:
        quantiles = "{:.1%} in the median, {:.1%} at nine tenths, {:.1%} at most".format(
            *np.quantile(off, (0.5, 0.9, 1.0))
        )
        near = np.mean(np.array(off) <= 0.1)
        lines.append(f"{len(off)} ratios differ by {quantiles}; {near:.0%} within 10 %")
    lines.append(f"{len(flagged)} of {len(found)} comparisons flagged at {threshold:.0%}")
    return "\n".join(lines), bool(flagged)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares two results files; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Check whether ours became slower between two runs.",
    )
    parser.add_argument("old", type=Path, help="results file of the first run")
    parser.add_argument("new", type=Path, help="results file of the second run")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="relative change to flag (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    try:
        old, new = results.read(given.old), results.read(given.new)
        if not pairs(old, new):
            raise ValueError(f"{given.old} and {given.new} have no benchmark in common.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text, flagged = report(old, new, given.threshold)
    print(text)
    return int(flagged)


if __name__ == "__main__":
    sys.exit(main())
