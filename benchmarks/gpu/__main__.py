"""Command of the GPU check: `python -m benchmarks.gpu --out DIR --budget 470`.

Each part runs in a separate process, the most valuable part first. A crash, a hang or a lack of
memory affects only one part. The parent kills it with its children, keeps the tail of its output
and starts the next part. A second call with the same DIR runs only what is missing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.gpu.record import (
    DEVICE,
    LOST,
    RESULTS,
    append,
    device,
    failed,
    latest,
    read,
    without_folders,
)
from benchmarks.gpu.table import table

PARTS = {
    "facts": 20.0, "correct": 65.0, "attention": 40.0, "head": 120.0, "step": 150.0, "train": 90.0,
    "variants": 600.0,
}  # fmt: skip
"""Time limits of the parts in seconds, most valuable first: the budget cuts the last ones."""
LOG = "log.txt"
LEAST = 5.0
"""Fewest seconds for a part, whose imports already take that long."""
REHEARSAL = 5.0
"""Factor of the limits in a rehearsal, because small shared CPUs import torch more slowly."""
TAIL = 1000
"""Characters of a failed part's output in the results."""


def complete(folder: Path, part: str) -> bool:
    """Whether the part ran to its end, and no case failed."""
    lines = [line for line in read(folder / RESULTS) if line["part"] == part]
    ends = [line for line in lines if "case" not in line]
    return bool(ends) and "done" in ends[-1] and not any(map(failed, latest(lines).values()))


def kill(process: subprocess.Popen) -> None:
    """Kills a part with all its descendants, including those outside its process group."""
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def run_once(module: str, folder: Path, seconds: float, call: int, rehearse: bool) -> int | None:
    """Runs one process of a part; returns its exit code, or None after the time limit."""
    settings = json.dumps({"seconds": seconds, "call": call, "rehearse": rehearse})
    command = [sys.executable, "-m", "benchmarks.gpu.worker", module, str(folder), settings]
    with (folder / LOG).open("a") as log:
        print(f"== {module}, call {call}, {seconds:.0f} s", file=log, flush=True)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill(process)


def run_part(module: str, folder: Path, seconds: float, call: int, rehearse: bool) -> str | None:
    """Runs a part, with a restart after each CUDA context loss; returns the reason of a failure."""
    end = time.monotonic() + seconds
    while True:
        failures = sum(map(failed, read(folder / RESULTS)))
        code = run_once(module, folder, end - time.monotonic(), call, rehearse)
        if code is None:
            return f"time limit {seconds:.0f} s"
        if code == 0:
            return None
        found = sum(map(failed, read(folder / RESULTS)))
        # Each restart has one case less, so the loop ends.
        if code != LOST or found == failures or end - time.monotonic() < LEAST:
            return f"exit code {code}"


def run(part: str, given: argparse.Namespace, left: float, call: int) -> None:
    """Runs one part within the remaining budget and records its end."""
    name, began, folder = part.rpartition(".")[2], time.monotonic(), given.out
    log = folder / LOG
    start = log.stat().st_size if log.exists() else 0
    limit = min(PARTS.get(part, given.limit) * (REHEARSAL if given.rehearse else 1), left)
    why = "the budget is spent"
    if limit >= LEAST:
        module = part if "." in part else f"benchmarks.gpu.{part}"
        why = run_part(module, folder, limit, call, given.rehearse)
    seconds = round(time.monotonic() - began, 1)
    line = {"part": name, "call": call, "seconds": seconds}
    if why is None:
        line["done"] = True
    else:
        output = log.read_bytes()[start:].decode(errors="replace") if log.exists() else ""
        line |= {"failed": why, "tail": without_folders(output)[-TAIL:]}
    append(folder / RESULTS, line)
    print(f"{name}: {why or 'done'} after {seconds} s", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the missing parts and prints the table; returns 0 if every part is complete."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--budget", type=float, default=470.0, help="seconds for all parts (default: %(default)s)"
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="comma-separated names or dotted module paths (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=20.0,
        help="seconds for a part given by its module path (default: %(default)s)",
    )
    parser.add_argument("--rehearse", action="store_true", help="run toy sizes on a CPU")
    given = parser.parse_args(arguments)
    if not given.rehearse:
        import torch  # also loads its libraries from a cold disk outside the parts' limits

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device: add --rehearse to run toy sizes on a CPU")
    end, parts = time.monotonic() + given.budget, given.parts.split(",")
    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / RESULTS
    call = 1 + max((line["call"] for line in read(results)), default=0)
    # A batch system ends this command by SIGTERM: kill the running part and print the table.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = [part.rpartition(".")[2] for part in parts]
    todo = [part for part, name in zip(parts, names, strict=True) if not complete(given.out, name)]
    if todo:
        line = {"part": DEVICE[0], "case": DEVICE[1], "call": call}
        append(results, line | device(given.rehearse))
    try:
        for part in todo:
            run(part, given, end - time.monotonic(), call)
    finally:
        print("\n".join(table(read(results), names)))
    return 0 if all(complete(given.out, name) for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
