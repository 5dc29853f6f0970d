"""The torch operators: schema, fake implementation, autograd. The only autograd of the package.

An operator's body sees real values even under torch.compile, so what depends on values is checked
here: label range, sequence numbers, non-finite results. Each body brings its flags to the host in
one transfer.
"""

import torch
from torch import Tensor

from realign_kernels.dispatch import backend_for, current_override
from realign_kernels.reference import wide_dtype


class NonFiniteError(ValueError):
    """A log-prob is NaN or infinite. `rows` are the flat indices of the rows, as they were given
    (of the (L, B) table that the message names, where it is not hidden).

    A trainer maps the rows to examples, names them, and stops before the optimizer step.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


def _first(values: list[int], limit: int = 8) -> str:
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return f"{values[:limit]}{more}"


def _valid_rows(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor | None:
    """Indices of the rows that are not ignored; None if that is all of them."""
    valid = labels != ignore_index
    outside = valid & ((labels < 0) | (labels >= vocabulary))
    count, bad = torch.stack([valid.sum(), outside.sum()]).tolist()
    if bad:
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels: {bad} outside [0, {vocabulary}), first {int(labels[row])} at flat row {row}; "
            f"rows to skip must hold ignore_index ({ignore_index})"
        )
    if count == len(labels):
        return None
    return torch.nonzero_static(valid, size=count).squeeze(1)


def _non_finite(
    rows: list[int], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> NonFiniteError:
    causes = []
    if not hidden.isfinite().all():
        causes.append("hidden holds NaN or inf in them")
    if not weight.isfinite().all():
        causes.append("weight holds NaN or inf")
    if bias is not None and not bias.isfinite().all():
        causes.append("bias holds NaN or inf")
    reason = ", ".join(causes) or (
        f"hidden, weight and bias are finite, so the logits overflow {hidden.dtype}: "
        "look for exploding activations, or use bfloat16"
    )
    return NonFiniteError(f"log-probs are not finite in rows {_first(rows)}: {reason}", rows)


@torch.library.custom_op("realign::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    chunk_rows: int | None,
    keep_direction: bool,
) -> tuple[Tensor, Tensor]:  # (N,) wide, (N, H) or (0, H)
    """Log-probs, and with keep_direction d logp_i / d hidden_i, from which backward is a scaling.

    keep_direction costs one GEMM now and saves two in backward; it is for a head that does not
    train, whose hidden states do.
    """
    rows = _valid_rows(labels, len(weight), ignore_index)
    dense = (hidden, labels) if rows is None else (hidden[rows], labels[rows])
    # Under autocast a GEMM in the body would be cast again, behind the back of the backend.
    with torch.autocast(hidden.device.type, enabled=False):
        logps, direction = backend_for(hidden).forward(
            dense[0],
            weight,
            dense[1],
            bias,
            softcap,
            temperature,
            chunk_rows=chunk_rows,
            keep_direction=keep_direction,
        )
    finite = logps.isfinite()
    if not finite.all():
        bad = (~finite).nonzero().squeeze(1)
        given = bad if rows is None else rows[bad]
        raise _non_finite(given.tolist(), dense[0][bad], weight, bias)
    if direction is None:
        direction = hidden.new_empty(0, hidden.shape[1])
    if rows is None:
        return logps, direction
    spread = logps.new_zeros(len(labels)).index_copy_(0, rows, logps)
    if keep_direction:
        direction = hidden.new_zeros(hidden.shape).index_copy_(0, rows, direction)
    return spread, direction


@linear_logprobs.register_fake
def _(hidden, weight, labels, bias, softcap, temperature, ignore_index, chunk_rows, keep_direction):
    logps = hidden.new_empty(labels.shape[0], dtype=wide_dtype(hidden.dtype))
    return logps, hidden.new_empty(hidden.shape[0] if keep_direction else 0, hidden.shape[1])


@torch.library.custom_op("realign::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad: Tensor,  # (N,)
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    chunk_rows: int | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, H), (V, H), (V,); empty where not wanted
    """Gradients by recomputing the logits. Ignored rows get 0, and their grad is not read."""
    rows = _valid_rows(labels, len(weight), ignore_index)
    dense = (grad, hidden, labels)
    if rows is not None:
        dense = tuple(tensor[rows] for tensor in dense)
    with torch.autocast(hidden.device.type, enabled=False):
        grad_hidden, grad_weight, grad_bias = backend_for(hidden, backend).backward(
            dense[0],
            dense[1],
            weight,
            dense[2],
            bias,
            softcap,
            temperature,
            chunk_rows=chunk_rows,
            wanted=(want_hidden, want_weight, want_bias),
        )
    if want_hidden and rows is not None:
        grad_hidden = hidden.new_zeros(hidden.shape).index_copy_(0, rows, grad_hidden)
    results = (grad_hidden, grad_weight, grad_bias)
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
    want_hidden,
    want_weight,
    want_bias,
    backend,
):
    inputs = ((hidden, want_hidden), (weight, want_weight), (bias, want_bias))
    return tuple(
        tensor.new_empty(tensor.shape) if want else hidden.new_empty(0) for tensor, want in inputs
    )


def _setup_linear_logprobs(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, *ctx.settings, ctx.keep_direction = inputs
    _, direction = output
    ctx.mark_non_differentiable(direction)
    ctx.set_materialize_grads(False)
    # Device threads of the autograd engine do not see use_backend; a trace must not bake it in.
    ctx.backend = "" if torch.compiler.is_compiling() else current_override()
    ctx.save_for_backward(
        *((labels, direction) if ctx.keep_direction else (hidden, weight, labels, bias))
    )


def _linear_logprobs_grads(ctx, grad, _):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "realign::linear_logprobs has no second derivative: call backward without create_graph"
        )
    others = (None,) * 5
    if grad is None:
        return None, None, None, None, *others
    want_hidden, want_weight, _, want_bias, *_ = ctx.needs_input_grad
    softcap, temperature, ignore_index, chunk_rows = ctx.settings
    if ctx.keep_direction:
        assert not want_weight and not want_bias, "keep_direction is for a frozen head"
        labels, direction = ctx.saved_tensors
        # An ignored row's log-prob is the constant 0, whatever (inf, NaN) comes back for it.
        factor = grad.masked_fill(labels == ignore_index, 0)[:, None]
        return (direction * factor).to(direction.dtype), None, None, None, *others
    hidden, weight, labels, bias = ctx.saved_tensors
    grads = linear_logprobs_backward(
        grad.contiguous(),
        hidden,
        weight,
        labels,
        bias,
        softcap,
        temperature,
        ignore_index,
        chunk_rows,
        want_hidden,
        want_weight,
        want_bias,
        ctx.backend,
    )
    wanted = (want_hidden, want_weight, want_bias)
    for_hidden, for_weight, for_bias = (
        g if want else None for g, want in zip(grads, wanted, strict=True)
    )
    return for_hidden, for_weight, None, for_bias, *others


linear_logprobs.register_autograd(_linear_logprobs_grads, setup_context=_setup_linear_logprobs)


@torch.library.custom_op("realign::sequence_sums", mutates_args=())
def sequence_sums(
    logps: Tensor,  # (N,)
    labels: Tensor,  # (N,) int64
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example; not read where ignored
    reference_logps: Tensor,  # (L, B)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # (L, B) in the dtype of logps, (L, B) int64
    """Log-prob and token count of each sequence.

    reference_logps give the shape; their values are only checked, here because their flag then
    shares the transfer of the others.
    """
    leaves, examples = reference_logps.shape
    valid = labels != ignore_index
    outside = valid & ((sequence_ids < 0) | (sequence_ids >= leaves * examples))
    ids = torch.where(valid & ~outside, sequence_ids, 0)
    counts = torch.zeros(leaves * examples, dtype=torch.int64, device=ids.device)
    counts.index_add_(0, ids, (valid & ~outside).long())
    lacking, infinite = counts == 0, ~reference_logps.isfinite().flatten()
    flags = torch.stack([outside.any(), lacking.any(), infinite.any()]).tolist()
    if flags[0]:
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"sequence_ids[{row}] is {int(sequence_ids[row])}, outside [0, {leaves * examples}): "
            f"number sequences as leaf * {examples} + example, {leaves} leaves"
        )
    if flags[1]:
        leaf, example = divmod(int(lacking.nonzero()[0]), examples)
        raise ValueError(
            f"labels: the sequence (leaf {leaf}, example {example}) has no token to score, all "
            f"its labels are ignore_index ({ignore_index}): drop the example, or truncate less"
        )
    if flags[2]:
        raise non_finite_sequences("reference_logps", reference_logps)
    # fp64: the tokens of a sequence are few, and the order of CUDA's atomic adds no longer shows.
    sums = torch.zeros(leaves * examples, dtype=torch.float64, device=logps.device)
    sums.index_add_(0, ids, logps.double().masked_fill(~valid, 0))
    return sums.to(logps.dtype).view(leaves, examples), counts.view(leaves, examples)


def non_finite_sequences(name: str, values: Tensor) -> NonFiniteError:
    """The error for an (L, B) tensor that holds NaN or inf."""
    rows = (~values.isfinite()).flatten().nonzero().squeeze(1).tolist()
    leaf, example = divmod(rows[0], values.shape[1])
    return NonFiniteError(
        f"{name} holds NaN or inf for {len(rows)} sequences, first (leaf {leaf}, example "
        f"{example}): compute it again for these",
        rows,
    )


@sequence_sums.register_fake
def _(logps, labels, sequence_ids, reference_logps, ignore_index):
    shape = reference_logps.shape
    return logps.new_empty(shape), labels.new_empty(shape)


def _setup_sequence_sums(ctx, inputs, output) -> None:
    _, labels, sequence_ids, _, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(labels, sequence_ids)


def _sequence_sums_grads(ctx, grad, _):
    labels, sequence_ids = ctx.saved_tensors
    ignored = labels == ctx.ignore_index
    spread = grad.flatten()[sequence_ids.masked_fill(ignored, 0)]
    return spread.masked_fill(ignored, 0), None, None, None, None


sequence_sums.register_autograd(_sequence_sums_grads, setup_context=_setup_sequence_sums)
