"""Training steps: the loop, forward and backward of a step, its update and its checks."""

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
from realign.training.evaluation import Evaluations
from realign.training.fsdp import sync_gradients
from realign.training.metrics import shifted_mean, sums
from realign.training.run_dir import StopSignal, write_identity
from realign.training.schedule import batches, learning_rate, projector_rate, seed_step
from realign.training.setup import Run
from realign.training.throughput import WORK, Meter, work_of
from realign.training.trackers import Trackers
from realign_kernels import Objective


class NonFiniteStep(distributed.CommonError):
    """Loss or gradient is not finite. Raised on all ranks; nothing was updated."""

    def __init__(
        self, step: int, metrics: dict[str, float], records: Sequence[str], batch_size: int
    ) -> None:
        if len(records) == batch_size:
            cause = "Every record of the step causes it. Lower --learning-rate."
        elif records:
            cause = f"It comes from record(s) {', '.join(records)}. Check their images and texts."
        else:
            cause = "No single record causes it. Lower --learning-rate."
        loss, norm = metrics["loss"], metrics["grad_norm"]
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {norm}. {cause} Nothing was updated, and "
            "checkpoints are kept. Train with different settings in another --output."
        )


@dataclass(frozen=True)
class MicroBatch:
    """The batch of one forward, with its references.

    Attributes:
        batch: the forest of its examples.
        references: (L, B) fp32 log-probs of the reference.
        work: (5,) fp64, `throughput.work_of`.
        last: whether it is the last micro-batch of a step.
    """

    batch: ForestBatch
    references: torch.Tensor
    work: torch.Tensor
    last: bool

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`. Copies from pinned memory do not wait."""
        references, work = (t.to(device, non_blocking=True) for t in (self.references, self.work))
        return MicroBatch(self.batch.to(device), references, work, self.last)


@dataclass(frozen=True)
class Feed:
    """Builds micro-batches on the host. Thread-safe.

    Attributes:
        examples: all examples of the data set.
        references: (L, examples) fp32 log-probs of the reference.
        store: the images.
        attention: name of the attention implementation in transformers.
        row_tokens: maximum number of tokens in a row. 0 chooses by attention
            (`attention.row_budget`).
        device: device of the forward. For CUDA, results are in pinned memory.
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
        """Build the micro-batch of these examples.

        Raises:
            RecordError: when an image cannot be decoded, or has changed.
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
    """Train to the last step, or to an early stop.

    Returns False if a signal stopped the run, after a checkpoint.

    Raises:
        NonFiniteStep: when loss or gradient is not finite. Checkpoints are kept.
        CheckpointError: when the last checkpoint cannot be written.
    """
    config, optim, inputs, total = run.config, run.config.optim, run.inputs, run.total
    row_tokens, attention = config.data.row_tokens, inputs.model.attention
    feed = Feed(inputs.examples, references, inputs.store, attention, row_tokens, run.device)
    trained = inputs.training
    order = partial(
        batches, len(trained), optim.batch_size, config.run.seed, first=run.done, last=total
    )
    tasks = (
        partial(feed, *part)
        for _, places in order()
        for part in micro_batches(trained[places][run.local], optim.micro_batch_size)
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
        evaluations = Evaluations(run, feed, trackers)
        evaluations.after(run.done)
        for step, places in order():
            if evaluations.stops:
                break
            began, indices = time.perf_counter(), trained[places]
            metrics, stopping = train_step(run, step, indices[run.local], feed, ready, stop)
            rates = meter.read(metrics, optim.batch_size, time.perf_counter() - began)
            epoch = step * optim.batch_size / len(trained)
            trackers.write({"step": step, "epoch": epoch, **metrics, **rates})
            run.done = step
            save = partial(run.checkpoints.save, step, inputs.model, run.optimizer, state=run.state)
            end = stopping or step == total
            saved = end or (config.run.save_every and step % config.run.save_every == 0)
            if saved:
                save(wait=end)
            if stopping and step < total:
                line = f"stopped after step {step} of {total}; add --resume to continue"
                distributed.log_rank0(line)
                return False
            improved = evaluations.after(step)
            if not saved and (improved or evaluations.stops):
                save(wait=evaluations.stops)
    if line := evaluations.summary():
        distributed.log_rank0(line)
    return True


def train_step(
    run: Run,
    step: int,
    local_indices: np.ndarray,  # (n,) of this rank's examples
    feed: Feed,
    ready: Iterator[MicroBatch],
    stop: StopSignal,
) -> tuple[dict[str, float], bool]:
    """One step on the micro-batches of `local_indices`, the next in `ready`.

    Returns:
        Metrics as means over the global batch, and whether any rank received a stop signal.

    Raises:
        NonFiniteStep: when loss or gradient is not finite.
    """
    optim, model, optimizer = run.config.optim, run.inputs.model, run.optimizer
    objective = run.objective
    seed_step(run.config.run.seed, step, distributed.rank())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step - 1, run.total, optim)
    for group in optimizer.param_groups[1:]:
        group["lr"] = projector_rate(step - 1, run.total, optim)
    forward_backward = partial(
        accumulate,
        model,
        objective=objective,
        batch_size=optim.batch_size,
        device=run.device,
    )
    forwards = -(-len(local_indices) // optim.micro_batch_size)
    totals = forward_backward(islice(ready, forwards))
    if run.inputs.text_only:
        # Without an image the projector has no gradient. Sharded, it has zeros (`build_batch`).
        for parameter in run.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    norm = clip(run.trained, optim.clip)
    metrics, stopping = update_and_read(optimizer, totals, norm, optim.batch_size, bool(stop.name))
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        nonfinite = nonfinite_records(
            lambda part: forward_backward([feed(part)]), local_indices, run.trained
        )
        names = [run.inputs.examples.name(i) for i in nonfinite]
        raise NonFiniteStep(step, metrics, names, optim.batch_size)
    optimizer.zero_grad()
    if objective.shifted_leaves:
        rewards = run.rewards
        rewards.add(shifted_mean(metrics, objective), optim.batch_size)
        run.state["rewards"] = vars(rewards)
    return metrics | {"learning_rate": optimizer.param_groups[0]["lr"]}, stopping


@contextmanager
def heap_frozen() -> Iterator[None]:
    """Hide existing objects (modules, model, records) from Python's garbage collector.

    A full collection would visit all of them and stop every thread, and no step frees them.
    `gc.unfreeze` would also undo a caller's freeze, so an existing freeze is left unchanged.
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
    """Forward and backward over the micro-batches of a step. Returns sums of metrics and work.

    Gradients are those of the mean loss over the `batch_size` examples of all ranks. They are
    reduced with the last micro-batch. No value is read back from the device.
    """
    totals: dict[str, torch.Tensor] = {}
    # FSDP averages gradients over ranks, and the loss is a mean over the global batch.
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
    """Clip gradients to norm `limit` (0: no clipping). Returns the norm before, a scalar."""
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

    The update is queued before the read, so that the device has work while the host waits. If loss
    or norm is not finite, the device leaves parameters and optimizer state unchanged.

    Args:
        optimizer: a fused optimizer, which reads `found_inf` as set by torch's GradScaler.
        totals: sums of this rank, from `accumulate`.
        norm: norm of the gradient of all ranks, from `clip`.
        batch_size: number of examples of all ranks.
        stop: whether this rank received a stop signal.

    Returns:
        Metrics with the norm, as means over the global batch, and whether any rank must stop.
    """
    summed = torch.stack([*totals.values()])
    summed = distributed.sum_over_ranks(torch.cat([summed, summed.new_full((1,), stop)]))
    norm = norm.to(summed, non_blocking=True)
    checked = torch.stack([summed[[*totals].index("loss")], norm])
    # Offloaded parameters are on the CPU. The optimizer would not wait for its copy of the flag.
    parameter_device = optimizer.param_groups[0]["params"][0].device
    found_inf = checked.isfinite().all().logical_not().float().to(parameter_device)
    optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue] - as GradScaler
    optimizer.step()
    *values, stopping, grad_norm = torch.cat([summed, norm[None]]).tolist()
    means = {name: value / batch_size for name, value in zip(totals, values, strict=True)}
    return means | {"grad_norm": grad_norm}, stopping > 0


def nonfinite_records(
    forward_backward: Callable[[np.ndarray], dict[str, torch.Tensor]],
    local_indices: np.ndarray,  # (n,) this rank's examples; n is equal on all ranks
    parameters: Sequence[torch.nn.Parameter],
) -> list[int]:
    """Find the examples of a step whose own loss or gradient is not finite.

    Every rank runs the same number of forwards and backwards, one example at a time. A gradient is
    summed over ranks. If it is not finite, each rank in turn repeats its example, while the other
    ranks run finite examples. If no example gives a finite gradient, all are returned.

    Args:
        forward_backward: runs one example and returns the result of `accumulate`.
        local_indices: the examples of this rank.
        parameters: trained parameters; their gradients are cleared.

    Returns:
        Indices of these examples, from all ranks. Empty if every single example is finite.
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
