"""The steps of training: the loop, forward and backward of a step, its update and its checks."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from realign import distributed
from realign.modeling.attention import row_budget
from realign.modeling.forest import Example, ForestBatch, build_batch
from realign.modeling.images import ImageStore
from realign.modeling.model import ForestModel
from realign.modeling.prefetch import ahead, pinned
from realign.training.fsdp import sync_gradients
from realign.training.metrics import sums
from realign.training.run_dir import StopSignal, write_identity
from realign.training.schedule import batches, learning_rate, seed_step
from realign.training.setup import Run
from realign.training.throughput import WORK, Meter, work_of
from realign.training.trackers import Trackers
from realign_kernels import Objective


class NonFiniteStep(distributed.CommonError):
    """Loss or gradient is not finite; raised on all ranks. The optimizer has updated nothing."""

    def __init__(
        self, step: int, metrics: dict[str, float], records: Sequence[str], batch_size: int
    ) -> None:
        if len(records) == batch_size:
            cause = "Every record of the step gives it: lower --learning-rate."
        elif records:
            cause = f"It comes from record(s) {', '.join(records)}: look at image and text."
        else:
            cause = "No record gives it by itself; lower --learning-rate."
        loss, norm = metrics["loss"], metrics["grad_norm"]
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {norm}. {cause} Nothing was updated; "
            "checkpoints are kept. Train with other settings in another --output."
        )


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward, laid out.

    Attributes:
        batch: their forest.
        references: (L, B) fp32 log-probs of the reference.
        work: (5,) fp64, `throughput.work_of`.
        last: whether it is the last micro-batch of a step.
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
        examples: all examples of the data set.
        references: (L, examples) fp32 log-probs of the reference.
        store: the images.
        attention: transformers' name of the implementation.
        row_tokens: most tokens in a row; 0 takes the best for the attention.
        device: device of the forward; results are in pinned memory for CUDA.
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
        examples = [self.examples[i] for i in part]
        budget = self.row_tokens or row_budget(self.attention, examples)
        batch = build_batch(examples, self.store, row_tokens=budget)
        references = self.references[:, part]
        return pinned(MicroBatch(batch, references, work_of(batch, examples), last), self.device)


def micro_batches(
    local_indices: np.ndarray,  # (n,) of this rank's examples of a step
    size: int,
) -> Iterator[tuple[np.ndarray, bool]]:
    """Indices of the examples of each forward of a step, and whether it is the last forward."""
    for start in range(0, len(local_indices), size):
        yield local_indices[start : start + size], start + size >= len(local_indices)


def train_steps(
    run: Run,
    references: torch.Tensor,  # (L, examples) fp32
) -> bool:
    """Train to the last step; returns False where a signal stopped the run, after a checkpoint.

    Raises:
        NonFiniteStep: when loss or gradient is not finite; the last checkpoint stays.
        CheckpointError: when a checkpoint that is waited for cannot be written.
    """
    config, optim, inputs, total = run.config, run.config.optim, run.inputs, run.total
    row_tokens, attention = config.data.row_tokens, inputs.model.attention
    feed = Feed(inputs.examples, references, inputs.store, attention, row_tokens, run.device)
    seed, count = config.run.seed, len(inputs.examples)
    order = partial(batches, count, optim.batch_size, seed, first=run.done, last=total)
    tasks = (
        partial(feed, *part)
        for _, indices in order()
        for part in micro_batches(indices[run.local], optim.micro_batch_size)
    )
    meter = Meter(inputs.model, run.device, inputs.model.dtype, run.image_flop)
    trackers = Trackers(config, inputs.objective.name, total=total, done=run.done)
    if distributed.rank() == 0:
        write_identity(config, **run.digests)
    inputs.model.train()
    with (
        StopSignal() as stop,
        run.checkpoints,
        trackers,
        heap_frozen(),
        ahead(tasks, run.device) as ready,
    ):
        for step, indices in order():
            began = time.perf_counter()
            metrics, stopping = train_step(run, step, indices[run.local], feed, ready, stop)
            rates = meter.read(metrics, optim.batch_size, time.perf_counter() - began)
            epoch = step * optim.batch_size / count
            trackers.write({"step": step, "epoch": epoch, **metrics, **rates})
            end = stopping or step == total
            if end or (config.run.save_every and step % config.run.save_every == 0):
                run.checkpoints.save(step, inputs.model, run.optimizer, wait=end)
            if stopping and step < total:
                line = f"stopped after step {step} of {total}; add --resume to continue"
                distributed.log_rank0(line)
                return False
    return True


def train_step(
    run: Run,
    step: int,
    local_indices: np.ndarray,  # (n,) of this rank's examples
    feed: Feed,
    ready: Iterator[MicroBatch],
    stop: StopSignal,
) -> tuple[dict[str, float], bool]:
    """One step on the micro-batches of `local_indices`, which are the next of `ready`.

    Returns:
        Metrics as means over the global batch; and whether any rank is to stop.

    Raises:
        NonFiniteStep: when loss or gradient is not finite.
    """
    optim, model, optimizer = run.config.optim, run.inputs.model, run.optimizer
    seed_step(run.config.run.seed, step, distributed.rank())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step - 1, run.total, optim)
    forward_backward = partial(
        accumulate,
        model,
        objective=run.inputs.objective,
        batch_size=optim.batch_size,
        device=run.device,
    )
    forwards = -(-len(local_indices) // optim.micro_batch_size)
    totals = forward_backward(islice(ready, forwards))
    norm = clip(run.trained, optim.clip)
    metrics, stopping = update_and_read(optimizer, totals, norm, optim.batch_size, bool(stop.name))
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        nonfinite = nonfinite_records(
            lambda part: forward_backward([feed(part)]), local_indices, run.trained
        )
        names = [run.inputs.examples[i].name for i in nonfinite]
        raise NonFiniteStep(step, metrics, names, optim.batch_size)
    optimizer.zero_grad()
    return metrics | {"learning_rate": optimizer.param_groups[0]["lr"]}, stopping


@contextmanager
def heap_frozen() -> Iterator[None]:
    """Keep Python's garbage collector off the objects that exist now: modules, model, records.

    A full collection visits all of them and stops every thread; no step makes them garbage.
    `gc.unfreeze` would undo a caller's freeze as well, so where there is one it is left as it is.
    """
    if gc.get_freeze_count():
        yield
        return
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
        for name, value in (sums(out, objective) | work).items():
            totals[name] = totals.get(name, 0) + value
    return totals


def clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Clip the gradient to norm `limit` (0: do not); returns its norm before, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def update_and_read(
    optimizer: torch.optim.Optimizer,
    totals: dict[str, torch.Tensor],
    norm: torch.Tensor,
    batch_size: int,
    stop: bool,
) -> tuple[dict[str, float], bool]:
    """Update the parameters, reduce the metrics over ranks, and read the device once.

    The update is queued before the read, so that the device has work while the host waits. Where
    loss or norm is not finite the device leaves parameters and states as they are.

    Args:
        optimizer: a fused optimizer, which reads `found_inf` as from torch's GradScaler.
        totals: sums of this rank, from `accumulate`.
        norm: norm of the gradient of all ranks, from `clip`.
        batch_size: examples of all ranks.
        stop: whether this rank is to stop.

    Returns:
        Metrics as means over the global batch, with the norm; and whether any rank is to stop.
    """
    summed = torch.stack([*totals.values()])
    summed = distributed.sum_over_ranks(torch.cat([summed, summed.new_full((1,), stop)]))
    norm = norm.to(summed, non_blocking=True)
    checked = torch.stack([summed[[*totals].index("loss")], norm])
    # Offloaded parameters are on the CPU. The optimizer would copy the flag there without a wait.
    parameter_device = optimizer.param_groups[0]["params"][0].device
    found_inf = checked.isfinite().all().logical_not().float().to(parameter_device)
    optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue] - as GradScaler
    optimizer.step()
    *values, stopping, grad_norm = torch.cat([summed, norm[None]]).tolist()
    means = {name: value / batch_size for name, value in zip(totals, values, strict=True)}
    return means | {"grad_norm": grad_norm}, stopping > 0


def nonfinite_records(
    forward_backward: Callable[[np.ndarray], dict[str, torch.Tensor]],
    local_indices: np.ndarray,  # (n,) of this rank's examples, as many on every rank
    parameters: Sequence[torch.nn.Parameter],
) -> list[int]:
    """Find the examples of a step whose own loss or gradient is not finite.

    Every rank runs the same forwards and backwards, one example at a time. A gradient is the sum
    of all ranks', so where it is not finite each rank in turn repeats its example, beside finite
    examples of other ranks. Where no example is finite, all stay suspects.

    Args:
        forward_backward: runs one example and returns the result of `accumulate`.
        local_indices: the examples of this rank.
        parameters: trained parameters; their gradients are cleared.

    Returns:
        Indices of these examples, of all ranks; empty when each of them is finite.
    """

    def is_finite(index: int) -> tuple[bool, bool]:
        """Whether the loss of one example is finite, and the gradient of all ranks."""
        for parameter in parameters:
            parameter.grad = None
        loss = forward_backward(np.array([index]))["loss"]
        return math.isfinite(loss), math.isfinite(clip(parameters, 0))

    indices, rank, ranks = local_indices.tolist(), distributed.rank(), distributed.world_size()
    losses, gradients = zip(*map(is_finite, indices), strict=True)
    if bad := distributed.gather([i for i, ok in zip(indices, losses, strict=True) if not ok]):
        return bad
    suspects = [i for i, ok in zip(indices, gradients, strict=True) if not ok]
    if not any(gradients) or ranks == 1:
        return distributed.gather(suspects)
    finite = indices[gradients.index(True)]
    repeated = [
        (i, turn, is_finite(i if turn == rank else finite)[1])
        for i in suspects
        for turn in range(ranks)
    ]
    return distributed.gather([i for i, turn, ok in repeated if turn == rank and not ok])
