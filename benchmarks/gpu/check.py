"""Results of a GPU check, benchmarks/results/gpu-check.jsonl: the last line of each case.

The file is a check's results.jsonl, or several of them one after the other.
"""

from collections import Counter
from pathlib import Path

from benchmarks import results
from benchmarks.contestants import OURS
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.record import DEVICE, Line, failed, latest, read

NAME = "gpu-check.jsonl"


class Check:
    """Results of a GPU check: the last line of each case, all of the device of the last call."""

    def __init__(self, lines: list[Line]) -> None:
        tagged, device, call = [], None, 0
        for line in lines:
            if _key(line) == DEVICE:
                device, call = line["name"], call + 1
            tagged.append((device, call, line))
        self.lines = [line for of, _, line in tagged if of == device]
        self.cases = latest(self.lines)
        self._calls = {_key(line): call for of, call, line in tagged if of == device}
        elsewhere = {(of, *_key(line)) for of, _, line in tagged if of != device and "case" in line}
        self.elsewhere = Counter(of for of, *case in elsewhere if tuple(case) != DEVICE)
        """Cases of other devices, which are left out, by device."""

    def figure(self, part: str, case: str, name: str) -> float | str | None:
        """A figure of a case; None where the case failed or was not run."""
        line = self.cases.get((part, case))
        return None if line is None or failed(line) else line.get(name)

    def over_ours(self, group: str, name: str) -> float | None:
        """Time of a contestant of the head over ours, in turns; None where not in one call."""
        case = f"{group}/{name}"
        together = self._calls.get(("head", case)) == self._calls.get(("head", f"{group}/{OURS}"))
        return self.figure("head", case, "ratio") if together else None

    @property
    def groups(self) -> list[str]:
        """Shapes and kinds of the head, "N x H x V kind", in their order."""
        found = [case.rpartition("/")[0] for part, case in self.cases if part == "head"]
        return list(dict.fromkeys(filter(None, found)))

    @property
    def machine(self) -> str:
        """Card, driver and versions, for a sentence."""
        versions = self.cases.get(("facts", "versions"), {})
        names = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
        return ", ".join([self.card, f"driver {self.figure(*DEVICE, 'driver')}", *names])

    @property
    def card(self) -> str:
        """Name of the GPU."""
        return str(self.figure(*DEVICE, "name") or "a GPU of unknown name")

    @property
    def correct(self) -> str:
        """How many cases of the correctness part were within their error budgets."""
        found = [line for (part, _), line in self.cases.items() if part == "correct"]
        fine = sum(not failed(line) for line in found)
        return f"{fine} of {len(found)}"

    @property
    def missing(self) -> str:
        """Parts that were not run or not to their end, and results of other devices."""
        ends = {line["part"]: line for line in self.lines if "case" not in line}
        found = []
        for part in PARTS:
            if part not in ends:
                found.append(f"`{part}` was not run")
            elif "failed" in ends[part]:
                found.append(f"`{part}` was cut ({ends[part]['failed']})")
        found += [f"{count} cases of {name} are left out" for name, count in self.elsewhere.items()]
        return "Not complete: " + ", ".join(found) + "." if found else "All parts are complete."


def _key(line: Line) -> tuple[str, str | None]:
    return line["part"], line.get("case")


def load(folder: Path = results.FOLDER) -> Check:
    """The check whose results are kept.

    Raises:
        ValueError: when there are none.
    """
    lines = read(folder / NAME)
    if not lines:
        raise ValueError(
            f"{folder / NAME} holds no results; `python -m benchmarks.gpu` makes them."
        )
    return Check(lines)
