"""`python -m realign.train --fsdp` on the digits: metrics against the CPU's, and a resumed run.

The fp32 curve (without TF32) is compared with that of a CPU, and the bf16 curve with the fp32 one.
Another run is killed by SIGKILL after a checkpoint and resumed. It should be bitwise equal to the
first. All runs are concurrent, because imports take most of their time. If a run is not done in
time, its cases fail. SIGABRT makes it print its traceback.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Record
from realign.files import read_jsonl
from realign.pairs.pipeline import PairsConfig, build_pairs
from realign.training.checkpoint import Checkpoints
from realign.training.throughput import TIMING

MARGIN = 6.0
"""Runs end this many seconds before the limit, so that their output is recorded."""
STEPS, TOY_STEPS = 24, 8
BATCH, PAIRS, TOY_PAIRS = 8, 64, 16
CURVE = ("loss", "grad_norm", "rewards/margins", "rewards/visual_margins", "logps/chosen")
"""Compared metrics of a curve."""
ONE_RANK = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}  # fmt: skip
"""torchrun's variables. A run with them starts no further ranks, so it imports everything once."""
CPU, FP32 = {"CUDA_VISIBLE_DEVICES": ""}, {"NVIDIA_TF32_OVERRIDE": "0"}
ALL = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
"""Variables of every run. Threads of runs on shared cores wait for each other. A rehearsal on two
shared cores had a checkpoint after 52 s with two threads per run, and after 24 s with one."""


@dataclass
class Run:
    """Process of `realign.train`, with its output in a subfolder of `folder`."""

    folder: Path
    name: str
    steps: int
    words: str  # further arguments
    environment: dict[str, str]  # further variables
    left: Callable[[], float]  # remaining seconds

    def __post_init__(self) -> None:
        self.output, self.printed = self.folder / self.name, self.folder / f"{self.name}.txt"
        given = f"--fsdp {self.words} --save-every 2 --steps {self.steps} --batch-size {BATCH}"
        given = [
            *given.split(),
            "--lora-rank",
            "128",
            "--pairs",
            str(self.folder / "pairs.parquet"),
        ]
        given += ["--output", str(self.output)]
        given += ["--reference-cache", str(self.output / "references")]
        self.began = time.monotonic()
        with self.printed.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "realign.train", *given],
                stdout=file, stderr=file, env=os.environ | ALL | self.environment,
            )  # fmt: skip

    def log(self) -> list[dict[str, Any]]:
        """Log entries of the completed steps."""
        path = self.output / "metrics.jsonl"
        return read_jsonl(path) if path.exists() else []

    def kill(self) -> dict[str, float]:
        """Kills the process after its first checkpoint; returns its done and saved steps.

        Raises:
            RuntimeError: The process ended, or ran out of time, before the checkpoint.
        """
        saved = Checkpoints(self.output / "checkpoints", keep=2)
        while not saved.last():
            if self.process.poll() is not None or self.left() < 0:
                raise self.failure("no checkpoint")
            time.sleep(0.01)
        seconds = time.monotonic() - self.began
        self.process.kill()
        self.process.wait()
        steps = {"killed_after_step": len(self.log()), "resumed_from_step": saved.last()}
        return steps | {"first_checkpoint_seconds": seconds}

    def curve(self) -> list[dict[str, Any]]:
        """Waits for the end of the run; returns its log.

        Raises:
            RuntimeError: The run failed or ran out of time.
        """
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(self.left(), 0))
        entries = self.log()
        if self.process.poll() != 0 or len(entries) != self.steps:
            raise self.failure(f"{len(entries)} of {self.steps} steps")
        return entries

    def failure(self, what: str) -> RuntimeError:
        """Error with the tail of the output. A running process prints its traceback first."""
        code, seconds = self.process.poll(), time.monotonic() - self.began
        if code is None:
            self.process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        tail = self.printed.read_text()[-1200:]
        return RuntimeError(f"{what} after {seconds:.0f} s, exit code {code}: {tail}")


def difference(curve: list[dict[str, Any]], truth: list[dict[str, Any]]) -> dict[str, float]:
    """Largest difference of each metric over the steps, relative to the metric's largest value."""
    found = {}
    for name in CURVE:
        pairs = [(one[name], other[name]) for one, other in zip(curve, truth, strict=True)]
        largest = max(abs(other) for _, other in pairs)
        found[name] = max(abs(one - other) for one, other in pairs) / largest
    return {"largest": max(found.values())} | found


def same(curve: list[dict[str, Any]], truth: list[dict[str, Any]]) -> bool:
    """Whether two logs are bitwise equal, except times and memory."""
    one, other = (
        [{k: v for k, v in entry.items() if k not in TIMING} for entry in log]
        for log in (curve, truth)
    )
    return one == other


def run(record: Record) -> None:
    """Starts all runs, kills and resumes one, and compares their curves."""
    cases = [*record.missing(("fp32 against CPU", "bf16 against fp32", "killed and resumed"))]
    if not cases:
        return
    steps, scenes = (TOY_STEPS, TOY_PAIRS) if record.rehearse else (STEPS, PAIRS)
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        pairs = str(folder / "pairs.parquet")
        build_pairs(PairsConfig(output=pairs, scenes=scenes, quiet=True))
        made = time.monotonic() - began
        start = partial(Run, folder, steps=steps, left=lambda: record.left() - MARGIN)
        single = "--nproc-per-node 1 --dtype"
        killed = start("killed", words=f"{single} fp32", environment=FP32 | ONE_RANK)
        whole = start("fp32", words=f"{single} fp32", environment=FP32)
        bf16 = start("bf16", words=f"{single} bf16", environment=ONE_RANK)
        cpu = whole  # in a rehearsal
        if not record.rehearse:
            cpu = start("cpu", words=f"{single} fp32", environment=CPU | ONE_RANK)
        with record.attempt("killed and resumed"):
            died = killed.kill()
            again = start("killed", words=f"{single} fp32 --resume", environment=FP32 | ONE_RANK)
            curves = again.curve(), whole.curve()
            found = {"same_bits": same(*curves)} | died
            record("killed and resumed", **found, **difference(*curves))
        with record.attempt("fp32 against CPU"):
            seconds = whole.curve()[-1]["seconds"]
            found = difference(whole.curve(), cpu.curve())
            about = {"steps": steps, "last_step_seconds": seconds, "pairs_seconds": made}
            record("fp32 against CPU", **found, **about)
        with record.attempt("bf16 against fp32"):
            record("bf16 against fp32", **difference(bf16.curve(), whole.curve()))
