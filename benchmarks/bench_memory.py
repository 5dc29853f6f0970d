"""Memory of the head against the length of the context: image tokens cost ours nothing.

Each contestant is called as its users call it, with image and prompt rows in front of the response,
in a fresh process (`memory_worker.py`, which says what counts). The time shown is that of the whole
process, imports included; it means nothing.
"""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.bench_head import make
from benchmarks.contestants import CONTESTANTS, OURS
from benchmarks.race import REPLAY, describe

ROOT = Path(__file__).parent.parent
CONTEXTS = (576, 1152, 2304, 4608, 8192)
CASE = {"H": 256, "V": 8192, "examples": 1, "prompt": 64, "response": 64}

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads peaks from Linux's /proc"
)


@functools.cache
def peaks(name: str, head: str, dtype: str) -> tuple[dict[int, int], float]:
    """Bytes for each number of image tokens, and the seconds it took to find out."""
    began = time.perf_counter()
    lengths = [CASE["prompt"] + tokens + CASE["response"] for tokens in CONTEXTS]
    case = CASE | {"head": head, "dtype": dtype, "lengths": lengths}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_worker", name, json.dumps(case)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = [int(line) for line in done.stdout.splitlines()]
    return dict(zip(CONTEXTS, found, strict=True)), time.perf_counter() - began


def settings():
    for head, dtype in (("frozen", "bf16"), ("frozen", "fp32"), ("trainable", "bf16")):
        quick = (head, dtype) == ("frozen", "bf16")
        for tokens in CONTEXTS:
            for name in CONTESTANTS:
                marks = () if quick else pytest.mark.slow
                label = f"{head}-{dtype}-{tokens}-{name}"
                yield pytest.param(head, dtype, tokens, name, marks=marks, id=label)


@pytest.mark.parametrize(("head", "dtype", "tokens", "name"), list(settings()))
def test_memory(benchmark, head, dtype, tokens, name):
    make(name, dtype)
    found, seconds = peaks(name, head, dtype)
    describe(
        benchmark,
        f"memory, {head}, {dtype}, {tokens} image tokens",
        suite="memory",
        case=CASE | {"head": head, "dtype": dtype, "image_tokens": tokens},
        contestant=name,
        role="ours" if name == OURS else "peer",
        bytes=found[tokens],
    )
    REPLAY.load([seconds])
    benchmark.pedantic(lambda: None, rounds=1)
