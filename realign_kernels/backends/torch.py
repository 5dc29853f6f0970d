"""Row kernel and GEMM in torch operations, for any device and dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels.backends.base import NO_FUSED_LOSS, RowStats, Scores
from realign_kernels.lm_head import Head
from realign_kernels.objectives import Objective
from realign_kernels.reference import acc_dtype


class TorchKernels:
    """The kernels of `chunked.ChunkedBackend`; `CppKernels` and `TritonKernels` override them."""

    def buffers(
        self, rows: int, hidden: Tensor, vocabulary: int, derivative: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Memory for the logits of a chunk and for exp_logits (in hidden's dtype).

        The two may share memory. It belongs to the caller until `release`. Logits are fp32 on
        CUDA. On the CPU torch has no GEMM with fp32 results, so it rounds logits to hidden's dtype.
        """
        acc = acc_dtype(hidden.dtype) if hidden.is_cuda else hidden.dtype
        logits = hidden.new_empty(rows, vocabulary, dtype=acc)
        if not derivative or acc == hidden.dtype:
            return logits, logits if derivative else None
        return logits, hidden.new_empty(rows, vocabulary)

    def release(self, logits: Tensor) -> None:
        """Return the memory of `buffers`."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype, device=device)

    def gemm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        """out = a @ b, or out += a @ b. out may be fp32 for half-precision a and b.

        In this case CUDA writes the fp32 accumulator, but the CPU rounds the product first. For
        bf16 logits of standard deviation 4 the rounding changes a log-prob by 1e-2 on average and
        by 6e-2 at most, as in eager torch.
        """
        if a.dtype == out.dtype:
            return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
        if a.is_cuda and accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        product = torch.mm(a, b)
        return out.add_(product) if accumulate else out.copy_(product)

    def row_stats(
        self,
        logits: Tensor,  # (r, V) hidden @ weight.T, overwritten
        labels: Tensor,  # (r,) int64; -1: on another shard
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        temperature: float,
        runner_up: Tensor | None,  # (r,) bool: the target is the strongest token except the label
        exp_logits: Tensor | None,  # (r, V), written; None: no derivative is needed
    ) -> RowStats:
        """The row kernel: statistics; exp_logits = E * dz / d(raw logit), 0 at the target.

        A NaN in a row, or an infinite logit, must make logit_gap NaN or logit infinite.
        """
        z = logits.to(acc_dtype(logits.dtype))
        if bias is not None:
            z.add_(bias)
        derivative = None
        if softcap is not None:
            z.div_(softcap).tanh_()
            derivative = (1 - z * z) / temperature
            z.mul_(softcap)
        if temperature != 1:
            z.div_(temperature)

        target = labels if runner_up is None else _with_runner_up(z, labels, runner_up)
        absent, index = target < 0, target.clamp(min=0)[:, None]
        logit = z.gather(1, index).squeeze(1)
        z.scatter_(1, index, torch.where(absent, logit, float("-inf"))[:, None])
        # Without another token (V = 1, or a bias of -inf) the maximum is -inf, and -inf - -inf
        # is NaN.
        max_logit = z.amax(1).clamp_(min=torch.finfo(z.dtype).min)
        sum_exp = z.sub_(max_logit[:, None]).exp_().sum(1)
        dz_dlogit = torch.full_like(max_logit, 1 / temperature)
        if derivative is not None:
            dz_dlogit = derivative.gather(1, index).squeeze(1)
        if exp_logits is not None:
            if derivative is not None:
                z.mul_(derivative)
            elif temperature != 1:
                z.div_(temperature)
            exp_logits.copy_(z)
        logit = logit.masked_fill(absent, float("-inf"))
        return RowStats(
            target, logit, max_logit, sum_exp, dz_dlogit.masked_fill(absent, 0), sum_exp
        )

    def head_stats(self, hidden: Tensor, labels: Tensor, head: Head) -> RowStats | None:
        """`row_stats` from hidden states without logits in memory, or None without a kernel."""

    def fuses(self, hidden: Tensor, head: Head) -> bool:
        """Whether `fused` supports these inputs."""
        return False

    def fused(
        self,
        hidden: Tensor,  # (r, H)
        labels: Tensor,  # (r,) int64 in [0, V)
        head: Head,
        exp_logits: Tensor,  # (r, V), written: E * dz / d(raw logit) up to a factor, 0 at the label
    ) -> Scores:
        """Scores from hidden states, for inputs that `fuses` accepts.

        If E of a row overflows, its log-prob or its exp_logits @ weight is not finite.
        """
        raise NotImplementedError

    def hidden_grad_epilogue(
        self,
        exp_w: Tensor,  # (r, H) exp_logits @ weight, wide
        weight: Tensor,  # (V, H)
        scores: Scores,
        factor: Tensor,  # (r,) wide
        out: Tensor,  # (r, H)
    ) -> None:
        """out = factor * (dz_dlogit * weight[target] - exp_w / sum_exp).

        The first term is 0 for target -1.
        """
        # dz_dlogit is 0 if the target is on another shard.
        target_w = weight[scores.target.clamp(min=0)].to(exp_w.dtype) * scores.dz_dlogit[:, None]
        out.copy_((target_w - exp_w / scores.sum_exp[:, None]) * factor[:, None])

    def scale(
        self,
        values: Tensor,  # contiguous
        factor: Tensor,  # () wide
    ) -> None:
        """values *= factor, skipped if the factor is 1."""
        if factor.is_cuda or factor.item() != 1:
            values.mul_(factor)

    def add_rows(
        self,
        total: Tensor,  # (V, H)
        index: Tensor,  # (r,) int64 in [0, V), r > 0; -1: on another shard
        rows: Tensor,  # (r, H) wide, 0 where index is -1
    ) -> None:
        """total[index] += rows, with wide sums even if total is half precision.

        Rows with equal indices are summed first. The number of distinct indices stays on the
        device, so there are always r sums. Sums past the last distinct index repeat it, and write
        the same values again.
        """
        index = index.clamp(min=0)
        if total.dtype == rows.dtype:
            total.index_add_(0, index, rows)
            return
        ordered, order = index.sort(stable=True)
        place = (ordered[1:] != ordered[:-1]).cumsum(0)
        place = torch.cat([place.new_zeros(1), place])
        sums = rows.new_zeros(rows.shape).index_add_(0, place, rows[order])
        slots = torch.arange(len(index), device=index.device).clamp_(max=place[-1])
        distinct = torch.empty_like(ordered).index_copy_(0, place, ordered)[slots]
        total[distinct] = (total[distinct] + sums[slots]).to(total.dtype)

    def fused_loss(self, objective: Objective) -> Callable | str:
        """See `base.Backend.fused_loss`."""
        return NO_FUSED_LOSS


def _with_runner_up(
    z: Tensor,  # (r, V)
    labels: Tensor,  # (r,)
    runner_up: Tensor,  # (r,) bool
) -> Tensor:  # (r,)
    """The label, or in runner-up rows the first strongest token except the label."""
    strongest = z.scatter(1, labels[:, None], float("-inf")).argmax(1)
    # If every other token is -inf, argmax may return the label.
    strongest = torch.where(strongest == labels, (labels == 0).long(), strongest)
    return torch.where(runner_up, strongest, labels)
