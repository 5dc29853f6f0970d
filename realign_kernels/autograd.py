"""The autograd Functions of eager mode: `LogProbs`, `FusedPreference` and `TokenLoss`.

The host plans the rows of a call once. Compiled graphs use the operators in `ops` instead. The
schema of an operator cannot hold a plan, so each operator plans its rows again. With autograd, a
call of a `torch.library.custom_op` takes 40 us of host time, and a call of a Function 9 us (2
cores, torch 2.13).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from realign_kernels.backends.base import Gradients, scaled
from realign_kernels.backends.dispatch import backend_for, current_override
from realign_kernels.lm_head import Head
from realign_kernels.nonfinite import check_rows, check_tables, finite_rows, is_finite, sentinel
from realign_kernels.objectives import Objective, PreferenceOutput
from realign_kernels.row_plan import (
    RowPlan,
    ScoredRows,
    scores_runner_ups,
    spread_rows,
    take_rows,
    to_device,
)

_NOTHING = nullcontext()  # entering an autocast context without effect takes 5 us


def refuse_second_derivative() -> None:
    """Check that a backward pass builds no graph of the gradient (no double backward).

    once_differentiable raises nothing if the incoming gradient is a constant. A gradient penalty
    would then be dropped silently.

    Raises:
        RuntimeError: a graph is built.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the head has no second derivative. Call backward without create_graph.")


def trains(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the head is trained."""
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def keeps_dlogp_dh(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the forward keeps d logp / d hidden, so that the backward needs no GEMM.

    It does for a frozen head with hidden states that need a gradient. This costs one GEMM in the
    forward and saves two in the backward.
    """
    return torch.is_grad_enabled() and hidden.requires_grad and not trains(weight, bias)


def no_autocast(device: str) -> AbstractContextManager:
    """A context without autocast, which would cast the operands of a backend's GEMM again."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


class _Call(NamedTuple):
    """Settings of a forward that its backward needs. Tensors are saved by autograd."""

    head: Head  # without weight and bias
    chunk_rows: int | None
    backend: str
    shape: torch.Size  # of hidden
    dtype: torch.dtype  # of hidden

    @classmethod
    def of(cls, hidden: Tensor, head: Head, chunk_rows: int | None) -> "_Call":
        # Device threads of the autograd engine do not see use_backend.
        bare = head._replace(weight=None, bias=None)
        return cls(bare, chunk_rows, current_override(), hidden.shape, hidden.dtype)

    def gradients(
        self,
        grad: Tensor,  # (n,)
        hidden: Tensor,  # (n, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (n,) int64
        index: Tensor | None,  # (n,) int64
        needs_input_grad: Sequence[bool],
    ) -> Gradients:
        """Gradients of hidden (..., H), weight and bias from those of log-probs, in 3 GEMMs."""
        need_hidden, need_weight, need_bias, *_ = needs_input_grad
        with no_autocast(hidden.device.type):
            for_hidden, *of_head = backend_for(hidden, self.backend).backward(
                grad.contiguous(),
                hidden,
                self.head._replace(weight=weight, bias=bias),
                targets,
                chunk_rows=self.chunk_rows,
                needs_grad=(need_hidden, need_weight, need_bias),
            )
        if for_hidden is not None:
            for_hidden = spread_rows(for_hidden, index, self.shape)
        return for_hidden, of_head[0], of_head[1]


def score_rows(
    hidden: Tensor,  # (n, H)
    head: Head,
    rows: ScoredRows,
    chunk_rows: int | None,
    *,
    keep_dlogp_dh: bool,
    check: bool,
) -> tuple[Head, Tensor, Tensor, Tensor | None]:  # (n,), (n,), (n, H)
    """Head used (after a possible retry), log-probs, targets and dlogp_dh of scored rows.

    Raises:
        NonFiniteError: with `check`, a log-prob or its derivative is NaN or infinite.
    """
    with no_autocast(hidden.device.type):
        logps, targets, dlogp_dh = backend_for(hidden).forward(
            hidden,
            head,
            rows.labels,
            rows.runner_up,
            chunk_rows=chunk_rows,
            keep_dlogp_dh=keep_dlogp_dh,
        )
    if check and not is_finite(sentinel(logps, dlogp_dh)):
        if retry := head.retry():
            settings = {"keep_dlogp_dh": keep_dlogp_dh, "check": True}
            return score_rows(hidden, retry, rows, chunk_rows, **settings)
        check_rows(finite_rows(logps, dlogp_dh), rows.index, hidden, head)
    return head, logps, targets, dlogp_dh


class LogProbs(torch.autograd.Function):
    """Log-probs of scored rows. The second result is dlogp_dh, kept for a frozen head only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        head: Head,
        rows: ScoredRows,
        chunk_rows: int | None,
        keep_dlogp_dh: bool,
        check: bool,
    ) -> tuple[Tensor, Tensor | None]:  # (n,), (n, H), both wide
        dense = take_rows(hidden, rows.index)
        head, logps, targets, dlogp_dh = score_rows(
            dense, head, rows, chunk_rows, keep_dlogp_dh=keep_dlogp_dh, check=check
        )
        ctx.call = _Call.of(hidden, head, chunk_rows)
        ctx.set_materialize_grads(False)
        if dlogp_dh is None:
            kept = _kept_targets(rows, targets)
            ctx.save_for_backward(None, rows.index, dense, weight, bias, kept)
        else:
            ctx.mark_non_differentiable(dlogp_dh)
            ctx.save_for_backward(dlogp_dh, rows.index)
        return logps, dlogp_dh

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        constants = (None,) * 5
        if grad is None:
            return None, None, None, *constants
        dlogp_dh, index, *recomputed = ctx.saved_tensors
        if dlogp_dh is not None:
            for_hidden = spread_rows(scaled(dlogp_dh, grad, ctx.call.dtype), index, ctx.call.shape)
            return for_hidden, None, None, *constants
        return *ctx.call.gradients(grad, *recomputed, index, ctx.needs_input_grad), *constants


