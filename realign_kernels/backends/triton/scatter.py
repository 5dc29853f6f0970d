"""Scatter-add of rows without atomics, for the target's part of the weight gradient.

`Tensor.index_add_` uses atomics on CUDA. Labels repeat, so its sums would depend on the order in
which threads arrive, and training would not be bitwise deterministic.
"""

import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.backends.triton.logits import ceil_div, launch

BLOCK = 1024
"""Columns per program: each thread of 4 warps loads 16 bytes of fp32 twice."""


# As `rows` of `loss_kernel`.
@triton.jit(do_not_specialize=["count"])
def add_rows_kernel(
    total,  # (V, H)
    index,  # (r,) int64, sorted; -1 for no target
    order,  # (r,) int64, row of each entry of index
    rows,  # (r, H) fp32
    count,
    width,
    total_stride,
    rows_stride,
    BLOCK: tl.constexpr,
):
    """Adds one block of columns for one index. The first of equal entries adds all their rows."""
    at = tl.program_id(0)
    target = tl.load(index + at)
    before = tl.load(index + at - 1, at > 0, other=-1)
    if (target != before) & (target >= 0):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        place = total + target * total_stride + columns
        sums = tl.zeros((BLOCK,), tl.float32)
        same = target
        while same == target:
            row = tl.load(order + at)
            sums += tl.load(rows + row * rows_stride + columns, inside, other=0.0)
            at += 1
            same = tl.load(index + at, at < count, other=-1)
        sums += tl.load(place, inside, other=0.0).to(tl.float32)
        tl.store(place, sums.to(total.dtype.element_ty), inside)


def add_rows(
    total: Tensor,  # (V, H) fp32, bf16 or fp16
    index: Tensor,  # (r,) int64 in [0, V), or -1: not added
    rows: Tensor,  # (r, H) fp32
) -> None:
    """total[index] += rows, in the same order in each call. See `TorchKernels.add_rows`."""
    assert total.stride(1) == 1
    rows = rows.contiguous()  # rows computed from hidden states have their layout
    count, width = rows.shape
    ordered, order = index.sort(stable=True)
    launch(
        add_rows_kernel,
        (count, ceil_div(width, BLOCK)),
        total,
        ordered,
        order,
        rows,
        count,
        width,
        total.stride(0),
        rows.stride(0),
        BLOCK=BLOCK,
        num_warps=4,
    )
