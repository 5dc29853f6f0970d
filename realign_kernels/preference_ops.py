"""From per-token log-probs to sequences, and the whole loss in one pass over a trainable head."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from realign_kernels.dispatch import backend_for, current_override
from realign_kernels.objectives import Objective, PreferenceOutput
from realign_kernels.ops import (
    IGNORED,
    NonFiniteError,
    first_few,
    linear_logprobs_backward,
    non_finite,
    refuse_second_derivative,
    take_rows,
)
from realign_kernels.row_plan import RowPlan, check_counts, check_ids, host_values, to_device
from realign_kernels.rows import Head


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
    index = to_device(rows, logps.device)
    used = logps[index]
    sums = sum_by_sequence(used, to_device(ids, logps.device), reference_logps.shape)
    flags = read(*flags_of(used.isfinite(), sums, reference_logps))
    check_tables(flags, used, index, reference_logps)
    return sums, to_device(counts, logps.device)


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


def flags_of(finite: Tensor, sums: Tensor, reference_logps: Tensor) -> tuple[Tensor, ...]:
    """Three scalars on the device: whether rows, references and sums are finite."""
    return finite.all(), reference_logps.isfinite().all(), sums.isfinite().all()


def read(*scalars: Tensor) -> list[float]:
    """The values of scalars, in one transfer from the device."""
    return torch.stack([scalar.double() for scalar in scalars]).tolist()


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


def check_results(
    flags: list[float],
    finite: Tensor,  # (n,) bool
    used: Tensor,  # (n,) log-probs times token weights
    reference_logps: Tensor,  # (L, B)
    rows: Tensor | None,  # (n,) int64, flat positions of the n rows; None: their own
    hidden: Tensor,  # (n, H)
    head: Head,
) -> None:
    """Raise for what `flags_of` found.

    Raises:
        NonFiniteError: a log-prob, its derivative or a reference is NaN or infinite.
    """
    if not flags[0]:
        bad = (~finite).nonzero().squeeze(1)
        places = _places(rows, bad)
        raise non_finite(places, hidden[bad], head)
    check_tables(flags, used, rows, reference_logps)


def check_tables(
    flags: list[float],
    used: Tensor,  # (n,)
    rows: Tensor | None,  # (n,) int64
    reference_logps: Tensor,  # (L, B)
) -> None:
    """As `check_results`, for references and weighted log-probs.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    if not flags[1]:
        raise non_finite_sequences("reference_logps", reference_logps)
    if not flags[2]:
        places = _places(rows, (~used.isfinite()).nonzero().squeeze(1))
        raise NonFiniteError(
            f"token_weights make the log-probs of rows {first_few(places)} NaN or infinite: look "
            "at their values there",
            places,
        )


def _places(rows: Tensor | None, bad: Tensor) -> list[int]:
    return (bad if rows is None else rows[bad]).tolist()


def check_finite(**tables: Tensor) -> None:
    """Refuse (L, B) tensors that hold NaN or infinity, after one read of the device.

    Raises:
        NonFiniteError: names the tensor and the first sequence.
    """
    flags = read(*(values.isfinite().all() for values in tables.values()))
    for (name, values), finite in zip(tables.items(), flags, strict=True):
        if not finite:
            raise non_finite_sequences(name, values)


def non_finite_sequences(name: str, values: Tensor) -> NonFiniteError:
    """The error for an (L, B) tensor that holds NaN or inf."""
    rows = (~values.isfinite()).flatten().nonzero().squeeze(1).tolist()
    leaf, example = divmod(rows[0], values.shape[1])
    return NonFiniteError(
        f"{name} holds NaN or inf for {len(rows)} sequences, first (leaf {leaf}, example "
        f"{example}): compute it again for these",
        rows,
    )


def from_tokens(
    logps: Tensor,  # (n,) of scored rows
    ids: Tensor,  # (n,) int64, leaf * B + example
    counts: Tensor,  # (L, B) int64
    reference_logps: Tensor,  # (L, B)
    objective: Objective,
    reduction: str,
) -> PreferenceOutput:
    """The objective of per-token log-probs; in one launch where the backend has it.

    Values are not checked.
    """
    kernel = None
    if reduction != "none" and logps.dtype == torch.float32:
        kernel = backend_for(logps).fused_loss(objective)
    if kernel is None:
        sums = sum_by_sequence(logps, ids, reference_logps.shape)
        return objective(sums, reference_logps, reduction, counts)
    inputs = (logps, ids, reference_logps, objective, reduction, kernel)
    loss, sums, rewards, terms = _FusedLoss.apply(*inputs)
    return PreferenceOutput(loss, sums, rewards, counts, terms)


