"""Targets on a GPU, `[[gpu]]` of docs/targets.toml, against the results of a GPU check."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.check import Check
from benchmarks.targets import FILE


@dataclass(frozen=True)
class Target:
    """A bound of a figure, or of its quotient.

    Args:
        name: in the table.
        part: of the check.
        case: of the part.
        figure: of the case, which the bound holds for.
        at_most: the bound.
        unit: of the bound.
        reason: of the bound.
        over: a case of the part whose figure divides.
        times: factor of the quotient. For the head, over its `times` GEMMs alone, this gives u.
    """

    name: str
    part: str
    case: str
    figure: str
    at_most: float
    unit: str
    reason: str
    over: str = ""
    times: float = 1.0

    def value(self, check: Check) -> float | None:
        """The measured figure; None where it is missing."""
        found = check.figure(self.part, self.case, self.figure)
        if not self.over or found is None:
            return found
        below = check.figure(self.part, self.over, self.figure)
        return None if below is None else self.times * found / below

    def verdict(self, check: Check) -> str:
        """ "met", "missed" or "not measured"."""
        value = self.value(check)
        return "not measured" if value is None else "met" if value <= self.at_most else "missed"


def read(path: Path = FILE) -> list[Target]:
    """The targets of a file.

    Raises:
        TypeError: for an unknown or missing key.
    """
    return [Target(**entry) for entry in tomllib.loads(path.read_text())["gpu"]]
