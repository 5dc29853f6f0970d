"""Measurements on a GPU: wall time, GPU-busy time, and peak memory.

A rehearsal on a CPU measures the host's wall time and omits GPU figures.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.race import MOST, turns

Call = Callable[[], Any]
BUSY = 0.1
"""Seconds of calls under the profiler."""
KERNELS, NAME = 25, 80
"""Number of listed kernels, and of characters of their names."""
WATCHED = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
"""Activities of a profile: GPU kernels, or CPU operators in a rehearsal."""


def kernel_seconds(profiler: profile) -> float:
    """Total seconds of GPU kernels and copies; 0 on a CPU."""
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return 1e-6 * sum(e.self_device_time_total for e in events if not e.is_user_annotation)


def kernels(profiler: profile) -> dict[str, list[float]]:
    """[milliseconds, calls] of the kernels with the most GPU time, by name.

    In a rehearsal it lists CPU operators. Kernels whose first NAME characters are equal are merged.
    """
    cuda = WATCHED == ProfilerActivity.CUDA
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        if event.device_type == kind and not event.is_user_annotation:
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            found[event.name[:NAME]][0] += 1e-3 * spent
            found[event.name[:NAME]][1] += 1
    most = sorted(found.items(), key=lambda item: -item[1][0])[:KERNELS]
    return {name: [round(ms, 4), calls] for name, (ms, calls) in most}


def profiled(call: Call, calls: int = 1) -> profile:
    """Profile of consecutive calls.

    A single call after a pause runs at another clock than a loop. For the same GEMMs its busy time
    was 0.87 to 1.14 of the loop's wall time (H200).
    """
    with profile(activities=[WATCHED]) as profiler:
        for _ in range(calls):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler


def peak(call: Call) -> int:
    """Peak of allocated bytes during a call, beyond those allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def figures(
    call: Call, device: str, budget: float = 0.5, ours: Call | None = None
) -> dict[str, float]:
    """Wall time of a call and, on CUDA, its GPU-busy time and peak memory beyond the inputs.

    Args:
        call: The contestant.
        device: "cuda", or "cpu" for one round without GPU figures.
        budget: Seconds for the rounds.
        ours: Alternates with `call`. `ratio` is the median of theirs / ours over the rounds.
    """
    few = {"least": 1, "most": 1} if device == "cpu" else {}
    theirs, mine = turns(call, ours, budget, **few)
    seconds = statistics.median(theirs)
    found = {"ms": 1e3 * seconds}
    if ours is not None:
        found["ratio"] = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
    if device != "cpu":
        calls = min(max(round(BUSY / seconds), 1), MOST)
        spent = kernel_seconds(profiled(call, calls)) / calls
        found |= {"busy_ms": 1e3 * spent, "peak_gib": peak(call) / 2**30}
    return found
