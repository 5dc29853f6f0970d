"""The head as torch operators: schema, fake implementation, autograd.

This file and `preference_ops` hold the only autograd of the package. An operator's body sees real
values even under torch.compile, so what depends on values is checked here: label range, sequence
numbers, non-finite results.

Labels and sequence numbers are planned on the host, where they may be from the start. A call on a
GPU then waits once, for the flags of its results.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from realign_kernels.dispatch import backend_for, current_override
from realign_kernels.reference import wide_dtype
from realign_kernels.row_plan import host_values, to_device, valid_rows
from realign_kernels.rows import Head, shard_of

IGNORED = -1
"""The target of an ignored row. ignore_index may be a token, which a rival row may score."""


class NonFiniteError(ValueError):
    """A log-prob is NaN or infinite. `rows` are the flat indices of the rows, as they were given
    (of the (L, B) table that the message names, where it is not hidden).

    A trainer maps the rows to examples, names them, and stops before the optimizer step.
    """

    def __init__(self, message: str, rows: list[int], reason: str = "") -> None:
        super().__init__(message)
        self.rows, self.reason = rows, reason

    def __reduce__(self):
        return NonFiniteError, (str(self), self.rows, self.reason)

    def at(self, places: Tensor) -> "NonFiniteError":
        """The same error where row i stands at places[i]."""
        return _in_rows(places.cpu()[torch.tensor(self.rows)].tolist(), self.reason)


def _in_rows(rows: list[int], reason: str) -> NonFiniteError:
    message = f"log-probs are not finite in rows {first_few(rows)}: {reason}"
    return NonFiniteError(message, rows, reason)


def first_few(values: list[int], limit: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return f"{values[:limit]}{more}"


def take_rows(
    hidden: Tensor,  # (..., H)
    rows: Tensor,  # (n,) int64, of the flattened leading axes
) -> Tensor:  # (n, H)
    """Rows of hidden, and no copy of the others: hidden[:, :, :-1] cannot be flattened in place."""
    if hidden.is_contiguous():
        return hidden.view(-1, hidden.shape[-1]).index_select(0, rows)
    places = []
    for size in reversed(hidden.shape[:-1]):  # torch.unravel_index would copy the sizes to a GPU
        places.append(rows % size)
        rows = rows // size
    return hidden[tuple(reversed(places))]


def non_finite(rows: list[int], hidden: Tensor, head: Head) -> NonFiniteError:
    """The error for rows whose log-prob is not finite, with its likely cause."""
    causes = []
    if not hidden.isfinite().all():
        causes.append("hidden holds NaN or inf in them")
    if not head.weight.isfinite().all():
        causes.append("weight holds NaN or inf")
    if head.bias is not None and not head.bias.isfinite().all():
        causes.append("bias holds NaN or inf")
    where = "" if head.shard is None else " on this rank (another's shard may hold NaN or inf)"
    reason = ", ".join(causes) or (
        f"hidden, weight and bias are finite{where}, so the logits overflow {hidden.dtype}: "
        "look for exploding activations, or use bfloat16"
    )
    return _in_rows(rows, reason)


def make_head(
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    group: dist.ProcessGroup | str | None,
) -> Head:
    """The head; with a process group or its name, whose ranks each hold rows of it in turn."""
    if isinstance(group, str):
        group = _resolve_process_group(group) if group else None
    shard = None if group is None else shard_of(weight, group)
    return Head(weight, bias, softcap, temperature, shard)


@torch.library.custom_op("realign::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    rival: Tensor | None,  # (N,) bool
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    chunk_rows: int | None,
    group: str,
    keep_direction: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # (N,), (N, H) or (0, H), both wide; (N,) bool; (N,) or (0,) int64
    """Log-probs, and with keep_direction d logp_i / d hidden_i, from which backward is a scaling.

    keep_direction costs one GEMM now and saves two in backward; it is for a head that does not
    train, whose hidden states do. It is kept wide, so that the gradient is rounded once. The third
    result says which rows are finite; with `check` the body reads it and raises. With `rival`, also
    the targets: the tokens that were scored.
    """
    device = hidden.device
    head = make_head(weight, bias, softcap, temperature, group)
    (known,) = host_values(labels)
    index = valid_rows(known, head.vocabulary, ignore_index)
    rows = None if index is None else to_device(index, device)
    dense = hidden if rows is None else hidden[rows]
    flags = None if rival is None else to_device(rival, device)
    # Under autocast a GEMM in the body would be cast again, behind the back of the backend.
    with torch.autocast(device.type, enabled=False):
        logps, scored, direction = backend_for(hidden).forward(
            dense,
            head,
            to_device(labels if index is None else known[index], device),
            flags if flags is None or rows is None else flags[rows],
            chunk_rows=chunk_rows,
            keep_direction=keep_direction,
        )
    finite = logps.isfinite()
    if direction is not None:
        # A weight of -inf may leave the log-prob finite, but not what it is a function of.
        finite &= direction.sum(1, dtype=logps.dtype).isfinite()
    if check and not finite.all():
        bad = (~finite).nonzero().squeeze(1)
        raise non_finite((bad if rows is None else rows[bad]).tolist(), dense[bad], head)
    if direction is None:
        direction = logps.new_empty(0, hidden.shape[1])
    if rows is None:
        targets = scored.new_empty(0) if rival is None else scored.clone()
        return logps, direction, finite, targets
    targets = scored.new_empty(0)
    if rival is not None:
        targets = scored.new_full((len(labels),), IGNORED).index_copy_(0, rows, scored)
    spread = logps.new_zeros(len(labels)).index_copy_(0, rows, logps)
    finite = finite.new_ones(len(labels)).index_copy_(0, rows, finite)
    if keep_direction:
        direction = logps.new_zeros(hidden.shape).index_copy_(0, rows, direction)
    return spread, direction, finite, targets


@linear_logprobs.register_fake
def _(
    hidden,
    weight,
    labels,
    bias,
    rival,
    softcap,
    temperature,
    ignore_index,
    chunk_rows,
    group,
    keep_direction,
    check,
):
    count = labels.shape[0]
    logps = hidden.new_empty(count, dtype=wide_dtype(hidden.dtype))
    direction = logps.new_empty(hidden.shape[0] if keep_direction else 0, hidden.shape[1])
    targets = hidden.new_empty(0 if rival is None else count, dtype=torch.int64)
    return logps, direction, hidden.new_empty(count, dtype=torch.bool), targets


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
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, H), (V, H), (V,); empty where not wanted
    """Gradients of hidden, weight and bias by recomputing the logits.

    Ignored rows get 0, and their grad is not read.
    """
    device = hidden.device
    head = make_head(weight, bias, softcap, temperature, group)
    (known,) = host_values(labels)
    index = valid_rows(known, head.vocabulary, ignore_index)
    rows, dense = None, (grad, hidden)
    if index is not None:
        rows = to_device(index, device)
        dense = grad[rows], hidden[rows]
    scored = to_device(labels if index is None else known[index], device)
    with torch.autocast(device.type, enabled=False):
        grads = backend_for(hidden, backend).backward(
            *dense, head, scored, chunk_rows=chunk_rows, wanted=tuple(wanted)
        )
    return spread_gradients(grads, rows, hidden)


def spread_gradients(
    grads: tuple[Tensor | None, ...], rows: Tensor | None, hidden: Tensor
) -> tuple[Tensor, ...]:
    """Puts the gradient of hidden back among the ignored rows; empty tensors for None."""
    first = grads[0]
    if first is not None and rows is not None:
        first = hidden.new_zeros(hidden.shape).index_copy_(0, rows, first)
    results = (first, *grads[1:])
    return tuple(hidden.new_empty(0) if result is None else result for result in results)


@linear_logprobs_backward.register_fake
def _(
    grad,
    hidden,
    weight,
    labels,
    bias,
    softcap,
    temperature,
    ignore_index,
    chunk_rows,
    group,
    wanted,
    backend,
):
    inputs = zip((hidden, weight, bias), wanted, strict=True)
    return tuple(t.new_empty(t.shape) if want else hidden.new_empty(0) for t, want in inputs)


def refuse_second_derivative() -> None:
    """To be called in a backward. once_differentiable is silent where the gradient that comes in
    is a constant, so that a gradient penalty would be left out.

    Raises:
        RuntimeError: where a graph of the gradient is wanted.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the head has no second derivative: call backward without create_graph")


