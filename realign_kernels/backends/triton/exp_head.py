"""E of a chunk from hidden states without logits: the exponential is in the GEMM's epilogue.

It is for rows whose derivative is needed. A row is shifted by its label's logit instead of its
maximum. That logit is known before the GEMM, so nothing is read twice:

    E_v = exp(z_v - z_label) / 2^MARGIN        logp = -log(1 + 2^MARGIN * sum E_v)

If other tokens are 109 nats above the label, E may overflow. The log-prob is then NaN, and the
call is repeated with row kernels, which shift by the maximum (`Head.retry`).
"""

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from realign_kernels._extension import extension, require_extension
from realign_kernels.backends.base import Scores
from realign_kernels.backends.triton.configs import EXP_HEADS, listed
from realign_kernels.backends.triton.logits import (
    ceil_div,
    device_facts,
    launch,
    load_wide,
    takes_tma,
)
from realign_kernels.lm_head import Head

MARGIN = tl.constexpr(58.0)
"""Exponent offset in bits (40 nats). In return, tokens 47 nats below the label underflow.

1 - p is then below 1e-20."""
LOG2E = tl.constexpr(math.log2(math.e))
ENVIRONMENT = "REALIGN_HEAD"
CHOICES = ("cutlass", "triton", "rows")
DEFAULT = "rows"
"""The other kernels were faster on an H200, but no complete call has run with them there."""


@triton.jit
def label_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    labels,  # (N,) int64
    logit_out,  # (N,) fp32
    shift_out,  # (N,) fp32, subtracted in the exponent of 2
    narrow_out,  # (N,) int32, the labels
    width,
    hidden_stride,
    weight_stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Computes the label's logit of one row, which is the shift of the row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        depth = start + tl.arange(0, BLOCK)
        a = load_wide(hidden + row * hidden_stride + depth, depth < width)
        b = load_wide(weight + label * weight_stride + depth, depth < width)
        sums += a * b
    logit = tl.sum(sums, 0) * inverse_temperature
    tl.store(logit_out + row, logit)
    tl.store(shift_out + row, logit * LOG2E + MARGIN)
    tl.store(narrow_out + row, label.to(tl.int32))


@triton.jit
def exponentials(z, shift, label, columns, vocabulary, inverse_temperature):
    """E of a tile of logits, 0 at the label and past the vocabulary."""
    left_out = (columns[None, :] == label[:, None]) | (columns >= vocabulary)[None, :]
    exponent = z * (inverse_temperature * LOG2E) - shift[:, None]
    return tl.where(left_out, 0.0, tl.exp2(exponent))


