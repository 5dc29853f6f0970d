"""Reader of GPU check results, benchmarks/results/gpu-check.jsonl.

The file is a check's results.jsonl, or a concatenation of several. The last line of a case counts.
"""

from collections import Counter
from pathlib import Path

from benchmarks import results
from benchmarks.contestants import OURS
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.record import DEVICE, Line, failed, latest, read
from benchmarks.results import RENAMED

NAME = "gpu-check.jsonl"


class Check:
    """Results of a GPU check: the last line of each case, from the device of the last call."""

    def __init__(self, lines: list[Line]) -> None:
        tagged, device, call = [], None, 0
        for line in map(_renamed, lines):
            if _key(line) == DEVICE:
                device, call = line["name"], call + 1
            tagged.append((device, call, line))
        self.lines = [line for of, _, line in tagged if of == device]
        self.cases = latest(self.lines)
        self._calls = {_key(line): call for of, call, line in tagged if of == device}
        elsewhere = {(of, *_key(line)) for of, _, line in tagged if of != device and "case" in line}
        self.elsewhere = Counter(of for of, *case in elsewhere if tuple(case) != DEVICE)
        """Number of ignored cases by other device."""

    def figure(self, part: str, case: str, name: str) -> float | str | None:
        """Figure of a case; None if the case failed or did not run."""
        line = self.cases.get((part, case))
        return None if line is None or failed(line) else line.get(name)

    def over_ours(self, group: str, name: str) -> float | None:
        """Time of a head contestant over ours; None if they ran in different calls."""
        case = f"{group}/{name}"
        together = self._calls.get(("head", case)) == self._calls.get(("head", f"{group}/{OURS}"))
        return self.figure("head", case, "ratio") if together else None

    @property
    def groups(self) -> list[str]:
        """Shapes and kinds of the head, "N x H x V kind", in the order of the results."""
        found = [case.rpartition("/")[0] for part, case in self.cases if part == "head"]
        return list(dict.fromkeys(filter(None, found)))

    @property
    def machine(self) -> str:
        """Card, driver and versions, comma-separated."""
        versions = self.cases.get(("facts", "versions"), {})
        names = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
        return ", ".join([self.card, f"driver {self.figure(*DEVICE, 'driver')}", *names])

    @property
    def card(self) -> str:
        """Name of the GPU."""
        return str(self.figure(*DEVICE, "name") or "a GPU of unknown name")

    @property
    def correct(self) -> str:
        """Share of the correctness cases within their error budgets, such as "52 of 52"."""
        found = [line for (part, _), line in self.cases.items() if part == "correct"]
        fine = sum(not failed(line) for line in found)
        return f"{fine} of {len(found)}"

    @property
    def missing(self) -> str:
        """Parts that did not run to their end, and the number of cases from other devices."""
        ends = {line["part"]: line for line in self.lines if "case" not in line}
        found = []
        for part in PARTS:
            if part not in ends:
                found.append(f"`{part}` (not run)")
            elif "failed" in ends[part]:
                found.append(f"`{part}` ({ends[part]['failed']})")
        sentences = ["All parts are complete."]
        if found:
            sentences = [f"Incomplete parts: {', '.join(found)}."]
        sentences += [f"{n} cases of {name} are ignored." for name, n in self.elsewhere.items()]
        return " ".join(sentences)


def _renamed(line: Line) -> Line:
    """The line with the current name of its contestant."""
    group, slash, name = line.get("case", "").rpartition("/")
    return line | {"case": group + slash + RENAMED[name]} if name in RENAMED else line


def _key(line: Line) -> tuple[str, str | None]:
    return line["part"], line.get("case")


def load(folder: Path = results.FOLDER) -> Check:
    """Loads the check whose results are committed.

    Raises:
        ValueError: There are none.
    """
    lines = read(folder / NAME)
    if not lines:
        raise ValueError(
            f"{folder / NAME} holds no results. `python -m benchmarks.gpu` writes them."
        )
    return Check(lines)
