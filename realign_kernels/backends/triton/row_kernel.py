"""The row kernel: label logit, sum of exp over the other tokens, and E of each row of logits.

One program computes one row. If E is needed, it shifts the row by the label's logit and reads it
once. It reads the row twice, first for its maximum, in these cases:

- the sum of E is out of range, because the other tokens are about 70 nats away
- E is fp16, or is written in place
- the target is the runner-up
- E is not needed

`realign_kernels.backends.base` defines the results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.backends.base import RowStats
from realign_kernels.backends.triton.configs import row_config
from realign_kernels.backends.triton.logits import (
    LOWEST,
    device_facts,
    launch,
    load_wide,
    logit_derivative,
    scale_logits,
)


@triton.jit
def row_kernel(
    logits,  # (r, V).
    labels,  # (r,) int64.
    bias,  # (V,) or None.
    runner_up,  # (r,) uint8 or None.
    exp_logits,  # (r, V) or None. May be logits.
    target_out,  # (r,) int64.
    logit_out,  # (r,) fp32.
    max_logit_out,  # (r,) fp32.
    sum_exp_out,  # (r,) fp32.
    dz_dlogit_out,  # (r,) fp32.
    divisor_out,  # (r,) fp32.
    vocabulary,
    stride,
    exp_stride,
    softcap,
    inverse_temperature,
    ONE_READ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes one row. max_logit and sum_exp exclude `target` before anything is rounded."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    offsets = tl.arange(0, BLOCK)
    label = tl.load(labels + row).to(tl.int32)
    if ONE_READ:
        shift = load_wide(logits + label, label >= 0)
        if bias is not None:
            shift += load_wide(bias + label, label >= 0)
        dz_dlogit = logit_derivative(shift, softcap, inverse_temperature)
        shift = scale_logits(shift, softcap, inverse_temperature)
        sums = tl.zeros((BLOCK,), tl.float32)
        rounding = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + offsets
            inside = columns < vocabulary
            x = tl.load(logits + columns, inside, other=0.0, eviction_policy="evict_first")
            x = x.to(tl.float32)
            if bias is not None:
                x += load_wide(bias + columns, inside)
            e = tl.exp(scale_logits(x, softcap, inverse_temperature) - shift)
            e = tl.where(inside & (columns != label), e, 0.0)
            sums += e
            e *= logit_derivative(x, softcap, inverse_temperature)
            rounded = e.to(exp_logits.dtype.element_ty)
            rounding += rounded.to(tl.float32) - e
            tl.store(exp_logits + row * exp_stride + columns, rounded, inside)
        sum_exp = tl.sum(sums, 0)
        # The limits leave room for the product with the weight. NaN and label -1 fail as well.
        if (sum_exp > 1e-30) & (sum_exp < 1e30) & (label >= 0):
            tl.store(target_out + row, label.to(tl.int64))
            tl.store(logit_out + row, shift)
            tl.store(max_logit_out + row, shift)
            tl.store(sum_exp_out + row, sum_exp)
            tl.store(dz_dlogit_out + row, dz_dlogit)
            # Without a shift by the maximum the largest entry of E is not 1, so it is rounded. With
            # the sum of the rounded entries, the gradient has half the error. The largest entries
            # have about the slope 1 / temperature, also with a softcap.
            tl.store(divisor_out + row, sum_exp + tl.sum(rounding, 0) / inverse_temperature)
            return
    target = label
    # Read before the first pass, whose reductions are barriers: the second pass may overwrite it.
    raw = load_wide(logits + target, target >= 0)
    if runner_up is not None:
        by_runner_up = tl.load(runner_up + row) != 0
        target = tl.where(by_runner_up, -1, label)
    best = tl.full((), float("-inf"), tl.float32)
    max_logit = tl.full((), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)

    for start in range(0, vocabulary, BLOCK):
        columns = start + offsets
        inside = columns < vocabulary
        x = tl.load(logits + columns, inside, other=0.0, eviction_policy="evict_last")
        x = x.to(tl.float32)
        if bias is not None:
            x += load_wide(bias + columns, inside)
        z = tl.where(inside, scale_logits(x, softcap, inverse_temperature), float("-inf"))
        displaced = tl.full((), float("-inf"), tl.float32)
        if runner_up is not None:
            # The target is the best token so far, except the label. The token that it displaces
            # becomes one of the other tokens. A strict comparison keeps the first of equal tokens.
            candidates = inside & (columns != label)
            leader = tl.max(tl.where(candidates, z, float("-inf")), 0)
            found = tl.min(tl.where(candidates & (z == leader), columns, vocabulary), 0)
            better = by_runner_up & ((leader > best) | ((target < 0) & (found < vocabulary)))
            displaced = tl.where(better, best, displaced)
            best = tl.where(better, leader, best)
            target = tl.where(better, found, target)
        z = tl.where(columns == target, float("-inf"), z)
        top = tl.max(z, 0)
        top = tl.where(displaced > top, displaced, top)
        # Comparisons instead of maximum(): a NaN never becomes the maximum, but stays in the sum.
        higher = tl.where(top > max_logit, top, max_logit)
        sums = sums * tl.exp(max_logit - higher) + tl.exp(z - higher)
        sums += tl.where(offsets == 0, tl.exp(displaced - higher), 0.0)
        max_logit = higher
    sum_exp = tl.sum(sums, 0)

    if runner_up is not None:
        raw = load_wide(logits + target, target >= 0)
        # Other warps must not overwrite the row before this one has read it.
        tl.debug_barrier()
    if bias is not None:
        raw += load_wide(bias + target, target >= 0)
    logit = scale_logits(raw, softcap, inverse_temperature)
    dz_dlogit = logit_derivative(raw, softcap, inverse_temperature)
    tl.store(target_out + row, target.to(tl.int64))
    tl.store(logit_out + row, tl.where(target >= 0, logit, float("-inf")))
    tl.store(max_logit_out + row, max_logit)
    tl.store(sum_exp_out + row, sum_exp)
    tl.store(divisor_out + row, sum_exp)
    tl.store(dz_dlogit_out + row, tl.where(target >= 0, dz_dlogit, 0.0))

    if exp_logits is not None:
        exp_logits += row * exp_stride
        for start in range(0, vocabulary, BLOCK):
            columns = start + offsets
            inside = columns < vocabulary
            x = tl.load(logits + columns, inside, other=0.0, eviction_policy="evict_first")
            x = x.to(tl.float32)
            if bias is not None:
                x += load_wide(bias + columns, inside)
            z = scale_logits(x, softcap, inverse_temperature)
            e = tl.exp(z - max_logit) * logit_derivative(x, softcap, inverse_temperature)
            e = tl.where(columns == target, 0.0, e)
            tl.store(exp_logits + columns, e.to(exp_logits.dtype.element_ty), inside)


def row_stats(
    logits: Tensor,  # (r, V) fp32, bf16 or fp16; may be overwritten
    labels: Tensor,  # (r,) int64 in [0, V), or -1: not in this shard of the vocabulary
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    runner_up: Tensor | None = None,  # (r,) bool
    exp_logits: Tensor | None = None,  # (r, V), written; may be logits
) -> RowStats:
    """The row kernel in Triton. `TorchKernels.row_stats` defines the contract."""
    assert logits.stride(1) == 1 and (exp_logits is None or exp_logits.stride(1) == 1)
    count, vocabulary = logits.shape
    wide = [logits.new_empty(count, dtype=torch.float32) for _ in range(5)]
    stats = RowStats(torch.empty_like(labels), *wide)
    # fp16 can hold E only if it is shifted by the maximum.
    one_read = (
        exp_logits is not None
        and runner_up is None
        and exp_logits.dtype != torch.float16
        and exp_logits.data_ptr() != logits.data_ptr()
    )
    if count == 0:
        return stats
    config = row_config(device_facts(logits)[0], vocabulary)
    launch(
        row_kernel,
        (count,),
        logits,
        labels.contiguous(),
        bias,
        None if runner_up is None else runner_up.contiguous().view(torch.uint8),
        exp_logits,
        *stats,
        vocabulary,
        logits.stride(0),
        0 if exp_logits is None else exp_logits.stride(0),
        softcap,
        1 / temperature,
        ONE_READ=one_read,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return stats
