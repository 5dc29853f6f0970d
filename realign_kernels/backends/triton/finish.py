"""Elementwise kernels: the last step of the gradient of hidden, and the scaling of gradients.

As torch operations the last step moves 68 bytes for each element of hidden, here 10.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.backends.base import Scores
from realign_kernels.backends.triton.logits import check_unit_stride, load_wide

BLOCK = 2048
SCALE_BLOCK = 8192


@triton.jit
def finish_kernel(
    pull,  # (r, H) fp32
    weight,  # (V, H)
    target,  # (r,) int64, -1 for no target
    total,  # (r,) fp32
    slope,  # (r,) fp32
    factor,  # (r,) fp32
    out,  # (r, H)
    width,
    pull_stride,
    weight_stride,
    column_stride,  # of weight
    out_stride,
    BLOCK: tl.constexpr,
):
    """A block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    label = tl.load(target + row)
    here = tl.load(factor + row)
    place = label * weight_stride + columns * column_stride
    w = load_wide(weight + place, inside & (label >= 0))
    p = load_wide(pull + row * pull_stride + columns, inside)
    value = here * (tl.load(slope + row) * w - p / tl.load(total + row))
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), inside)


def finish(
    pull: Tensor,  # (r, H) fp32
    weight: Tensor,  # (V, H)
    scores: Scores,
    factor: Tensor,  # (r,) fp32
    out: Tensor,  # (r, H)
) -> None:
    """See `realign_kernels.backends.base.Kernels.finish`."""
    for name, tensor in (("pull", pull), ("out", out)):
        check_unit_stride(name, tensor)
    count, width = out.shape
    if out.numel() == 0:
        return
    with torch.cuda.device_of(out):  # Triton launches on the current device
        finish_kernel[(count, triton.cdiv(width, BLOCK))](
            pull,
            weight,
            scores.target.contiguous(),
            scores.total,
            scores.slope,
            factor.contiguous(),
            out,
            width,
            pull.stride(0),
            *weight.stride(),
            out.stride(0),
            BLOCK=BLOCK,
            num_warps=4,
        )


@triton.jit
def scale_kernel(
    values,  # (n,)
    factor,  # () fp32
    count,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values *= factor, and nothing where the factor is 1."""
    f = tl.load(factor)
    if f != 1:
        step = PROGRAMS * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            place = start + tl.arange(0, BLOCK)
            scaled = load_wide(values + place, place < count) * f
            tl.store(values + place, scaled.to(values.dtype.element_ty), place < count)


def scale(
    values: Tensor,  # contiguous, any shape
    factor: Tensor,  # () fp32
) -> None:
    """See `realign_kernels.backends.base.Kernels.scale`."""
    assert values.is_contiguous()
    with torch.cuda.device_of(values):
        scale_kernel[(SCALE_PROGRAMS,)](
            values,
            factor,
            values.numel(),
            PROGRAMS=SCALE_PROGRAMS,
            BLOCK=SCALE_BLOCK,
            num_warps=8,
        )


SCALE_PROGRAMS = 1024
"""A few for each multiprocessor of any GPU."""
