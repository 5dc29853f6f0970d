"""Custom operators for torch.compile: schema, fake implementation, autograd.

Eager calls use `autograd` instead. The body of an operator has real values even under
torch.compile. It therefore checks them: label range, sequence numbers, non-finite results. It also
drops ignored rows, because the number of scored rows is not a constant of the graph.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from realign_kernels.autograd import (
    keeps_dlogp_dh,
    no_autocast,
    refuse_second_derivative,
    score_rows,
    sum_by_sequence,
)
from realign_kernels.backends.dispatch import backend_for, current_override
from realign_kernels.lm_head import HeadSettings
from realign_kernels.nonfinite import check_tables, is_finite, sentinel
from realign_kernels.reference import acc_dtype
from realign_kernels.row_plan import (
    check_counts,
    check_ids,
    drop_ignored,
    host_values,
    indices_to_device,
    spread_rows,
    take_rows,
    to_device,
)

IGNORED = -1
"""Target of an ignored row. ignore_index could be a token that a runner-up row scores."""


@torch.library.custom_op("realign::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    runner_up: Tensor | None,  # (N,) bool
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    chunk_rows: int | None,
    group: str,
    keep_dlogp_dh: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, H) or (0, H), both wide; (N,) or (0,) int64
    """Log-probs; with keep_dlogp_dh also d logp_i / d hidden_i, which backward only has to scale.

    dlogp_dh is wide, so that the gradient is rounded once. With `runner_up` the third result is
    the targets, the tokens that were scored.

    Raises:
        ValueError: a label is outside [0, V).
        NonFiniteError: a log-prob or its derivative is NaN or infinite.
    """
    settings = HeadSettings(softcap, temperature, ignore_index, chunk_rows, group)
    head = settings.head(weight, bias)
    rows = drop_ignored(labels, runner_up, hidden.device, head.vocabulary, ignore_index)
    dense = take_rows(hidden, rows.index)
    _, logps, scored, dlogp_dh = score_rows(
        dense, head, rows, chunk_rows, keep_dlogp_dh=keep_dlogp_dh, check=True
    )
    targets = scored.new_empty(0)
    if runner_up is not None:
        targets = scored.clone()
    if rows.index is not None:
        logps = logps.new_zeros(len(labels)).index_copy_(0, rows.index, logps)
        if runner_up is not None:
            targets = scored.new_full((len(labels),), IGNORED).index_copy_(0, rows.index, scored)
    if dlogp_dh is None:
        return logps, logps.new_empty(0, hidden.shape[1]), targets
    return logps, spread_rows(dlogp_dh, rows.index, hidden.shape), targets


@linear_logprobs.register_fake
def _(hidden, weight, labels, bias, runner_up, *settings):
    *_, keep_dlogp_dh = settings
    count = labels.shape[0]
    logps = hidden.new_empty(count, dtype=acc_dtype(hidden.dtype))
    dlogp_dh = logps.new_empty(hidden.shape[0] if keep_dlogp_dh else 0, hidden.shape[1])
    targets = hidden.new_empty(0 if runner_up is None else count, dtype=torch.int64)
    return logps, dlogp_dh, targets


@torch.library.custom_op("realign::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad: Tensor,  # (N,)
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64, the targets of the forward
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    chunk_rows: int | None,
    group: str,
    needs_grad: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, H), (V, H), (V,); empty where not needed
    """Gradients of hidden, weight and bias from recomputed logits.

    Ignored rows get gradient 0, and their grad is not read.
    """
    settings = HeadSettings(softcap, temperature, ignore_index, chunk_rows, group)
    head = settings.head(weight, bias)
    rows = drop_ignored(labels, None, hidden.device, head.vocabulary, ignore_index)
    dense, (need_hidden, need_weight, need_bias) = take_rows(hidden, rows.index), needs_grad
    with no_autocast(hidden.device.type):
        for_hidden, for_weight, for_bias = backend_for(hidden, backend).backward(
            rows.of(grad),
            dense,
            head,
            rows.labels,
            chunk_rows=chunk_rows,
            needs_grad=(need_hidden, need_weight, need_bias),
        )
    if for_hidden is not None:
        for_hidden = spread_rows(for_hidden, rows.index, hidden.shape)
    empty = hidden.new_empty
    return (
        empty(0) if for_hidden is None else for_hidden,
        empty(0) if for_weight is None else for_weight,
        empty(0) if for_bias is None else for_bias,
    )


@linear_logprobs_backward.register_fake
def _(grad, hidden, weight, labels, bias, *settings):
    *_, needs_grad, _ = settings
    inputs = zip((hidden, weight, bias), needs_grad, strict=True)
    return tuple(t.new_empty(t.shape) if need else hidden.new_empty(0) for t, need in inputs)


def _setup_linear_logprobs(ctx: Any, inputs, output) -> None:
    hidden, weight, labels, bias, runner_up, *settings, ctx.keep_dlogp_dh = inputs
    _, dlogp_dh, targets = output
    ctx.mark_non_differentiable(dlogp_dh, targets)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.settings = hidden.dtype, HeadSettings(*settings)
    # Device threads of the autograd engine do not see use_backend. A trace must not store it.
    ctx.backend = "" if torch.compiler.is_compiling() else current_override()
    if runner_up is not None:
        labels, ctx.settings = targets, ctx.settings._replace(ignore_index=IGNORED)
    ctx.save_for_backward(
        *((labels, dlogp_dh) if ctx.keep_dlogp_dh else (hidden, weight, labels, bias))
    )


def _linear_logprobs_grads(ctx: Any, grad: Tensor | None, *_):
    refuse_second_derivative()
    constants = (None,) * 7
    if grad is None:
        return None, None, None, None, *constants
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    if ctx.keep_dlogp_dh:
        assert not need_weight and not need_bias, "keep_dlogp_dh is for a frozen head"
        labels, dlogp_dh = ctx.saved_tensors
        ignored = to_device(labels == ctx.settings.ignore_index, grad.device)
        # An ignored row's log-prob is the constant 0, even if its incoming gradient is inf or NaN.
        factor = grad.masked_fill(ignored, 0)[:, None]
        return (dlogp_dh * factor).to(ctx.dtype), None, None, None, *constants
    hidden, weight, labels, bias = ctx.saved_tensors
    needs_grad = [need_hidden, need_weight, need_bias]
    inputs = (grad.contiguous(), hidden, weight, labels, bias, *ctx.settings)
    grads = linear_logprobs_backward(*inputs, needs_grad, ctx.backend)
    for_hidden, for_weight, for_bias = (
        g if need else None for g, need in zip(grads, needs_grad, strict=True)
    )
    return for_hidden, for_weight, None, for_bias, *constants


linear_logprobs.register_autograd(_linear_logprobs_grads, setup_context=_setup_linear_logprobs)


def logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    runner_up: Tensor | None,  # (N,) bool
    settings: HeadSettings,
) -> Tensor:  # (N,) wide
    """Calls the operator `linear_logprobs` with public settings."""
    softcap, temperature, *_, group = settings
    plain = settings._replace(
        softcap=None if softcap is None else float(softcap),
        temperature=float(temperature),
        group="" if group is None else group.group_name,
    )
    keep = keeps_dlogp_dh(hidden, weight, bias)
    return linear_logprobs(hidden, weight, labels, bias, runner_up, *plain, keep)[0]


@torch.library.custom_op("realign::sequence_sums", mutates_args=())
def sequence_sums(
    logps: Tensor,  # (N,)
    labels: Tensor,  # (N,) int64
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example; not read where ignored
    reference_logps: Tensor,  # (L, B)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # (L, B) in the dtype of logps, (L, B) int64
    """Log-prob and token count of each sequence.

    The shape of the result is that of reference_logps, whose values are only checked.

    Raises:
        ValueError: a sequence number is out of range, or a sequence has no token.
        NonFiniteError: a log-prob or reference is NaN or infinite.
    """
    leaves, examples = reference_logps.shape
    known, every = host_values(labels, sequence_ids)
    rows = (known != ignore_index).nonzero()[0]
    check_ids(every[rows], rows, leaves, examples)
    counts = np.bincount(every[rows], minlength=leaves * examples).reshape(leaves, examples)
    check_counts(counts, ignore_index)
    index, ids = indices_to_device(rows, every[rows], device=logps.device)
    assert index is not None and ids is not None
    used = logps[index]
    sums = sum_by_sequence(used, ids, reference_logps.shape)
    if not is_finite(sentinel(sums - reference_logps)):
        check_tables(used, index, sums, reference_logps)
    return sums, to_device(torch.from_numpy(counts), logps.device)


@sequence_sums.register_fake
def _(logps, labels, sequence_ids, reference_logps, ignore_index):
    shape = reference_logps.shape
    return logps.new_empty(shape), logps.new_empty(shape, dtype=torch.int64)


def _setup_sequence_sums(ctx: Any, inputs, output) -> None:
    _, labels, sequence_ids, _, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(labels, sequence_ids)


def _sequence_sums_grads(ctx: Any, grad: Tensor, _):
    labels, sequence_ids = ctx.saved_tensors
    ignored = labels == ctx.ignore_index
    of_row = grad.flatten()[sequence_ids.masked_fill(ignored, 0)].masked_fill(ignored, 0)
    return of_row, None, None, None, None


sequence_sums.register_autograd(_sequence_sums_grads, setup_context=_setup_sequence_sums)
