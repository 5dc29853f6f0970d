"""Results of a run: reads `benchmarks/results/NAME.json`, pytest-benchmark's form.

`conftest.py` writes the files. The head of `race.py` lists the `extra_info` of each benchmark.
"""

import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"
Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Entry:
    """One contestant in one case.

    Attributes:
        seconds: of every round; without meaning for a memory benchmark.
        ratio: quartiles of theirs / ours; None for ours and where nothing was raced.
        error: relative errors against fp64, by name.
        extra: other figures of the benchmark (bytes, rate, unit, filled, slope).
    """

    suite: str
    group: str
    case: dict[str, Any]
    contestant: str
    role: str
    seconds: tuple[float, ...]
    ratio: Quartiles | None = None
    error: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Group and contestant: the same in every run."""
        return self.group, self.contestant

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return float(np.median(self.seconds))

    @property
    def bytes(self) -> int | None:
        """Peak memory, where the suite measures it."""
        return self.extra.get("bytes")

    @property
    def is_peer(self) -> bool:
        """Whether it is another library: neither a limit nor ours in another form."""
        return self.role == "peer" and not self.contestant.startswith("ours")


Groups = dict[str, list[Entry]]


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Run:
    """A results file."""

    name: str
    machine: dict[str, Any]
    commit: str  # the first twelve digits, with a plus where files differed from it
    date: str  # UTC, to the second
    entries: tuple[Entry, ...]
    skipped: tuple[dict[str, str], ...]  # suite, name, reason

    def find(self, group: str, contestant: str) -> Entry | None:
        """The entry of that name, or None."""
        return {entry.key: entry for entry in self.entries}.get((group, contestant))


def read(path: Path) -> Run:
    """Reads a results file.

    Raises:
        ValueError: for a file that is absent or has another form.
    """
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
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} holds no results ({error!r}); `make bench` writes one."
        ) from error


def _entry(bench: dict[str, Any]) -> Entry:
    extra = dict(bench["extra_info"])
    ratio = extra.pop("ratio", None)
    return Entry(
        group=bench["group"],
        seconds=tuple(bench["stats"]["data"]),
        ratio=ratio and tuple(ratio),
        error=extra.pop("error", {}),
        **{name: extra.pop(name) for name in ("suite", "case", "contestant", "role")},
        extra=extra,
    )


def groups_of(runs: list[Run], suite: str) -> Groups:
    """Entries of a suite by group; the first run that has an entry counts."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in (entry for run in runs for entry in run.entries if entry.suite == suite):
        found.setdefault(entry.group, {}).setdefault(entry.contestant, entry)
    return {group: list(part.values()) for group, part in found.items()}


def over_limit(entries: list[Entry]) -> dict[str, Quartiles]:
    """Quartiles of each contestant's time over the limit's; empty for a group without a limit.

    Both were raced against ours, so it is (theirs / ours) / (limit / ours).
    """
    limit = next((e.ratio for e in entries if e.role == "limit" and e.ratio), None)
    if limit is None:
        return {}
    low, middle, high = limit
    return {
        e.contestant: tuple(part / middle for part in e.ratio)
        if e.ratio
        else (1 / high, 1 / middle, 1 / low)  # ours
        for e in entries
        if e.role != "limit"
    }
