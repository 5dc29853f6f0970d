"""Results of the GPU check: one JSON line per case, appended as soon as it is known.

A part calls its cases like this, and everything else (skipping what an earlier call recorded,
tracebacks, freed memory) follows:

    def run(record: Record) -> None:
        record.each({"a": lambda: {"ms": ..., "error": ...}})

A case named "group/name" shares a line of the table with the others of its group; its first figure
is shown there. Other cases have a line of their own.
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
"""Part and case of the line that every call begins with."""
LOST = 3
"""Exit code of a part whose CUDA context is dead: the parent restarts it for its other cases."""
TRACEBACK = 1500
"""Characters of a traceback that are kept in the results; log.txt has all of it."""

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """All whole lines of a results file; none where there is no file.

    A line may be torn by a full disk, or by a copy that was made while it was written.
    """
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(path: Path, line: Line) -> None:
    """Adds one line, in one write: a process that is killed leaves no half of it."""
    before = path.read_bytes() if path.exists() else b""
    torn = bool(before) and not before.endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def failed(line: Line) -> bool:
    """Whether a case ended in an exception: its "error" is then a traceback, not a figure."""
    return isinstance(line.get("error"), str)


def latest(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """The last line of each (part, case), in the order in which the cases first appeared."""
    return {(line["part"], line["case"]): line for line in lines if "case" in line}


def without_folders(text: str) -> str:
    """Text without this checkout's and the temporary folder's path: results are committed."""
    for folder in (os.getcwd(), tempfile.gettempdir()):
        text = text.replace(f"{folder}/", "")
    return text


def smi(**fields: str) -> dict[str, str]:
    """nvidia-smi's fields of the first GPU, by names of ours.

    Where it fails or is absent its error is the one field: it must not end the parent.
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
    """The line at the start of every call: later lines of the results are of this device."""
    if rehearse:
        return {"name": platform.processor() or platform.machine()}
    fields = {
        "driver": "driver_version",
        "power_limit": "power.limit",
        "max_clock": "clocks.max.sm",
    }
    return {"name": "unknown"} | smi(name="name", **fields)


class Record:
    """What a part gets: where it runs, how long it may, and where its results go."""

    def __init__(self, folder: Path, part: str, *, rehearse: bool, seconds: float, call: int):
        """
        Args:
            folder: of the results.
            part: name of the part.
            rehearse: toy sizes on a CPU.
            seconds: until the parent kills this process.
            call: number of the call of `benchmarks.gpu` for this folder, from 1.
        """
        self.folder, self.part, self.rehearse, self.call = folder, part, rehearse, call
        self.device = "cpu" if rehearse else "cuda"
        self._began, self._seconds = time.monotonic(), seconds

    def __call__(self, case: str, **figures: Any) -> None:
        """Appends the figures of a case: numbers, strings, or lists of them.

        `after_s` is added, the seconds since the part began: it shows which cases take long.
        """
        after = round(time.monotonic() - self._began, 1)
        line = {"part": self.part, "case": case, "call": self.call, **figures, "after_s": after}
        append(self.folder / RESULTS, line)

    def left(self) -> float:
        """Seconds until this process is killed."""
        return self._began + self._seconds - time.monotonic()

    def missing(self, cases: Iterable[str]) -> Iterator[str]:
        """The cases to run: neither done, nor failed in this call before a restart."""
        for case in cases:
            line = latest(read(self.folder / RESULTS)).get((self.part, case))
            if line is None or (failed(line) and line["call"] != self.call):
                yield case

    def each(self, cases: Mapping[str, Callable[[], Line]]) -> None:
        """Records the figures that the missing cases return; see `attempt`."""
        for case in self.missing(cases):
            with self.attempt(case):
                self(case, **cases[case]())

    @contextlib.contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """A `with` block whose exception costs this case only.

        The exception becomes the case's "error" and CUDA memory is freed. Where the CUDA context is
        dead (an illegal address, a failed assertion in a kernel), the process exits with LOST.
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
    """Frees CUDA memory that nothing holds; exits with LOST where the context is dead."""
    import torch

    gc.collect()
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the CUDA context is dead: {error}", file=sys.stderr, flush=True)
        sys.exit(LOST)
