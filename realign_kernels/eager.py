"""The head in eager mode as an autograd.Function: rows are planned on the host, and only once.

Compiled graphs take the operators in `ops`, whose schema has no place for a plan. A call of
`torch.library.custom_op` costs 40 us of host time with autograd, one of a Function 9 us
(2 cores, torch 2.13). An operator would plan its rows again.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from realign_kernels.backends.base import Head, scaled
from realign_kernels.backends.dispatch import backend_for, current_override

_NOTHING = nullcontext()  # entering an autocast that changes nothing takes 5 us


def refuse_second_derivative() -> None:
    """To be called in a backward. once_differentiable is silent where the gradient that comes in
    is a constant, so that a gradient penalty would be left out.

    Raises:
        RuntimeError: where a graph of the gradient is wanted.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the head has no second derivative: call backward without create_graph")


def trains(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the head learns."""
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def wants_direction(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the forward keeps d logp / d hidden, so that the backward needs no GEMM.

    It costs one GEMM and saves two; it is for a head that does not train, whose hidden states do.
    """
    return torch.is_grad_enabled() and hidden.requires_grad and not trains(weight, bias)


def take_rows(
    hidden: Tensor,  # (..., H)
    rows: Tensor | None,  # (n,) int64, of the flattened leading axes; None: all of them
) -> Tensor:  # (n, H)
    """Rows of hidden, and no copy of the others: hidden[:, :, :-1] cannot be flattened in place."""
    if rows is None:
        return hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    if hidden.is_contiguous():
        return hidden.view(-1, hidden.shape[-1]).index_select(0, rows)
    places = []
    for size in reversed(hidden.shape[:-1]):  # torch.unravel_index would copy the sizes to a GPU
        places.append(rows % size)
        rows = rows // size
    return hidden[tuple(reversed(places))]


def spread_rows(
    values: Tensor,  # (n, H)
    rows: Tensor | None,  # (n,) int64, distinct
    shape: torch.Size,  # (..., H)
) -> Tensor:  # (..., H)
    """The inverse of `take_rows`, with 0 in the other rows."""
    if rows is None:
        return values.view(shape)
    every = values.new_empty(shape) if len(rows) == shape[:-1].numel() else values.new_zeros(shape)
    every.view(-1, shape[-1]).index_copy_(0, rows, values)
    return every


def as_given(device: str) -> AbstractContextManager:
    """No autocast: it would cast a GEMM of the backend again, behind its back."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def kept_targets(labels: Tensor, targets: Tensor, rival: Tensor | None) -> Tensor:
    """The targets of a backward: those of a vocabulary shard are local, the labels are not.

    A copy, since a loader may fill the labels' memory again before the backward.
    """
    return labels.clone() if rival is None else targets


def recompute_gradients(
    grad: Tensor,  # (n,)
    hidden: Tensor,  # (n, H)
    head: Head,
    targets: Tensor,  # (n,) int64
    chunk_rows: int | None,
    wanted: tuple[bool, bool, bool],
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (n, H), weight and bias from those of log-probs."""
    with as_given(hidden.device.type):
        return backend_for(hidden, backend).backward(
            grad.contiguous(), hidden, head, targets, chunk_rows=chunk_rows, wanted=wanted
        )


class LogProbs(torch.autograd.Function):
    """Log-probs of planned rows. The direction that a frozen head keeps is the second result."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # (..., H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        head: Head,
        labels: Tensor,  # (n,) int64
        rows: Tensor | None,  # (n,) int64, flat positions; None: all of them
        rival: Tensor | None,  # (n,) bool
        chunk_rows: int | None,
        keep_direction: bool,
    ) -> tuple[Tensor, Tensor | None]:  # (n,), (n, H), both wide
        dense = take_rows(hidden, rows)
        with as_given(hidden.device.type):
            logps, targets, direction = backend_for(hidden).forward(
                dense, head, labels, rival, chunk_rows=chunk_rows, keep_direction=keep_direction
            )
        ctx.hidden_like = hidden.shape, hidden.dtype
        # Device threads of the autograd engine do not see use_backend.
        ctx.head, ctx.chunk_rows, ctx.backend = head[2:], chunk_rows, current_override()
        ctx.set_materialize_grads(False)
        if direction is None:
            kept = kept_targets(labels, targets, rival)
            ctx.save_for_backward(None, rows, dense, weight, bias, kept)
        else:
            ctx.mark_non_differentiable(direction)
            ctx.save_for_backward(direction, rows)
        return logps, direction

    @staticmethod
    def backward(ctx, grad, _):
        refuse_second_derivative()
        others = (None,) * 6
        if grad is None:
            return None, None, None, *others
        direction, rows, *rest = ctx.saved_tensors
        shape, dtype = ctx.hidden_like
        if direction is not None:
            return spread_rows(scaled(direction, grad, dtype), rows, shape), None, None, *others
        dense, weight, bias, targets = rest
        head, wanted = Head(weight, bias, *ctx.head), tuple(ctx.needs_input_grad[:3])
        first, *of_head = recompute_gradients(
            grad, dense, head, targets, ctx.chunk_rows, wanted, ctx.backend
        )
        return None if first is None else spread_rows(first, rows, shape), *of_head, *others
