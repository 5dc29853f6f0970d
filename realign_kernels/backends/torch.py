"""Row kernel and GEMM in torch operations: works on any device and in any dtype."""

import torch
from torch import Tensor

from realign_kernels.backends.base import RowStats, Scores
from realign_kernels.backends.chunked import ChunkedBackend
from realign_kernels.reference import wide_dtype


def buffers(
    rows: int, hidden: Tensor, vocabulary: int, derivative: bool
) -> tuple[Tensor, Tensor | None]:
    """fp32 logits on CUDA. The CPU of torch has no GEMM that widens, and rounds them."""
    wide = wide_dtype(hidden.dtype) if hidden.is_cuda else hidden.dtype
    logits = hidden.new_empty(rows, vocabulary, dtype=wide)
    if not derivative or wide == hidden.dtype:
        return logits, logits if derivative else None
    return logits, hidden.new_empty(rows, vocabulary)


def release(logits: Tensor) -> None:
    """See `rows.Kernels`."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """See `rows.Kernels`."""
    return torch.empty(shape, dtype=dtype, device=device)


def gemm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b. See `rows.Kernels`.

    Where a, b are half and out is not, CUDA writes the fp32 accumulator; the CPU rounds the product
    before it widens. For bf16 logits of standard deviation 4 that costs 1e-2 in log-prob on average
    and 6e-2 at most, as in eager torch.
    """
    if a.dtype == out.dtype:
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    if a.is_cuda:
        settings = {"out_dtype": out.dtype, "out": out}
        return torch.addmm(out, a, b, **settings) if accumulate else torch.mm(a, b, **settings)
    product = torch.mm(a, b)
    return out.add_(product) if accumulate else out.copy_(product)


def read_rows(
    logits: Tensor,  # (r, V)
    labels: Tensor,  # (r,)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    rival: Tensor | None,  # (r,) bool
    others: Tensor | None,  # (r, V)
) -> RowStats:
    """See `rows.Kernels`."""
    z = logits.to(wide_dtype(logits.dtype))
    if bias is not None:
        z.add_(bias)
    slopes = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slopes = (1 - z * z) / temperature
        z.mul_(softcap)
    if temperature != 1:
        z.div_(temperature)

    target = labels if rival is None else _with_rivals(z, labels, rival)
    absent, index = target < 0, target.clamp(min=0)[:, None]
    logit = z.gather(1, index).squeeze(1)
    z.scatter_(1, index, torch.where(absent, logit, float("-inf"))[:, None])
    # With no other token left (V = 1, or a bias of -inf) the peak is -inf, and -inf - -inf is NaN.
    peak = z.amax(1).clamp_(min=torch.finfo(z.dtype).min)
    total = z.sub_(peak[:, None]).exp_().sum(1)
    slope = torch.full_like(peak, 1 / temperature)
    if slopes is not None:
        slope = slopes.gather(1, index).squeeze(1)
    if others is not None:
        if slopes is not None:
            z.mul_(slopes)
        elif temperature != 1:
            z.div_(temperature)
        others.copy_(z)
    logit = logit.masked_fill(absent, float("-inf"))
    return RowStats(target, logit, peak, total, slope.masked_fill(absent, 0), total)


def _with_rivals(
    z: Tensor,  # (r, V)
    labels: Tensor,  # (r,)
    rival: Tensor,  # (r,) bool
) -> Tensor:  # (r,)
    """The label, or in rival rows the first strongest token that is not the label."""
    strongest = z.scatter(1, labels[:, None], float("-inf")).argmax(1)
    # Where every other token is -inf, argmax may be the label itself.
    strongest = torch.where(strongest == labels, (labels == 0).long(), strongest)
    return torch.where(rival, strongest, labels)


def finish(
    pull: Tensor,  # (r, H)
    weight: Tensor,  # (V, H)
    scores: Scores,
    factor: Tensor,  # (r,)
    out: Tensor,  # (r, H)
) -> None:
    """See `rows.Kernels`. slope is 0 where the target is on another shard."""
    push = weight[scores.target.clamp(min=0)].to(pull.dtype) * scores.slope[:, None]
    out.copy_((push - pull / scores.total[:, None]) * factor[:, None])


def scale(
    values: Tensor,
    factor: Tensor,  # ()
) -> None:
    """See `rows.Kernels`. On the CPU a pass over the values is worth a look at the factor."""
    if factor.is_cuda or factor.item() != 1:
        values.mul_(factor)


def add_rows(
    total: Tensor,  # (V, H)
    index: Tensor,  # (r,) int64, r > 0
    rows: Tensor,  # (r, H)
) -> None:
    """See `rows.Kernels`.

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


def backend() -> ChunkedBackend:
    """See `dispatch.Backend`."""
    import realign_kernels.backends.torch as kernels

    return ChunkedBackend(kernels)
