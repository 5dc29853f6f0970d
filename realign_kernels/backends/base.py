"""Protocols of a backend and of its kernels, and the statistics of a row.

With z the logits of a row, t its target, and everything below about the *other* tokens (v != t):

    max_logit = max z_v      exp_logits_v = E_v = exp(z_v - max_logit)      sum_exp = sum E_v
    logit_gap = z_t - max_logit - log sum_exp      # the target's logit against all others
    logp = logsigmoid(logit_gap)      one_minus_p = 1 - p_t = sigmoid(-logit_gap)
    dlogp_dh = one_minus_p * (dz_dlogit * W[t] - (E W) / sum_exp)

Leaving the target out before anything is rounded is what keeps confident tokens right: W[t] - p W
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


class Kernels(Protocol):
    """Kernels of the chunked backend. `backends.torch.TorchKernels` runs on any device."""

    def buffers(
        self, rows: int, hidden: Tensor, vocabulary: int, derivative: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Memory for the logits of a chunk, and for exp_logits (hidden's dtype), may be shared.

        They are the caller's until it calls `release`.
        """
        ...

    def release(self, logits: Tensor) -> None:
        """Return the memory of `buffers`."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a result, as torch.empty."""
        ...

    def gemm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        """out = a @ b, or out += a @ b; out may be fp32 where a and b are half."""
        ...

    def row_stats(
        self,
        logits: Tensor,  # (r, V) hidden @ weight.T, is overwritten
        labels: Tensor,  # (r,) int64; -1: on another shard
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        temperature: float,
        runner_up: Tensor | None,  # (r,) bool: the target is the strongest token but the label
        exp_logits: Tensor | None,  # (r, V), None: no derivative is needed
    ) -> RowStats:
        """The row kernel: statistics; exp_logits = E * dz / d(raw logit), 0 at the target.

        A NaN in a row, or an infinite logit, must make logit_gap NaN or logit infinite.
        """
        ...

    def head_stats(self, hidden: Tensor, labels: Tensor, head: Head) -> RowStats | None:
        """`row_stats` from hidden states, without logits in memory; None without such a kernel."""

    def fuses(self, hidden: Tensor, head: Head) -> bool:
        """Whether `fused` can compute on these."""
        return False

    def fused(
        self,
        hidden: Tensor,  # (r, H)
        labels: Tensor,  # (r,) int64 in [0, V)
        head: Head,
        exp_logits: Tensor,  # (r, V), written: E * dz / d(raw logit) up to a factor, 0 at the label
    ) -> Scores:
        """Scores from hidden states, where `fuses` allows it.

        A row whose E overflows is not finite, in its log-prob or in exp_logits @ weight.
        """
        raise AssertionError("called where `fuses` is False")

    def hidden_grad_epilogue(
        self,
        exp_w: Tensor,  # (r, H) exp_logits @ weight, wide
        weight: Tensor,  # (V, H)
        scores: Scores,
        factor: Tensor,  # (r,) wide
        out: Tensor,  # (r, H)
    ) -> None:
        """out = factor * (dz_dlogit * weight[target] - exp_w / sum_exp); target -1: no weight."""

    def scale(
        self,
        values: Tensor,  # contiguous
        factor: Tensor,  # () wide
    ) -> None:
        """values *= factor, without a pass over them where the factor is 1."""

    def add_rows(
        self,
        total: Tensor,  # (V, H)
        index: Tensor,  # (r,) int64 in [0, V), r > 0; -1: on another shard
        rows: Tensor,  # (r, H) wide, 0 where index is -1
    ) -> None:
        """total[index] += rows, with wide sums also where total is half."""

    def fused_loss(self, objective: Objective) -> Callable | None:
        """A kernel from tokens to the loss (`triton.loss.preference_sums`), None without one."""


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
        ...

    def example_rows(
        self, hidden: Tensor, head: Head, runner_up: bool, chunk_rows: int | None
    ) -> int:
        """Rows that `forward_backward_by_example` scores at once."""
        ...

    def scale(self, values: Tensor, factor: Tensor) -> None:
        """See `Kernels.scale`."""

    def fused_loss(self, objective: Objective) -> Callable | None:
        """See `Kernels.fused_loss`."""


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
    # It is 0 only if there are no other tokens; the product that it divides is 0, too.
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
