"""Helpers of the Triton kernels: softcap and temperature of a logit, launches, argument checks."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Maxima start here and not at -inf: -inf - -inf is NaN where a row has no other token."""


@triton.jit
def load_wide(pointer, mask):
    """fp32 values; 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scale_logits(logits, softcap, inverse_temperature):
    """cap(logits) / temperature.

    tanh from one exponential, since tanh.approx errs by 5e-4. An infinite logit is an overflow and
    must not become the finite softcap: + 0 * logits makes it NaN.
    """
    if softcap is not None:
        tanh = 1 - 2 / (tl.exp(logits * (2 / softcap)) + 1)
        return tanh * (softcap * inverse_temperature) + 0 * logits
    else:
        return logits * inverse_temperature


@triton.jit
def logit_derivative(logits, softcap, inverse_temperature):
    """d z / d logits. 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2 |x|) does not cancel."""
    if softcap is not None:
        e = tl.exp(tl.abs(logits) * (-2 / softcap))
        return inverse_temperature * 4 * e / ((1 + e) * (1 + e))
    else:
        return inverse_temperature


_assumed: tuple[int, int] | None = None


@contextlib.contextmanager
def assume_device(architecture: int, processors: int) -> Iterator[None]:
    """Launchers choose tiles for this device, also without one: for compiling and for tests."""
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
    """triton.cdiv for the host: that one is typed as a constexpr."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors: Triton launches on the current device."""
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](*args, **options)


def device_facts(tensor: Tensor) -> tuple[int, int]:
    """(architecture, multiprocessors) of the tensor's device; (0, 1) for the interpreter's CPU."""
    if _assumed is not None:
        return _assumed
    return _device_facts(tensor.get_device()) if tensor.is_cuda else (0, 1)


def takes_tma(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can address it: everything in multiples of 16 bytes."""
    pitch = tensor.stride(0) * tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and pitch % 16 == 0
