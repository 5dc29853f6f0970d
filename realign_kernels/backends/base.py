"""The protocol of a backend, and the statistics of a row.

With z the logits of a row, t its target, and everything below about the *other* tokens (v != t):

    max_logit = max z_v      exp_logits_v = E_v = exp(z_v - max_logit)      sum_exp = sum E_v
    logit_gap = z_t - max_logit - log sum_exp      # the target's logit against all others
    logp = logsigmoid(logit_gap)      one_minus_p = 1 - p_t = sigmoid(-logit_gap)
    dlogp_dh = one_minus_p * (dz_dlogit * W[t] - (E W) / sum_exp)

The target is left out before anything is rounded, which keeps confident tokens right: W[t] - p W
with p in bf16 has a relative error of 1 at 1 - p = 6e-4. The maximum over the other tokens keeps E
in range for fp16, and logit_gap needs no guard for targets that are very unlikely.
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
"""Those of hidden, weight and bias; None where not needed."""


class RowStats(NamedTuple):
    """Result of a row kernel, one entry per row. fp32; fp64 for fp64 logits."""

    target: Tensor  # (r,) int64, the label or the runner-up; -1 where it is on another shard
    logit: Tensor  # (r,) z[target], -inf where target is -1
    max_logit: Tensor  # (r,) over the other tokens, clamped to finite: there may be none
    sum_exp: Tensor  # (r,) sum over the other tokens of exp(z - max_logit)
    dz_dlogit: Tensor  # (r,) dz / d(raw logit) at the target, 0 where it is -1
    divisor: Tensor  # (r,) sum_exp, or the sum of E as it was rounded, by which E W is divided


class Scores(NamedTuple):
    """RowStats made into log-probs, over all shards."""

    logps: Tensor  # (r,)
    one_minus_p: Tensor  # (r,) 1 - p[target]
    target: Tensor  # (r,) in this shard, or -1
    sum_exp: Tensor  # (r,) RowStats.divisor over all shards, on the scale of this shard's E
    dz_dlogit: Tensor  # (r,)


class Backend(Protocol):
    """A backend. Rows are compacted: no label is ignored, all are in [0, V)."""

    def forward(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,) int64
        runner_up: Tensor | None,  # (n,) bool: the target is the strongest token but the label
        *,
        chunk_rows: int | None,
        keep_dlogp_dh: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # (n,), (n,), (n, H)
        """logps, targets and, if kept, d logp_i / d hidden_i; logps and dlogp_dh are wide."""
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
        """logps, targets and gradients in one pass, for a loss that is a sum over examples.

        grad_logps_fn(first, last, logps) is d loss / d logp of the rows of examples [first, last).
        The gradient of hidden is wide: it can still be scaled before it is rounded.
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
        """Rows that `forward_backward_by_example` scores at once."""
        return len(hidden)

    def scale(self, values: Tensor, factor: Tensor) -> None:
        """values *= factor, a scalar on the device."""
        values.mul_(factor)

    def fused_loss(self, objective: Objective) -> Callable | None:
        """A kernel from tokens to the loss (`triton.loss.preference_sums`), None without one."""
        return None


def score(stats: RowStats, shard: VocabularyShard | None) -> Scores:
    """log p[target] and 1 - p[target]. With a shard: two reductions over its group."""
    logit, max_logit, sum_exp, divisor = stats.logit, stats.max_logit, stats.sum_exp, stats.divisor
    scale = torch.ones_like(sum_exp)
    if shard is not None:
        highest = max_logit.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, shard.group)
        scale = (max_logit - highest).exp()
        owned = logit.masked_fill(stats.target < 0, 0)  # -inf elsewhere would swallow it
        sums = torch.stack([sum_exp * scale, divisor * scale, owned])
        dist.all_reduce(sums, group=shard.group)
        max_logit, (sum_exp, divisor, logit) = highest, sums
    # logit - logit is 0, but NaN where it is inf: an overflow must not read as certainty.
    logit_gap = logit - max_logit - sum_exp.log() + (logit - logit)
    # It is 0 only if there are no other tokens; then the product that it divides is also 0.
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
