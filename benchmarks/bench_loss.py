"""Benchmark of the combined loss without a head: forward and backward from log-probs, in fp32.

- leaves: from the log-probs of responses, (3, B) in order chosen, rejected, visual, as
  `preference_loss` takes them.
- tokens: from the log-probs of N rows (three responses of 32 to 96 rows per example). It computes
  their sums, both loss terms, and the gradient of every row. This is the path of
  `linear_preference_loss` after the head. On CUDA ours is one launch of a Triton kernel.

Ours also checks its inputs for NaN and returns rewards and counts. The others are the bare formula.
Token counts are given, because `linear_preference_loss` counts on the host before the head. TRL
1.16 is missing because its loss (in `DPOTrainer._compute_loss`) needs a trainer and its model.
Liger is missing because its loss is part of its fused head.

Each contestant's loss and gradient are compared with fp64 before timing.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks.contestants import BETA, DEVICE, OURS, from_sums, relative
from benchmarks.race import race
from realign_kernels import objectives, preference_loss
from realign_kernels.autograd import from_tokens
from realign_kernels.nonfinite import is_finite, sentinel

ALLOWED = 1e-5
"""Largest relative error of ours. The error of the others is only shown."""
SHORTEST, LONGEST = 32, 96
ROUNDS = 300
"""Most rounds; a call takes a few hundred microseconds."""
EXAMPLES = {"leaves": (64, 4096), "tokens": (64, 1024)}
OBJECTIVE = objectives.rdpo(BETA)


class Case:
    """Token log-probs near -2, and references near the policy."""

    def __init__(self, kind: str, examples: int) -> None:
        self.kind = kind
        g = torch.Generator().manual_seed(0)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (examples, 3), generator=g)
        # The responses of an example are adjacent. Their ids are leaf * B + example.
        numbers = torch.arange(3) * examples + torch.arange(examples)[:, None]
        self.ids = numbers.flatten().repeat_interleave(lengths.flatten())
        rows = -2 * torch.rand(len(self.ids), generator=g).add_(0.5)
        sums = torch.zeros(3 * examples).index_add_(0, self.ids, rows).view(3, examples)
        self.references = (sums + 5 * torch.randn(3, examples, generator=g)).to(DEVICE)
        self.counts = torch.bincount(self.ids, minlength=3 * examples).view(3, examples).numpy()
        self.ids, self.logps = self.ids.to(DEVICE), (sums if kind == "leaves" else rows).to(DEVICE)
        self.case = {"what": kind, "examples": examples, "dtype": "fp32"}
        if kind == "tokens":
            self.case["N"] = len(rows)
        self.truth = self.step(FORMULA[kind], torch.float64)

    def step(self, loss, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the log-probs, from one forward and backward."""
        logps = self.logps.to(dtype).detach().requires_grad_()
        value = loss(self, logps, self.references.to(dtype))
        value.backward()
        return value.detach(), logps.grad

    def error(self, loss) -> dict[str, float]:
        """Relative errors of the loss and (in norm) of the gradient."""
        off = map(relative, self.step(loss), self.truth)
        return dict(zip(("loss", "gradient"), off, strict=True))


def our_leaves(case: Case, logps: Tensor, references: Tensor) -> Tensor:
    return preference_loss(logps, references, OBJECTIVE).loss


def our_tokens(case: Case, logps: Tensor, references: Tensor) -> Tensor:
    output = from_tokens(logps, case.ids, case.counts, references, OBJECTIVE, "mean")
    assert is_finite(sentinel(output.logps.detach() - references))
    return output.loss


def eager_leaves(case: Case, logps: Tensor, references: Tensor) -> Tensor:
    return from_sums(logps - references)


def eager_tokens(
    case: Case, logps: Tensor, references: Tensor, add: Callable[..., Tensor] = torch.index_add
) -> Tensor:
    sums = add(logps.new_zeros(references.numel()), 0, case.ids, logps)
    return from_sums(sums.view_as(references) - references)


FORMULA = {"leaves": eager_leaves, "tokens": eager_tokens}
"""The formula for the exact result in fp64."""
CONTESTANTS = {
    "leaves": {OURS: our_leaves, "eager torch": eager_leaves},
    "tokens": {
        OURS: our_tokens,
        "eager torch, index_add": eager_tokens,
        "eager torch, scatter_add": partial(eager_tokens, add=torch.scatter_add),
    },
}
case_of = lru_cache(maxsize=1)(Case)


@pytest.mark.parametrize(
    ("kind", "examples", "name"),
    [
        (kind, n, name)
        for kind, many in EXAMPLES.items()
        for n in many
        for name in CONTESTANTS[kind]
    ],
)
def test_loss(benchmark, kind, examples, name):
    case, loss, mine = case_of(kind, examples), CONTESTANTS[kind][name], CONTESTANTS[kind][OURS]
    error = case.error(loss)
    if name == OURS:
        assert all(value < ALLOWED for value in error.values()), error
    race(
        benchmark,
        f"loss, {kind}, {examples} examples",
        case=case.case,
        contestant=name,
        call=lambda: case.step(loss),
        ours=lambda: case.step(mine),
        budget=1.0,
        most=ROUNDS,
        error=error,
    )
