"""Prefetch: batches are built in a background thread while the device computes.

    with ahead((partial(build, part) for part in parts), device) as batches:
        for batch in batches:
            step(batch.to(device))

Order and content are those of a plain loop, and the thread draws no random numbers. For CUDA a
batch is `pinned`, so that a copy with `non_blocking=True` does not wait. A copy from pageable
memory waits for all work that was queued before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_DEPTH = 2
"""Finished results that may wait: one hides the time of a build, a second one its variation."""


@contextmanager
def builder(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """One background thread for batches of `device`, which ends with the context.

    At the end the current task is finished and waiting tasks are dropped.
    """

    def on_start() -> None:
        if device.type == "cuda":  # a new thread starts on device 0 in every rank
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(1, "prefetch", on_start)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def ahead(
    tasks: Iterable[Callable[[], T]], device: torch.device, depth: int = _DEPTH
) -> Iterator[Iterator[T]]:
    """Results of tasks in order, computed ahead of their use in a background thread.

    At most `depth` results wait, so memory is bounded. `tasks` is iterated in the caller's thread.
    An error in a task is raised when its result is requested.
    """
    with builder(device) as pool:
        submitted = (pool.submit(task) for task in tasks)
        waiting = deque(islice(submitted, depth))

        def results() -> Iterator[T]:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(islice(submitted, 1))
                yield result

        yield results()


def pinned(value: Any, device: torch.device) -> Any:
    """Copy the tensors of `value` to pinned memory if `device` is a CUDA device.

    Args:
        value: a tensor, or dataclasses, dictionaries, tuples and named tuples of tensors. Other
            values are returned unchanged.
        device: the device that the tensors will be copied to.
    """
    if device.type != "cuda":
        return value
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if is_dataclass(value) and not isinstance(value, type):
        moved = {f.name: pinned(getattr(value, f.name), device) for f in fields(value)}
        return replace(value, **moved)
    if isinstance(value, dict):
        return {name: pinned(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        parts = (pinned(item, device) for item in value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
