"""Inputs, memory layouts, fp64 truth, and the error budget of the kernel tests.

The error of a result against fp64 is relative to the largest entry of the truth. It may be at most
FACTOR times the error of eager torch in the same dtype, plus FLOOR.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import realign_kernels as rk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Device of Triton's cases: compiled if there is a GPU, else interpreted on the CPU."""
DEVICES = tuple(dict.fromkeys(("cpu", DEVICE)))
TRITON_DTYPES = (torch.float32, torch.float16) + (torch.bfloat16,) * (DEVICE == "cuda")
"""The interpreter treats the bits of bf16 in tl.dot as integers."""
FACTOR = 2.0
FLOOR = {
    torch.float64: 1e-14,
    torch.float32: 5e-7,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
"""One rounding in half precision, 4 eps in fp32, 45 in fp64, for eager results exact by luck."""


class Case(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,) fp64, incoming gradient of the log-probs


class Result(NamedTuple):
    logps: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def make_case(
    rows, width, vocabulary, dtype, *, bias=False, ignored=0.3, spread=3.0, seed=0, device="cpu"
):
    """Inputs with logits of standard deviation `spread`, and a fraction `ignored` of labels -100.

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
    """Eager computation of a typical trainer: GEMM in `dtype`, the rest in fp32.

    It holds the logits of `block` rows at a time (None: all). `rival` (N,) marks rows that score
    the strongest other token instead of their label.
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
    """The result in fp64 from the rounded inputs."""
    return eager(case, torch.float64, **head)


def rdpo(case, dtype, ids, reference, weights=None, **options):
    """rDPO of packed rows with all logits, which are in `dtype`: loss, sums, gradients."""
    options = {"beta": 0.1, "visual_weight": 1.0, "reduction": "mean"} | options
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in case[:3]]
    rows = (case.labels != -100).nonzero().squeeze(1)
    z = F.linear(leaves[0][rows], *leaves[1:])
    z = z if dtype == torch.float64 else z.float()
    if options["softcap"] is not None:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    logps = (z / options["temperature"]).log_softmax(1)
    logps = logps.gather(1, case.labels[rows, None]).squeeze(1)
    if weights is not None:
        logps = logps * weights[rows]
    sums = logps.new_zeros(reference.numel()).index_add(0, ids[rows], logps)
    sums = sums.view(reference.shape)
    margins = options["beta"] * (sums - reference.to(sums.dtype))
    text, visual = -F.logsigmoid(margins[0] - margins[1:])
    losses = text + options["visual_weight"] * visual
    loss = {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[options["reduction"]]()
    grads = torch.autograd.grad(loss.sum(), leaves)
    return [loss.detach(), sums.detach(), *grads]


def ours(case: Case, needs: str = "hwb", labels: Tensor | None = None, **head) -> Result:
    """linear_logprobs on tensors in their memory layout. `needs` names inputs with gradient."""
    tensors = zip("hwb", case[:3], strict=True)
    leaves = [t if t is None else t.detach().requires_grad_(k in needs) for k, t in tensors]
    hidden, weight, bias = leaves
    labels = case.labels if labels is None else labels
    logps = rk.linear_logprobs(hidden, weight, labels, bias=bias, **head)
    trained = [t for t in leaves if t is not None and t.requires_grad]
    assert logps.requires_grad == bool(trained)
    wide = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    assert logps.dtype == wide
    grads = []
    if trained:
        upstream = case.upstream.view(logps.shape).to(wide)
        grads = list(torch.autograd.grad((logps * upstream).sum(), trained))
    for tensor, grad in zip(trained, grads, strict=True):
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype
    grads = [grads.pop(0) if t is not None and t.requires_grad else None for t in leaves]
    return Result(logps.detach(), *grads)


def error(value: Tensor, exact: Tensor, least: float = 1e-300) -> float:
    """Largest error divided by the largest entry, or by `least` if larger. NaN is infinite."""
    value, exact = value.detach().double(), exact.detach().double()
    worst = (value - exact).abs().max() / exact.abs().max().clamp(min=least)
    return float(worst.nan_to_num(nan=float("inf")))


def within_budget(
    result: Result,
    eager: Result,
    exact: Result,
    dtype: torch.dtype,
    least: float = 1e-300,
    slack: float = 1,
) -> None:
    for name, value, plain, target in zip(Result._fields, result, eager, exact, strict=True):
        if value is None or target is None or not value.numel():
            continue
        budget = slack * (FACTOR * error(plain, target, least) + FLOOR[dtype])
        found = error(value, target, least)
        assert found <= budget, (name, found, budget)
        assert value.isfinite().all()


def check(case: Case, needs="hwb", labels=None, *, least=1.0, slack=1.0, **head) -> Result:
    """Checks that `ours` is within its budget.

    A truth of 0 counts as 1, because rows or weights may be equal. `slack` multiplies the budget.
    Searches need it, because among thousands of calls an eager result may be exact by luck.
    """
    dtype = case.hidden.dtype
    settings = {k: head[k] for k in ("softcap", "temperature") if k in head}
    result = ours(case, needs, labels, **head)
    plain, exact = eager(case, dtype, **settings), truth(case, **settings)
    within_budget(result, plain, exact, dtype, least, slack)
    return result


def stepped(t: Tensor) -> Tensor:
    """A view with every second element along each axis, and NaN between them."""
    wide = t.new_full([2 * n for n in t.shape], torch.nan)
    return wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def _offset(t: Tensor) -> Tensor:
    """A view that starts at an odd element, so a bf16 pointer is 2 bytes past an aligned one."""
    flat = t.new_full((t.numel() + 9,), torch.nan)
    return flat[7 : 7 + t.numel()].copy_(t.flatten()).view(t.shape)


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "stepped": stepped,
    "offset": _offset,
    "offset rows": lambda t: _offset(t.new_zeros(len(t), t[0].numel() + 1))[:, 1:].copy_(t),
    "one row": lambda t: t[:1].expand_as(t),
    "one column": lambda t: t[:, :1].expand_as(t),
    "one number": lambda t: t[:1, :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1, 1)),
}
