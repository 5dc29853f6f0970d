"""Kernels with the most GPU time in a profile, so that a result explains itself."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KERNELS, NAME = 25, 80
"""Kernels listed, and the characters of a name."""
WATCHED = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
"""Activities of a profile: kernels, or in a rehearsal the operators of a CPU."""


def kernels(profiler: profile) -> dict[str, list[float]]:
    """Milliseconds and calls of the kernels with the most GPU time, by name; of a CPU's operators.

    Kernels whose names are equal in their first characters are one.
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


def kernels_of(call: Callable[[], Any]) -> dict[str, list[float]]:
    """The same of one call."""
    with profile(activities=[WATCHED]) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return kernels(profiler)