class _FusedLoss(torch.autograd.Function):
    """Loss, sums, rewards and d loss / d logp of every token by one kernel."""

    @staticmethod
    def forward(ctx, logps, ids, reference_logps, objective, reduction, kernel):
        # No row is ignored, so ids serve as labels.
        out = kernel(
            *(logps, ids, ids, reference_logps, objective), reduction=reduction, ignore_index=-1
        )
        ctx.save_for_backward(out.coefficients, ids)
        ctx.mark_non_differentiable(out.rewards, out.term_losses)
        ctx.set_materialize_grads(False)
        return out.loss, out.sums, out.rewards, out.term_losses

    @staticmethod
    def backward(ctx, grad_loss, grad_sums, *_):
        refuse_second_derivative()
        coefficients, ids = ctx.saved_tensors
        grad = None if grad_loss is None else coefficients * grad_loss
        if grad_sums is not None:
            of_row = grad_sums.flatten()[ids]
            grad = of_row if grad is None else grad + of_row
        return (grad, *(None,) * 5)


class FusedPreference(torch.autograd.Function):
    """An objective over a head that trains, in 3 GEMMs: logits, gradient of hidden, of weight.

    The gradient of the weight needs each row's d loss / d logp before the sum over rows. It is
    known as soon as the sequences of the row's example are in, since the loss of an example depends
    on that example alone; so the head goes by whole examples, and their logits serve the forward
    and the backward. Gradients are made in forward and scaled in backward.

    An autograd.Function and not an operator, since an objective is Python; under torch.compile the
    public function takes linear_logprobs and sequence_sums instead, at 4 GEMMs.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # (..., H), N rows
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        head: Head,
        plan: RowPlan,
        counts: Tensor,  # (L, B) int64
        token_weights: Tensor | None,  # (N,)
        reference_logps: Tensor,  # (L, B)
        objective: Objective,
        reduction: str,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor]:  # (), (L, B)
        device, (leaves, examples) = hidden.device, reference_logps.shape
        # Rows by example: the order of the rows of an example is kept.
        order = (plan.ids % max(examples, 1)).argsort(kind="stable")
        rows = to_device(order if plan.rows is None else plan.rows[order], device)
        labels, ids = (to_device(values[order], device) for values in (plan.labels, plan.ids))
        rival = rival_rows(objective, ids, examples)
        lengths = plan.counts.sum(0)
        ends = [0, *lengths.cumsum().tolist()]
        factor = None if token_weights is None else token_weights[rows]
        scale = 1 / examples if reduction == "mean" else 1.0
        every, partial = [], []  # d loss / d logp and the loss, by chunks of examples

        def slopes(first: int, last: int, logps: Tensor) -> Tensor:
            """d loss / d logp of the examples [first, last), whose rows are adjacent."""
            span, width = slice(ends[first], ends[last]), last - first
            leaf, example = ids[span] // examples, ids[span] % examples - first
            index = leaf * width + example
            used = logps if factor is None else logps * factor[span]
            sums = sum_by_sequence(used, index, (leaves, width))
            part = slice(first, last)
            loss, of_sum = _with_slope(
                lambda s: objective(s, reference_logps[:, part], "sum", counts[:, part]).loss, sums
            )
            partial.append(loss)
            grad = of_sum.flatten()[index] * scale
            every.append(grad if factor is None else grad * factor[span])
            return every[-1]

        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        dense = take_rows(hidden, rows)
        with torch.autocast(device.type, enabled=False):
            logps, scored, grads = backend_for(hidden).by_spans(
                dense,
                head,
                labels,
                rival,
                lengths.tolist(),
                slopes,
                chunk_rows=chunk_rows,
                wanted=wanted,
            )
        used = logps if factor is None else logps * factor
        sums = sum_by_sequence(used, ids, reference_logps.shape)
        loss = objective(sums, reference_logps, reduction, counts).loss
        finite = logps.isfinite()
        # The only read of the device: flags, and the loss in parts beside the whole.
        *flags, parts, whole = read(
            *flags_of(finite, sums, reference_logps),
            torch.stack([loss.new_zeros(()), *partial]).sum(dtype=torch.float64),
            loss / scale,
        )
        check_results(flags, finite, used, reference_logps, rows, dense, head)
        _check_separable(objective, parts, whole)

        ctx.grads, ctx.rows, ctx.hidden_like = grads, rows, (hidden.shape, hidden.dtype)
        # Targets that are known stay on the host, where a second backward plans its rows.
        targets = torch.from_numpy(plan.labels[order]) if rival is None else scored
        slope = torch.cat(every) if every else logps
        ctx.save_for_backward(hidden, weight, bias, targets, ids, factor, slope)
        group = "" if head.shard is None else head.shard.group.group_name
        ctx.settings = (head.softcap, head.temperature, IGNORED, chunk_rows, group)
        ctx.backend = current_override()
        ctx.set_materialize_grads(False)
        return loss, sums

    @staticmethod
    def backward(ctx, grad_loss, grad_sums):
        refuse_second_derivative()
        # Given away, so that they need not be copied; a second backward recomputes them.
        ready, ctx.grads = ctx.grads, None
        grads = [None, None, None]
        if ready is not None and grad_loss is not None:
            hidden, weight, bias = ready
            hidden = None if hidden is None else FusedPreference._spread(ctx, hidden * grad_loss)
            # On the CPU a pass over the gradient of the weight is worth a look at the scalar.
            if grad_loss.is_cuda or grad_loss.item() != 1:
                weight, bias = (None if g is None else g.mul_(grad_loss) for g in (weight, bias))
            grads, grad_loss = [hidden, weight, bias], None
        if grad_loss is not None or grad_sums is not None:
            more = FusedPreference._recomputed(ctx, grad_loss, grad_sums)
            pairs = zip(grads, more, strict=True)
            grads = [b if a is None else a if b is None else a + b for a, b in pairs]
        return (*grads, *(None,) * 8)

    @staticmethod
    def _spread(ctx, scored: Tensor) -> Tensor:
        """The gradient of all of hidden from that of its scored rows, rounded to its dtype."""
        shape, dtype = ctx.hidden_like
        every = scored.new_zeros(shape, dtype=dtype)
        every.view(-1, shape[-1]).index_copy_(0, ctx.rows, scored.to(dtype))
        return every

    @staticmethod
    def _recomputed(ctx, grad_loss, grad_sums) -> list[Tensor | None]:
        """Gradients from those of the loss and of the sums, by linear_logprobs_backward."""
        hidden, weight, bias, targets, ids, factor, slope = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        tokens = torch.zeros_like(slope) if grad_loss is None else slope * grad_loss
        if grad_sums is not None:
            of_row = grad_sums.flatten()[ids]
            tokens = tokens + (of_row if factor is None else of_row * factor).to(tokens.dtype)
        dense = take_rows(hidden, ctx.rows)
        args = (tokens, dense, weight, targets, bias, *ctx.settings, wanted, ctx.backend)
        grads = linear_logprobs_backward(*args)
        first = FusedPreference._spread(ctx, grads[0]) if wanted[0] else None
        shaped = (first, *grads[1:])
        return [grad if want else None for grad, want in zip(shaped, wanted, strict=True)]


def _with_slope(loss_of: Callable[[Tensor], Tensor], sums: Tensor) -> tuple[Tensor, Tensor]:
    """loss_of(sums) and its gradient, outside of whatever graph is being built around."""
    # Hooks of checkpointing would run the caller's forward again at each tensor that is kept.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        sums.requires_grad_()
        loss = loss_of(sums)
        if not loss.requires_grad:  # a loss over detached leaves alone
            return loss.detach(), torch.zeros_like(sums)
        (slope,) = torch.autograd.grad(loss, sums, allow_unused=True)
    return loss.detach(), torch.zeros_like(sums) if slope is None else slope


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _check_separable(objective: Objective, parts: float, whole: float) -> None:
    """The gradients are of the parts; were they not the whole loss, they would be wrong."""
    if abs(parts - whole) > 1e-5 * (1 + abs(parts) + abs(whole)):  # of fp32 sums
        raise ValueError(
            f"objective {objective.name!r} gives {whole} for all examples and {parts} for them "
            "in parts: a term must be a function of the rewards of one example"
        )


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
