"""linear_logprobs on tensors as they lie in memory, held to the budget of kernel_cases."""

import torch
from kernel_cases import FACTOR, FLOOR, Result, eager, truth

import realign_kernels as rk

NAN = float("nan")


def ours(case, wanted="hwb", labels=None, **head):
    """linear_logprobs on the tensors as they lie; wanted: which of hidden, weight, bias train."""
    tensors = zip("hwb", case[:3], strict=True)
    leaves = [t if t is None else t.detach().requires_grad_(k in wanted) for k, t in tensors]
    hidden, weight, bias = leaves
    labels = case.labels if labels is None else labels
    logps = rk.linear_logprobs(hidden, weight, labels, bias=bias, **head)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    assert logps.requires_grad == bool(wanted)
    grads = []
    if wanted:
        upstream = case.upstream.view(logps.shape).to(logps.dtype)
        grads = list(torch.autograd.grad((logps * upstream).sum(), wanted))
    for tensor, grad in zip(wanted, grads, strict=True):
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype
    grads = [grads.pop(0) if t is not None and t.requires_grad else None for t in leaves]
    return Result(logps.detach(), *grads)


def answers(case, **settings):
    """Eager in the case's dtype, and in fp64."""
    return eager(case, case.hidden.dtype, **settings), truth(case, **settings)


def check(case, wanted="hwb", labels=None, slack=1, **head):
    """The budget of kernel_cases, with a truth of 0 counted as 1: rows or weights may be equal.

    slack multiplies it, for searches: of thousands of calls one has an eager result that is exact
    by luck.
    """
    dtype = case.hidden.dtype
    settings = {k: head[k] for k in ("softcap", "temperature") if k in head}
    result, plain, exact = ours(case, wanted, labels, **head), *answers(case, **settings)
    for name, value, near, target in zip(Result._fields, result, plain, exact, strict=True):
        if value is not None and value.numel():
            errors = [float((t.double() - target).abs().max()) for t in (value, near)]
            budget = FLOOR[dtype] * max(1, float(target.abs().max())) * 2
            assert errors[0] <= slack * (FACTOR * errors[1] + budget), (name, errors, budget)
            assert value.isfinite().all()
    return result


def stepped(t):
    wide = t.new_full([2 * n for n in t.shape], NAN)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def offset(t):
    """Starts at an odd element: a bf16 pointer that is 2 bytes past an aligned one."""
    flat = t.new_full((t.numel() + 9,), NAN)
    return flat[7 : 7 + t.numel()].copy_(t.flatten()).view(t.shape)


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "stepped": stepped,
    "offset": offset,
    "offset rows": lambda t: offset(t.new_zeros(len(t), t[0].numel() + 1))[:, 1:].copy_(t),
    "one row": lambda t: t[:1].expand_as(t),
    "one column": lambda t: t[:, :1].expand_as(t),
    "one number": lambda t: t[:1, :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1, 1)),
}
