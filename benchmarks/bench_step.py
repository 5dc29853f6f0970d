"""A training step of a LLaVA of 60M parameters: rDPO on the forest, TRL's DPO, plain rDPO.

Hidden 512, 8 layers, V = 32000, 576 image tokens, prompts of 64, responses of 128, 4 examples; a
frozen tower; LoRA (rank 128) and full fine-tuning, fp32 and bf16. Contestants, each a process that
lives through its setting (`step_contestants.py` says what each one runs and what is timed):

- ours: rDPO, three sequences, reference log-probs from the cache.
- TRL: `DPOTrainer` 1.16, two sequences, live reference; on the CPU it projects every row.
- TRL, labelled rows: the same, made to project labelled rows alone as it does on CUDA.
- released: rDPO over three plain sequences, full logits, live reference.

Losses and gradient norms are compared first. Then peak memory, of live tensors: two steps of which
freed blocks are returned to the system. Then time, in rounds in which contestants alternate; a
ratio is ours over theirs in one round. About 24 GB of memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from models import write_setting

ROUNDS = 3
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference between losses, and between norms, of two ways to the same thing."""


class Contestant:
    """A process of `step_contestants.py`."""

    def __init__(self, name, folder, tune, dtype):
        script = Path(__file__).with_name("step_contestants.py")
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, script, name, folder, tune, dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        built = self.read()
        self.imported, self.built = built["imported"], built["VmRSS"]

    def read(self):
        if not (line := self.process.stdout.readline()):
            self.errors.seek(0)
            raise RuntimeError(f"a contestant ended:\n{self.errors.read()[-2000:]}")
        return json.loads(line)

    def step(self, *words):
        self.process.stdin.write(" ".join(["step", *words]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def peaks(self, steps, *words):
        """Peak memory over that of imports, and over that of what was built, in bytes."""
        peak = [self.step(*words) for _ in range(steps)][-1]["VmHWM"]
        return peak - self.imported, peak - self.built

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        write_setting(name, 4, prompt=64, response=128)
        yield name


def check_equal(ours, theirs, dtype):
    for what in ("loss", "norm"):
        assert ours[what] == pytest.approx(theirs[what], rel=TOLERANCE[dtype]), what


def spread(ours, theirs):
    """Median, least and most of the ratios of paired rounds."""
    ratios = np.array(ours) / np.array(theirs)
    return [float(f(ratios)) for f in (np.median, np.min, np.max)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_step(benchmark, folder, tune, dtype):
    pytest.importorskip("trl", reason="trl is missing; pip install -c constraints.txt '.[peers]'")
    benchmark.group = f"step, {tune} {dtype}"
    where, peaks, times = (folder, tune, dtype), {}, {}

    with Contestant("ours", *where) as ours:
        dpo, rdpo = ours.step("dpo"), ours.step()
        peaks["ours"] = ours.peaks(1)
        ours.step("keep")

        with Contestant("trl", *where) as trl:
            check_equal(dpo, trl.step("labelled"), dtype)
            peaks["TRL, labelled rows"] = trl.peaks(1, "labelled")
            peaks["TRL"] = trl.peaks(1)
            trl.step("keep")
            mine, labelled, every = [], [], []

            def theirs():
                labelled.append(trl.step("labelled")["seconds"])
                every.append(trl.step()["seconds"])

            benchmark.pedantic(
                lambda: mine.append(ours.step()["seconds"]), setup=theirs, rounds=ROUNDS
            )
        times["TRL"] = every, spread(mine, every)
        times["TRL, labelled rows"] = labelled, spread(mine, labelled)

        with Contestant("released", *where) as released:
            check_equal(rdpo, released.step(), dtype)
            peaks["released"] = released.peaks(1)
            released.step("keep")
            beside = [
                [other.step()["seconds"] for other in (ours, released)] for _ in range(ROUNDS)
            ]
        again, plain = zip(*beside, strict=True)
        times["released"] = plain, spread(again, plain)

    times["ours"] = [*mine, *again], [1.0, 1.0, 1.0]
    benchmark.extra_info["table"] = {
        name: {
            "seconds": float(np.median(times[name][0])),
            "time": times[name][1],
            "bytes": peaks[name],
            "memory": [a / b for a, b in zip(peaks["ours"], peaks[name], strict=True)],
        }
        for name in ("ours", "TRL", "TRL, labelled rows", "released")
    }
