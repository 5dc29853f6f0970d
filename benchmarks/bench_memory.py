"""Benchmark of the head's peak memory against the length of the context.

Each contestant is called as its users call it, with image and prompt rows before the response. The
shown time is that of the process and has no meaning.

A peak is that of one forward and backward, in bytes beyond the inputs. It excludes the gradients of
the inputs, which every contestant returns. Each peak is measured in a fork of a process that has
only imported code. malloc returns freed blocks over 1 MB to the system, so the peak is that of live
tensors. On CUDA the peak is that of the device's allocator.
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
"""Whether peaks can be read. On a CPU this needs Linux's /proc."""


def step(case: Case, loss) -> int:
    """Peak memory of a forward and backward in bytes."""
    inputs = case.hidden.requires_grad_(), case.weight.requires_grad_(case.trainable)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory
    before = memory()["VmRSS"]
    value = loss(*inputs, case.labels)
    forward = memory()["VmHWM"] - before
    value.backward()
    returned = sum(t.grad.nbytes for t in inputs if t.grad is not None)
    return max(forward, memory()["VmHWM"] - before - returned)


def peak(name: str, shape: Shape) -> int:
    """Peak memory of a step in this process, after a small step that loads code.

    CCE compiles for a shape, so its first step has that shape. Buffers that the others keep between
    steps count in the peak. Ours keeps some.
    """
    loss = CONTESTANTS[name]()
    step(Case(shape if name == "CCE" else replace(shape, examples=1, V=512, image_tokens=0)), loss)
    return step(Case(shape), loss)


def serve(name: str, pipe) -> None:
    """Worker process: receives shapes and sends their peaks."""
    allocate("return")
    CONTESTANTS[name]()
    while True:
        shape = pipe.recv()
        if DEVICE == "cuda":  # CUDA does not work after a fork, and the peak is the allocator's
            pipe.send(peak(name, shape))
        elif (child := os.fork()) == 0:
            pipe.send(peak(name, shape))
            os._exit(0)
        elif os.waitpid(child, 0)[1]:
            raise RuntimeError(f"The process that measures {name} at {shape} failed.")


@pytest.mark.skipif(not MEASURED, reason="needs Linux's /proc to read peaks")
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
