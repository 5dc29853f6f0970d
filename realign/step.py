"""One step: forward and backward over a rank's examples, and the checks before the optimizer's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from realign import metrics, parallel
from realign.attention import row_budget
from realign.forest import Example, build_batch
from realign.model import ForestModel
from realign.sharding import sync_gradients
from realign.throughput import work_of
from realign_kernels import Objective


class NonFiniteStep(parallel.CommonError):
    """Loss or gradient is not finite; raised on all ranks, before the optimizer step."""

    def __init__(
        self, step: int, found: dict[str, float], culprits: Sequence[str], batch_size: int
    ) -> None:
        if len(culprits) == batch_size:
            who = "Every record of the step gives it: lower --learning-rate."
        elif culprits:
            who = f"It comes from record(s) {', '.join(culprits)}: look at image and text."
        else:
            who = "No record gives this alone; lower --learning-rate."
        super().__init__(
            f"step {step}: loss {found['loss']}, gradient norm {found['grad_norm']}. {who} Nothing "
            "was updated; checkpoints are kept. Train what you change in another --output."
        )


def accumulate(
    model: ForestModel,
    mine: np.ndarray,  # (n,) indices of this rank's examples
    examples: Sequence[Example],
    references: torch.Tensor,  # (L, examples) fp32
    store,
    objective: Objective,
    *,
    batch_size: int,
    micro_batch_size: int,
    row_tokens: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Forward and backward over `mine`, `micro_batch_size` at a time; returns sums of metrics
    and of the work (`throughput.work_of`).

    Gradients are those of the mean over the `batch_size` examples of all ranks; they are reduced
    with the last part.
    """
    totals: dict[str, torch.Tensor] = {}
    # FSDP averages gradients over ranks; the loss is a mean over the global batch.
    scale = parallel.world_size() / batch_size
    for start in range(0, len(mine), micro_batch_size):
        part = mine[start : start + micro_batch_size]
        chosen = [examples[i] for i in part]
        budget = row_tokens or row_budget(model.attention, chosen)
        batch = build_batch(chosen, store, row_tokens=budget)
        work = work_of(batch, chosen, device)
        sync_gradients(model, start + micro_batch_size >= len(mine))
        batch = batch.to(device)
        out = model(batch, objective, references[:, part].to(device))
        (out.loss * scale).backward()
        for name, value in (metrics.sums(out, objective) | work).items():
            totals[name] = totals.get(name, 0) + value
    return totals


def clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
    """Clip the gradient to norm `limit` (0: do not); returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def over_ranks(
    totals: dict[str, torch.Tensor], batch_size: int, stop: bool
) -> tuple[dict[str, float], bool]:
    """Metrics of the global batch from every rank's sums, and whether any rank is to stop."""
    sums = torch.stack([*totals.values()])
    sums = parallel.sum_over_ranks(torch.cat([sums, sums.new_tensor([stop])])).tolist()
    means = [value / batch_size for value in sums[:-1]]
    return dict(zip(totals, means, strict=True)), sums[-1] > 0


def culprits(
    take: Callable[[np.ndarray], dict[str, torch.Tensor]],
    mine: np.ndarray,  # (n,) this rank's examples, as many on every rank
    parameters: Sequence[torch.nn.Parameter],
) -> list[int]:
    """Which examples of a step give a loss or gradient that is not finite, each on its own.

    Every rank runs the same forwards and backwards, one example at a time. A gradient is the sum
    of all ranks', so where it is not finite each rank in turn repeats its example, beside examples
    of other ranks that were in order; if none was, all remain suspects.

    Args:
        take: runs forward and backward over examples, as `accumulate` does.
        mine: the examples of this rank.
        parameters: what is trained; their gradients are cleared.

    Returns:
        Indices of these examples, of all ranks; empty when each alone is in order.
    """

    def run(index: int) -> tuple[bool, bool]:
        """Whether the loss of one example, and the gradient of all ranks', is finite."""
        for parameter in parameters:
            parameter.grad = None
        loss = take(np.array([index]))["loss"]
        return math.isfinite(loss), math.isfinite(clip(parameters, 0))

    losses, gradients = zip(*(run(index) for index in mine), strict=True)
    if found := parallel.gather([int(i) for i, fine in zip(mine, losses, strict=True) if not fine]):
        return found
    suspects = [int(i) for i, fine in zip(mine, gradients, strict=True) if not fine]
    if not any(gradients) or parallel.world_size() == 1:
        return parallel.gather(suspects)
    good = mine[gradients.index(True)]
    turns = [
        (i, rank, run(i if rank == parallel.rank() else good)[1])
        for i in suspects
        for rank in range(parallel.world_size())
    ]
    return parallel.gather([i for i, rank, fine in turns if rank == parallel.rank() and not fine])
