"""One step: forward and backward over a rank's examples, and the checks before the optimizer's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from realign import metrics, parallel
from realign.forest import Example, build_batch
from realign.model import ForestModel
from realign.throughput import work_of
from realign_kernels import Objective


class NonFiniteStep(ValueError):
    """Loss or gradient is not finite; raised before the optimizer step."""


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
        longest = row_tokens or max(example.longest_tree for example in chosen)
        batch = build_batch(chosen, store, row_tokens=longest)
        work = work_of(batch, chosen, device)
        batch = batch.to(device)
        parallel.sync_gradients(model, start + micro_batch_size >= len(mine))
        out = model(batch, objective, references[:, part].to(device))
        (out.loss * scale).backward()
        for name, value in (metrics.sums(out, objective) | work).items():
            totals[name] = totals.get(name, 0) + value
    return totals


def clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
    """Clip the gradient to norm `limit` (0: do not); returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def means(totals: dict[str, torch.Tensor], batch_size: int) -> dict[str, float]:
    """Metrics of the global batch from every rank's sums."""
    values = parallel.sum_over_ranks(torch.stack(list(totals.values())))
    return dict(zip(totals, (values / batch_size).tolist(), strict=True))


def check_finite(step: int, loss: float, norm: float, names: Sequence[str]) -> None:
    """Refuse a step whose loss or gradient is not finite.

    Raises:
        NonFiniteStep: names this rank's records in the step.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise NonFiniteStep(
        f"step {step}: loss {loss}, gradient norm {norm}. Nothing was updated; the last checkpoint "
        f"is whole. Records of this rank in the step: {', '.join(names)}. "
        "Remove the faulty one, or lower --learning-rate, and go on with --resume."
    )
