"""One step: forward and backward over a rank's examples, the optimizer's, and its checks."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from realign import distributed
from realign.modeling.attention import row_budget
from realign.modeling.forest import Example, ForestBatch, build_batch
from realign.modeling.images import ImageStore
from realign.modeling.model import ForestModel
from realign.modeling.prefetch import pinned
from realign.training import metrics
from realign.training.fsdp import sync_gradients
from realign.training.throughput import WORK, work_of
from realign_kernels import Objective


class NonFiniteStep(distributed.CommonError):
    """Loss or gradient is not finite; raised on all ranks. The optimizer has updated nothing."""

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


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward, laid out.

    Attributes:
        batch: their forest.
        references: (L, B) fp32 log-probs of the reference.
        work: (5,) fp64, `throughput.work_of`.
        last: whether it is the last one of a step.
    """

    batch: ForestBatch
    references: torch.Tensor
    work: torch.Tensor
    last: bool

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; copies from pinned memory do not wait."""
        references, work = (t.to(device, non_blocking=True) for t in (self.references, self.work))
        return MicroBatch(self.batch.to(device), references, work, self.last)


@dataclass(frozen=True)
class Feed:
    """Lays out micro-batches on the host, in any thread.

    Attributes:
        examples: those of the data set.
        references: (L, examples) fp32 log-probs of the reference.
        store: the images.
        attention: transformers' name of the implementation.
        row_tokens: most tokens in a row; 0 takes what suits the attention.
        device: where the forward is; results are in pinned memory for CUDA.
    """

    examples: Sequence[Example]
    references: torch.Tensor
    store: ImageStore
    attention: str
    row_tokens: int
    device: torch.device

    def __call__(
        self,
        part: Sequence[int] | np.ndarray,  # (B,) indices of examples
        last: bool = True,
    ) -> MicroBatch:
        """The micro-batch of these examples.

        Raises:
            RecordError: when an image cannot be read again.
        """
        chosen = [self.examples[i] for i in part]
        budget = self.row_tokens or row_budget(self.attention, chosen)
        batch = build_batch(chosen, self.store, row_tokens=budget)
        found = MicroBatch(batch, self.references[:, part], work_of(batch, chosen), last)
        return pinned(found, self.device)


def micro_batches(
    mine: np.ndarray,  # (n,) indices of this rank's examples of a step
    size: int,
) -> Iterator[tuple[np.ndarray, bool]]:
    """Indices of the examples of each forward of a step, and whether it is the last forward."""
    for start in range(0, len(mine), size):
        yield mine[start : start + size], start + size >= len(mine)


@contextmanager
def heap_frozen() -> Iterator[None]:
    """Keep Python's garbage collector off the objects that exist now: modules, model, records.

    A full collection visits all of them and stops every thread; no step makes them garbage.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def accumulate(
    model: ForestModel,
    parts: Iterable[MicroBatch],
    objective: Objective,
    *,
    batch_size: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Forward and backward over the micro-batches of a step; returns sums of metrics and of work.

    Gradients are those of the mean over the `batch_size` examples of all ranks; they are reduced
    with the last part. Nothing here reads a value back from the device.
    """
    totals: dict[str, torch.Tensor] = {}
    # FSDP averages gradients over ranks; the loss is a mean over the global batch.
    scale = distributed.world_size() / batch_size
    for part in parts:
        sync_gradients(model, part.last)
        part = part.to(device)
        out = model(part.batch, objective, part.references)
        (out.loss * scale).backward()
        work = dict(zip(WORK, part.work.unbind(), strict=True))
        for name, value in (metrics.sums(out, objective) | work).items():
            totals[name] = totals.get(name, 0) + value
    return totals


def clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Clip the gradient to norm `limit` (0: do not); returns its norm before, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def update_and_read(
    optimizer: torch.optim.Optimizer,
    totals: dict[str, torch.Tensor],
    norm: torch.Tensor,
    batch_size: int,
    stop: bool,
) -> tuple[dict[str, float], bool]:
    """Update parameters, then read the device once: metrics, and whether any rank is to stop.

    The update is queued before the read, so that the device has work while the host waits. Where
    loss or norm is not finite the device leaves parameters and states as they are.

    Args:
        optimizer: a fused one, which takes `found_inf` as from torch's GradScaler.
        totals: sums of this rank, of `accumulate`.
        norm: of the gradient of all ranks, of `clip`.
        batch_size: examples of all ranks.
        stop: whether this rank is to stop.

    Returns:
        Metrics as means over the global batch, with the norm; and whether to stop.
    """
    sums = torch.stack([*totals.values()])
    sums = distributed.sum_over_ranks(torch.cat([sums, sums.new_full((1,), stop)]))
    norm = norm.to(sums, non_blocking=True)
    decisive = torch.stack([sums[[*totals].index("loss")], norm])
    # Offloaded parameters are on the CPU. The optimizer would copy the flag there without a wait.
    where = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = decisive.isfinite().all().logical_not().float().to(where)
    optimizer.step()
    *sums, stopping, norm = torch.cat([sums, norm[None]]).tolist()
    means = [value / batch_size for value in sums]
    return dict(zip(totals, means, strict=True)) | {"grad_norm": norm}, stopping > 0


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
        take: runs forward and backward over examples and returns what `accumulate` does.
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
    if found := distributed.gather(
        [int(i) for i, fine in zip(mine, losses, strict=True) if not fine]
    ):
        return found
    suspects = [int(i) for i, fine in zip(mine, gradients, strict=True) if not fine]
    if not any(gradients) or distributed.world_size() == 1:
        return distributed.gather(suspects)
    good = mine[gradients.index(True)]
    turns = [
        (i, rank, run(i if rank == distributed.rank() else good)[1])
        for i in suspects
        for rank in range(distributed.world_size())
    ]
    return distributed.gather(
        [i for i, rank, fine in turns if rank == distributed.rank() and not fine]
    )
