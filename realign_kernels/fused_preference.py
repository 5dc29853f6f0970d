"""The whole loss in one pass over a head that trains: 3 GEMMs."""

import math
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from realign_kernels.backends.base import Head, scaled
from realign_kernels.backends.dispatch import backend_for, current_override
from realign_kernels.eager import (
    as_given,
    kept_targets,
    recompute_gradients,
    refuse_second_derivative,
    spread_rows,
    take_rows,
)
from realign_kernels.nonfinite import check_rows, check_tables, finite_rows, sentinel
from realign_kernels.objectives import Objective, PreferenceOutput
from realign_kernels.preference_ops import from_tokens, loss_kernel, plan_rivals, sum_by_sequence
from realign_kernels.row_plan import RowPlan, to_device


class _Losses:
    """The loss of spans of examples, and d loss / d logp of their tokens."""

    def __init__(
        self,
        objective: Objective,
        reference_logps: Tensor,  # (L, B)
        reduction: str,
        plan: RowPlan,
        lengths: list[int],  # rows of each span
        token_weights: Tensor | None,  # (n,)
    ) -> None:
        self.objective, self.reference_logps, self.reduction = objective, reference_logps, reduction
        self.plan, self.token_weights = plan, token_weights
        self.ends = [0, *accumulate(lengths)]
        self.output: PreferenceOutput | None = None
        self.every: list[Tensor] = []  # d loss / d logp of the rows, by chunks
        self.partial: list[Tensor] = []  # sums of losses, by chunks of examples

    @cached_property
    def counts(self) -> Tensor:  # (L, B) int64
        return to_device(torch.from_numpy(self.plan.counts), self.plan.device)

    def slopes(self, first: int, last: int, logps: Tensor) -> Tensor:
        """d loss / d logp of the rows in spans [first, last)."""
        span, everything = slice(self.ends[first], self.ends[last]), len(logps) == self.ends[-1]
        ids, factor = self.plan.ids_on_device[span], self.token_weights
        factor = None if factor is None else factor[span]
        used = logps if factor is None else logps * factor
        if kernel := loss_kernel(self.objective, self.reduction, logps):
            # Examples outside of the span get losses without meaning, which nobody reads.
            args = (used, ids, ids, self.reference_logps, self.objective)
            out = kernel(*args, reduction=self.reduction, ignore_index=-1)
            grad = out.coefficients
            output = PreferenceOutput(out.loss, out.sums, out.rewards, out.counts, out.term_losses)
        elif everything:
            sums = sum_by_sequence(used, ids, self.reference_logps.shape)
            args = (self.reference_logps, self.reduction, self.counts)
            output, of_sum = _with_slope(lambda sums: self.objective(sums, *args), sums)
            grad = of_sum.flatten()[ids]
        else:
            grad = self._slopes_of_examples(first, last, used, ids)
        if everything:
            self.output = output
        self.every.append(grad if factor is None else grad * factor)
        return self.every[-1]

    def _slopes_of_examples(self, first: int, last: int, used: Tensor, ids: Tensor) -> Tensor:
        leaves, examples = self.reference_logps.shape
        width, part = last - first, slice(first, last)
        index = ids // examples * width + ids % examples - first
        sums = sum_by_sequence(used, index, (leaves, width))
        args = (self.reference_logps[:, part], "sum", self.counts[:, part])
        output, of_sum = _with_slope(lambda sums: self.objective(sums, *args), sums)
        self.partial.append(output.loss)
        slope = of_sum.flatten()[index]
        return slope / examples if self.reduction == "mean" else slope

    def finish(self, used: Tensor) -> PreferenceOutput:
        """The loss of all examples, from their log-probs times token weights."""
        if self.output is None:
            sequences = self.plan.ids_on_device, self.plan.counts
            args = (self.reference_logps, self.objective, self.reduction)
            self.output = from_tokens(used, *sequences, *args)
        return self.output

    def check_parts(self, parts: float, whole: float) -> None:
        """Compare the loss in parts, of which the slopes are, with the whole.

        Raises:
            ValueError: they differ: the slopes are not those of the loss.
        """
        if self.reduction == "mean":
            whole *= self.reference_logps.shape[1]
        if abs(parts - whole) > 1e-5 * (1 + abs(parts) + abs(whole)):  # of fp32 sums
            raise ValueError(
                f"objective {self.objective.name!r} gives {whole} for all examples and {parts} for "
                "them in parts: a term must be a function of the rewards of one example"
            )


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
        token_weights: Tensor | None,  # (N,)
        reference_logps: Tensor,  # (L, B)
        objective: Objective,
        reduction: str,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # the fields of PreferenceOutput
        ordered, lengths = plan, [len(plan.labels)]
        backend, scores_rivals = backend_for(hidden), any(leaf.rival for leaf in objective.leaves)
        if len(plan.labels) > backend.span_rows(hidden, head, scores_rivals, chunk_rows):
            ordered, lengths = plan.by_example(), plan.counts.sum(0).tolist()
        labels, rows = ordered.labels_on_device()
        rival = plan_rivals(objective, ordered)
        factor = token_weights if rows is None or token_weights is None else token_weights[rows]
        losses = _Losses(objective, reference_logps, reduction, ordered, lengths, factor)
        needs = ctx.needs_input_grad
        with as_given(hidden.device.type):
            logps, targets, grads = backend.by_spans(
                take_rows(hidden, rows),
                head,
                labels,
                rival,
                lengths,
                losses.slopes,
                chunk_rows=chunk_rows,
                wanted=(needs[0], needs[1], needs[2]),
            )
        used = logps if factor is None else logps * factor
        output = losses.finish(used)
        ctx.grads, ctx.rows, ctx.hidden_like = grads, rows, (hidden.shape, hidden.dtype)
        slope = losses.every[0] if len(losses.every) == 1 else torch.cat([logps[:0], *losses.every])
        targets, ids = kept_targets(labels, targets, rival), ordered.ids_on_device
        ctx.save_for_backward(hidden, weight, bias, targets, ids, factor, slope)
        ctx.head, ctx.chunk_rows, ctx.backend = head[2:], chunk_rows, current_override()
        ctx.mark_non_differentiable(output.rewards, output.token_counts, output.term_losses)
        ctx.set_materialize_grads(False)

        # The only read of the device, last: until the backward, the GPU has nothing to do.
        flag = sentinel(output.logps - reference_logps)
        if losses.partial:
            parts = torch.stack(losses.partial).sum(dtype=torch.float64)
            flag, *both = torch.stack([flag, parts, output.loss.double()]).tolist()
        else:
            flag, both = flag.item(), ()
        if not math.isfinite(flag):
            if again := head.again():
                given = (plan, token_weights, reference_logps, objective, reduction, chunk_rows)
                return FusedPreference.forward(ctx, hidden, weight, bias, again, *given)
            check_rows(finite_rows(logps, None), rows, take_rows(hidden, None), head)
            check_tables(used, rows, output.logps, reference_logps)
        if both:
            losses.check_parts(*both)
        return tuple(output)

    @staticmethod
    def backward(ctx, grad_loss, grad_sums, *_):
        refuse_second_derivative()
        # Given away, so that they need not be copied; a second backward recomputes them.
        ready, ctx.grads = ctx.grads, None
        grads = [None, None, None]
        if ready is not None and grad_loss is not None:
            hidden, weight, bias = ready
            if hidden is not None:
                shape, dtype = ctx.hidden_like
                hidden = spread_rows(scaled(hidden, grad_loss, dtype), ctx.rows, shape)
            for grad in (weight, bias):
                if grad is not None:
                    backend_for(grad, ctx.backend).scale(grad, grad_loss)
            grads, grad_loss = [hidden, weight, bias], None
        if grad_loss is not None or grad_sums is not None:
            more = FusedPreference._recomputed(ctx, grad_loss, grad_sums)
            pairs = zip(grads, more, strict=True)
            grads = [b if a is None else a if b is None else a + b for a, b in pairs]
        return (*grads, *(None,) * 7)

    @staticmethod
    def _recomputed(ctx, grad_loss, grad_sums) -> tuple[Tensor | None, ...]:
        """Gradients from those of the loss and of the sums, in 4 GEMMs."""
        hidden, weight, bias, targets, ids, factor, slope = ctx.saved_tensors
        tokens = torch.zeros_like(slope) if grad_loss is None else slope * grad_loss
        if grad_sums is not None:
            of_row = grad_sums.flatten()[ids]
            tokens = tokens + (of_row if factor is None else of_row * factor).to(tokens.dtype)
        first, *of_head = recompute_gradients(
            tokens,
            take_rows(hidden, ctx.rows),
            Head(weight, bias, *ctx.head),
            targets,
            ctx.chunk_rows,
            tuple(ctx.needs_input_grad[:3]),
            ctx.backend,
        )
        return None if first is None else spread_rows(first, ctx.rows, hidden.shape), *of_head


def _with_slope(
    loss_of: Callable[[Tensor], PreferenceOutput],
    sums: Tensor,  # (L, B)
) -> tuple[PreferenceOutput, Tensor]:
    """loss_of(sums), and the gradient of its loss, outside of whatever graph is being built."""
    # Hooks of checkpointing would run the caller's forward again at each tensor that is kept.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        output = loss_of(sums.requires_grad_())
        slope = None
        if output.loss.requires_grad:  # not that of detached leaves only
            (slope,) = torch.autograd.grad(output.loss, sums, allow_unused=True)
    output = output._replace(loss=output.loss.detach(), logps=sums.detach())
    return output, torch.zeros_like(output.logps) if slope is None else slope


def _same(tensor: Tensor) -> Tensor:
    return tensor
