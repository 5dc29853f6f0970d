"""Results of a run as rows: what `report`, `compare` and `targets` read, and Liger's CSV.

A run leaves `benchmarks/results/NAME.json` in pytest-benchmark's form (`conftest.py`); what each
benchmark says of itself is listed at the head of `race.py`.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"
LIGER_COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip
X_OF_SUITE = {"head": "V", "memory": "image_tokens", "scaling": "value", "loss": "examples"}
"""What a suite is drawn against; the others are drawn against nothing, x = 0."""


@dataclass(frozen=True)
class Entry:
    """One contestant in one case.

    Attributes:
        seconds: of every round; of a memory benchmark they mean nothing.
        ratio: lower quartile, median, upper quartile of theirs / ours; None for ours and where
            nothing was raced.
        error: relative errors against fp64, by name.
        extra: what else the benchmark said (bytes, rate, unit, filled, slope).
    """

    suite: str
    group: str
    case: dict[str, Any]
    contestant: str
    role: str
    seconds: tuple[float, ...]
    ratio: tuple[float, float, float] | None = None
    error: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What names it in every run: group and contestant."""
        return self.group, self.contestant

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return float(np.median(self.seconds))

    @property
    def bytes(self) -> int | None:
        """Peak memory, where the suite measures it."""
        return self.extra.get("bytes")


@dataclass(frozen=True)
class Run:
    """A results file."""

    name: str
    machine: dict[str, Any]
    commit: str  # the first twelve digits, with a plus where files differed from it
    date: str  # UTC, to the second
    entries: tuple[Entry, ...]
    skipped: tuple[dict[str, str], ...]  # suite, name, reason

    def groups(self, suite: str) -> dict[str, list[Entry]]:
        """Entries of a suite by group, in the order they ran."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.suite == suite:
                found.setdefault(entry.group, []).append(entry)
        return found

    @property
    def load(self) -> float | None:
        """Processes that ran or waited in the minute before it; about 0 on a quiet machine."""
        return self.machine.get("load")

    def find(self, group: str, contestant: str) -> Entry | None:
        """The entry of that name, or None."""
        keys = {entry.key: entry for entry in self.entries}
        return keys.get((group, contestant))


def read(path: str | Path) -> Run:
    """Reads a results file.

    Raises:
        ValueError: when it is not one, with what to do.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text())
        commit = found["commit_info"]
        return Run(
            name=path.stem,
            machine=found["machine_info"],
            commit=(commit.get("id") or "none")[:12] + ("+" if commit.get("dirty") else ""),
            date=found["datetime"][:19].replace("T", " "),
            entries=tuple(_entry(bench) for bench in found["benchmarks"]),
            skipped=tuple(found.get("skipped", ())),
        )
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; `make bench` writes one.") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no results file of these benchmarks ({error!r}); `make bench` writes one."
        ) from error


def _entry(bench: dict[str, Any]) -> Entry:
    extra = dict(bench["extra_info"])
    ratio = extra.pop("ratio", None)
    own = {name: extra.pop(name) for name in ("suite", "case", "contestant", "role")}
    return Entry(
        group=bench["group"],
        seconds=tuple(bench["stats"]["data"]),
        ratio=None if ratio is None else tuple(ratio),
        error=extra.pop("error", {}),
        extra=extra,
        **own,
    )


def groups_of(runs: list[Run], suite: str) -> dict[str, list[Entry]]:
    """Entries of a suite by group, of several runs; the first run that has an entry counts."""
    found: dict[str, dict[str, Entry]] = {}
    for run in runs:
        for group, entries in run.groups(suite).items():
            part = found.setdefault(group, {})
            for entry in entries:
                part.setdefault(entry.contestant, entry)
    return {group: list(part.values()) for group, part in found.items()}


def over_limit(entries: list[Entry]) -> dict[str, tuple[float, float, float]]:
    """Time of each contestant over that of the limit: quartiles, by contestant.

    Both were raced against ours, so (theirs / ours) / (limit / ours); the quartiles are those of
    the first ratio. Empty where the group has no limit.
    """
    limits = [e.ratio[1] for e in entries if e.role == "limit" and e.ratio]
    if not limits:
        return {}
    found = {}
    for entry in entries:
        if entry.role == "limit":
            continue
        if entry.ratio is not None:
            found[entry.contestant] = tuple(part / limits[0] for part in entry.ratio)
        else:  # ours: the limit's own ratio, upside down
            low, middle, high = next(e.ratio for e in entries if e.role == "limit")
            found[entry.contestant] = (1 / high, 1 / middle, 1 / low)
    return found


def write_csv(run: Run, path: Path) -> None:
    """Writes a run with Liger's columns: a row for time, and one for memory where it was measured.

    `gpu_name` is the CPU's name where no GPU ran; `liger_version` is that of the peer.
    """
    shared = {
        "gpu_name": run.machine["gpu"] or run.machine["cpu"],
        "timestamp": run.date,
        "liger_version": run.machine["versions"].get("liger-kernel") or "",
    }
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, LIGER_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for entry in run.entries:
            x = X_OF_SUITE.get(entry.suite, "")
            row = shared | {
                "kernel_name": _kernel(entry),
                "kernel_provider": entry.contestant,
                "kernel_operation_mode": "full",
                "x_name": entry.case.get("axis", x),
                "x_label": entry.case.get("axis", x),
                "x_value": entry.case.get(x, 0),
                "extra_benchmark_config_str": json.dumps(entry.case, sort_keys=True),
            }
            if entry.suite != "memory":
                row |= {"metric_name": "speed", "metric_unit": "ms"}
                times = np.quantile(entry.seconds, (0.5, 0.2, 0.8)) * 1e3
                writer.writerow(row | _values(times))
            if entry.bytes is not None:
                row |= {"metric_name": "memory", "metric_unit": "MB"}
                writer.writerow(row | _values([entry.bytes / 2**20] * 3))
    partial.replace(path)


def _kernel(entry: Entry) -> str:
    """What is drawn in one picture: all x of a suite, or of an axis; else the group."""
    if entry.suite in ("head", "memory", "loss"):
        return entry.suite
    return f"scaling {entry.case['axis']}" if entry.suite == "scaling" else entry.group


def _values(three) -> dict[str, str]:
    names = ("y_value_50", "y_value_20", "y_value_80")
    return {name: f"{value:.6g}" for name, value in zip(names, three, strict=True)}
