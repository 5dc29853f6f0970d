"""The backend protocol, and the statistics of a row.

With z the logits of a row and t its target, sums and maxima are over the *other* tokens (v != t):

    max_logit = max z_v      exp_logits_v = E_v = exp(z_v - max_logit)      sum_exp = sum E_v
    logit_gap = z_t - max_logit - log sum_exp      # the target's logit against all others
    logp = logsigmoid(logit_gap)      one_minus_p = 1 - p_t = sigmoid(-logit_gap)
    dlogp_dh = one_minus_p * (dz_dlogit * W[t] - (E W) / sum_exp)

The target is excluded before anything is rounded, which keeps confident tokens accurate. W[t] - p W
with p in bf16, in comparison, has a relative error of 1 at 1 - p = 6e-4. The maximum over the other
tokens keeps E in range for fp16. logit_gap needs no guard for very unlikely targets.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from realign_kernels.lm_head import Head, VocabularyShard
from realign_kernels.objectives import Objective

NeedsGrad = tuple[bool, bool, bool]
"""Whether hidden, weight and bias need a gradient."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of hidden, weight and bias, None if not needed."""
NO_FUSED_LOSS = "this backend has no fused kernel"
"""Reason for torch operations in backends other than Triton."""


class RowStats(NamedTuple):
    """Result of a row kernel, one entry per row. fp32; fp64 for fp64 logits."""

    target: Tensor  # (r,) int64. Label or runner-up, -1 if it is on another shard.
    logit: Tensor  # (r,) z[target], -inf for target -1.
    max_logit: Tensor  # (r,) over the other tokens. Finite even if there are none.
    sum_exp: Tensor  # (r,) sum over the other tokens of exp(z - max_logit).
    dz_dlogit: Tensor  # (r,) dz / d(raw logit) at the target, 0 for target -1.
    divisor: Tensor  # (r,) divides E W: sum_exp, or the sum of the rounded E.


class Scores(NamedTuple):
    """Log-probs and 1 - p from RowStats, over all shards."""

    logps: Tensor  # (r,)
    one_minus_p: Tensor  # (r,) 1 - p[target]
    target: Tensor  # (r,) index in this shard, or -1
    sum_exp: Tensor  # (r,) RowStats.divisor over all shards, on the scale of this shard's E
    dz_dlogit: Tensor  # (r,)


class Backend(Protocol):
    """A backend. Rows are compacted: no label is ignored, all are in [0, V)."""

    def forward(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,) int64
        runner_up: Tensor | None,  # (n,) bool: the target is the strongest token except the label
        *,
        chunk_rows: int | None,
        keep_dlogp_dh: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # (n,), (n,), (n, H)
        """Log-probs, targets and, if kept, d logp_i / d hidden_i.

        Log-probs and dlogp_dh are wide (fp32 or fp64).
        """
        ...

    def backward(
        self,
        grad: Tensor,  # (n,) in the dtype of logps
        hidden: Tensor,  # (n, H)
        head: Head,
        targets: Tensor,  # (n,) int64
        *,
        chunk_rows: int | None,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        """Gradients in the dtypes of hidden, weight and bias."""
        ...

    def forward_backward_by_example(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,) int64
        runner_up: Tensor | None,  # (n,) bool
        lengths: list[int],  # rows of each example, sum n
        grad_logps_fn: Callable[[int, int, Tensor], Tensor],
        *,
        chunk_rows: int | None,
        needs_grad: NeedsGrad,
    ) -> tuple[Tensor, Tensor, Gradients]:  # (n,), (n,)
        """Log-probs, targets and gradients in one pass, for a loss that is a sum over examples.

        grad_logps_fn(first, last, logps) is d loss / d logp of the rows of examples [first, last).
        The gradient of hidden is wide, so that it can be scaled before it is rounded.
        """
        logps, targets, _ = self.forward(
            hidden, head, labels, runner_up, chunk_rows=chunk_rows, keep_dlogp_dh=False
        )
        grad = grad_logps_fn(0, len(lengths), logps)
        settings = {"chunk_rows": chunk_rows, "needs_grad": needs_grad}
        return logps, targets, self.backward(grad, hidden, head, targets, **settings)

    def example_rows(
        self, hidden: Tensor, head: Head, runner_up: bool, chunk_rows: int | None
    ) -> int:
        """Number of rows that `forward_backward_by_example` scores at once."""
        return len(hidden)

    def scale(self, values: Tensor, factor: Tensor) -> None:
        """values *= factor, where factor is a scalar on the device."""
        values.mul_(factor)

    def fused_loss(self, objective: Objective) -> Callable | str:
        """A kernel from token log-probs to the loss (`triton.loss.preference_sums`).

        Or the reason why torch operations compute this objective.
        """
        return NO_FUSED_LOSS


def score(stats: RowStats, shard: VocabularyShard | None) -> Scores:
    """log p[target] and 1 - p[target]. A vocabulary shard needs two reductions over its group."""
    logit, max_logit, sum_exp, divisor = stats.logit, stats.max_logit, stats.sum_exp, stats.divisor
    scale = torch.ones_like(sum_exp)
    if shard is not None:
        highest = max_logit.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, shard.group)
        scale = (max_logit - highest).exp()
        owned = logit.masked_fill(stats.target < 0, 0)  # -inf of another shard would spoil the sum
        sums = torch.stack([sum_exp * scale, divisor * scale, owned])
        dist.all_reduce(sums, group=shard.group)
        max_logit, (sum_exp, divisor, logit) = highest, sums
    # logit - logit is 0, but NaN for an infinite logit: an overflow must not look like certainty.
    logit_gap = logit - max_logit - sum_exp.log() + (logit - logit)
    # The divisor is 0 only if there are no other tokens. The product that it divides is then 0.
    safe = divisor.clamp(min=torch.finfo(sum_exp.dtype).tiny) / scale
    logps, one_minus_p = F.logsigmoid(logit_gap), torch.sigmoid(-logit_gap)
    return Scores(logps, one_minus_p, stats.target, safe, stats.dz_dlogit)


def scaled(
    values: Tensor,  # (n, H)
    factor: Tensor,  # (n,) or () wide
    dtype: torch.dtype,
) -> Tensor:  # (n, H)
    """values * factor, rounded once to dtype, in one pass over memory."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    return torch.mul(values, factor.unsqueeze(-1), out=out)
