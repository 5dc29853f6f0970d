"""Row kernel and GEMM in torch operations: on any device and in any dtype."""

import torch
from torch import Tensor

from realign_kernels.backends.base import Kernels, RowStats, Scores
from realign_kernels.backends.chunked import ChunkedBackend
from realign_kernels.reference import acc_dtype


class TorchKernels(Kernels):
    """`base.Kernels` without a kernel of our own; the base of the other two."""

    def buffers(
        self, rows: int, hidden: Tensor, vocabulary: int, derivative: bool
    ) -> tuple[Tensor, Tensor | None]:
        """fp32 logits on CUDA. The CPU of torch has no GEMM that widens, and rounds them."""
        acc = acc_dtype(hidden.dtype) if hidden.is_cuda else hidden.dtype
        logits = hidden.new_empty(rows, vocabulary, dtype=acc)
        if not derivative or acc == hidden.dtype:
            return logits, logits if derivative else None
        return logits, hidden.new_empty(rows, vocabulary)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def gemm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        """out = a @ b, or out += a @ b.

        Where a, b are half and out is not, CUDA writes the fp32 accumulator; the CPU rounds the
        product before it widens. For bf16 logits of standard deviation 4 that costs 1e-2 in
        log-prob on average and 6e-2 at most, as in eager torch.
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
        logits: Tensor,  # (r, V)
        labels: Tensor,  # (r,)
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        temperature: float,
        runner_up: Tensor | None,  # (r,) bool
        exp_logits: Tensor | None,  # (r, V)
    ) -> RowStats:
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
        # With no other token left (V = 1, or a bias of -inf) the maximum is -inf, and
        # -inf - -inf is NaN.
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

    def hidden_grad_epilogue(
        self,
        exp_w: Tensor,  # (r, H)
        weight: Tensor,  # (V, H)
        scores: Scores,
        factor: Tensor,  # (r,)
        out: Tensor,  # (r, H)
    ) -> None:
        # dz_dlogit is 0 where the target is on another shard.
        target_w = weight[scores.target.clamp(min=0)].to(exp_w.dtype) * scores.dz_dlogit[:, None]
        out.copy_((target_w - exp_w / scores.sum_exp[:, None]) * factor[:, None])

    def scale(
        self,
        values: Tensor,
        factor: Tensor,  # ()
    ) -> None:
        """values *= factor. On the CPU the factor is read first, to save a pass over the values."""
        if factor.is_cuda or factor.item() != 1:
            values.mul_(factor)

    def add_rows(
        self,
        total: Tensor,  # (V, H)
        index: Tensor,  # (r,) int64, r > 0
        rows: Tensor,  # (r, H)
    ) -> None:
        """total[index] += rows.

        Equal indices are summed first. Their number stays on the device, so there are r sums: those
        past the last distinct index repeat it, and write the same values again.
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


def _with_runner_up(
    z: Tensor,  # (r, V)
    labels: Tensor,  # (r,)
    runner_up: Tensor,  # (r,) bool
) -> Tensor:  # (r,)
    """The label, or in runner-up rows the first strongest token that is not the label."""
    strongest = z.scatter(1, labels[:, None], float("-inf")).argmax(1)
    # Where every other token is -inf, argmax may be the label itself.
    strongest = torch.where(strongest == labels, (labels == 0).long(), strongest)
    return torch.where(runner_up, strongest, labels)


def backend() -> ChunkedBackend:
    """See `dispatch.MODULES`."""
    return ChunkedBackend(TorchKernels())
