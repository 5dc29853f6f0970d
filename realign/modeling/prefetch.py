"""Prefetch: batches are built in background threads while the device computes.

    with ahead((partial(build, part) for part in parts), device) as batches:
        for batch in batches:
            step(batch.to(device))

Order and content are those of a plain loop, and the threads draw no random numbers. For CUDA a
batch is `pinned`, so that a copy with `non_blocking=True` does not wait. A copy from pageable
memory waits for all work that was queued before it.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_MOST_WORKERS = 8
"""Limit of `default_workers`. Each worker holds the image that it decodes, up to 0.8 GB."""


def default_workers() -> int:
    """Default number of worker threads: the cores of this process, at most 8."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


class Copies(Generic[T]):
    """Copies of an object that is not thread-safe, such as a processor. Threads borrow them.

    Args:
        original: the object. It is copied and never lent, so its owner may read it at any time.
    """

    def __init__(self, original: T) -> None:
        self._original = original
        self._idle: list[T] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator[T]:
        """A copy that no other thread has. A new one is made only if all others are lent."""
        with self._lock:
            lent = self._idle.pop() if self._idle else copy.deepcopy(self._original)
        try:
            yield lent
        finally:
            self._idle.append(lent)


@contextmanager
def builder(device: torch.device, workers: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Background threads for batches of `device`, which end with the context.

    At the end the current task is finished and waiting tasks are dropped.
    """

    def on_start() -> None:
        if device.type == "cuda":  # a new thread starts on device 0 in every rank
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(workers, "prefetch", on_start)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def ahead(
    tasks: Iterable[Callable[[], T]],
    device: torch.device,
    *,
    workers: int = 1,
    depth: int | None = None,
) -> Iterator[Iterator[T]]:
    """Results of tasks in order, computed ahead of their use in background threads.

    `tasks` is iterated in the caller's thread. An error in a task is raised when its result is
    requested.

    Args:
        tasks: the tasks.
        device: the device of the results.
        workers: number of threads. With 0, each task runs when its result is requested.
        depth: maximum number of tasks that run or wait, which bounds the memory. None means
            `workers` + 1: the additional result hides the variation of the times.
    """
    if workers == 0:
        yield (task() for task in tasks)
        return
    depth = workers + 1 if depth is None else depth
    with builder(device, min(workers, depth)) as pool:
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