def _kept_targets(rows: ScoredRows, targets: Tensor) -> Tensor:
    """The targets to keep for the backward.

    Labels are copied, because a loader may overwrite their memory before the backward. The targets
    of a forward over a vocabulary shard are local indices, so the labels are kept instead.
    """
    return rows.labels.clone() if rows.runner_up is None else targets


def sum_by_sequence(
    logps: Tensor,  # (n,)
    ids: Tensor,  # (n,) int64, leaf * B + example
    shape: Sequence[int],
) -> Tensor:  # (L, B) in the dtype of logps
    """Sums of log-probs by sequence, in fp64.

    In fp64 the order of CUDA's atomic adds does not change the rounded result.
    """
    leaves, examples = shape
    sums = logps.new_zeros(leaves * examples, dtype=torch.float64)
    return sums.index_add(0, ids, logps.double()).to(logps.dtype).view(leaves, examples)


def _loss_kernel(objective: Objective, reduction: str, logps: Tensor) -> Callable | None:
    """A fused kernel from token log-probs to the loss, or None if the backend has none."""
    if reduction == "none" or logps.dtype != torch.float32:
        return None
    kernel = backend_for(logps).fused_loss(objective)
    return None if isinstance(kernel, str) else kernel


def from_tokens(
    logps: Tensor,  # (n,) of scored rows
    ids: Tensor,  # (n,) int64, leaf * B + example
    counts: np.ndarray,  # (L, B) int64
    reference_logps: Tensor,  # (L, B)
    objective: Objective,
    reduction: str,
) -> PreferenceOutput:
    """The objective of per-token log-probs, in one launch if the backend has a kernel for it.

    Does not check values.
    """
    kernel = _loss_kernel(objective, reduction, logps)
    if kernel is None:
        sums = sum_by_sequence(logps, ids, reference_logps.shape)
        on_device = to_device(torch.from_numpy(counts), logps.device)
        return objective(sums, reference_logps, reduction, on_device)
    inputs = (logps, ids, reference_logps, objective, reduction, kernel)
    return PreferenceOutput(*TokenLoss.apply(*inputs))


class TokenLoss(torch.autograd.Function):
    """Loss, sums, rewards and d loss / d logp of every token by one kernel."""

    @staticmethod
    def forward(ctx: Any, logps, ids, reference_logps, objective, reduction, kernel):
        out = kernel(logps, ids, reference_logps, objective, reduction=reduction)
        ctx.save_for_backward(out.coefficients, ids)
        ctx.mark_non_differentiable(out.rewards, out.counts, out.term_losses)
        ctx.set_materialize_grads(False)
        return out.loss, out.sums, out.rewards, out.counts, out.term_losses

    @staticmethod
    def backward(ctx: Any, grad_loss, grad_sums, *_):
        refuse_second_derivative()
        coefficients, ids = ctx.saved_tensors
        grad = None if grad_loss is None else coefficients * grad_loss
        if grad_sums is not None:
            of_row = grad_sums.flatten()[ids]
            grad = of_row if grad is None else grad + of_row
        return (grad, *(None,) * 5)


