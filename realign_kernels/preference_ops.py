"""From per-token log-probs to sequences, and the whole loss in one pass over a trainable head."""

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels.dispatch import backend_for, current_override
from realign_kernels.objectives import Objective, PreferenceOutput
from realign_kernels.ops import (
    IGNORED,
    NonFiniteError,
    first_few,
    linear_logprobs_backward,
    make_head,
    non_finite,
    refuse_second_derivative,
    take_rows,
    valid_rows,
    vocabulary_of,
)


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

    Raises:
        ValueError: for a number of a sequence out of range, or a sequence without a token.
        NonFiniteError: where a log-prob or reference is NaN or infinite.
    """
    leaves, examples = reference_logps.shape
    valid = labels != ignore_index
    outside = valid & ((sequence_ids < 0) | (sequence_ids >= leaves * examples))
    ids = torch.where(valid & ~outside, sequence_ids, 0)
    counts = torch.zeros(leaves * examples, dtype=torch.int64, device=ids.device)
    counts.index_add_(0, ids, (valid & ~outside).long())
    lacking, infinite = counts == 0, ~reference_logps.isfinite().flatten()
    bad = valid & ~logps.isfinite()
    flags = torch.stack([outside.any(), lacking.any(), infinite.any(), bad.any()]).tolist()
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
    if flags[3]:
        rows = bad.nonzero().squeeze(1).tolist()
        raise NonFiniteError(
            f"token_weights make the log-probs of rows {first_few(rows)} NaN or infinite: look at "
            "their values there",
            rows,
        )
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
    return _spread(grad, sequence_ids, labels == ctx.ignore_index), None, None, None, None


sequence_sums.register_autograd(_sequence_sums_grads, setup_context=_setup_sequence_sums)


def from_tokens(
    logps: Tensor,  # (N,), 0 where ignored
    labels: Tensor,  # (N,) int64
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example; not read where ignored
    reference_logps: Tensor,  # (L, B)
    objective: Objective,
    reduction: str,
    ignore_index: int,
) -> PreferenceOutput:
    """The objective of per-token log-probs; in one launch where the backend has it."""
    kernel = None
    if reduction != "none" and logps.dtype == torch.float32 and not torch.compiler.is_compiling():
        kernel = backend_for(logps).fused_loss(objective)
    inputs = (logps, labels, sequence_ids, reference_logps)
    if kernel is None:
        sums, counts = sequence_sums(*inputs, ignore_index)
        return objective(sums, reference_logps, reduction, counts)
    return PreferenceOutput(*_FusedLoss.apply(*inputs, objective, reduction, ignore_index, kernel))


class _FusedLoss(torch.autograd.Function):
    """Loss, sums, rewards and d loss / d logp of every token by one kernel."""

    @staticmethod
    def forward(
        ctx,
        logps,
        labels,
        sequence_ids,
        reference_logps,
        objective,
        reduction,
        ignore_index,
        kernel,
    ):
        out = kernel(
            logps,
            labels,
            sequence_ids,
            reference_logps,
            objective,
            reduction=reduction,
            ignore_index=ignore_index,
        )
        wrong = torch.stack(
            [
                out.outside > 0,
                (out.counts == 0).any(),
                ~reference_logps.isfinite().all(),
                ~out.sums.isfinite().all(),
            ]
        )
        if wrong.any():  # sequence_sums finds it again, and says what it is
            sequence_sums(logps, labels, sequence_ids, reference_logps, ignore_index)
            raise AssertionError("the fused loss refuses what sequence_sums accepts")
        ctx.save_for_backward(out.coefficients, labels, sequence_ids)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(out.rewards, out.counts, out.term_losses)
        ctx.set_materialize_grads(False)
        return out.loss, out.sums, out.rewards, out.counts, out.term_losses

    @staticmethod
    def backward(ctx, grad_loss, grad_sums, *_):
        refuse_second_derivative()
        coefficients, labels, sequence_ids = ctx.saved_tensors
        grad = None if grad_loss is None else coefficients * grad_loss
        if grad_sums is not None:
            spread = _spread(grad_sums, sequence_ids, labels == ctx.ignore_index)
            grad = spread if grad is None else grad + spread
        return (grad, *(None,) * 7)


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
        labels: Tensor,  # (N,) int64
        sequence_ids: Tensor,  # (N,) int64, leaf * B + example
        token_weights: Tensor | None,  # (N,)
        reference_logps: Tensor,  # (L, B)
        objective: Objective,
        reduction: str,
        softcap: float | None,
        temperature: float,
        ignore_index: int,
        chunk_rows: int | None,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (), (L, B), (L, B) int64
        head = make_head(weight, bias, softcap, temperature, group)
        rows = valid_rows(labels, vocabulary_of(head), ignore_index)
        rows = torch.arange(len(labels), device=labels.device) if rows is None else rows
        leaves, examples = reference_logps.shape
        # Refuses wrong numbers and empty sequences before the first GEMM.
        zeros = labels.new_zeros(len(labels), dtype=reference_logps.dtype)
        _, counts = sequence_sums(zeros, labels, sequence_ids, reference_logps, ignore_index)
        rows = rows[(sequence_ids[rows] % examples).argsort(stable=True)]
        ids = sequence_ids[rows]
        lengths = counts.sum(0)
        ends = [0, *lengths.cumsum(0).tolist()]
        factor = None if token_weights is None else token_weights[rows]
        scale = 1 / examples if reduction == "mean" else 1.0
        every, partial = [], []  # d loss / d logp and the loss, by chunks of examples

        def slopes(first: int, last: int, logps: Tensor) -> Tensor:
            """d loss / d logp of the examples [first, last), whose rows stand together."""
            finite = logps.isfinite()
            if not finite.all():
                bad = rows[ends[first] : ends[last]][~finite]
                raise non_finite(bad.tolist(), take_rows(hidden, bad), head)
            span, width = slice(ends[first], ends[last]), last - first
            leaf, example = ids[span] // examples, ids[span] % examples - first
            index = leaf * width + example
            used = logps if factor is None else logps * factor[span]
            sums = used.new_zeros(leaves * width, dtype=torch.float64)
            sums = sums.index_add_(0, index, used.double()).to(logps.dtype).view(leaves, width)
            part = slice(first, last)
            loss, of_sum = _with_slope(
                lambda s: objective(s, reference_logps[:, part], "sum", counts[:, part]).loss, sums
            )
            partial.append(loss)
            grad = of_sum.flatten()[index] * scale
            every.append(grad if factor is None else grad * factor[span])
            return every[-1]

        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        rival = rival_rows(objective, sequence_ids, examples)
        with torch.autocast(hidden.device.type, enabled=False):
            logps, scored, grads = backend_for(hidden).by_spans(
                take_rows(hidden, rows),
                head,
                labels[rows],
                None if rival is None else rival[rows],
                lengths.tolist(),
                slopes,
                chunk_rows=chunk_rows,
                wanted=wanted,
            )
        spread = logps.new_zeros(len(labels)).index_copy_(0, rows, logps)
        weighted = spread if token_weights is None else spread * token_weights
        sums, _ = sequence_sums(weighted, labels, sequence_ids, reference_logps, ignore_index)
        loss = objective(sums, reference_logps, reduction, counts).loss
        _check_separable(objective, partial, loss / scale)

        ctx.grads, ctx.rows, ctx.hidden_like = grads, rows, (hidden.shape, hidden.dtype)
        slope = torch.cat(every) if every else logps
        targets = torch.full_like(labels, IGNORED).index_copy_(0, rows, scored)
        slope = spread.index_copy(0, rows, slope)
        saved = (hidden, weight, bias, targets, sequence_ids, token_weights, slope)
        ctx.save_for_backward(*saved)
        ctx.settings = (softcap, temperature, IGNORED, chunk_rows, group)
        ctx.backend = current_override()
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return loss, sums, counts

    @staticmethod
    def backward(ctx, grad_loss, grad_sums, _):
        refuse_second_derivative()
        # Given away, so that they need not be copied; a second backward recomputes them.
        ready, ctx.grads = ctx.grads, None
        grads = [None, None, None]
        if ready is not None and grad_loss is not None:
            grads = FusedPreference._scaled(ctx, ready, grad_loss)
            grad_loss = None
        if grad_loss is not None or grad_sums is not None:
            more = FusedPreference._recomputed(ctx, grad_loss, grad_sums)
            pairs = zip(grads, more, strict=True)
            grads = [b if a is None else a if b is None else a + b for a, b in pairs]
        return (*grads, *(None,) * 11)

    @staticmethod
    def _scaled(ctx, ready, grad_loss) -> list[Tensor | None]:
        """The gradients of forward times that of the loss; hidden's is rounded after that."""
        hidden, weight, bias = ready
        shape, dtype = ctx.hidden_like
        if hidden is not None:
            hidden = (hidden * grad_loss).to(dtype)
            every = hidden.new_zeros(shape)
            every.view(-1, shape[-1]).index_copy_(0, ctx.rows, hidden)
            hidden = every
        # On the CPU a pass over the gradient of the weight is worth a look at the scalar.
        if grad_loss.is_cuda or grad_loss.item() != 1:
            weight, bias = (None if g is None else g.mul_(grad_loss) for g in (weight, bias))
        return [hidden, weight, bias]

    @staticmethod
    def _recomputed(ctx, grad_loss, grad_sums) -> list[Tensor | None]:
        """Gradients from those of the loss and of the sums, by linear_logprobs_backward."""
        hidden, weight, bias, targets, sequence_ids, token_weights, slope = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        tokens = torch.zeros_like(slope) if grad_loss is None else slope * grad_loss
        if grad_sums is not None:
            spread = _spread(grad_sums, sequence_ids, targets == IGNORED)
            spread = spread if token_weights is None else spread * token_weights
            tokens = tokens + spread.masked_fill(targets == IGNORED, 0).to(tokens.dtype)
        rows = hidden.reshape(len(tokens), -1)
        args = (tokens, rows, weight, targets, bias, *ctx.settings, wanted, ctx.backend)
        grads = linear_logprobs_backward(*args)
        shaped = (grads[0].view(hidden.shape) if wanted[0] else None, *grads[1:])
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


