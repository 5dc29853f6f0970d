"""Evaluation of held-out records during a run: its pass, the best checkpoint, early stopping.

The evaluation of step 0 is the baseline. Later ones are compared with the best so far, whose
checkpoint is kept. A step of --save-every is saved first, so a kill during its evaluation loses no
step. Its checkpoint is then older than its evaluation. A run that resumes from it reads the
evaluation from the log, or repeats it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from realign import distributed
from realign.files import read_jsonl
from realign.modeling.prefetch import ahead
from realign.progress import Progress
from realign.training import held_out
from realign.training.checkpoint import CheckpointError
from realign.training.metrics import EVALUATION, is_evaluation, sums
from realign.training.setup import Run
from realign.training.trackers import Trackers

_STATE = "eval"  # key in `Run.state`


class Evaluations:
    """The evaluations of a run. Every rank must make the same calls.

    Args:
        run: the run, after `restore`.
        feed: builds the micro-batch of given examples (`step.Feed`).
        trackers: receive the metrics.

    Attributes:
        state: numbers that checkpoints keep. `step` is the last step that was evaluated. `best` is
            the best value of `--best-metric`, at `best_step`. `since_best` counts the evaluations
            after it. `baseline` is the value before the first step.
    """

    def __init__(self, run: Run, feed: Callable[..., Any], trackers: Trackers) -> None:
        self._run, self._feed, self._trackers = run, feed, trackers
        self._resumed = run.done
        self._config = run.config.eval
        self._given = len(run.inputs.held_out) > 0
        self._sign = held_out.sign(self._config.best_metric, run.inputs.objective)
        self.state: dict[str, Any] = run.state.setdefault(_STATE, {}) if self._given else {}
        run.checkpoints.best = self.state.get("best_step", 0)

    def after(self, step: int) -> bool:
        """Evaluate after a step if it is due, and was not done. Returns whether it is a new best.

        Step 0 is before the first step.
        """
        due = self._given and held_out.is_due(self._run.config, step, self._run.total)
        if not due or self.state.get("step") == step:
            return False
        metric = self._config.best_metric
        if step == self._resumed and (entry := self._logged(step)) is not None:
            return self._note(step, _value(entry, metric, EVALUATION))
        began = time.perf_counter()
        means = measure(self._run, self._feed)
        improved = self._note(step, _value(means, metric))
        if step:
            means["since_best"] = self.state["since_best"]
        means["seconds"] = time.perf_counter() - began
        epoch = step * self._run.config.optim.batch_size / len(self._run.inputs.training)
        entry = {f"{EVALUATION}{name}": value for name, value in means.items()}
        self._trackers.write({"step": step, "epoch": epoch, **entry})
        return improved

    @property
    def stops(self) -> bool:
        """Whether the run has had enough evaluations without a new best."""
        patience = self._config.early_stopping
        return 0 < patience <= self.state.get("since_best", 0)

    def summary(self) -> str:
        """A line about the end of the run and its best evaluation; "" without held-out pairs."""
        state, run = self.state, self._run
        if not self._given:
            return ""
        metric = f"{EVALUATION}{self._config.best_metric}"
        line = f"{metric} was never finite"
        if "best" in state:
            line = (
                f"the best {metric} is {state['best']:.4g}, at step {state['best_step']}, and "
                f"{state['baseline']:.4g} before the first step"
            )
        if self.stops and run.done < run.total:
            line = (
                f"stopped early after step {run.done} of {run.total}, since "
                f"{state['since_best']} evaluation(s) in a row were no better; {line}"
            )
        return line

    def _note(self, step: int, value: float) -> bool:
        """Update the state by the value of an evaluation. Returns whether it is a new best."""
        state = self.state
        state["step"] = step
        if step == 0:
            state["baseline"] = value
            return False
        best = state.get("best", -self._sign * math.inf)
        if math.isfinite(value) and self._sign * (value - best) > 0:
            state |= {"best": value, "best_step": step, "since_best": 0}
            self._run.checkpoints.best = step
            return True
        state["since_best"] = state.get("since_best", 0) + 1
        return False

    def _logged(self, step: int) -> dict[str, Any] | None:
        """The evaluation of a step in the log of a killed run, which a repetition would double."""

        def read() -> dict[str, Any] | None:
            log = Path(self._run.config.run.output) / "metrics.jsonl"
            entries = read_jsonl(log)
            return next((e for e in entries if e["step"] == step and is_evaluation(e)), None)

        return distributed.broadcast_from_rank0(read)


def _value(means: Mapping[str, float], metric: str, prefix: str = "") -> float:
    """A metric, or NaN if the loss is not finite: an accuracy counts a NaN reward as wrong."""
    return means[prefix + metric] if math.isfinite(means[f"{prefix}loss"]) else math.nan


def measure(run: Run, feed: Callable[..., Any]) -> dict[str, float]:
    """Evaluate the held-out examples. Every rank calls it for a part of them.

    All ranks run the same number of forwards, since a sharded model gathers weights in each. A rank
    without further examples repeats one, whose metrics are not counted.

    Returns:
        Means of all metrics over the held-out examples, equal on all ranks.
    """
    model, indices, size = run.inputs.model, run.inputs.held_out, run.config.optim.micro_batch_size
    rank, ranks, objective = distributed.rank(), distributed.world_size(), run.objective
    own = indices[rank::ranks]
    forwards = -(-len(indices) // (ranks * size))
    starts = range(0, forwards * size, size)
    parts = [own[start : start + size] for start in starts]
    tasks = (partial(feed, part if len(part) else indices[:1]) for part in parts)
    totals: dict[str, torch.Tensor] = {}
    losses: list[tuple[torch.Tensor, tuple[str, ...]]] = []
    bar = Progress(
        "evaluation", "records", len(own), quiet=not run.progress or not len(own), summary=False
    )
    model.eval()
    try:
        with torch.no_grad(), bar, ahead(tasks, run.device) as ready:
            for part, built in zip(parts, ready, strict=True):
                built = built.to(run.device)
                output = model(built.batch, objective, built.references)
                for name, value in sums(output, objective).items():
                    value = value if len(part) else torch.zeros_like(value)
                    totals[name] = totals.get(name, 0) + value
                if len(part):
                    losses.append((output.loss, built.batch.names))
                bar.update(len(part))
    finally:
        model.train()
        if isinstance(model, FSDPModule):
            model.reshard()  # without a backward the root stays gathered
    summed = distributed.sum_over_ranks(torch.stack([*totals.values()]))
    means = dict(zip(totals, (summed / len(indices)).tolist(), strict=True))
    if not math.isfinite(means["loss"]):
        bad = [name for loss, names in losses if not loss.isfinite() for name in names]
        names = ", ".join(distributed.gather(bad)[:8])
        distributed.log_rank0(
            f"warning: the loss of held-out records is {means['loss']}. It comes from a forward "
            f"with record(s) {names}. Check their images and texts. This evaluation cannot be the "
            "best."
        )
    return means


def choose_weights(run: Run) -> int:
    """Load the best checkpoint, if the settings ask for it. Returns the step of the weights.

    Raises:
        CheckpointError: when that checkpoint is missing or damaged.
    """
    best = run.state.get(_STATE, {}).get("best_step", 0)
    if not run.config.eval.exports_best or best == run.done:
        return run.done
    if not best:
        distributed.log_rank0("no evaluation was finite; the last weights are exported")
        return run.done
    try:
        run.checkpoints.check(best)
        run.checkpoints.load(best, run.inputs.model, run.optimizer)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} It has the best evaluation. Add --resume --no-load-best to export the "
            "weights of the last step."
        ) from error
    distributed.log_rank0(f"loaded the weights of step {best}, which has the best evaluation")
    return best


def held_out_facts(run: Run, step: int, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts for the model card: held-out records, their metrics, and the choice of the step.

    Args:
        run: the run.
        step: step whose weights are exported.
        entries: entries of the log of that step.
    """
    if not len(run.inputs.held_out):
        return {}
    entry = next(filter(is_evaluation, entries), {})
    return {
        "records": len(run.inputs.held_out),
        "digest": run.digests["held_out_pairs"],
        "step": step,
        "chosen_by": f"{EVALUATION}{run.config.eval.best_metric}" * run.config.eval.exports_best,
        "metrics": {name.removeprefix(EVALUATION): value for name, value in entry.items()},
    }