class LossInputs(NamedTuple):
    """A batch without its hidden states, and the objective. All tensors are constants."""

    plan: RowPlan
    token_weights: Tensor | None  # (N,)
    reference_logps: Tensor  # (L, B)
    objective: Objective
    reduction: str


class _ExampleLosses:
    """Losses of groups of examples, and d loss / d logp of their tokens."""

    def __init__(
        self,
        loss: LossInputs,
        plan: RowPlan,  # in the order of the rows
        lengths: list[int],  # rows of each example, or of the whole batch
        token_weights: Tensor | None,  # (n,)
    ) -> None:
        self.loss, self.plan, self.token_weights = loss, plan, token_weights
        self.ends = [0, *accumulate(lengths)]
        self.output: PreferenceOutput | None = None  # of a batch that is one group
        self.grads: list[Tensor] = []  # d loss / d logp, by groups
        self.partial: list[Tensor] = []  # sums of losses, by groups

    @cached_property
    def counts(self) -> Tensor:  # (L, B) int64
        return to_device(torch.from_numpy(self.plan.counts), self.plan.device)

    def grad_logps(self, first: int, last: int, logps: Tensor) -> Tensor:
        """d loss / d logp of the rows of examples [first, last)."""
        rows, whole = slice(self.ends[first], self.ends[last]), len(logps) == self.ends[-1]
        ids, weights = self.plan.ids_on_device[rows], self.token_weights
        weights = None if weights is None else weights[rows]
        used = logps if weights is None else logps * weights
        _, _, reference_logps, objective, reduction = self.loss
        if kernel := _loss_kernel(objective, reduction, logps):
            # The losses of examples outside the group are meaningless and are not read.
            out = kernel(used, ids, reference_logps, objective, reduction=reduction)
            grad = out.coefficients
            output = PreferenceOutput(out.loss, out.sums, out.rewards, out.counts, out.term_losses)
            self.output = output if whole else None
        elif whole:
            sums = sum_by_sequence(used, ids, reference_logps.shape)
            args = (reference_logps, reduction, self.counts)
            self.output, of_sum = _with_grad(lambda sums: objective(sums, *args), sums)
            grad = of_sum.flatten()[ids]
        else:
            grad = self._grad_of_group(first, last, used, ids)
        self.grads.append(grad if weights is None else grad * weights)
        return self.grads[-1]

    def _grad_of_group(self, first: int, last: int, used: Tensor, ids: Tensor) -> Tensor:
        _, _, reference_logps, objective, reduction = self.loss
        leaves, examples = reference_logps.shape
        width, part = last - first, slice(first, last)
        index = ids // examples * width + ids % examples - first
        sums = sum_by_sequence(used, index, (leaves, width))
        args = (reference_logps[:, part], "sum", self.counts[:, part])
        output, of_sum = _with_grad(lambda sums: objective(sums, *args), sums)
        self.partial.append(output.loss)
        grad = of_sum.flatten()[index]
        return grad / examples if reduction == "mean" else grad

    def result(self, used: Tensor) -> PreferenceOutput:
        """The loss of all examples, from their log-probs times token weights."""
        if self.output is not None:
            return self.output
        sequences = self.plan.ids_on_device, self.plan.counts
        return from_tokens(used, *sequences, *self.loss[2:])

    def check_parts(self, parts: float, whole: float) -> None:
        """Compare the sum of the group losses with the loss of the whole batch.

        The gradients come from the group losses, so the two must agree.

        Raises:
            ValueError: they differ.
        """
        if self.loss.reduction == "mean":
            whole *= self.loss.reference_logps.shape[1]
        if abs(parts - whole) > 1e-5 * (1 + abs(parts) + abs(whole)):  # of fp32 sums
            raise ValueError(
                f"objective {self.loss.objective.name!r} gives {whole} for all examples together, "
                f"but {parts} for groups of them. A term must be a function of the rewards of one "
                "example."
            )


