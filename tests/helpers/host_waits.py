"""Host waits: reads of tensor values, for which the host waits for the GPU."""

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sys import _getframe
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
READS = (
    "item", "tolist", "cpu", "nonzero", "unique", "masked_select",
    "__bool__", "__int__", "__float__", "__index__", "__contains__",
)  # fmt: skip
"""Tensor methods that return values, or shapes that depend on values. `__getitem__` is absent,
although masks wait: a Python method of that name makes every tensor a sequence for C code."""


@contextmanager
def counted() -> Iterator[Counter]:
    """Count the host waits of this thread inside the context, by file.

    On CUDA torch itself reports them. On a CPU the methods that would wait are counted.
    `Tensor.numpy` is not counted: it fails for tensors on a GPU, so it reads host memory.
    """
    found: Counter = Counter()
    if torch.cuda.is_available():
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                found[_place(warning.filename)] += 1
        return
    thread, depth = threading.get_ident(), 0  # nested methods count as one wait

    def counting(method):
        def call(self, *args, **kwargs):
            nonlocal depth
            if threading.get_ident() != thread:
                return method(self, *args, **kwargs)
            if depth == 0:
                found[_place(_getframe(1).f_code.co_filename)] += 1
            depth += 1
            try:
                return method(self, *args, **kwargs)
            finally:
                depth -= 1

        return call

    with mock.patch.multiple(Tensor, **{n: counting(getattr(Tensor, n)) for n in READS}):
        yield found


def _place(file: str) -> str:
    """The path within this repository; for other files the last folder and the name."""
    path = Path(file)
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return f"{path.parent.name}/{path.name}"
