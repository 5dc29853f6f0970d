"""Chunked GEMM + torch elementwise: the backend that works on any device.

Rows go through the head a chunk at a time, so the largest thing alive is a chunk's logits. With
z the logits of a row, y its label, and everything below about the *other* tokens (v != y):

    peak = max z_v        E_v = exp(z_v - peak), E_y = 0        total = sum E_v
    gap  = z_y - peak - log total            # the label's logit against all others
    logp = logsigmoid(gap)      miss = 1 - p_y = sigmoid(-gap)
    d logp / d hidden = miss * (W[y] - (E W) / total)

Leaving the label out before anything is rounded is what keeps confident tokens right: W[y] - p W
with p in bf16 has a relative error of 1 at miss = 6e-4. Taking the peak over the others alone
keeps E in range for fp16, and gap needs no guard for labels that are very unlikely.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_kernels.reference import wide_dtype


def gemm(a: Tensor, b: Tensor, out: Tensor, staging: Tensor | None = None) -> Tensor:
    """out = a @ b, where out may be fp32 and a, b half.

    CUDA writes the fp32 accumulator. The CPU has no such GEMM in torch: it rounds to the inputs'
    dtype (into `staging`) before it widens. For bf16 logits of standard deviation 4 that costs
    1e-2 in log-prob on average and 6e-2 at most, as in eager torch.
    """
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b, out=staging))


def gemm_subtract(total: Tensor, a: Tensor, b: Tensor, product: Tensor | None) -> None:
    """total -= a @ b, total in fp32 or wider; `product` holds a @ b where a, b are half."""
    if product is None:
        total.addmm_(a, b, alpha=-1)
    else:
        total.sub_(gemm(a, b, out=product))


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose fp32 logits fill 64 MiB (CUDA: 512 MiB), but not fewer than 256 (CUDA: 1024).

    The GEMMs are faster the taller the chunk: on 2 cores at H = 1024, V = 32000 in bf16, 768 rows
    through both GEMMs take 0.32 s in chunks of 32, 0.19 s of 128, 0.15 s of 256 and of 768. From
    256 rows the floor outweighs the budget: for V = 152k it is 150 MiB. CUDA is not measured.
    """
    budget, floor = (512 * 2**20, 1024) if device.type == "cuda" else (64 * 2**20, 256)
    return max(floor, budget // (4 * max(vocabulary, 1)))


def even_step(rows: int, limit: int) -> int:
    """The chunk, at most `limit`, that leaves no short, slow rest: 600 rows at 524 are 2 x 300."""
    return max(1, math.ceil(rows / math.ceil(max(rows, 1) / limit)))


class Workspace:
    """The buffers of one call, sized for its largest chunk and used again by every chunk."""

    def __init__(self, rows: int, hidden: Tensor, weight: Tensor, slopes: bool) -> None:
        shape = (rows, len(weight))
        self.wide = hidden.new_empty(shape, dtype=wide_dtype(hidden.dtype))
        is_wide = hidden.dtype == self.wide.dtype
        self.narrow = self.wide if is_wide else hidden.new_empty(shape)
        self.slopes = torch.empty_like(self.wide) if slopes else None


class Rows(NamedTuple):
    """What a chunk's logits leave behind, r rows. `others` and `exact` lie in the workspace."""

    logps: Tensor  # (r, 1) wide
    miss: Tensor  # (r, 1) wide, 1 - p[label]
    total: Tensor  # (r, 1) wide, sum of E before slopes, at least 1
    slope: Tensor  # (r, 1) wide, d z / d (raw logit) at the label
    others: Tensor  # (r, V) E * d z / d (raw logit), 0 at the label, in the inputs' dtype
    exact: Tensor  # (r, V) the same, wide


def read_rows(
    hidden: Tensor,  # (r, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (r,)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    work: Workspace,
    derivative: bool,
) -> Rows:
    """One GEMM and the row kernel. Without `derivative`, `others` is not set."""
    count = len(hidden)
    z, narrow = work.wide[:count], work.narrow[:count]
    gemm(hidden, weight.T, out=z, staging=narrow)
    if bias is not None:
        z.add_(bias)
    slopes = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        if derivative:
            slopes = torch.mul(z, z, out=work.slopes[:count]).neg_().add_(1)
        z.mul_(softcap)
    if temperature != 1:
        z.div_(temperature)

    index = labels[:, None]
    label_logit = z.gather(1, index)
    z.scatter_(1, index, float("-inf"))
    # With no other token left (V = 1, or a bias of -inf) the peak is -inf, and -inf - -inf is NaN.
    peak = z.amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
    total = z.sub_(peak).exp_().sum(1, keepdim=True)
    # label - label is 0, but NaN where it is inf: an overflow must not read as certainty.
    gap = label_logit - peak - total.log() + (label_logit - label_logit)

    slope = torch.full_like(gap, 1 / temperature)
    if derivative:
        if slopes is not None:
            slope.mul_(slopes.gather(1, index))
            z.mul_(slopes)
        if temperature != 1:
            z.div_(temperature)
        if narrow is not z:
            narrow.copy_(z)
    # total is 0 only if there are no others, and E with it: 1 makes that 0 / 1.
    return Rows(F.logsigmoid(gap), torch.sigmoid(-gap), total.clamp_(min=1), slope, narrow, z)


def hidden_gradient(rows: Rows, weight: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
    """factor * (slope * W[y] - (others W) / total), in fp32 but for the GEMM's inputs. (r, H)"""
    pull = factor.new_empty(len(labels), weight.shape[1])
    gemm(rows.others, weight, out=pull)
    return (rows.slope * weight[labels].to(pull.dtype) - pull / rows.total) * factor


def forward(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (n,)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    *,
    chunk_rows: int | None,
    keep_direction: bool,
) -> tuple[Tensor, Tensor | None]:  # (n,), (n, H)
    """1 GEMM, or 2 with the direction. See `dispatch.Backend`."""
    step = even_step(len(hidden), chunk_rows or default_chunk_rows(len(weight), hidden.device))
    work = Workspace(step, hidden, weight, slopes=keep_direction and softcap is not None)
    logps = hidden.new_empty(len(hidden), dtype=work.wide.dtype)
    direction = hidden.new_empty(hidden.shape) if keep_direction else None
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        rows = read_rows(
            hidden[part], weight, labels[part], bias, softcap, temperature, work, keep_direction
        )
        logps[part] = rows.logps.squeeze(1)
        if direction is not None:
            direction[part] = hidden_gradient(rows, weight, labels[part], rows.miss)
    return logps, direction


def backward(
    grad: Tensor,  # (n,)
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (n,)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    *,
    chunk_rows: int | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recomputes the logits: 1 GEMM, and 1 each for hidden and weight. See `dispatch.Backend`."""
    step = even_step(len(hidden), chunk_rows or default_chunk_rows(len(weight), hidden.device))
    work = Workspace(step, hidden, weight, slopes=softcap is not None)
    wide = work.wide.dtype
    want_hidden, want_weight, want_bias = wanted
    grad_hidden = hidden.new_empty(hidden.shape) if want_hidden else None
    grad_weight = weight.new_zeros(weight.shape, dtype=wide) if want_weight else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if want_bias else None
    product = None
    if want_weight and hidden.dtype != wide:
        product = weight.new_empty(weight.shape, dtype=wide if weight.is_cuda else None)

    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        h, y = hidden[part], labels[part]
        rows = read_rows(h, weight, y, bias, softcap, temperature, work, derivative=True)
        factor = grad[part, None] * rows.miss
        if grad_hidden is not None:
            grad_hidden[part] = hidden_gradient(rows, weight, y, factor)
        if grad_weight is not None:
            scaled = h.to(wide) * factor
            grad_weight.index_add_(0, y, scaled * rows.slope)
            pushed = (scaled / rows.total).to(h.dtype)
            gemm_subtract(grad_weight, rows.others.T, pushed, product)
        if grad_bias is not None:
            grad_bias.index_add_(0, y, (factor * rows.slope).squeeze(1))
            grad_bias.addmv_(rows.exact.T, (factor / rows.total).squeeze(1), alpha=-1)

    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )
