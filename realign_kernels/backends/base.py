"""The head, a chunk of rows at a time: what a row kernel takes and leaves behind.

With z the logits of a row, t its target, and everything below about the *other* tokens (v != t):

    peak = max z_v        E_v = exp(z_v - peak)        total = sum E_v
    gap  = z_t - peak - log total            # the target's logit against all others
    logp = logsigmoid(gap)      miss = 1 - p_t = sigmoid(-gap)
    d logp / d hidden = miss * (W[t] - (E W) / total)

Leaving the target out before anything is rounded is what keeps confident tokens right: W[t] - p W
with p in bf16 has a relative error of 1 at miss = 6e-4. Taking the peak over the others alone
keeps E in range for fp16, and gap needs no guard for targets that are very unlikely.
"""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class VocabularyShard(NamedTuple):
    """Which rows of the head this rank holds."""

    group: dist.ProcessGroup
    start: int
    total: int
    """Vocabulary over all ranks."""
    largest: int
    """Rows of the largest shard: what every rank sizes its chunks by, so that they agree."""


class Head(NamedTuple):
    """z = cap(hidden @ weight.T + bias) / temperature, cap(x) = softcap * tanh(x / softcap)."""

    weight: Tensor  # (V, H); with a shard, this rank's rows
    bias: Tensor | None  # (V,)
    softcap: float | None
    temperature: float
    shard: VocabularyShard | None = None
    peak: bool = False
    """Without `Kernels.fused`, for which labels may be too far below other tokens."""

    @property
    def vocabulary(self) -> int:
        """Tokens of the whole head, over all shards."""
        return len(self.weight) if self.shard is None else self.shard.total

    def again(self) -> "Head | None":
        """The head for a second try where results are not finite; None if it would change nothing.

        Shards never fuse, and their ranks must not differ in what they compute.
        """
        return None if self.peak or self.shard is not None else self._replace(peak=True)


class RowStats(NamedTuple):
    """What a row kernel returns, one entry per row. fp32; fp64 for fp64 logits."""

    target: Tensor  # (r,) int64, the label or the rival; -1 where it is on another shard
    logit: Tensor  # (r,) z[target], -inf where target is -1
    peak: Tensor  # (r,) max over the others, clamped to finite: there may be none
    total: Tensor  # (r,) sum over the others of exp(z - peak)
    slope: Tensor  # (r,) dz / d(raw logit) at the target, 0 where it is -1
    divisor: Tensor  # (r,) total, or the sum of E as it was rounded, by which E W is divided


class Kernels(Protocol):
    """What a chunked backend provides; a module that defines these functions."""

    def buffers(
        self, rows: int, hidden: Tensor, vocabulary: int, derivative: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Memory for the logits of a chunk, and for `others` (hidden's dtype), which may share it.

        They are the caller's until it calls `release`.
        """

    def release(self, logits: Tensor) -> None:
        """Gives the memory of `buffers` back."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a result, as torch.empty."""

    def gemm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        """out = a @ b, or out += a @ b; out may be fp32 where a and b are half."""

    def read_rows(
        self,
        logits: Tensor,  # (r, V) hidden @ weight.T, is overwritten
        labels: Tensor,  # (r,) int64; -1: on another shard
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        temperature: float,
        rival: Tensor | None,  # (r,) bool: the target is the strongest token but the label
        others: Tensor | None,  # (r, V), None: no derivative is wanted
    ) -> RowStats:
        """The statistics of each row; others = E * dz / d(raw logit), 0 at the target.

        A NaN in a row, or an infinite logit, must make gap NaN or logit infinite.
        """

    def fused(
        self,
        hidden: Tensor,  # (r, H)
        labels: Tensor,  # (r,) int64 in [0, V)
        head: Head,
        others: Tensor,  # (r, V), written: E * dz / d(raw logit) up to a factor, 0 at the label
    ) -> "Scores":
        """Scores from hidden states, where `fuses` says so (both are optional in a module).

        A row whose E overflows is not finite, in its log-prob or in others @ weight.
        """

    def fuses(self, hidden: Tensor, head: Head) -> bool:
        """Whether `fused` can compute on these."""

    def scale(
        self,
        values: Tensor,  # contiguous
        factor: Tensor,  # () wide
    ) -> None:
        """values *= factor, without a pass over them where the factor is 1."""

    def finish(
        self,
        pull: Tensor,  # (r, H) others @ weight, wide
        weight: Tensor,  # (V, H)
        scores: "Scores",
        factor: Tensor,  # (r,) wide
        out: Tensor,  # (r, H)
    ) -> None:
        """out = factor * (slope * weight[target] - pull / total); no weight where target is -1."""

    def add_rows(
        self,
        total: Tensor,  # (V, H)
        index: Tensor,  # (r,) int64 in [0, V), r > 0; -1: on another shard
        rows: Tensor,  # (r, H) wide, 0 where index is -1
    ) -> None:
        """total[index] += rows, with wide sums also where total is half."""


class Scores(NamedTuple):
    """RowStats made into log-probs, over all shards."""

    logps: Tensor  # (r,)
    miss: Tensor  # (r,) 1 - p[target]
    target: Tensor  # (r,) in this shard, or -1
    total: Tensor  # (r,) RowStats.divisor over all shards, on the scale of this shard's E
    slope: Tensor  # (r,)


def score(stats: RowStats, shard: VocabularyShard | None) -> Scores:
    """log p[target] and 1 - p[target]. With a shard: two reductions over its group."""
    logit, peak, total, divisor = stats.logit, stats.peak, stats.total, stats.divisor
    scale = torch.ones_like(total)
    if shard is not None:
        highest = peak.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, shard.group)
        scale = (peak - highest).exp()
        owned = logit.masked_fill(stats.target < 0, 0)  # -inf elsewhere would swallow it
        sums = torch.stack([total * scale, divisor * scale, owned])
        dist.all_reduce(sums, group=shard.group)
        peak, (total, divisor, logit) = highest, sums
    # logit - logit is 0, but NaN where it is inf: an overflow must not read as certainty.
    gap = logit - peak - total.log() + (logit - logit)
    # It is 0 only if there are no others, and what it divides with it.
    safe = divisor.clamp(min=torch.finfo(total.dtype).tiny) / scale
    return Scores(F.logsigmoid(gap), torch.sigmoid(-gap), stats.target, safe, stats.slope)


def scaled(
    values: Tensor,  # (n, H)
    factor: Tensor,  # (n,) or () wide
    dtype: torch.dtype,
) -> Tensor:  # (n, H)
    """values * factor, rounded once to dtype, in one pass over memory."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    return torch.mul(values, factor.unsqueeze(-1), out=out)


def shard_of(weight: Tensor, group: dist.ProcessGroup) -> VocabularyShard:
    """Which rows of the whole head `weight` is: shards stand in the order of the ranks.

    Raises:
        ValueError: when a rank has no row.
    """
    mine = torch.tensor([len(weight)], device=weight.device)
    sizes = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sizes, mine, group)
    counts = torch.cat(sizes).tolist()
    if min(counts) == 0:
        raise ValueError(
            f"weight has {counts} rows on the ranks of group: each needs one, use fewer ranks"
        )
    return VocabularyShard(group, sum(counts[: group.rank()]), sum(counts), max(counts))
