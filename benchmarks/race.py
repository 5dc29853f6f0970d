"""Timing of the benchmarks: rounds of a contestant alternate with rounds of ours.

Times on a shared machine drift by a third within minutes. The ratio of two consecutive calls does
not. So each contestant alternates with ours, and the order changes from round to round. The result
is the median of theirs / ours over the rounds. On CUDA, events time a round after a flush of the L2
cache.

pytest-benchmark gets the durations for its table and JSON. `extra_info` of a benchmark has:

- suite: head, memory, loss, step, cache, pairs or scaling.
- case: dict of numbers and names (dtype, N, H, V, image_tokens, ...).
- contestant, and its role: `ours`, `limit` (the work that all contestants share) or `peer`.
- ratio: lower quartile, median and upper quartile of theirs / ours. Ours has none.
- error: relative errors against fp64, {"loss": ..., "gradient": ...}, if there is an exact result.
- bytes: peak memory as the suite defines it, if memory is a result.
"""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

LEAST, MOST = 3, 15
"""Fewest and most rounds of a contestant within its time budget."""


class Replay:
    """Timer for pytest-benchmark that replays measured durations."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def load(self, seconds: list[float]) -> None:
        """Queues two ticks per round, of which the first is zero."""
        self.ticks = [tick for s in seconds for tick in (0.0, s)]

    def __call__(self) -> float:
        return self.ticks.pop(0)


REPLAY = Replay()


@functools.cache
def _flush() -> torch.Tensor:
    """Buffer larger than any L2 cache, written before each round on CUDA."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def seconds(call: Callable[[], object]) -> float:
    """Duration of one call in seconds; a float that the call returns is its own duration."""
    if torch.cuda.is_available():
        _flush().zero_()
        torch.cuda.synchronize()  # so that launches do not overlap with the flush
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        found = call()
        end.record()
        end.synchronize()
        return found if isinstance(found, float) else 1e-3 * start.elapsed_time(end)
    began = time.perf_counter()
    found = call()
    return found if isinstance(found, float) else time.perf_counter() - began


def turns(
    call: Callable[[], object],
    ours: Callable[[], object] | None,
    budget: float,
    least: int = LEAST,
    most: int = MOST,
) -> tuple[list[float], list[float]]:
    """Alternates `call` and `ours` for about `budget` seconds; returns both lists of durations."""
    calls = [call] if ours is None else [call, ours]
    for one in calls:
        seconds(one)  # warm-up: loads code, allocates buffers, compiles graphs
    found: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while len(found[0]) < least or (len(found[0]) < most and time.perf_counter() - began < budget):
        order = range(len(calls)) if len(found[0]) % 2 else reversed(range(len(calls)))
        for i in order:
            found[i].append(seconds(calls[i]))
    return found[0], found[-1]


def race(
    benchmark,
    group: str,
    *,
    case: dict,
    contestant: str,
    call: Callable[[], object],
    ours: Callable[[], object] | None = None,
    role: str | None = None,
    things: tuple[int, str] | None = None,
    budget: float = 3.0,
    most: int = MOST,
    **info,
) -> None:
    """Times `call` against `ours` (None: `call` is ours) and passes the result to pytest-benchmark.

    Args:
        group: Name of the group, which begins with that of the suite.
        contestant: Name of the contestant. If it is "ours", `ours` is not called.
        role: Role of the contestant. The default is "ours" without `ours`, and "peer" with it.
        things: Number of things per call and their unit, for a rate.
        budget: Seconds for the rounds. At least LEAST rounds run in any case.
        info: Further entries of `extra_info`.
    """
    if not benchmark.enabled:
        benchmark(call)
        return
    ours = None if contestant == "ours" else ours
    theirs, mine = turns(call, ours, budget, most=most)
    role = role or ("ours" if ours is None else "peer")
    describe(benchmark, group, case=case, contestant=contestant, role=role, **info)
    if things is not None:
        count, unit = things
        benchmark.extra_info.update(rate=count / float(np.median(theirs)), unit=unit)
    if ours is not None:
        ratios = np.array(theirs) / np.array(mine)
        benchmark.extra_info["ratio"] = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    REPLAY.load(theirs)
    benchmark.pedantic(lambda: None, rounds=len(theirs))


def describe(benchmark, group: str, **info) -> None:
    """Sets the group and `extra_info` of a benchmark."""
    benchmark.group, suite = group, group.partition(",")[0]
    benchmark.extra_info.update({"suite": suite} | {k: v for k, v in info.items() if v is not None})