def _check_separable(objective: Objective, parts: list[Tensor], whole: Tensor) -> None:
    """The gradients are of the parts; were they not the whole loss, they would be wrong."""
    if len(parts) > 1:
        total, whole = torch.stack(parts).double().sum().item(), whole.item()
        if abs(total - whole) > 1e-5 * (1 + abs(total) + abs(whole)):  # of fp32 sums
            raise ValueError(
                f"objective {objective.name!r} gives {whole} for all examples and {total} for them "
                "in parts: a term must be a function of one example's rewards alone"
            )


def _spread(
    grad: Tensor,  # (L, B)
    sequence_ids: Tensor,  # (N,)
    ignored: Tensor,  # (N,) bool
) -> Tensor:  # (N,)
    """The gradient of each sequence's sum, for each of its tokens; 0 where ignored."""
    return grad.flatten()[sequence_ids.masked_fill(ignored, 0)].masked_fill(ignored, 0)


def rival_rows(
    objective: Objective,
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example; not read where ignored
    examples: int,
) -> Tensor | None:  # (N,) bool
    """The rows of leaves that are scored by the strongest other token; None if there are none."""
    flags = [leaf.rival for leaf in objective.leaves]
    if not any(flags):
        return None
    leaf = (sequence_ids // max(examples, 1)).clamp(0, len(flags) - 1)
    return torch.tensor(flags, device=sequence_ids.device)[leaf]
