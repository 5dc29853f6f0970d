"""Prefetch: batches are built in a background thread while the device computes.

    with ahead((partial(build, part) for part in parts), device) as batches:
        for batch in batches:
            step(batch.to(device))

Order and content are those of a plain loop, and nothing random is drawn in the thread. For CUDA a
batch is `pinned`, so that a copy with `non_blocking=True` does not wait: from pageable memory CUDA
first waits for all work queued before the copy.
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
"""Results that may be waiting: one hides a slow build, a second one hides its variation."""


@contextmanager
def builder(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """One background thread for batches of `device`; leaving the context ends it.

    The task in progress is finished first, and waiting tasks are dropped.
    """

    def on_start() -> None:
        if device.type == "cuda":  # a new thread is on device 0 in every rank
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
    """Results of tasks in order, each computed in a background thread before it is asked for.

    At most `depth` results wait, so memory is bounded. `tasks` is iterated in the caller's thread.
    An error of a task is raised where its result is asked for.
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
    """`value` with its tensors in pinned memory where `device` is a CUDA device.

    Args:
        value: a tensor, or dataclasses, dictionaries, tuples and named tuples of tensors; other
            values stay as they are.
        device: where the tensors will be copied.
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
