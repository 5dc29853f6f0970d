"""Inputs of the GPU check on the device, and their exact results in fp64.

The eager computation and the error budget come from tests/kernels/kernel_cases.py.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import realign_kernels as rk
from benchmarks.contestants import from_sums

sys.path.append(str(Path(__file__).parents[2] / "tests" / "kernels"))
from kernel_cases import FACTOR, FLOOR, Case, Result, eager, error  # noqa: E402

IGNORE = -100
BLOCK = 2048
"""Rows of fp64 logits in memory at a time: 2.5 GB at V = 151936."""


class Problem(NamedTuple):
    """Inputs of a head, and its options (rival, softcap, temperature)."""

    case: Case
    head: dict[str, Any]


def make(
    size: tuple[int, int, int],  # N, H, V
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = False,
    rival: bool = False,
    strided: bool = False,
    **head: float,
) -> Problem:
    """Random inputs with logits of standard deviation 3. `head` is softcap and temperature."""
    rows, width, vocabulary = size
    g = torch.Generator(device).manual_seed(rows + width + vocabulary)
    kind = {"generator": g, "device": device}
    hidden = (3 * torch.randn(rows, width, **kind)).to(dtype)
    if strided:  # as for hidden[:, :, :-1] of a model, with NaN between the rows
        wide = hidden.new_full((rows, width + 8), torch.nan)
        wide[:, :width] = hidden
        hidden = wide[:, :width]
    labels = torch.randint(vocabulary, (rows,), **kind)
    labels[1:][torch.rand(rows - 1, **kind) < 0.3] = IGNORE
    weight = (torch.randn(vocabulary, width, **kind) / width**0.5).to(dtype)
    upstream = torch.randn(rows, **kind)
    offset = torch.randn(vocabulary, **kind).to(dtype) if bias else None
    flags = {"rival": torch.rand(rows, **kind) < 0.5} if rival else {}
    return Problem(Case(hidden, weight, offset, labels, upstream), flags | head)


def ours(problem: Problem, trains: str) -> Result:
    """Result of `linear_logprobs`. `trains`: "nothing", "hidden" (a frozen head) or "all"."""
    case = problem.case
    hidden = case.hidden.detach().requires_grad_(trains != "nothing")
    weight, bias = (
        None if t is None else t.detach().requires_grad_(trains == "all") for t in case[1:3]
    )
    logps = rk.linear_logprobs(hidden, weight, case.labels, bias=bias, **problem.head)
    if trains != "nothing":
        (logps * case.upstream).sum().backward()
    return Result(logps.detach(), *(None if t is None else t.grad for t in (hidden, weight, bias)))


def check(problem: Problem, value: Result) -> dict[str, float]:
    """Checks a result of a problem with `within_budget`."""
    case, dtype = problem.case, problem.case.hidden.dtype
    exact = eager(case, torch.float64, block=BLOCK, **problem.head)
    return within_budget(value, eager(case, dtype, **problem.head), exact, dtype)


def within_budget(
    value: Result, eager: Result, exact: Result, dtype: torch.dtype
) -> dict[str, float]:
    """Errors by name, and the largest share of an error in its budget.

    Raises:
        AssertionError: An error is over its budget.
    """
    found, share = {}, 0.0
    for name, mine, plain, true in zip(Result._fields, value, eager, exact, strict=True):
        if mine is not None:
            found[name] = error(mine, true)
            share = max(share, found[name] / (FACTOR * error(plain, true) + FLOOR[dtype]))
    assert share <= 1, f"errors {found} take {share:.2f} of their budget"
    return {"of_budget": share} | found


class Preference(NamedTuple):
    """Batch of rDPO, with three sequences per example."""

    hidden: Tensor  # (3, B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (3, B, T)


def preference(
    examples: int, response: int, width: int, vocabulary: int, dtype: torch.dtype, device: str
) -> Preference:
    """Random batch with `response` labels per sequence, no prompt, and logits of deviation 2."""
    g = torch.Generator(device).manual_seed(width + vocabulary)
    kind = {"generator": g, "device": device}
    hidden = torch.randn(3, examples, response, width, **kind).to(dtype)
    weight = (torch.randn(vocabulary, width, **kind) * (2 / width**0.5)).to(dtype)
    return Preference(hidden, weight, torch.randint(vocabulary, hidden.shape[:-1], **kind))


def preference_truth(batch: Preference) -> tuple[Tensor, Result]:
    """fp64 rDPO loss with references of 0, and its gradients, by 4 GEMMs in blocks of rows."""
    hidden, labels = batch.hidden.flatten(0, -2), batch.labels.flatten()
    with torch.no_grad():
        weight = batch.weight.double()
        logps = torch.cat([
            F.log_softmax(F.linear(rows.double(), weight), 1).gather(1, targets[:, None])
            for rows, targets in zip(hidden.split(BLOCK), labels.split(BLOCK), strict=True)
        ])  # fmt: skip
    logps = logps.view(batch.labels.shape).requires_grad_()
    loss = from_sums(logps.sum(-1))
    loss.backward()
    flat = Case(hidden, batch.weight, None, labels, logps.grad.flatten())
    return loss.detach(), eager(flat, torch.float64, block=BLOCK)
