"""Memory of the head against the length of the context: image tokens cost ours nothing.

Each contestant is called as its users call it, with image and prompt rows in front of the response.
The time shown is that of the process; it has no meaning.

A peak is that of one forward and backward, in bytes beyond the inputs, not counting, in the
backward, the gradients of the inputs, which any contestant has to return. Each is measured in a
fork of a process that has imported code and run nothing. malloc gives blocks over 1 MB back when
they are freed, so the peak is that of live tensors. On CUDA the device's allocator counts.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.bench_head import PROMPT, RESPONSE, Case, Shape, make
from benchmarks.contestants import CONTESTANTS, DEVICE, OURS
from benchmarks.race import REPLAY, describe
from benchmarks.step_contestants import allocate, memory

CONTEXTS = (576, 1152, 2304, 4608, 8192)
SETTINGS = (("frozen", "bf16"), ("frozen", "fp32"), ("trainable", "bf16"))
CASE = {"H": 256, "V": 8192, "examples": 1, "prompt": PROMPT, "response": RESPONSE}

MEASURED = DEVICE == "cuda" or Path("/proc/self/clear_refs").exists()
"""Whether peaks can be read: on a CPU they come from Linux's /proc."""


def step(case: Case, loss) -> int:
    """Bytes of a forward and backward."""
    inputs = case.hidden.requires_grad_(), case.weight.requires_grad_(case.trainable)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = memory()["VmRSS"]
    value = loss(*inputs, case.labels)
    forward = memory()["VmHWM"] - before
    value.backward()
    returned = sum(t.grad.nbytes for t in inputs if t.grad is not None)
    return max(forward, memory()["VmHWM"] - before - returned)


def peak(name: str, shape: Shape) -> int:
    """Bytes in this process, after a small step that loads code and leaves little behind.

    CCE compiles for a shape, so its first step has that shape. The others may keep buffers, as ours
    does, and these belong to the peak.
    """
    loss = CONTESTANTS[name]()
    step(Case(shape if name == "CCE" else replace(shape, examples=1, V=512, image_tokens=0)), loss)
    return step(Case(shape), loss)


def serve(name: str, pipe) -> None:
    """Answers a shape with its peak."""
    allocate("return")
    CONTESTANTS[name]()
    while True:
        shape = pipe.recv()
        if DEVICE == "cuda":  # its allocator counts, and CUDA does not survive a fork
            pipe.send(peak(name, shape))
        elif (child := os.fork()) == 0:
            pipe.send(peak(name, shape))
            os._exit(0)
        elif os.waitpid(child, 0)[1]:
            raise RuntimeError(f"no peak of {name} at {shape}")


@pytest.mark.skipif(not MEASURED, reason="reads peaks from Linux's /proc")
@pytest.mark.parametrize(
    ("head", "dtype", "tokens", "name"),
    [
        pytest.param(
            *setting, tokens, name, marks=() if setting == SETTINGS[0] else pytest.mark.slow
        )
        for setting in SETTINGS
        for tokens in CONTEXTS
        for name in CONTESTANTS
    ],
)
def test_memory(benchmark, peak_of, head, dtype, tokens, name):
    make(name, dtype)
    began = time.perf_counter()
    taken = peak_of(name, Shape("", CASE["H"], CASE["V"], 1, dtype, head, tokens))
    describe(
        benchmark,
        f"memory, {head}, {dtype}, {tokens} image tokens",
        case=CASE | {"head": head, "dtype": dtype, "image_tokens": tokens},
        contestant=name,
        role="ours" if name == OURS else "peer",
        bytes=taken,
    )
    REPLAY.load([time.perf_counter() - began])
    benchmark.pedantic(lambda: None, rounds=1)
