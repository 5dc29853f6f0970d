"""How everything here is timed: a contestant and ours take turns, and the turns are divided.

Times on a shared machine drift by a third within minutes; a ratio of two calls, one right after
the other, does not. So each contestant's rounds alternate with rounds of ours, which goes first
changes from round to round, and the result is the median of theirs / ours over the rounds. On
CUDA a round is timed by events, after a flush of the L2 cache.

pytest-benchmark then gets the durations, for its table and JSON. `extra_info` of each benchmark:

- suite: head, memory, loss, step, cache, pairs or scaling;
- case: what was run, a dict of numbers and names (dtype, N, H, V, image_tokens, ...);
- contestant, and its role: `ours`, `limit` (the work that nobody can leave out) or `peer`;
- ratio: lower quartile, median and upper quartile of theirs / ours; not for ours itself;
- error, where there is a truth: {"loss": ..., "gradient": ...}, relative, against fp64;
- bytes, where memory is a result: the peak, as the suite defines it.
"""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

LEAST, MOST = 3, 15
"""Rounds of a contestant, within its seconds."""


class Replay:
    """A timer for pytest-benchmark that replays durations measured before."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def load(self, seconds: list[float]) -> None:
        """Two ticks a round; the first is zero."""
        self.ticks = [tick for s in seconds for tick in (0.0, s)]

    def __call__(self) -> float:
        return self.ticks.pop(0)


REPLAY = Replay()


@functools.cache
def _flush() -> torch.Tensor:
    """Larger than any L2 cache; written before each round on CUDA."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def seconds(call: Callable[[], object]) -> float:
    """Duration of one call. A call that returns a float has timed itself, in another process."""
    if torch.cuda.is_available():
        _flush().zero_()
        torch.cuda.synchronize()  # or launches would hide behind the flush
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
    """(durations of `call`, durations of `ours`), in turns, for about `budget` seconds."""
    calls = [call] if ours is None else [call, ours]
    for one in calls:
        seconds(one)  # warm: code loaded, buffers and compiled graphs made
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
    """Times `call` in turns with `ours` (None: it is ours) and reports it to pytest-benchmark.

    Args:
        group: begins with the name of the suite.
        contestant: its name; `ours` is not called where it is "ours".
        role: "ours" without `ours` and else "peer", or "limit".
        things: their number in a call, and their unit, for a rate.
        budget: Seconds for the rounds; LEAST rounds are run in any case.
        info: More for `extra_info`, as the head of this file lists.
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
    """Sets a benchmark's group and `extra_info`."""
    benchmark.group, suite = group, group.partition(",")[0]
    benchmark.extra_info.update({"suite": suite} | {k: v for k, v in info.items() if v is not None})
