"""Row statistics (label logit, maximum, sum of exp) from hidden states, without writing logits.

It is for passes without gradient, such as references and evaluation. A program handles one block of
rows and one split of the vocabulary. It processes the split tile by tile, with the GEMM and an
online sum in one loop. The splits of a row are combined in a fixed order, so results are
deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from realign_kernels.backends.base import RowStats
from realign_kernels.backends.triton.configs import GemmConfig, choose_splits, gemm_config
from realign_kernels.backends.triton.logits import (
    LOWEST,
    ceil_div,
    device_facts,
    launch,
    load_wide,
    scale_logits,
    takes_tma,
)


# As `rows` of `loss_kernel`.
@triton.jit(do_not_specialize=["count"])
def head_kernel(
    hidden,  # (N, H) pointer, or descriptor with BLOCK_ROWS x BLOCK_DEPTH boxes.
    weight,  # (V, H) pointer, or descriptor with BLOCK_COLUMNS x BLOCK_DEPTH boxes.
    labels,  # (N,) int64.
    bias,  # (V,) or None.
    logit_out,  # (N,) fp32, -inf if no program finds the label.
    max_logit_out,  # (splits, N) fp32.
    sum_exp_out,  # (splits, N) fp32.
    count,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    splits,
    tiles_per_split,
    softcap,
    inverse_temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    """Computes the statistics of one block of rows over one split of the vocabulary."""
    # Programs that run at the same time share tiles of weight, because a group of row blocks has
    # one split. They also share rows of hidden, because GROUP blocks fit into L2.
    program = tl.program_id(0)
    row_blocks = tl.cdiv(count, BLOCK_ROWS)
    group = program // (GROUP * splits)
    group_rows = row_blocks - group * GROUP
    group_rows = tl.where(group_rows < GROUP, group_rows, GROUP)
    within = program % (GROUP * splits)
    first_row = (group * GROUP + within % group_rows) * BLOCK_ROWS
    split = within // group_rows

    rows = first_row + tl.arange(0, BLOCK_ROWS)
    depth = tl.arange(0, BLOCK_DEPTH)
    label = tl.load(labels + rows, rows < count, other=-1).to(tl.int32)
    max_logit = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK_ROWS,), tl.float32)
    tiles = tl.cdiv(vocabulary, BLOCK_COLUMNS)
    first_tile = split * tiles_per_split
    last_tile = first_tile + tiles_per_split
    last_tile = tl.where(last_tile < tiles, last_tile, tiles)

    for tile in range(first_tile, last_tile):
        first_column = tile * BLOCK_COLUMNS
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        z = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        if bias is not None:
            z += load_wide(bias + columns, columns < vocabulary)[None, :]
        if DESCRIPTORS:
            for k in range(0, width, BLOCK_DEPTH):
                a = hidden.load([first_row, k])
                b = weight.load([first_column, k])
                z = tl.dot(a, b.T, z, input_precision="tf32x3")
        else:
            # Past the end the last row is read again. Those results are masked or not stored.
            a_rows = tl.where(rows < count, rows, count - 1).to(tl.int64)
            b_rows = tl.where(columns < vocabulary, columns, vocabulary - 1).to(tl.int64)
            a_pointers = hidden + a_rows[:, None] * hidden_stride + depth[None, :]
            b_pointers = weight + b_rows[None, :] * weight_stride + depth[:, None]
            for k in range(0, width, BLOCK_DEPTH):
                if EVEN_DEPTH:
                    a = tl.load(a_pointers)
                    b = tl.load(b_pointers)
                else:
                    a = tl.load(a_pointers, depth[None, :] < width - k, other=0.0)
                    b = tl.load(b_pointers, depth[:, None] < width - k, other=0.0)
                z = tl.dot(a, b, z, input_precision="tf32x3")
                a_pointers += BLOCK_DEPTH
                b_pointers += BLOCK_DEPTH
        z = scale_logits(z, softcap, inverse_temperature)
        is_label = columns[None, :] == label[:, None]
        # Only one tile holds the label, so only one program writes its logit. No tile holds -1.
        found = (label >= first_column) & (label < first_column + BLOCK_COLUMNS)
        tl.store(logit_out + rows, tl.sum(tl.where(is_label, z, 0.0), 1), found)
        z = tl.where(is_label | (columns >= vocabulary)[None, :], float("-inf"), z)
        top = tl.max(z, 1)
        # A comparison instead of maximum(): a NaN never becomes the maximum, but stays in the sum.
        higher = tl.where(top > max_logit, top, max_logit)
        sum_exp = sum_exp * tl.exp(max_logit - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        max_logit = higher

    slot = split.to(tl.int64) * count + rows
    tl.store(max_logit_out + slot, max_logit, rows < count)
    tl.store(sum_exp_out + slot, sum_exp, rows < count)


def head_stats(
    hidden: Tensor,  # (N, H) fp32, bf16 or fp16
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64 in [0, V), or -1: not in this shard of the vocabulary
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    *,
    config: GemmConfig | None = None,
) -> RowStats:
    """`row_stats` of hidden @ weight.T, with fp32 logits that are never in memory.

    fp32 inputs are multiplied as three tf32 products, which is about as exact as fp32. hidden is
    copied if the elements of a row are not adjacent.

    Raises:
        ValueError: the last stride of weight is not 1.
    """
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(
            f"weight {tuple(weight.shape)} has strides {weight.stride()}, but the last stride must "
            "be 1. Call contiguous() on it."
        )
    (count, width), vocabulary = hidden.shape, len(weight)
    architecture, processors = device_facts(hidden)
    describable = takes_tma(hidden) and takes_tma(weight)
    if config is None:
        config = gemm_config(architecture, hidden.dtype, count, width, vocabulary, describable)
    described = config.descriptors and describable
    row_blocks, tiles = ceil_div(count, config.rows), ceil_div(vocabulary, config.columns)
    splits, tiles_per_split = choose_splits(row_blocks, tiles, processors)
    logit = hidden.new_full((count,), float("-inf"), dtype=torch.float32)
    # Two tensors, whose addresses are both aligned for every `count`.
    max_logits, sums_exp = (hidden.new_empty(splits, count, dtype=torch.float32) for _ in range(2))
    if count:
        left, right = hidden, weight
        if described:
            left = TensorDescriptor.from_tensor(hidden, [config.rows, config.depth])
            right = TensorDescriptor.from_tensor(weight, [config.columns, config.depth])
        launch(
            head_kernel,
            (row_blocks * splits,),
            left,
            right,
            labels.contiguous(),
            bias,
            logit,
            max_logits,
            sums_exp,
            count,
            vocabulary,
            width,
            hidden.stride(0),
            weight.stride(0),
            splits,
            tiles_per_split,
            softcap,
            1 / temperature,
            BLOCK_ROWS=config.rows,
            BLOCK_COLUMNS=config.columns,
            BLOCK_DEPTH=config.depth,
            GROUP=config.group,
            DESCRIPTORS=described,
            EVEN_DEPTH=width % config.depth == 0,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    max_logit = max_logits.amax(0)
    sum_exp = (sums_exp * (max_logits - max_logit).exp()).sum(0)
    dz_dlogit = torch.full_like(logit, 1 / temperature)
    if softcap is not None:
        dz_dlogit *= 1 - (logit * (temperature / softcap)) ** 2
    dz_dlogit = dz_dlogit.masked_fill(labels < 0, 0)
    return RowStats(labels, logit, max_logit, sum_exp, dz_dlogit, sum_exp)