class FusedPreference(torch.autograd.Function):
    """An objective over a head that trains, in 3 GEMMs: logits, gradient of hidden, of weight.

    The gradient of the weight needs each row's d loss / d logp before the sum over rows. The loss
    of an example depends on that example only, so the factor is known once all its sequences are
    scored. Rows are therefore scored in whole examples, and their logits serve both the forward and
    the backward. The forward computes the gradients, and the backward scales them.

    It is an autograd.Function and not an operator, because an objective is Python code. Under
    torch.compile the public function uses linear_logprobs and sequence_sums, at 4 GEMMs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., H), N rows
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        head: Head,
        loss: LossInputs,
        chunk_rows: int | None,
    ) -> tuple[Tensor | None, ...]:  # the fields of PreferenceOutput
        plan, token_weights, reference_logps, objective, _ = loss
        lengths, backend = [len(plan.labels)], backend_for(hidden)
        limit = backend.example_rows(hidden, head, scores_runner_ups(objective), chunk_rows)
        if len(plan.labels) > limit:
            plan, lengths = plan.by_example(), plan.counts.sum(0).tolist()
        rows = plan.scored(objective)
        weights = None if token_weights is None else rows.of(token_weights)
        losses = _ExampleLosses(loss, plan, lengths, weights)
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        with no_autocast(hidden.device.type):
            dense = take_rows(hidden, rows.index)
            logps, targets, ctx.grads = backend.forward_backward_by_example(
                dense,
                head,
                rows.labels,
                rows.runner_up,
                lengths,
                losses.grad_logps,
                chunk_rows=chunk_rows,
                needs_grad=(need_hidden, need_weight, need_bias),
            )
        used = logps if weights is None else logps * weights
        output = losses.result(used)
        ctx.call, ctx.index = _Call.of(hidden, head, chunk_rows), rows.index
        grads = losses.grads
        grad_logps = grads[0] if len(grads) == 1 else torch.cat([logps[:0], *grads])
        kept = _kept_targets(rows, targets)
        ctx.save_for_backward(hidden, weight, bias, kept, plan.ids_on_device, weights, grad_logps)
        ctx.mark_non_differentiable(output.rewards, output.token_counts, output.term_losses)
        ctx.set_materialize_grads(False)

        # The only wait for the device. It comes last, when all work of the forward is enqueued.
        flag = sentinel(output.logps - reference_logps)
        both: list[float] = []
        if losses.partial:
            parts = torch.stack(losses.partial).sum(dtype=torch.float64)
            finite, *both = torch.stack([flag, parts, output.loss.double()]).tolist()
        else:
            finite = flag.item()
        if not math.isfinite(finite):
            if retry := head.retry():
                return FusedPreference.forward(ctx, hidden, weight, bias, retry, loss, chunk_rows)
            check_rows(finite_rows(logps, None), rows.index, dense, head)
            check_tables(used, rows.index, output.logps, reference_logps)
        if both:
            losses.check_parts(*both)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, grad_loss, grad_sums, *_) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # Autograd takes them over without a copy. A second backward recomputes them.
        ready, ctx.grads = ctx.grads, None
        grads: list[Tensor | None] = [None, None, None]
        if ready is not None and grad_loss is not None:
            hidden, *of_head = ready
            if hidden is not None:
                hidden = scaled(hidden, grad_loss, ctx.call.dtype)
                hidden = spread_rows(hidden, ctx.index, ctx.call.shape)
            for grad in of_head:
                if grad is not None:
                    backend_for(grad, ctx.call.backend).scale(grad, grad_loss)
            grads, grad_loss = [hidden, *of_head], None
        if grad_loss is not None or grad_sums is not None:
            more = FusedPreference._recomputed(ctx, grad_loss, grad_sums)
            pairs = zip(grads, more, strict=True)
            grads = [b if a is None else a if b is None else a + b for a, b in pairs]
        return (*grads, *(None,) * 3)

    @staticmethod
    def _recomputed(ctx: Any, grad_loss: Tensor | None, grad_sums: Tensor | None) -> Gradients:
        """Gradients from those of the loss and of the sums, in 3 GEMMs."""
        hidden, weight, bias, targets, ids, weights, grad_logps = ctx.saved_tensors
        grad = torch.zeros_like(grad_logps) if grad_loss is None else grad_logps * grad_loss
        if grad_sums is not None:
            of_row = grad_sums.flatten()[ids]
            grad = grad + (of_row if weights is None else of_row * weights).to(grad.dtype)
        dense = take_rows(hidden, ctx.index)
        saved = (dense, weight, bias, targets, ctx.index)
        return ctx.call.gradients(grad, *saved, ctx.needs_input_grad)


def _with_grad(
    loss_of: Callable[[Tensor], PreferenceOutput],
    sums: Tensor,  # (L, B)
) -> tuple[PreferenceOutput, Tensor]:
    """loss_of(sums) and the gradient of its loss, computed outside the caller's graph."""
    # Checkpointing hooks would run the caller's forward again for each saved tensor.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        output = loss_of(sums.requires_grad_())
        grad = None
        if output.loss.requires_grad:  # False if all leaves are detached
            (grad,) = torch.autograd.grad(output.loss, sums, allow_unused=True)
    output = output._replace(loss=output.loss.detach(), logps=sums.detach())
    return output, torch.zeros_like(output.logps) if grad is None else grad


def _same(tensor: Tensor) -> Tensor:
    return tensor
