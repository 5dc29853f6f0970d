"""Inputs on the device, answers by plain torch in any dtype, and the error budget against fp64.

A result may err against fp64 at most FACTOR times as much as eager torch does in the same dtype,
plus FLOOR, relative to the largest entry of the truth: the budget of the kernel tests.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import realign_kernels as rk
from benchmarks.contestants import from_sums

IGNORE = -100
FACTOR = 2.0
FLOOR = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""One rounding in half precision, 4 eps in fp32: for where eager is exact by luck."""
BLOCK = 2048
"""Rows of fp64 logits that are alive at a time: 2.5 GB at V = 151936."""


class Problem(NamedTuple):
    """A head, its rows, and the gradient that comes back for their log-probs."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,) int64, IGNORE in about a third of the rows
    upstream: Tensor  # (N,) fp32
    bias: Tensor | None = None  # (V,)
    rival: Tensor | None = None  # (N,) bool
    softcap: float | None = None
    temperature: float = 1.0


class Answer(NamedTuple):
    """Log-probs and gradients; None where there is none."""

    logps: Tensor  # (N,)
    hidden: Tensor | None = None  # (N, H)
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)


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
    """Random inputs; logits have a standard deviation of 3. `head`: softcap, temperature."""
    rows, width, vocabulary = size
    g = torch.Generator(device).manual_seed(rows + width + vocabulary)
    kind = {"generator": g, "device": device}
    hidden = (3 * torch.randn(rows, width, **kind)).to(dtype)
    if strided:  # as hidden[:, :, :-1] of a model: rows are apart, and NaN is between them
        wide = hidden.new_full((rows, width + 8), torch.nan)
        wide[:, :width] = hidden
        hidden = wide[:, :width]
    labels = torch.randint(vocabulary, (rows,), **kind)
    labels[1:][torch.rand(rows - 1, **kind) < 0.3] = IGNORE
    return Problem(
        hidden,
        (torch.randn(vocabulary, width, **kind) / width**0.5).to(dtype),
        labels,
        torch.randn(rows, **kind),
        torch.randn(vocabulary, **kind).to(dtype) if bias else None,
        torch.rand(rows, **kind) < 0.5 if rival else None,
        **head,
    )


def plain(problem: Problem, dtype: torch.dtype, block: int | None = None) -> Answer:
    """Logits in `dtype`, the rest in fp32 (fp64 for fp64), `block` rows at a time (all)."""
    weight = problem.weight.to(dtype, copy=True).requires_grad_()
    bias = problem.bias
    bias = None if bias is None else bias.to(dtype, copy=True).requires_grad_()
    rows = len(problem.labels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logps = problem.upstream.new_zeros(rows, dtype=wide)
    grad = problem.hidden.new_zeros(problem.hidden.shape, dtype=dtype)
    for at in (problem.labels != IGNORE).nonzero().squeeze(1).split(block or rows):
        hidden = problem.hidden[at].to(dtype).requires_grad_()
        logits = F.linear(hidden, weight, bias).to(wide)
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        logits = logits / problem.temperature
        target = problem.labels[at, None]
        if problem.rival is not None:
            strongest = logits.detach().scatter(1, target, -torch.inf).argmax(1, keepdim=True)
            target = torch.where(problem.rival[at, None], strongest, target)
        found = F.log_softmax(logits, 1).gather(1, target).squeeze(1)
        (found * problem.upstream[at]).sum().backward()
        logps[at], grad[at] = found.detach(), hidden.grad
    return Answer(logps, grad, weight.grad, None if bias is None else bias.grad)


def ours(problem: Problem, trains: str) -> Answer:
    """`linear_logprobs`; trains: "nothing", "hidden" (a frozen head) or "all"."""
    hidden = problem.hidden.detach().requires_grad_(trains != "nothing")
    head = [problem.weight.detach(), None if problem.bias is None else problem.bias.detach()]
    leaves = [t for t in head if t is not None]
    for leaf in leaves:
        leaf.requires_grad_(trains == "all")
    settings = {"softcap": problem.softcap, "temperature": problem.temperature}
    logps = rk.linear_logprobs(
        hidden, head[0], problem.labels, bias=head[1], rival=problem.rival, **settings
    )
    if trains != "nothing":
        (logps * problem.upstream).sum().backward()
    return Answer(logps.detach(), hidden.grad, *(None if t is None else t.grad for t in head))


def error(value: Tensor, exact: Tensor) -> float:
    """Largest error over the largest entry of the truth. NaN counts as infinite."""
    worst = (value.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1e-300)
    return float(worst.nan_to_num(nan=torch.inf))


def within_budget(
    value: Answer, eager: Answer, exact: Answer, dtype: torch.dtype
) -> dict[str, float]:
    """The largest share of its budget that an error takes, and the errors by name.

    Raises:
        AssertionError: an error is over its budget.
    """
    found, share = {}, 0.0
    for name, mine, plain, true in zip(Answer._fields, value, eager, exact, strict=True):
        if mine is not None:
            found[name] = error(mine, true)
            share = max(share, found[name] / (FACTOR * error(plain, true) + FLOOR[dtype]))
    assert share <= 1, f"errors {found} take {share:.2f} of their budget"
    return {"of_budget": share} | found


class Preference(NamedTuple):
    """rDPO's batch: hidden states of three sequences an example."""

    hidden: Tensor  # (3, B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (3, B, T), IGNORE in the prompt

    @property
    def rows(self) -> int:
        """Rows with a label."""
        return int((self.labels != IGNORE).sum())


def preference(
    examples: int, response: int, width: int, vocabulary: int, dtype: torch.dtype, device: str
) -> Preference:
    """`response` labels a sequence behind no prompt; logits of standard deviation 2."""
    g = torch.Generator(device).manual_seed(width + vocabulary)
    kind = {"generator": g, "device": device}
    hidden = torch.randn(3, examples, response, width, **kind).to(dtype)
    weight = (torch.randn(vocabulary, width, **kind) * (2 / width**0.5)).to(dtype)
    return Preference(hidden, weight, torch.randint(vocabulary, hidden.shape[:-1], **kind))


def preference_truth(batch: Preference) -> tuple[Tensor, Answer]:
    """rDPO's loss with references of 0, and its gradients, in fp64: 4 GEMMs in blocks of rows."""
    flat = Problem(
        batch.hidden.flatten(0, -2),
        batch.weight,
        batch.labels.flatten(),
        batch.hidden.new_ones(batch.labels.numel(), dtype=torch.float32),
    )
    with torch.no_grad():
        weight = batch.weight.double()
        logps = torch.cat([
            F.log_softmax(F.linear(hidden.double(), weight), 1).gather(1, labels[:, None])
            for hidden, labels in zip(
                flat.hidden.split(BLOCK), flat.labels.split(BLOCK), strict=True
            )
        ])  # fmt: skip
    logps = logps.view(batch.labels.shape).requires_grad_()
    loss = from_sums(logps.sum(-1))
    loss.backward()
    flat = flat._replace(upstream=logps.grad.flatten())
    return loss.detach(), plain(flat, torch.float64, BLOCK)