# As `rows` of `loss_kernel`.
@triton.jit(do_not_specialize=["count"])
def exp_kernel(
    hidden,  # (N, H) descriptor with BLOCK_ROWS x BLOCK_DEPTH boxes.
    weight,  # (V, H) descriptor with BLOCK_COLUMNS x BLOCK_DEPTH boxes.
    exp_logits,  # (N, V) descriptor with BLOCK_ROWS x BLOCK_COLUMNS / 2 boxes.
    labels,  # (N,) int32.
    shift,  # (N,) fp32, subtracted in the exponent of 2.
    sums_out,  # (tiles of columns, N) fp32.
    rounded_out,  # (tiles of columns, N) fp32, sums of the rounded exp_logits.
    count,
    vocabulary,
    width,
    sums_stride,
    inverse_temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Computes tiles of E in one persistent program: GEMM, exponential, sums over columns."""
    row_blocks = tl.cdiv(count, BLOCK_ROWS)
    column_blocks = tl.cdiv(vocabulary, BLOCK_COLUMNS)
    HALF: tl.constexpr = BLOCK_COLUMNS // 2
    # flatten: the loads of the next tile overlap with the epilogue of this one.
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS, flatten=True):
        # GROUP row blocks pass over the vocabulary together, so their hidden states stay in L2.
        group = tile // (GROUP * column_blocks)
        group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
        within = tile % (GROUP * column_blocks)
        first_row = (group * GROUP + within % group_rows) * BLOCK_ROWS
        block = within // group_rows
        first_column = block * BLOCK_COLUMNS
        z = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for k in range(0, width, BLOCK_DEPTH):
            a = hidden.load([first_row, k])
            b = weight.load([first_column, k])
            z = tl.dot(a, b.T, z, input_precision="tf32x3")
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        shifts = tl.load(shift + rows, rows < count, other=0.0)
        label = tl.load(labels + rows, rows < count, other=-1)
        # Storing two halves takes less shared memory than storing the tile at once.
        left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_ROWS, 2, HALF)), (0, 2, 1)))
        columns = first_column + tl.arange(0, HALF)
        e = exponentials(left, shifts, label, columns, vocabulary, inverse_temperature)
        rounded = (e * inverse_temperature).to(exp_logits.dtype)
        exp_logits.store([first_row, first_column], rounded)
        sum_exp, rounded_total = tl.sum(e, 1), tl.sum(rounded.to(tl.float32), 1)
        e = exponentials(right, shifts, label, columns + HALF, vocabulary, inverse_temperature)
        rounded = (e * inverse_temperature).to(exp_logits.dtype)
        exp_logits.store([first_row, first_column + HALF], rounded)
        sum_exp += tl.sum(e, 1)
        rounded_total += tl.sum(rounded.to(tl.float32), 1)
        slot = block.to(tl.int64) * sums_stride + rows
        tl.store(sums_out + slot, sum_exp, rows < count)
        tl.store(rounded_out + slot, rounded_total, rows < count)


# As `rows` of `loss_kernel`.
@triton.jit(do_not_specialize=["count"])
def score_kernel(
    sums,  # (tiles of columns, N) fp32
    rounded_sums,  # (tiles of columns, N) fp32
    logit,  # (N,) fp32
    logps_out,  # (N,) fp32
    one_minus_p_out,  # (N,) fp32
    divisor_out,  # (N,) fp32
    count,
    tiles,
    sums_stride,
    temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Computes log-prob, 1 - p and divisor of a block of rows from the sums of their tiles."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    parts = tl.zeros((BLOCK_TILES, BLOCK_ROWS), tl.float32)
    rounded = tl.zeros((BLOCK_TILES, BLOCK_ROWS), tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        tile = (first + tl.arange(0, BLOCK_TILES)).to(tl.int64)
        inside = (tile < tiles)[:, None] & (rows < count)[None, :]
        slots = tile[:, None] * sums_stride + rows[None, :]
        parts += tl.load(sums + slots, inside, other=0.0)
        rounded += tl.load(rounded_sums + slots, inside, other=0.0)
    sum_exp = tl.sum(parts, 0)
    z = tl.load(logit + rows, rows < count, other=0.0)
    # z - z is 0, but NaN for an infinite z: an overflow must not look like certainty.
    # The product with 2^MARGIN is exact. For large sums, which could overflow, logarithms add up.
    large = sum_exp > 1
    log_total = tl.log(tl.where(large, sum_exp, sum_exp * tl.exp2(MARGIN)))
    logit_gap = z - z - tl.where(large, log_total + MARGIN / LOG2E, log_total)
    # For larger sums the product of E with the weight may overflow.
    logit_gap = tl.where(sum_exp < 1e30, logit_gap, float("nan"))
    e = tl.exp(-tl.abs(logit_gap))
    u = 1 + e
    # log1p(e) = e log(u) / (u - 1), with u = 1 + e rounded, is exact to a few ulp.
    log1p = tl.where(u == 1, e, e * tl.log(u) / tl.where(u == 1, 1.0, u - 1))
    negative = tl.where(logit_gap < 0, logit_gap, 0.0)
    logps = negative - tl.where(logit_gap != logit_gap, logit_gap, log1p)
    tl.store(logps_out + rows, logps, rows < count)
    tl.store(one_minus_p_out + rows, tl.where(logit_gap > 0, e / u, 1 / u), rows < count)
    # The divisor is 0 only if there are no other tokens. The product that it divides is then 0.
    divisor = tl.sum(rounded, 0) * temperature
    divisor = tl.where(divisor < 1e-37, 1e-37, divisor)
    tl.store(divisor_out + rows, divisor, rows < count)


def label_logits(hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of the label (fp32), shift (fp32) and label (int32), each (N,)."""
    count, width = hidden.shape
    logit, shift = (hidden.new_empty(count, dtype=torch.float32) for _ in range(2))
    narrow = hidden.new_empty(count, dtype=torch.int32)
    launch(
        label_kernel,
        (count,),
        hidden,
        head.weight,
        labels.contiguous(),
        logit,
        shift,
        narrow,
        width,
        hidden.stride(0),
        head.weight.stride(0),
        1 / head.temperature,
        BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return logit, shift, narrow


def exp_rows(
    hidden: Tensor, head: Head, narrow: Tensor, shift: Tensor, exp_logits: Tensor
) -> Tensor:  # (2, tiles, N)
    """The GEMM in Triton: writes exp_logits, (N, V), and returns sums by tiles of columns.

    The first are sums of E in fp32, the second are sums of the rounded exp_logits.
    """
    (count, width), vocabulary = hidden.shape, len(head.weight)
    tile = EXP_HEADS[listed(device_facts(hidden)[0])]
    tiles = ceil_div(vocabulary, tile.columns)
    # Rows are padded, so that addresses and stride are aligned for every `count`.
    sums = hidden.new_empty(2, tiles, ceil_div(count, 16) * 16, dtype=torch.float32)[..., :count]
    programs = min(device_facts(hidden)[1], ceil_div(count, tile.rows) * tiles)
    boxes = [[tile.rows, tile.depth], [tile.columns, tile.depth], [tile.rows, tile.columns // 2]]
    launch(
        exp_kernel,
        (programs,),
        *map(TensorDescriptor.from_tensor, (hidden, head.weight, exp_logits), boxes),
        narrow,
        shift,
        *sums,
        count,
        vocabulary,
        width,
        sums.stride(1),
        1 / head.temperature,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_DEPTH=tile.depth,
        GROUP=tile.group,
        PROGRAMS=programs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return sums


def cutlass_rows(
    hidden: Tensor, head: Head, narrow: Tensor, shift: Tensor, exp_logits: Tensor
) -> Tensor:  # (2, tiles, N)
    """`exp_rows` by the extension's CUTLASS kernel."""
    module = require_extension()
    count = len(hidden)
    rows, columns = module.EXP_HEAD_TILE
    # The epilogue writes sums for whole blocks of rows.
    shape = 2, ceil_div(len(head.weight), columns), ceil_div(count, rows) * rows
    sums = hidden.new_empty(shape, dtype=torch.float32)
    module.exp_head(
        hidden.data_ptr(),
        head.weight.data_ptr(),
        exp_logits.data_ptr(),
        shift.data_ptr(),
        narrow.data_ptr(),
        *(part.data_ptr() for part in sums),
        (count, len(head.weight), hidden.shape[1]),
        (hidden.stride(0), head.weight.stride(0), exp_logits.stride(0)),
        hidden.get_device(),
        torch.cuda.current_stream(hidden.device).cuda_stream,
    )
    return sums[..., :count]


def score_sums(
    sums: Tensor,  # (2, tiles, N)
    logit: Tensor,  # (N,)
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # each (N,) fp32
    """Log-probs, 1 - p and the divisor of E W from the sums by tiles of columns."""
    logps, one_minus_p, divisor = (torch.empty_like(logit) for _ in range(3))
    _, tiles, count = sums.shape
    block = 32
    launch(
        score_kernel,
        (ceil_div(count, block),),
        *sums,
        logit,
        logps,
        one_minus_p,
        divisor,
        count,
        tiles,
        sums.stride(1),
        temperature,
        BLOCK_ROWS=block,
        BLOCK_TILES=32,
        num_warps=4,
    )
    return logps, one_minus_p, divisor


def fused(hidden: Tensor, labels: Tensor, head: Head, exp_logits: Tensor) -> Scores:
    """See `TorchKernels.fused`."""
    logit, shift, narrow = label_logits(hidden, labels, head)
    gemm = cutlass_rows if choice(hidden, head) == "cutlass" else exp_rows
    sums = gemm(hidden, head, narrow, shift, exp_logits)
    logps, one_minus_p, divisor = score_sums(sums, logit, head.temperature)
    dz_dlogit = torch.full_like(logit, 1 / head.temperature)
    return Scores(logps, one_minus_p, labels, divisor, dz_dlogit)


def choice(hidden: Tensor, head: Head) -> str:
    """The kernel for E, one of `CHOICES`. "rows" writes logits and reads them again.

    Raises:
        ValueError: REALIGN_HEAD has another value, or names a kernel that is not installed.
    """
    asked = os.environ.get(ENVIRONMENT) or DEFAULT
    if asked not in CHOICES:
        raise ValueError(f"{ENVIRONMENT} is {asked!r}. Use one of {', '.join(CHOICES)}.")
    if asked == "cutlass" and not built():
        raise ValueError(
            f"{ENVIRONMENT} is 'cutlass', but the extension was built without CUTLASS. Install "
            "nvidia-cutlass==4.2.0 and nvcc and build again, or use triton or rows."
        )
    if asked == "rows" or not _suits(hidden, head):
        return "rows"
    # The CUTLASS kernel is for sm_90a, has no temperature in its derivative, and stores 16 bytes at
    # a time.
    hopper = device_facts(hidden)[0] == 90
    plain = head.temperature == 1 and len(head.weight) % 8 == 0
    return asked if hopper and plain else "triton"


def built() -> bool:
    """Whether the extension has the CUTLASS kernel."""
    return hasattr(extension(), "exp_head")


def _suits(hidden: Tensor, head: Head) -> bool:
    """Whether a kernel without logits supports these inputs.

    It needs bf16 on Hopper or later, with rows that the tensor memory accelerator can address:

    - E needs the range of bf16.
    - With a vocabulary shard, the label may be on another rank.
    - At a temperature below 1, labels easily are 109 nats below another token.
    """
    if listed(device_facts(hidden)[0]) not in EXP_HEADS:
        return False
    if hidden.dtype != torch.bfloat16 or hidden.shape[1] % 8:
        return False
    if head.bias is not None or head.softcap is not None or head.shard is not None:
        return False
    tensors = hidden, head.weight
    return head.temperature >= 1 and all(t.stride(1) == 1 and takes_tma(t) for t in tensors)
