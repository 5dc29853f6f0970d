"""The output folder of a run (lock, settings, progress), and the signals that stop a run."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from realign import distributed
from realign.config import EvalConfig, LossConfig, RunConfig, TrainConfig
from realign.digits import ASSETS
from realign.files import check_file, check_folder, open_lock, write_whole
from realign.modeling import feature_cache, reference_logps
from realign.modeling.merging import adapter_base
from realign.training.checkpoint import Checkpoints

_FREE = {
    "row_tokens", "micro_batch_size", "model", "pairs", "split", "image_folder", "workers",
    "recipe", "reference_model", "eval_pairs", "eval_split", "eval_image_folder", "early_stopping",
    "load_best",
}  # fmt: skip
"""Settings that --resume may change. They have no effect beyond rounding, are paths with a digest,
or use the best checkpoint. The values of a recipe are compared. With --lora-dropout, the sizes of
forwards change what is dropped, so they are compared too."""


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Lock the output folder on rank 0, against a second run in it.

    The system releases the lock when the process ends for any reason.

    Raises:
        CommonError: when another run holds the lock.
    """

    with ExitStack() as stack:

        def lock() -> None:
            output.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open_lock(output / ".lock"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise distributed.CommonError(
                    f"another run writes to {output}. Wait for its end, or name another --output."
                ) from None
            except OSError:  # a file system without locks
                pass

        distributed.broadcast_from_rank0(lock)
        yield


class StopSignal:
    """Records SIGTERM and Ctrl-C, so that the current step is finished and saved.

    A second Ctrl-C takes effect at once. A second SIGTERM does not, since both the scheduler and
    the launcher may send one.
    """

    def __init__(self) -> None:
        self.name = ""  # name of the received signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


def steps_done(config: TrainConfig, checkpoints: Checkpoints) -> int:
    """The step to resume from, 0 for a new run. An earlier run is never overwritten.

    Raises:
        ValueError: when the folder holds a run and `resume` is off, or its folder `model`, which
            the run writes, holds other files.
        CheckpointError: when it holds checkpoints and none is intact.
    """
    output = Path(config.run.output)
    if config.run.resume and (done := checkpoints.last_intact()):
        check_inputs(config)
        return done
    done = checkpoints.last()
    if not config.run.resume and (done or (output / "metrics.jsonl").exists()):
        raise ValueError(
            f"{output} holds a run with a checkpoint at step {done}. Add --resume to continue "
            "it, or name another --output."
        )
    check_inputs(config)
    folder = output / "model"
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files, and the run would replace them. Name another --output."
        )
    return 0


def check_inputs(config: TrainConfig) -> None:
    """Check that no model that a run reads is in the folder that it replaces.

    Raises:
        ValueError: when one is, also through a symbolic link.
    """
    folder = Path(config.run.output) / "model"
    for path in filter(None, (config.model.model, config.model.reference_model)):
        if Path(path).exists() and _within(path, folder):
            raise ValueError(
                f"the run replaces the folder {folder}, and {path} is in it. Name another --output."
            )


def _within(path: str | Path, folder: Path) -> bool:
    """Whether a path is a folder or in it, through symbolic links."""
    return Path(path).resolve().is_relative_to(folder.resolve())


def check_outputs(run: RunConfig) -> None:
    """Check that a run can write its outputs; called before any work.

    Raises:
        ValueError: when it cannot. The message names the flag, the path and the reason.
    """
    output, cache = Path(run.output), run.reference_cache or reference_logps.default_directory()
    check_folder("--output", output)
    for name in ("metrics.jsonl", "run.json"):
        check_file("--output", output / name)
    for name in ("checkpoints", "model"):
        check_folder("--output", output / name)
    check_folder("--reference-cache", cache)
    if run.tensorboard:
        check_folder("--tensorboard", output / "tensorboard")
    if run.cache_vision:
        check_folder("--cache-vision", feature_cache.default_directory())


def write_identity(config: TrainConfig, **digests: str) -> None:
    """Write settings and digests, such as those of base weights and pairs, to `run.json`."""
    identity = {"config": config.to_dict(), **digests}
    write_whole(Path(config.run.output) / "run.json", json.dumps(identity, indent=2) + "\n")


def check_settings(config: TrainConfig, **digests: str) -> None:
    """Check that a resumed run has the settings and digests that `write_identity` wrote.

    Raises:
        ValueError: when they differ. The message names each change.
    """
    output = Path(config.run.output)
    try:
        identity = json.loads((output / "run.json").read_text())
        old_sections = {"run": {}, "eval": asdict(EvalConfig())} | identity["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{output / 'run.json'}, which holds the run's settings, cannot be read ({error!r}). "
            "Restore it, or name another --output."
        ) from error
    settings = config.to_dict()
    sections = {name: settings[name] for name in ("model", "data", "loss", "optim", "eval")}
    sections["run"] = {"seed": settings["run"]["seed"]}
    if config.eval.given and not config.eval.eval_every:  # then it is the interval of evaluations
        sections["run"]["save_every"] = settings["run"]["save_every"]
    free = _FREE - {"micro_batch_size", "row_tokens"} if config.model.lora_dropout else _FREE
    changed = []
    for section, values in sections.items():
        # A run of an earlier version lacks newer settings, which had no other value there.
        defaults = {f.name: f.default for f in fields(getattr(config, section))}
        old = defaults | old_sections.get(section, {})
        if section == "loss":  # unset settings have the objective's defaults
            old = asdict(LossConfig(**old))
        changed += [
            f"{name} ({old[name]!r} -> {value!r})"
            for name, value in values.items()
            if name not in free and old[name] != value
        ]
    changed += [
        f"the {name.replace('_', ' ')}"
        for name, digest in digests.items()
        if identity.get(name, "") != digest
    ]
    if changed:
        raise ValueError(
            f"the run in {output} has different settings. Changed: {', '.join(changed)}. Resume it "
            "with its own settings, or name another --output."
        )


def base_of(config: TrainConfig) -> str:
    """Folder or Hub name of the model to train.

    Raises:
        ValueError: when it is an adapter, and the run would add a second one to it.
    """
    base = config.model.model or str(ASSETS)
    if adapter_base(base) and config.model.tune == "lora" and not config.run.merge:
        raise ValueError(
            f"{base} is an adapter itself, and an adapter on top of it could not be loaded."
            " Add --merge, which writes whole weights, or --tune full."
        )
    return base
