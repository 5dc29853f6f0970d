"""Elementwise kernels: epilogue of the hidden gradient, and scaling of gradients.

The epilogue moves 10 bytes per element of hidden. As torch operations it would move 68.
"""

import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.backends.base import Scores
from realign_kernels.backends.triton.logits import ceil_div, launch, load_wide

BLOCK = 2048
SCALE_BLOCK = 8192
SCALE_PROGRAMS = 1024
"""A few programs per multiprocessor on any GPU."""


@triton.jit
def hidden_grad_kernel(
    exp_w,  # (r, H) fp32
    weight,  # (V, H)
    target,  # (r,) int64, -1 for no target
    sum_exp,  # (r,) fp32
    dz_dlogit,  # (r,) fp32
    factor,  # (r,) fp32
    out,  # (r, H)
    width,
    exp_w_stride,
    weight_stride,
    column_stride,  # of weight
    out_stride,
    BLOCK: tl.constexpr,
):
    """Computes one block of columns of one row of the hidden gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    label = tl.load(target + row)
    here = tl.load(factor + row)
    place = label * weight_stride + columns * column_stride
    w = load_wide(weight + place, inside & (label >= 0))
    p = load_wide(exp_w + row * exp_w_stride + columns, inside)
    value = here * (tl.load(dz_dlogit + row) * w - p / tl.load(sum_exp + row))
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), inside)


def hidden_grad_epilogue(
    exp_w: Tensor,  # (r, H) fp32
    weight: Tensor,  # (V, H)
    scores: Scores,
    factor: Tensor,  # (r,) fp32
    out: Tensor,  # (r, H)
) -> None:
    """See `TorchKernels.hidden_grad_epilogue`."""
    assert exp_w.stride(1) == 1 and out.stride(1) == 1
    count, width = out.shape
    if out.numel() == 0:
        return
    launch(
        hidden_grad_kernel,
        (count, ceil_div(width, BLOCK)),
        exp_w,
        weight,
        scores.target.contiguous(),
        scores.sum_exp,
        scores.dz_dlogit,
        factor.contiguous(),
        out,
        width,
        exp_w.stride(0),
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
    """values *= factor, skipped if the factor is 1."""
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
    """See `TorchKernels.scale`."""
    assert values.is_contiguous()
    launch(
        scale_kernel,
        (SCALE_PROGRAMS,),
        values,
        factor,
        values.numel(),
        PROGRAMS=SCALE_PROGRAMS,
        BLOCK=SCALE_BLOCK,
        num_warps=8,
    )
