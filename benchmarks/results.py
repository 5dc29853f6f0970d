"""Reader of results files, `benchmarks/results/NAME.json` in pytest-benchmark's format.

`conftest.py` writes the files. The docstring of `race.py` lists the `extra_info` of a benchmark.
"""

import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"
LIMIT = "bare GEMMs"
RENAMED = {"GEMMs alone": LIMIT}  # codespell:ignore
"""Former names of contestants, in older results files."""
Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Entry:
    """One contestant in one case.

    Attributes:
        seconds: Duration of each round. It has no meaning in a memory benchmark.
        ratio: Quartiles of theirs / ours. None for ours, and without a race.
        error: Relative errors against fp64, by name.
        extra: Other figures of the benchmark (bytes, rate, unit, filled, slope).
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
        """Group and contestant, which identify the entry in every run."""
        return self.group, self.contestant

    @property
    def median(self) -> float:
        """Median duration of a round in seconds."""
        return float(np.median(self.seconds))

    @property
    def bytes(self) -> int | None:
        """Peak memory in bytes; None in suites that do not measure it."""
        return self.extra.get("bytes")

    @property
    def is_peer(self) -> bool:
        """Whether the contestant is another library: no limit, and no variant of ours."""
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
    commit: str  # twelve digits, and a plus if the working tree had changes
    date: str  # UTC, to the second
    entries: tuple[Entry, ...]
    skipped: tuple[dict[str, str], ...]  # suite, name, reason

    def find(self, group: str, contestant: str) -> Entry | None:
        """Entry of a group and contestant, or None."""
        return {entry.key: entry for entry in self.entries}.get((group, contestant))


def read(path: Path) -> Run:
    """Reads a results file.

    Raises:
        ValueError: The file is missing or has another format.
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
            f"{path} holds no results ({error!r}). `make bench` writes such a file."
        ) from error


def _entry(bench: dict[str, Any]) -> Entry:
    extra = dict(bench["extra_info"])
    ratio = extra.pop("ratio", None)
    return Entry(
        group=bench["group"],
        seconds=tuple(bench["stats"]["data"]),
        ratio=ratio and tuple(ratio),
        error=extra.pop("error", {}),
        contestant=RENAMED.get(name := extra.pop("contestant"), name),
        **{name: extra.pop(name) for name in ("suite", "case", "role")},
        extra=extra,
    )


def groups_of(runs: list[Run], suite: str) -> Groups:
    """Entries of a suite by group. Each entry comes from the first run that has it."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in (entry for run in runs for entry in run.entries if entry.suite == suite):
        found.setdefault(entry.group, {}).setdefault(entry.contestant, entry)
    return {group: list(part.values()) for group, part in found.items()}
