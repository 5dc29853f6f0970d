"""Targets of docs/targets.toml and their measured values.

A `[[target]]` names a group of benchmarks, a measure, and a bound (`at_least` or `at_most`):

- `time`, `memory`: seconds or peak memory, theirs / ours. `of` names the other contestant.
- `memory growth`: peak memory of ours in `group` over that in `base`.
- `rate` (things per second), `seconds`, `filled`: figures of ours.

A `[[gpu]]` names a figure of a case of the GPU check and its `unit`. `over` is a case of the same
part that divides the figure. `times` multiplies the quotient: it is the number of GEMMs if the
divisor is the bare GEMMs and the unit is u.

A bound is a number, or a quotient such as "1 / 0.75".
"""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import Check
from benchmarks.results import Run
from benchmarks.tables import quantity

FILE = Path(__file__).parent.parent / "docs" / "targets.toml"
RATIOS = ("time", "memory", "memory growth")
UNITS = {"seconds": " s", "rate": "/s"}


@dataclass(frozen=True)
class Target:
    """Bound of a CPU run, with either `at_most` or `at_least`."""

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
        """The bound as text."""
        if math.isinf(self.at_least):
            return f"at most {self.shown(self.at_most)}"
        return f"at least {self.shown(self.at_least)}"

    def shown(self, value: float) -> str:
        """A value with the unit of the measure."""
        if self.measure in RATIOS:
            return f"{value:.2f}x"
        return quantity(value) + UNITS.get(self.measure, "")

    def value(self, runs: list[Run]) -> float | None:
        """Measured value from the first run that has it."""
        return next((v for v in map(self._value, runs) if v is not None), None)

    def _value(self, run: Run) -> float | None:
        own = run.find(self.group, self.contestant)
        if own is None:
            return None
        if self.measure == "seconds":
            return own.median
        if self.measure in ("rate", "filled"):
            return own.extra.get(self.measure)
        other = run.find(self.base or self.group, self.of or self.contestant)
        if other is None:
            return None
        if self.measure == "time":
            return other.ratio[1]
        growth = own.bytes / other.bytes
        return growth if self.measure == "memory growth" else 1 / growth


@dataclass(frozen=True)
class GpuTarget:
    """Bound of a figure of the GPU check, or of a quotient of two figures."""

    name: str
    part: str
    case: str
    figure: str
    unit: str
    reason: str
    at_most: float = math.inf
    at_least: float = -math.inf
    over: str = ""
    times: float = 1.0

    @property
    def bound(self) -> str:
        """The bound as text."""
        if math.isinf(self.at_least):
            return f"at most {self.shown(self.at_most)}"
        return f"at least {self.shown(self.at_least)}"

    def shown(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.2f}x" if self.unit == "x" else f"{value:.3g} {self.unit}"

    def value(self, check: Check) -> float | None:
        """Measured value; None if a figure is missing."""
        found = check.figure(self.part, self.case, self.figure)
        below = check.figure(self.part, self.over, self.figure) if self.over else 1.0
        return None if found is None or below is None else self.times * found / below


def read() -> tuple[list[Target], list[GpuTarget]]:
    """Targets on a CPU and on a GPU."""
    found = tomllib.loads(FILE.read_text())
    cpu, gpu = ([_numbers(one) for one in found[kind]] for kind in ("target", "gpu"))
    return [Target(**one) for one in cpu], [GpuTarget(**one) for one in gpu]


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its bounds as numbers."""
    found = dict(entry)
    for name in ("at_most", "at_least"):
        if isinstance(bound := entry.get(name), str):
            above, below = bound.split("/")
            found[name] = float(above) / float(below)
    return found


def verdict(target: Target | GpuTarget, value: float | None) -> str:
    """ "met", "missed" or "not measured"."""
    if value is None:
        return "not measured"
    return "met" if target.at_least <= value <= target.at_most else "missed"


def counts(verdicts: list[str]) -> str:
    """Number of met, missed and unmeasured targets."""
    words = ("met", "missed", "not measured")
    return ", ".join(f"{verdicts.count(word)} {word}" for word in words if word in verdicts)
