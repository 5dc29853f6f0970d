"""Pages from the results of a GPU check: measured figures beside the calculation of `roofline`.

The results are benchmarks/results/gpu-check.jsonl, a copy of a check's results.jsonl. Where there
is no such file the pages say that nothing was measured.
"""

from collections.abc import Iterable
from pathlib import Path

from benchmarks import results
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.record import Line, failed, latest, read
from benchmarks.gpu.table import table as lines_of
from benchmarks.words import PAGES, table

NAME = "gpu-check.jsonl"
WORDS = PAGES["gpu"]


class Check:
    """What a GPU check recorded."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines
        self.cases = latest(lines)

    def figure(self, part: str, case: str, name: str) -> float | str | None:
        """A figure of a case; None where the case failed or was not run."""
        line = self.cases.get((part, case))
        return None if line is None or failed(line) else line.get(name)

    @property
    def machine(self) -> str:
        """Card, driver and versions, for a sentence."""
        versions = self.cases.get(("facts", "versions"), {})
        names = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
        driver = self.figure("facts", "device", "driver")
        return ", ".join([self.card, f"driver {driver}", *names])

    @property
    def card(self) -> str:
        """Name of the GPU."""
        return str(self.figure("facts", "device", "name") or "a GPU of unknown name")

    @property
    def correct(self) -> str:
        """How many cases of the correctness part were within their error budgets."""
        found = [line for (part, _), line in self.cases.items() if part == "correct"]
        fine = sum(not failed(line) for line in found)
        return f"{fine} of {len(found)}"


def load(folder: Path = results.FOLDER) -> Check | None:
    """The check whose results are kept; None where there are none."""
    lines = read(folder / NAME)
    return Check(lines) if lines else None


def ratio(measured: float | None, calculated: float) -> str:
    """measured / calculated."""
    return "-" if measured is None else f"{measured / calculated:.2f}"


def number(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:.3g}"


def kernels_sentence(check: Check | None) -> str:
    """For docs/kernels.md: whether the Triton kernels have run on a GPU."""
    if check is None:
        return WORDS["kernels_not_run"].strip()
    return WORDS["kernels_run"].strip().format(card=check.card, correct=check.correct)


def readme_sentence(check: Check | None) -> str:
    """For the README: the frozen and the trained head of LLaVA-1.5-7B, or that nothing was run."""
    if check is None:
        return WORDS["readme_not_measured"].strip()
    found = {
        kind: number(check.figure("head", f"3072x4096x32000 {kind}/ours", "u"))
        for kind in ("frozen", "trained")
    }
    return WORDS["readme_measured"].strip().format(card=check.card, **found)


def benchmarks_section(check: Check, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """For docs/benchmarks.md: measured over calculated, then the whole table of the check."""
    columns = ("part", "case", "calculated", "measured", "measured / calculated")
    whole = "\n".join(lines_of(check.lines, PARTS))
    words = WORDS["check"].strip().format(machine=check.machine)
    return [words, table(columns, rows), f"```text\n{whole}\n```"]
