"""Results of the GPU check: a JSON line per case, appended when the case is done.

A part calls its cases like this:

    def run(record: Record) -> None:
        record.each({"a": lambda: {"ms": ..., "error": ...}})

`each` skips cases that an earlier call recorded, records tracebacks, and frees memory. Cases named
"group/name" share a line of the table, which shows the first figure of each. Other cases have a
line each.
"""

import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
DEVICE = ("facts", "device")
"""Part and case of the first line of every call."""
LOST = 3
"""Exit code after a loss of the CUDA context. The parent restarts the part for its other cases."""
TRACEBACK = 1500
"""Most characters of a traceback in the results. log.txt has the whole traceback."""

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Complete lines of a results file, or an empty list without a file.

    A full disk, or a copy during a write, can leave a torn line.
    """
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(path: Path, line: Line) -> None:
    """Appends a line in one write, so that a killed process leaves no partial line."""
    before = path.read_bytes() if path.exists() else b""
    torn = bool(before) and not before.endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def failed(line: Line) -> bool:
    """Whether a case ended in an exception: its "error" is a traceback and not a figure."""
    return isinstance(line.get("error"), str)


def latest(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """Last line of each (part, case), in the order of their first lines."""
    return {(line["part"], line["case"]): line for line in lines if "case" in line}


def without_folders(text: str) -> str:
    """Removes the paths of the checkout and the temporary folder, since results are committed."""
    for folder in (os.getcwd(), tempfile.gettempdir()):
        text = text.replace(f"{folder}/", "")
    return text


def smi(**fields: str) -> dict[str, str]:
    """Fields of nvidia-smi for the first GPU, under the names of the arguments.

    If nvidia-smi is missing or fails, the only field "smi" has the error.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run([*command, "-i", "0"], capture_output=True, text=True)
    except OSError as error:
        return {"smi": str(error)}
    if done.returncode:
        return {"smi": (done.stdout + done.stderr).strip()}
    return dict(zip(fields, map(str.strip, done.stdout.split(",")), strict=True))


def device(rehearse: bool) -> dict[str, str]:
    """First line of a call: the device of the lines that follow."""
    if rehearse:
        return {"name": platform.processor() or platform.machine()}
    fields = {
        "driver": "driver_version",
        "power_limit": "power.limit",
        "max_clock": "clocks.max.sm",
    }
    return {"name": "unknown"} | smi(name="name", **fields)


class Record:
    """Argument of a part's `run`: device, time limit and results file."""

    def __init__(self, folder: Path, part: str, *, rehearse: bool, seconds: float, call: int):
        """
        Args:
            folder: Folder of the results.
            part: Name of the part.
            rehearse: Whether to run toy sizes on a CPU.
            seconds: Seconds until the parent kills this process.
            call: Number of the call of `benchmarks.gpu` for this folder, from 1.
        """
        self.folder, self.part, self.rehearse, self.call = folder, part, rehearse, call
        self.device = "cpu" if rehearse else "cuda"
        self._began, self._seconds = time.monotonic(), seconds

    def __call__(self, case: str, **figures: Any) -> None:
        """Appends the figures of a case: numbers, strings, or lists of them.

        `after_s` is added. It is the time since the start of the part, and shows slow cases.
        """
        after = round(time.monotonic() - self._began, 1)
        line = {"part": self.part, "case": case, "call": self.call, **figures, "after_s": after}
        append(self.folder / RESULTS, line)

    def left(self) -> float:
        """Seconds until this process is killed."""
        return self._began + self._seconds - time.monotonic()

    def missing(self, cases: Iterable[str]) -> Iterator[str]:
        """Yields the cases that are neither done, nor failed in this call before a restart."""
        for case in cases:
            line = latest(read(self.folder / RESULTS)).get((self.part, case))
            if line is None or (failed(line) and line["call"] != self.call):
                yield case

    def each(self, cases: Mapping[str, Callable[[], Line]]) -> None:
        """Runs and records the missing cases, each within `attempt`."""
        for case in self.missing(cases):
            with self.attempt(case):
                self(case, **cases[case]())

    @contextlib.contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """Context manager that records an exception as the "error" of the case.

        It also frees CUDA memory. The process exits with LOST if the CUDA context is dead (an
        illegal address, or a failed assertion in a kernel).
        """
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = without_folders("".join(traceback.format_exception(error)).strip())
            self(case, error=text[-TRACEBACK:])
            traceback.clear_frames(error.__traceback__)
            free()


def free() -> None:
    """Frees unused CUDA memory; exits with LOST if the CUDA context is dead."""
    import torch

    gc.collect()
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"The CUDA context is dead: {error}", file=sys.stderr, flush=True)
        sys.exit(LOST)
