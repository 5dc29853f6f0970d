"""From per-token log-probs to sequences and the loss: operators, and the loss in one launch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from realign_kernels.backends.base import Head
from realign_kernels.backends.dispatch import backend_for
from realign_kernels.eager import LogProbs, refuse_second_derivative, take_rows, wants_direction
from realign_kernels.nonfinite import check_rows, check_tables, finite_rows, is_finite, sentinel
from realign_kernels.objectives import Objective, PreferenceOutput
from realign_kernels.row_plan import (
    RowPlan,
    check_counts,
    check_ids,
    host_values,
    indices_to_device,
    to_device,
)


@torch.library.custom_op("realign::sequence_sums", mutates_args=())
def sequence_sums(
    logps: Tensor,  # (N,)
    labels: Tensor,  # (N,) int64
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example; not read where ignored
    reference_logps: Tensor,  # (L, B)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # (L, B) in the dtype of logps, (L, B) int64
    """Log-prob and token count of each sequence, for graphs of torch.compile.

    reference_logps give the shape; their values are only checked.

    Raises:
        ValueError: for a number of a sequence out of range, or a sequence without a token.
        NonFiniteError: where a log-prob or reference is NaN or infinite.
    """
    leaves, examples = reference_logps.shape
    known, ids = host_values(labels, sequence_ids)
    rows = (known != ignore_index).nonzero()[0]
    ids = ids[rows]
    check_ids(ids, rows, leaves, examples)
    counts = np.bincount(ids, minlength=leaves * examples).reshape(leaves, examples)
    check_counts(counts, ignore_index)
    index, ids = indices_to_device(rows, ids, device=logps.device)
    used = logps[index]
    sums = sum_by_sequence(used, ids, reference_logps.shape)
    if not is_finite(sentinel(sums - reference_logps)):
        check_tables(used, index, sums, reference_logps)
    return sums, to_device(torch.from_numpy(counts), logps.device)


def sum_by_sequence(
    logps: Tensor,  # (n,)
    ids: Tensor,  # (n,) int64, leaf * B + example
    shape: tuple[int, int],
) -> Tensor:  # (L, B) in the dtype of logps
    """Sums of log-probs by sequence, in fp64.

    The tokens of a sequence are few, and the order of CUDA's atomic adds no longer shows.
    """
    sums = logps.new_zeros(shape[0] * shape[1], dtype=torch.float64)
    return sums.index_add(0, ids, logps.double()).to(logps.dtype).view(shape)


@sequence_sums.register_fake
def _(logps, labels, sequence_ids, reference_logps, ignore_index):
    shape = reference_logps.shape
    return logps.new_empty(shape), logps.new_empty(shape, dtype=torch.int64)


def _setup_sequence_sums(ctx, inputs, output) -> None:
    _, labels, sequence_ids, _, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(labels, sequence_ids)


def _sequence_sums_grads(ctx, grad, _):
    labels, sequence_ids = ctx.saved_tensors
    ignored = labels == ctx.ignore_index
    of_row = grad.flatten()[sequence_ids.masked_fill(ignored, 0)].masked_fill(ignored, 0)
    return of_row, None, None, None, None


sequence_sums.register_autograd(_sequence_sums_grads, setup_context=_setup_sequence_sums)


def planned_preference(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    head: Head,
    plan: RowPlan,
    token_weights: Tensor | None,  # (N,)
    reference_logps: Tensor,  # (L, B)
    objective: Objective,
    reduction: str,
    chunk_rows: int | None,
) -> PreferenceOutput:
    """The objective over log-probs of planned rows, in eager mode.

    Raises:
        NonFiniteError: a log-prob, its derivative or a reference is NaN or infinite.
    """
    labels, rows = plan.labels_on_device()
    rival = plan_rivals(objective, plan)
    keep = wants_direction(hidden, weight, bias)
    args = (head, labels, rows, rival, chunk_rows, keep)
    logps, direction = LogProbs.apply(hidden, weight, bias, *args)
    used = logps
    if token_weights is not None:
        used = logps * (token_weights if rows is None else token_weights[rows])
    sequences = plan.ids_on_device, plan.counts
    output = from_tokens(used, *sequences, reference_logps, objective, reduction)
    if not is_finite(sentinel(output.logps.detach() - reference_logps, direction)):
        if again := head.again():
            settings = (token_weights, reference_logps, objective, reduction, chunk_rows)
            return planned_preference(hidden, weight, bias, again, plan, *settings)
        check_rows(finite_rows(logps, direction), rows, take_rows(hidden, None), head)
        check_tables(used, rows, output.logps, reference_logps)
    return output


def loss_kernel(objective: Objective, reduction: str, logps: Tensor) -> Callable | None:
    """The kernel from these log-probs of tokens to the loss, None where there is none."""
    if reduction == "none" or logps.dtype != torch.float32:
        return None
    return backend_for(logps).fused_loss(objective)


def from_tokens(
    logps: Tensor,  # (n,) of scored rows
    ids: Tensor,  # (n,) int64, leaf * B + example
    counts: np.ndarray,  # (L, B) int64
    reference_logps: Tensor,  # (L, B)
    objective: Objective,
    reduction: str,
) -> PreferenceOutput:
    """The objective of per-token log-probs; in one launch where the backend has it.

    Values are not checked.
    """
    kernel = loss_kernel(objective, reduction, logps)
    if kernel is None:
        sums = sum_by_sequence(logps, ids, reference_logps.shape)
        counts = to_device(torch.from_numpy(counts), logps.device)
        return objective(sums, reference_logps, reduction, counts)
    inputs = (logps, ids, reference_logps, objective, reduction, kernel)
    return PreferenceOutput(*_FusedLoss.apply(*inputs))


class _FusedLoss(torch.autograd.Function):
    """Loss, sums, rewards and d loss / d logp of every token by one kernel."""

    @staticmethod
    def forward(ctx, logps, ids, reference_logps, objective, reduction, kernel):
        # No row is ignored, so ids serve as labels.
        out = kernel(
            *(logps, ids, ids, reference_logps, objective), reduction=reduction, ignore_index=-1
        )
        ctx.save_for_backward(out.coefficients, ids)
        ctx.mark_non_differentiable(out.rewards, out.counts, out.term_losses)
        ctx.set_materialize_grads(False)
        return out.loss, out.sums, out.rewards, out.counts, out.term_losses

    @staticmethod
    def backward(ctx, grad_loss, grad_sums, *_):
        refuse_second_derivative()
        coefficients, ids = ctx.saved_tensors
        grad = None if grad_loss is None else coefficients * grad_loss
        if grad_sums is not None:
            of_row = grad_sums.flatten()[ids]
            grad = of_row if grad is None else grad + of_row
        return (grad, *(None,) * 5)


def plan_rivals(objective: Objective, plan: RowPlan) -> Tensor | None:  # (n,) bool
    """`rival_rows` of planned rows; sequence numbers wait where no leaf is a rival."""
    if not any(leaf.rival for leaf in objective.leaves):
        return None
    return rival_rows(objective, plan.ids_on_device, plan.shape[1])


def rival_rows(
    objective: Objective,
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example; not read where ignored
    examples: int,
) -> Tensor | None:  # (N,) bool
    """The rows of leaves that are scored by the strongest other token; None if there are none."""
    leaves = [index for index, leaf in enumerate(objective.leaves) if leaf.rival]
    if not leaves:
        return None
    of_row = sequence_ids // max(examples, 1)
    return torch.stack([of_row == leaf for leaf in leaves]).any(0)
