"""Trackers of a run's metrics: JSONL, console, TensorBoard, W&B.

A tracker receives the metrics of each step, and is closed at the end. A resumed run continues its
trackers: repeated steps replace the entries of the killed run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from realign.config import RunConfig, TrainConfig
from realign.distributed import rank
from realign.files import JsonlLog, write_whole
from realign.progress import Progress, clock
from realign.training.metrics import evaluation_line, is_evaluation, legend, step_line

_RUN_ID = "wandb-id.txt"


class Tracker(AbstractContextManager, Protocol):
    """Receives metrics. It is a context manager, and writes pending entries on exit."""

    def write(self, entry: dict[str, Any]) -> None:
        """Write the metrics of one step or evaluation, which include `step` and `epoch`."""


def check_packages(run: RunConfig) -> None:
    """Check that the packages of the requested trackers are installed; called before any work.

    Raises:
        ValueError: when one is missing. The message names it and how to install it.
    """
    requested = {"tensorboard": run.tensorboard, "wandb": run.wandb is not None}
    for package, is_set in requested.items():
        if is_set and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--{package} needs the package {package}, which is not installed. "
                f"Run pip install 'realign[{package}]', or leave the flag out."
            )


class Trackers(ExitStack):
    """All trackers of a run; none on ranks other than 0.

    Args:
        config: the settings; `config.run` selects the trackers.
        name: title of the progress bar.
        total: steps of the whole run.
        done: steps already done.
    """

    def __init__(self, config: TrainConfig, name: str, *, total: int, done: int) -> None:
        super().__init__()
        self._trackers: list[Tracker] = []
        if rank() > 0:
            return
        run, output = config.run, Path(config.run.output)
        # A run without a checkpoint starts again with the evaluation of step 0.
        self._trackers.append(JsonlLog(output / "metrics.jsonl", keep_steps=done or -1))
        if run.tensorboard:
            self._trackers.append(TensorBoardLog(output / "tensorboard", done))
        if run.wandb is not None:
            self._trackers.append(WandbLog(run.wandb, output, config.to_dict(), done))
        if not run.quiet:
            self._trackers.append(Console(name, total=total, done=done, every=run.log_every))
        for tracker in self._trackers:
            self.enter_context(tracker)

    def write(self, entry: dict[str, Any]) -> None:
        """Write an entry to all trackers."""
        for tracker in self._trackers:
            tracker.write(entry)


class Console(Tracker):
    """Prints every `every`-th step and all evaluations on stdout, with a bar on a terminal."""

    def __init__(self, name: str, *, total: int, done: int, every: int) -> None:
        self._total, self._every, self._first = total, every, done
        # No bar, hence no carriage return, if stderr is not a terminal.
        quiet = not sys.stderr.isatty()
        self._progress = Progress(name, "steps", total, done=done, quiet=quiet, summary=False)

    def write(self, entry: dict[str, Any]) -> None:
        step = entry["step"]
        if is_evaluation(entry):
            tqdm.write(evaluation_line(entry, self._total))
            sys.stdout.flush()
            return
        self._progress.update()
        if self._progress.done == self._first + 1:
            tqdm.write(legend(entry))
        if step % self._every == 0 or step == self._total:
            each = self._progress.seconds / (self._progress.done - self._first)
            left = clock(each * (self._total - self._progress.done))
            tqdm.write(f"{step_line(entry, self._total)}  {left} left")
            sys.stdout.flush()

    def __exit__(self, *_) -> None:
        self._progress.close()


class TensorBoardLog(Tracker):
    """Writes event files for `tensorboard --logdir`. Entries after step `done` are purged."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else 0)

    def write(self, entry: dict[str, Any]) -> None:
        for name, value in _scalars(entry):
            self._writer.add_scalar(name, value, entry["step"])
        self._writer.flush()

    def __exit__(self, *_) -> None:
        self._writer.close()


class WandbLog(Tracker):
    """A Weights & Biases run, whose id is kept in the output folder.

    `WANDB_MODE=offline` needs no network, and `wandb sync` uploads the run later. W&B keeps the
    first values of a step. A repeated step gives the same values. W&B drops values for the last
    step of the earlier run, so an evaluation that was left to this run is logged one step later.
    """

    def __init__(self, project: str, output: Path, config: dict[str, Any], done: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - optional

        id_file = output / _RUN_ID
        run_id = id_file.read_text().strip() if done and id_file.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow" if run_id else None,
                dir=str(output),
                name=output.name,
                config=config,
            )
        except wandb.Error as error:
            raise ValueError(
                f"--wandb {project}: {error}. Log in with `wandb login`, or set WANDB_MODE=offline."
            ) from error
        write_whole(id_file, self._run.id + "\n")
        self._first = done + 1 if run_id else 0

    def write(self, entry: dict[str, Any]) -> None:
        self._run.log(dict(_scalars(entry)), step=max(entry["step"], self._first))

    def __exit__(self, kind, *_) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def _scalars(entry: dict[str, Any]) -> Sequence[tuple[str, float]]:
    return [(name, value) for name, value in entry.items() if name != "step"]