def _setup_linear_logprobs(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, rival, *ctx.settings, ctx.keep_direction, _ = inputs
    _, direction, finite, targets = output
    ctx.mark_non_differentiable(direction, finite, targets)
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype
    # Device threads of the autograd engine do not see use_backend; a trace must not bake it in.
    ctx.backend = "" if torch.compiler.is_compiling() else current_override()
    if rival is not None:
        labels, ctx.settings[2] = targets, IGNORED
    ctx.save_for_backward(
        *((labels, direction) if ctx.keep_direction else (hidden, weight, labels, bias))
    )


def _linear_logprobs_grads(ctx, grad, *_):
    refuse_second_derivative()
    others = (None,) * 8
    if grad is None:
        return None, None, None, None, *others
    want_hidden, want_weight, _, want_bias, *_ = ctx.needs_input_grad
    wanted = [want_hidden, want_weight, want_bias]
    if ctx.keep_direction:
        assert not want_weight and not want_bias, "keep_direction is for a frozen head"
        labels, direction = ctx.saved_tensors
        ignored = to_device(labels == ctx.settings[2], grad.device)
        # An ignored row's log-prob is the constant 0, whatever (inf, NaN) comes back for it.
        factor = grad.masked_fill(ignored, 0)[:, None]
        return (direction * factor).to(ctx.dtype), None, None, None, *others
    hidden, weight, labels, bias = ctx.saved_tensors
    args = (grad.contiguous(), hidden, weight, labels, bias, *ctx.settings)
    grads = linear_logprobs_backward(*args, wanted, ctx.backend)
    for_hidden, for_weight, for_bias = (
        g if want else None for g, want in zip(grads, wanted, strict=True)
    )
    return for_hidden, for_weight, None, for_bias, *others


linear_logprobs.register_autograd(_linear_logprobs_grads, setup_context=_setup_linear_logprobs)


def logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    rival: Tensor | None,  # (N,) bool
    ignore_index: int,
    *,
    softcap: float | None,
    temperature: float,
    chunk_rows: int | None,
    group: dist.ProcessGroup | None,
    check: bool = True,
) -> tuple[Tensor, Tensor]:  # (N,) wide, (N,) bool
    """The operator with public settings: log-probs, and which of them are finite."""
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not trains(weight, bias)
    logps, _, finite, _ = linear_logprobs(
        hidden,
        weight,
        labels,
        bias,
        rival,
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        chunk_rows,
        "" if group is None else group.group_name,
        frozen,
        check,
    )
    return logps, finite


def trains(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the head learns."""
    return weight.requires_grad or (bias is not None and bias.requires_grad)
