"""Limit on the numbers and tensors that a model may register, given the size of its files.

A configuration of a few bytes can describe a model of a trillion weights, and transformers and PEFT
initialize every weight that the files lack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

_FREE = 1 << 26  # numbers that need no file; rotary tables of 1e6 positions have as many
_MOST_TENSORS = 200_000  # a model with 256 experts in each of 61 layers has 50,000


class TooLarge(ValueError):
    """A configuration describes more than its files hold."""


@contextmanager
def limited(size: Callable[[], int], *, meta: bool = False) -> Iterator[None]:
    """Limit what this thread's modules register: as many numbers as `size` returns, and 2^26 more.

    Args:
        size: returns a number that grows with the bytes of the files. Called once many numbers
            are registered.
        meta: count tensors on the meta device only. transformers builds a model there first.

    Raises:
        TooLarge: as soon as a module registers more, before it is initialized.
    """
    thread, numbers, tensors, most = threading.get_ident(), 0, 0, _FREE

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal numbers, tensors, most
        if tensor is None or threading.get_ident() != thread or (meta and not tensor.is_meta):
            return
        numbers, tensors = numbers + tensor.numel(), tensors + 1
        if numbers > most:
            most = _FREE + size()
        if numbers > most or tensors > _MOST_TENSORS:
            raise TooLarge(
                f"its configuration describes over {numbers:,} numbers in {tensors:,} tensors, and "
                f"its weights allow {most:,} numbers in {_MOST_TENSORS:,} tensors. Check the sizes "
                "in its configuration, or copy its weights again"
            )

    hooks = (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
