"""Inputs, fp64 truth, and the error budget of the kernel tests.

A result may err against fp64 at most FACTOR times as much as eager torch does in the same dtype,
plus FLOOR, relative to the largest entry of the truth.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import realign_kernels as rk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Of Triton's cases: compiled where there is a GPU, else interpreted on the CPU."""
DEVICES = tuple(dict.fromkeys(("cpu", DEVICE)))
TRITON_DTYPES = (torch.float32, torch.float16) + (torch.bfloat16,) * (DEVICE == "cuda")
"""The interpreter takes the bits of bf16 in tl.dot for integers."""
FACTOR = 2.0
FLOOR = {
    torch.float64: 1e-14,
    torch.float32: 5e-7,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
"""One rounding in half precision, 4 eps in fp32, 45 in fp64: for where eager is exact by luck."""


class Case(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,) fp64, gradient that comes back for the log-probs


class Result(NamedTuple):
    logps: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def make_case(
    rows, width, vocabulary, dtype, *, bias=False, ignored=0.3, spread=3.0, seed=0, device="cpu"
):
    """Logits of standard deviation `spread`; about `ignored` of the rows carry -100.

    The numbers are the same on each device.
    """
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64) * spread
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) / width**0.5
    offset = torch.randn(vocabulary, generator=g, dtype=torch.float64) if bias else None
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = -100
    upstream = torch.randn(rows, generator=g, dtype=torch.float64)
    head = (None if t is None else t.to(device, dtype) for t in (hidden, weight, offset))
    return Case(*head, labels.to(device), upstream.to(device))


def eager(
    case: Case, dtype: torch.dtype, softcap=None, temperature=1.0, rival=None, block=None
) -> Result:
    """GEMM in `dtype`, the rest in fp32: what a trainer writes by hand.

    `block` rows of logits are alive at a time (None: all). `rival` (N,) marks rows that score the
    strongest other token instead of their label.
    """
    leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in case[1:3]]
    weight, bias = leaves
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logps = torch.zeros(len(case.labels), dtype=wide, device=case.labels.device)
    grad = torch.zeros_like(case.hidden, dtype=dtype)
    for rows in (case.labels != -100).nonzero().squeeze(1).split(block or max(len(logps), 1)):
        hidden, target = case.hidden[rows].to(dtype).requires_grad_(), case.labels[rows, None]
        logits = F.linear(hidden, weight, bias).to(wide)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        if rival is not None:
            strongest = logits.detach().scatter(1, target, -torch.inf).argmax(1, keepdim=True)
            target = torch.where(rival[rows, None], strongest, target)
        picked = F.log_softmax(logits, 1).gather(1, target).squeeze(1)
        (picked * case.upstream[rows].to(wide)).sum().backward()
        logps[rows], grad[rows] = picked.detach(), hidden.grad
    return Result(logps, grad, *(None if t is None else t.grad for t in leaves))


def truth(case: Case, **head) -> Result:
    """fp64 from the rounded inputs."""
    return eager(case, torch.float64, **head)


def ours(case: Case, *, frozen=False, **head) -> Result:
    """linear_logprobs; with `frozen` only hidden takes a gradient."""
    hidden = case.hidden.clone().requires_grad_()
    weight, bias = (None if t is None else t.clone().requires_grad_(not frozen) for t in case[1:3])
    logps = rk.linear_logprobs(hidden, weight, case.labels, bias=bias, **head)
    (logps * case.upstream.to(logps.dtype)).sum().backward()
    return Result(logps.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad)


def error(value: Tensor, exact: Tensor) -> float:
    """Largest error over the largest entry. NaN counts as infinite."""
    worst = (value.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1e-300)
    return float(worst.nan_to_num(nan=float("inf")))


def within_budget(result: Result, eager: Result, exact: Result, dtype: torch.dtype) -> None:
    for name, value, plain, target in zip(Result._fields, result, eager, exact, strict=True):
        if value is None or target is None:
            continue
        budget = FACTOR * error(plain, target) + FLOOR[dtype]
        assert error(value, target) <= budget, (name, error(value, target), budget)
