"""What we set out to reach (docs/targets.toml), against what a run measured.

A target names a group and a measure of ours in it, and a bound:

- `time over limit`: seconds of ours over those of the limit;
- `time over`: seconds of ours over those of contestant `of`; `memory over`: the same of peaks;
- `memory growth`: peak of ours in `group` over that in `base`;
- `rate` (things per second), `seconds`, `filled`: of ours itself.

Medians are compared, whatever their spread.
"""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Run, over_limit
from benchmarks.words import quantity

FILE = Path(__file__).parent.parent / "docs" / "targets.toml"
MEASURES = (
    "time over limit",
    "time over",
    "memory over",
    "memory growth",
    "rate",
    "seconds",
    "filled",
)


@dataclass(frozen=True)
class Target:
    """One entry of the file; exactly one of the bounds is given."""

    name: str
    group: str
    measure: str
    reason: str
    at_most: float = math.inf
    at_least: float = -math.inf
    of: str = ""  # a contestant
    base: str = ""  # a group
    contestant: str = "ours"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"target {self.name!r}: {self.measure!r} is none of {MEASURES}.")
        if math.isinf(self.at_most) == math.isinf(self.at_least):
            raise ValueError(f"target {self.name!r} needs at_most or at_least, and not both.")
        if ("over" in self.measure and self.measure != "time over limit") != bool(self.of):
            raise ValueError(f"target {self.name!r}: `of` goes with 'time over' and 'memory over'.")

    @property
    def bound(self) -> str:
        """The bound in words."""
        finite = math.isinf(self.at_least)
        what, value = ("at most", self.at_most) if finite else ("at least", self.at_least)
        return f"{what} {quantity(value)}"

    def value(self, run: Run) -> float | None:
        """What a run measured; None where it did not."""
        own = run.find(self.group, self.contestant)
        if own is None:
            return None
        if self.measure == "time over limit":
            found = over_limit(run.groups(own.suite)[self.group]).get(self.contestant)
            return found[1] if found else None
        if self.measure == "memory growth":
            base = run.find(self.base, self.contestant)
            return own.bytes / base.bytes if base else None
        if self.measure in ("rate", "filled"):
            return own.extra.get(self.measure)
        if self.measure == "seconds":
            return own.median
        other = run.find(self.group, self.of)
        if other is None:
            return None
        if self.measure == "memory over":
            return own.bytes / other.bytes
        return 1 / other.ratio[1]

    def met(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return self.at_least <= value <= self.at_most


def read(path: Path = FILE) -> list[Target]:
    """The targets of a file.

    Raises:
        ValueError: for an entry that makes no sense.
        TypeError: for an unknown key.
    """
    return [Target(**entry) for entry in tomllib.loads(path.read_text())["target"]]


def verdict(target: Target, runs: list[Run]) -> tuple[float | None, str]:
    """(value, "met", "missed" or "not measured") by the first run that has it."""
    for run in runs:
        value = target.value(run)
        if value is not None:
            return value, "met" if target.met(value) else "missed"
    return None, "not measured"
