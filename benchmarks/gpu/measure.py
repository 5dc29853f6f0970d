"""Measurements on a GPU: wall time, GPU-busy time, peak memory, and what the card can do.

In a rehearsal on a CPU wall time is the host's, and figures that a CPU lacks are left out.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.race import turns

Call = Callable[[], Any]


def wall(call: Call, budget: float = 0.5) -> float:
    """Median seconds of a call, the L2 cache flushed before each; about `budget` seconds of it.

    A budget of 0 is one round, for a rehearsal.
    """
    return statistics.median(turns(call, None, budget, least=3 if budget else 1)[0])


def ratio(call: Call, ours: Call, device: str, budget: float = 0.5) -> float:
    """Median of theirs / ours over rounds in turns; one round in a rehearsal."""
    few = {"least": 1, "most": 1} if device == "cpu" else {}
    pairs = zip(*turns(call, ours, budget, **few), strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def kernel_seconds(profiler: profile) -> float:
    """Seconds in which the GPU ran kernels or copies, summed; 0 on a CPU."""
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return 1e-6 * sum(e.self_device_time_total for e in events if not e.is_user_annotation)


def busy(call: Call) -> float:
    """GPU-busy seconds of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return kernel_seconds(profiler)


def peak(call: Call) -> int:
    """Bytes allocated at the peak of a call beyond those allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def figures(call: Call, device: str, budget: float = 0.5) -> dict[str, float]:
    """Wall time and, on CUDA, GPU-busy time and peak memory beyond the inputs, of one call."""
    if device == "cpu":
        return {"ms": 1e3 * wall(call, budget=0)}
    times = {"ms": 1e3 * wall(call, budget), "busy_ms": 1e3 * busy(call)}
    return times | {"peak_gib": peak(call) / 2**30}


def copy_rate(device: str, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes within the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / wall(lambda: target.copy_(source))


def gemm_rate(device: str, size: int) -> float:
    """FLOP per second of torch's size x size x size GEMM in bf16, on random data."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / wall(lambda: torch.mm(left, right, out=out))


GEMM_SIZE = {"cuda": 8192, "cpu": 128}
COPY_SIZE = {"cuda": 4 << 30, "cpu": 1 << 20}
