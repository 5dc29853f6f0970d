"""Targets of docs/targets.toml against measured medians.

A `[[target]]` names a group, a measure of ours in it, and a bound:

- `time over limit`: seconds of ours over those of the limit;
- `time over`, `memory over`: seconds or peak of ours over those of contestant `of`;
- `memory growth`: peak of ours in `group` over that in `base`;
- `rate` (things per second), `seconds`, `filled`: of ours itself.

A `[[gpu]]` names a figure of a case of the GPU check, in `unit`. `over` is a case of the part that
divides it, `times` a factor of that quotient: `times` GEMMs alone give u.
"""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.check import Check
from benchmarks.results import Run, over_limit
from benchmarks.tables import quantity

FILE = Path(__file__).parent.parent / "docs" / "targets.toml"


@dataclass(frozen=True)
class Target:
    """A bound of a run on a CPU; either `at_most` or `at_least` is given."""

    name: str
    group: str
    measure: str
    reason: str
    at_most: float = math.inf
    at_least: float = -math.inf
    of: str = ""
    base: str = ""
    contestant: str = "ours"

    @property
    def bound(self) -> str:
        """The bound in words."""
        if math.isinf(self.at_least):
            return f"at most {quantity(self.at_most)}"
        return f"at least {quantity(self.at_least)}"

    def value(self, runs: list[Run]) -> float | None:
        """The measured value by the first run that has it."""
        return next((v for v in map(self._value, runs) if v is not None), None)

    def _value(self, run: Run) -> float | None:
        own = run.find(self.group, self.contestant)
        if own is None:
            return None
        if self.measure == "seconds":
            return own.median
        if self.measure in ("rate", "filled"):
            return own.extra.get(self.measure)
        if self.measure == "time over limit":
            entries = [entry for entry in run.entries if entry.group == self.group]
            found = over_limit(entries).get(self.contestant)
            return found and found[1]
        other = run.find(self.base or self.group, self.of or self.contestant)
        if other is None:
            return None
        return 1 / other.ratio[1] if self.measure == "time over" else own.bytes / other.bytes


@dataclass(frozen=True)
class GpuTarget:
    """A bound of a figure of a GPU check, or of its quotient."""

    name: str
    part: str
    case: str
    figure: str
    at_most: float
    unit: str
    reason: str
    over: str = ""
    times: float = 1.0
    at_least: float = -math.inf

    @property
    def bound(self) -> str:
        """The bound in words."""
        return f"at most {self.at_most:g} {self.unit}"

    def value(self, check: Check) -> float | None:
        """The measured figure; None where it is missing."""
        found = check.figure(self.part, self.case, self.figure)
        below = check.figure(self.part, self.over, self.figure) if self.over else 1.0
        return None if found is None or below is None else self.times * found / below


def read() -> tuple[list[Target], list[GpuTarget]]:
    """The targets on a CPU and on a GPU."""
    found = tomllib.loads(FILE.read_text())
    return [Target(**one) for one in found["target"]], [GpuTarget(**one) for one in found["gpu"]]


def verdict(target: Target | GpuTarget, value: float | None) -> str:
    """ "met", "missed" or "not measured"."""
    if value is None:
        return "not measured"
    return "met" if target.at_least <= value <= target.at_most else "missed"


def counts(verdicts: list[str]) -> str:
    """How many targets are met, missed and not measured."""
    words = ("met", "missed", "not measured")
    return ", ".join(f"{verdicts.count(word)} {word}" for word in words if word in verdicts)
