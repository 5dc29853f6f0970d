"""Did ours become slower? `python -m benchmarks.compare OLD.json NEW.json`.

Times of two runs say little on a shared machine, so what is compared are ratios: theirs / ours,
each measured in turns within one run. Where ours takes 20 % longer than before, all ratios of its
group fall by as much, while a slower machine moves them little. A group's change is the mean of its
contestants' (in logarithms, by the inverse of their variances; those that run our code are left
out). It is flagged when it is over the threshold and more than half of that beyond two standard
errors, which no number of contestants makes smaller than runs of the same code differ. Where one
ratio alone speaks, three times the threshold is needed: other work on the machine slows what runs
in several threads more than what does not; where none does, ten times: times of 0.1 s have differed
by half between quiet runs. Memory is flagged over the threshold and a MiB, errors when they double,
and what is gone.

Compare runs of quiet machines: both loads are printed. Exit codes: 0 nothing is flagged, 1
something is, 2 the files cannot be compared.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import results
from benchmarks.results import Entry, Run

RUNS = 0.04
"""Standard error of a group's mean that no number of contestants takes away: ours is in all of its
ratios. Between quiet runs of the same code the head's groups differ by 0.024, all groups by 0.05 to
0.06 (root mean squares of three reruns)."""
LEAST_BYTES = 2**20
"""Peaks of small cases differ by half of that from run to run."""
FLOOR = 0.03
"""Least standard error of a logarithm of a ratio: rounds of one run differ less than runs do."""
OF_OURS = ("ours", "bare forward")
"""How contestants begin that run our code: a slow-down of ours may be theirs."""


class Change(NamedTuple):
    """What became of ours in one group."""

    group: str
    factor: float  # new / old, 1.2: ours takes 20 % longer
    error: float  # standard error of its logarithm; 0 where nothing is known
    flagged: bool
    what: str


def log_ratio(entry: Entry) -> tuple[float, float]:
    """(logarithm of theirs / ours, its standard error: IQR / 1.35 x 1.25 / sqrt(rounds))."""
    low, middle, high = entry.ratio
    error = math.log(high / low) / 1.349 * 1.253 / math.sqrt(len(entry.seconds))
    return math.log(middle), max(error, FLOOR)


def pairs(old: Run, new: Run) -> list[tuple[Entry, Entry]]:
    """Entries that both runs have, of the same case, old first."""
    found = {entry.key: entry for entry in new.entries}
    shared = [(entry, found[entry.key]) for entry in old.entries if entry.key in found]
    return [(before, after) for before, after in shared if before.case == after.case]


def changes(old: Run, new: Run, threshold: float) -> list[Change]:
    """The change of every group that both runs have."""
    shared, by_group = pairs(old, new), {}
    for before, after in shared:
        if before.suite != "memory":
            by_group.setdefault(before.group, []).append((before, after))
    drift = _drift(shared)
    found = []
    for group, members in by_group.items():
        raced = [
            (b, a)
            for b, a in members
            if b.ratio and a.ratio and not b.contestant.startswith(OF_OURS)
        ]
        if raced:
            found.append(_by_ratio(group, raced, threshold))
        else:
            found += [
                _by_time(group, b, a, drift, threshold) for b, a in members if b.role == "ours"
            ]
    for before, after in shared:
        if before.role == "ours":
            found += _memory(before, after, threshold) + _errors(before, after)
    here = {entry.key for entry in new.entries}
    gone = [entry for entry in old.entries if entry.role == "ours" and entry.key not in here]
    return found + [Change(entry.group, 1.0, 0.0, True, "gone") for entry in gone]


def _by_ratio(group: str, raced: list[tuple[Entry, Entry]], threshold: float) -> Change:
    logs, weights = [], []
    for before, after in raced:
        (was, error), (now, more) = log_ratio(before), log_ratio(after)
        logs.append(was - now)  # theirs / ours falls as ours takes longer
        weights.append(1 / (error**2 + more**2))
    change = float(np.average(logs, weights=weights))
    error = math.hypot(1 / math.sqrt(sum(weights)), RUNS)
    limit = math.log1p(threshold if len(raced) > 1 else 3 * threshold)
    flagged = change > limit and change - 2 * error > limit / 2
    return Change(group, math.exp(change), error, flagged, f"{len(raced)} ratios")


def _drift(shared: list[tuple[Entry, Entry]]) -> float:
    """How much slower the machine is in the second run, by the median of all that is not ours."""
    others = [a.median / b.median for b, a in shared if b.role != "ours" and b.suite != "memory"]
    return float(np.median(others)) if others else 1.0


def _by_time(group, before: Entry, after: Entry, drift: float, threshold: float) -> Change:
    factor = after.median / before.median / drift
    flagged = factor > 1 + 10 * threshold
    return Change(group, factor, 0.0, flagged, "time, less the machine's drift")


def _memory(before: Entry, after: Entry, threshold: float) -> list[Change]:
    if not before.bytes or not after.bytes:
        return []
    factor = after.bytes / before.bytes
    flagged = factor > 1 + threshold and after.bytes - before.bytes > LEAST_BYTES
    return [Change(before.group, factor, 0.0, flagged, "peak memory")]


def _errors(before: Entry, after: Entry) -> list[Change]:
    found = []
    for name, was in before.error.items():
        now = after.error.get(name, 0.0)
        if was > 0:
            found.append(Change(before.group, now / was, 0.0, now > 2 * was, f"error of {name}"))
    return found


def spread(old: Run, new: Run) -> np.ndarray:
    """(n,) by how much each ratio differs between the runs, |new / old - 1|."""
    return np.array(
        [abs(a.ratio[1] / b.ratio[1] - 1) for b, a in pairs(old, new) if a.ratio and b.ratio]
    )


def report(old: Run, new: Run, threshold: float, every: bool) -> tuple[str, bool]:
    """(the text, whether something is flagged)."""
    found = changes(old, new, threshold)
    lines = [
        f"{run.name}: {run.date}, commit {run.commit}, {run.machine['cpu']}, load "
        + ("unknown" if run.load is None else f"{run.load:.1f}")
        for run in (old, new)
    ]
    for what in ("cpu", "gpu", "threads", "versions"):
        if old.machine[what] != new.machine[what]:
            lines.append(f"they differ in {what}: {old.machine[what]} and {new.machine[what]}")
    for change in sorted(found, key=lambda change: -change.factor):
        if every or change.flagged:
            times = change.what.endswith(("ratios", "drift"))
            mark = "GONE" if change.what == "gone" else "SLOWER" if times else "MORE"
            lines.append(
                f"{mark if change.flagged else '':6} {100 * (change.factor - 1):+7.1f} % "
                f"+- {100 * change.error:4.1f}  {change.group} ({change.what})"
            )
    gone = {entry.key for entry in old.entries} - {entry.key for entry in new.entries}
    if gone:
        lines.append(f"{len(gone)} of the first are not in the second, e.g. {min(gone)}")
    off = spread(old, new)
    if len(off):
        quantiles = "{:.1%} in the median, {:.1%} at nine tenths, {:.1%} at most".format(
            *np.quantile(off, (0.5, 0.9, 1.0))
        )
        lines.append(
            f"{len(off)} ratios differ by {quantiles}; {(off <= 0.1).mean():.0%} within 10 %"
        )
    flagged = sum(change.flagged for change in found)
    lines.append(f"{flagged} of {len(found)} comparisons flagged at {threshold:.0%}")
    return "\n".join(lines), flagged > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, prints; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="Did ours become slower between two runs?"
    )
    parser.add_argument("old", type=Path, help="results file of the first run")
    parser.add_argument("new", type=Path, help="results file of the second")
    parser.add_argument("--threshold", type=float, default=0.1, help="0.1: flag over 10 %%")
    parser.add_argument("--all", action="store_true", help="show what is not flagged, too")
    given = parser.parse_args(arguments)
    try:
        if given.threshold <= 0:
            raise ValueError(f"--threshold is {given.threshold}; it must be over 0, e.g. 0.1.")
        old, new = results.read(given.old), results.read(given.new)
        if not pairs(old, new):
            raise ValueError(
                f"{given.old} and {given.new} have no benchmark in common; run both with the same "
                "selection."
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text, flagged = report(old, new, given.threshold, given.all)
    print(text)
    return int(flagged)


if __name__ == "__main__":
    sys.exit(main())
