"""Helpers for Triton kernels: softcap and temperature of a logit, launches, device properties."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Initial value of maxima. With -inf, a row without other tokens would give -inf - -inf = NaN."""


@triton.jit
def load_wide(pointer, mask):
    """Loads values as fp32, 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scale_logits(logits, softcap, inverse_temperature):
    """cap(logits) / temperature.

    tanh is computed from one exponential, because tanh.approx has an error of 5e-4. An infinite
    logit is an overflow and must not become the finite softcap, so + 0 * logits makes it NaN.
    """
    if softcap is not None:
        tanh = 1 - 2 / (tl.exp(logits * (2 / softcap)) + 1)
        return tanh * (softcap * inverse_temperature) + 0 * logits
    else:
        return logits * inverse_temperature


@triton.jit
def logit_derivative(logits, softcap, inverse_temperature):
    """d z / d logits, from 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2 |x|).

    This form has no cancellation.
    """
    if softcap is not None:
        e = tl.exp(tl.abs(logits) * (-2 / softcap))
        return inverse_temperature * 4 * e / ((1 + e) * (1 + e))
    else:
        return inverse_temperature


_assumed: tuple[int, int] | None = None


@contextlib.contextmanager
def assume_device(architecture: int, processors: int) -> Iterator[None]:
    """Makes launchers choose tiles for this device, for compilation and tests without a GPU."""
    global _assumed
    before, _assumed = _assumed, (architecture, processors)
    try:
        yield
    finally:
        _assumed = before


@functools.cache
def _device_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def ceil_div(a: int, b: int) -> int:
    """Ceiling division on the host. triton.cdiv is typed as a constexpr."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the device of its tensors. Triton itself uses the current device."""
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](*args, **options)


def device_facts(tensor: Tensor) -> tuple[int, int]:
    """(architecture, multiprocessors) of the tensor's device; (0, 1) for the interpreter's CPU."""
    if _assumed is not None:
        return _assumed
    return _device_facts(tensor.get_device()) if tensor.is_cuda else (0, 1)


def takes_tma(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can address a matrix: 16-byte address and row pitch."""
    pitch = tensor.stride(0) * tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and pitch % 16 == 0
