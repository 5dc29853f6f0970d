"""Peak memory of one contestant of the head: `memory_worker.py NAME '{"H": ..., ...}'`.

It runs one forward and backward for each length, each in a process of its own, so that nothing else
has been allocated before, and prints a line for each: bytes at the peak beyond the inputs, not
counting, in the backward, the gradients of the inputs, which any contestant has to return. malloc
gives blocks over 1 MB back when they are freed, so the peak is that of live tensors.
"""

import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.bench_head import DTYPES
from benchmarks.contestants import CONTESTANTS, DEVICE
from benchmarks.step_contestants import allocate

SMALL = 512
"""Vocabulary of the step that loads code: what it leaves behind is small."""


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


class Peak:
    """Bytes at the peak since it was made, beyond what was there then."""

    def __init__(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # starts from what is resident now
            self.before = resident("VmRSS")

    def __call__(self) -> int:
        now = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident("VmHWM")
        return now - self.before


def step(loss, hidden, weight, labels) -> int:
    """Bytes of a forward and backward, as the head of this file says."""
    inputs, whole = (hidden, weight), Peak()
    value = loss(*inputs, labels)
    forward = whole()
    value.backward()
    returned = sum(t.grad.nbytes for t in inputs if t.grad is not None)
    return max(forward, whole() - returned)


def measure(loss, case, length, V) -> int:
    """Bytes of a step at one length."""
    g = torch.Generator().manual_seed(0)
    kind = {"dtype": DTYPES[case["dtype"]], "device": DEVICE}
    weight = torch.randn(V, case["H"], generator=g).to(**kind)
    weight.requires_grad_(case["head"] == "trainable")
    hidden = torch.randn(3, case["examples"], length, case["H"], generator=g).to(**kind)
    labels = torch.randint(V, hidden.shape[:3], generator=g).to(DEVICE)
    labels[..., : length - case["response"]] = -100
    return step(loss, hidden.requires_grad_(), weight, labels)


def main():
    allocate("return")
    name, case = sys.argv[1], json.loads(sys.argv[2])
    loss = CONTESTANTS[name]()
    for length in case["lengths"]:
        # CUDA does not survive a fork; its allocator counts by itself.
        child = 0 if DEVICE == "cuda" else os.fork()
        if child == 0:
            # Loads code. What compiles for a shape is given that; the others may keep buffers, as
            # ours does, and these belong to the peak.
            warm = (length, case["V"]) if name == "CCE" else (case["lengths"][0], SMALL)
            measure(loss, case, *warm)
            print(measure(loss, case, length, case["V"]), flush=True)
            if DEVICE == "cpu":
                os._exit(0)
        elif os.waitpid(child, 0)[1]:
            sys.exit(f"no peak of {name} at {length} positions")


if __name__ == "__main__":
    main()
