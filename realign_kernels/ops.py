"""The head as torch operators, for graphs of torch.compile: schema, fake implementation, autograd.

Eager calls take `eager`. An operator's body sees real values even under torch.compile, so what
depends on values is checked here: label range, sequence numbers, non-finite results. Ignored rows
are dropped here, as the number of the others is no constant of a graph.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from realign_kernels.backends.base import Head, shard_of
from realign_kernels.backends.dispatch import backend_for, current_override
from realign_kernels.eager import refuse_second_derivative, spread_rows, wants_direction
from realign_kernels.nonfinite import check_rows, finite_rows, is_finite, sentinel
from realign_kernels.reference import wide_dtype
from realign_kernels.row_plan import host_values, indices_to_device, scored_rows, to_device

IGNORED = -1
"""The target of an ignored row. ignore_index may be a token, which a rival row may score."""


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
    softcap = None if softcap is None else float(softcap)
    return Head(weight, bias, softcap, float(temperature), shard)


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
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, H) or (0, H), both wide; (N,) or (0,) int64
    """Log-probs, and with keep_direction d logp_i / d hidden_i, from which backward is a scaling.

    The direction is wide, so that the gradient is rounded once. With `rival`, also the targets:
    the tokens that were scored.

    Raises:
        ValueError: a label is outside [0, V).
        NonFiniteError: a log-prob, or its derivative, is NaN or infinite.
    """
    device = hidden.device
    head = make_head(weight, bias, softcap, temperature, group)
    (known,) = host_values(labels)
    scored, rows = scored_rows(known, head.vocabulary, ignore_index)
    scored, rows = indices_to_device(scored, rows, device=device)
    dense = hidden if rows is None else hidden[rows]
    flags = None if rival is None else to_device(rival, device)
    flags = flags if flags is None or rows is None else flags[rows]
    settings = {"chunk_rows": chunk_rows, "keep_direction": keep_direction}
    compute = partial(backend_for(hidden).forward, dense, labels=scored, rival=flags, **settings)
    # Under autocast a GEMM in the body would be cast again, behind the back of the backend.
    with torch.autocast(device.type, enabled=False):
        logps, scored, direction = compute(head=head)
        finite = is_finite(sentinel(logps, direction))
        if not finite and (again := head.again()):
            logps, scored, direction = compute(head=again)
            finite = is_finite(sentinel(logps, direction))
    if not finite:
        check_rows(finite_rows(logps, direction), rows, hidden, head)
    if direction is None:
        direction = logps.new_empty(0, hidden.shape[1])
    if rows is None:
        targets = scored.new_empty(0) if rival is None else scored.clone()
        return logps, direction, targets
    targets = scored.new_empty(0)
    if rival is not None:
        targets = scored.new_full((len(labels),), IGNORED).index_copy_(0, rows, scored)
    spread = logps.new_zeros(len(labels)).index_copy_(0, rows, logps)
    if keep_direction:
        direction = logps.new_zeros(hidden.shape).index_copy_(0, rows, direction)
    return spread, direction, targets


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
):
    count = labels.shape[0]
    logps = hidden.new_empty(count, dtype=wide_dtype(hidden.dtype))
    direction = logps.new_empty(hidden.shape[0] if keep_direction else 0, hidden.shape[1])
    targets = hidden.new_empty(0 if rival is None else count, dtype=torch.int64)
    return logps, direction, targets


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
    scored, rows = scored_rows(known, head.vocabulary, ignore_index)
    scored, rows = indices_to_device(scored, rows, device=device)
    dense = (grad, hidden) if rows is None else (grad[rows], hidden[rows])
    with torch.autocast(device.type, enabled=False):
        grads = backend_for(hidden, backend).backward(
            *dense, head, scored, chunk_rows=chunk_rows, wanted=tuple(wanted)
        )
    first, *of_head = grads
    if first is not None:
        first = spread_rows(first, rows, hidden.shape)
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in (first, *of_head))


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


def _setup_linear_logprobs(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, rival, *ctx.settings, ctx.keep_direction = inputs
    _, direction, targets = output
    ctx.mark_non_differentiable(direction, targets)
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
    others = (None,) * 7
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
) -> Tensor:  # (N,) wide
    """The operator with public settings."""
    logps, _, _ = linear_logprobs(
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
        wants_direction(hidden, weight, bias),
    )
    return logps
