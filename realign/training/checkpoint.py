"""Checkpoints: trained parameters and optimizer state, written while training continues.

The name of a checkpoint holds the step. The order of the data, the learning rate and the random
numbers follow from settings and step, so they are not saved. A checkpoint is written between two
steps, so it holds no partial gradient. Every rank writes its shards through
torch.distributed.checkpoint, and any number of ranks can read them. Numbers that do not follow from
the step, such as the best evaluation so far, are the run's state.

    checkpoints/step-000050/manifest.json                    size and digest of every file
                            state.json                       the state of the run
                            shard-00001-model-....safetensors   one for each rank

Tensors are stored as safetensors and metadata as JSON. Nothing is unpickled, so a malicious file
cannot run code. The digests detect damage, such as a cut file or a flipped bit. They do not detect
manipulation, since a manifest can be rewritten too. A checkpoint is written under a temporary name.
It is renamed when all ranks have finished and every file is on the disk, so a checkpoint with its
final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from realign.distributed import CommonError, broadcast_from_rank0, rank
from realign.files import read_json
from realign.terminal import show

_MANIFEST, _STATE = "manifest.json", "state.json"
_TRAINED = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)


class CheckpointError(CommonError):
    """A checkpoint could not be written or read."""


class Checkpoints:
    """The checkpoints of a run. Every rank must make the same calls.

    As a context manager it finishes the pending checkpoint on exit.

    Args:
        folder: folder of the checkpoints. Several machines need a shared file system.
        keep: number of checkpoints to keep; older ones are deleted.

    Attributes:
        best: step of a checkpoint to keep besides the newest; 0 for none.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.best = 0
        self._pending: Future | None = None
        # The writer thread communicates with other ranks, so it needs its own process group.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self._settle()
        except Exception:
            if kind is None:
                raise

    def last(self) -> int:
        """The step of the newest checkpoint, or 0."""
        return max(map(_step, _steps(self.folder)), default=0)

    def last_intact(self) -> int:
        """The step of the newest intact checkpoint, or 0 if there is no checkpoint.

        Rank 0 compares all files with their digests. Newer damaged checkpoints are reported and
        renamed to `damaged-step-NNNNNN`.

        Raises:
            CheckpointError: when there are checkpoints and none is intact.
        """
        return broadcast_from_rank0(self._choose)

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        state: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Copy a checkpoint to CPU memory, and write it from there while training continues.

        At most one checkpoint is pending, and the next waits for it. If one cannot be written, as
        on a full disk, a warning reports it at once. Earlier checkpoints stay, and the next is
        tried.

        Args:
            step: the step just finished.
            model: its trained parameters are saved.
            optimizer: its state is saved.
            state: numbers of the run that `load` returns, as JSON. Those of rank 0 are saved.
            wait: return only when the checkpoint is on the disk.

        Raises:
            CheckpointError: with `wait`, when the checkpoint could not be written.
        """
        self._settle()
        # The text is made here, since the run changes its state while the thread writes.
        writer = _Writer(self.folder, step, self.keep, self.best, json.dumps(state or {}))
        model_state, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
        pending = async_save(
            _tensors(model_state, optimizer_state),
            storage_writer=writer,
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(pending, Future)
        pending.add_done_callback(lambda done: self._clear(writer, done, warn=not wait))
        self._pending = pending
        if wait and (problem := self._settle()):
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written ({problem}). "
                f"{self._newest_kept()} Free some space, and continue with --resume."
            )

    def check(self, step: int) -> None:
        """Check that the checkpoint of a step is intact. Rank 0 compares its files.

        Raises:
            CheckpointError: when it is missing or damaged.
        """

        def damage() -> str:
            return _damage(self.folder / _name(step))

        if problem := broadcast_from_rank0(damage):
            raise CheckpointError(f"{self.folder / _name(step)} cannot be loaded: {problem}.")

    def load(
        self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Restore the checkpoint of a step in place. Any number of ranks may have written it.

        Returns:
            The state that was saved; empty for checkpoints of versions without it.

        Raises:
            CheckpointError: when the checkpoint cannot be read.
        """
        model_state, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
        path = self.folder / _name(step)
        reader = HuggingFaceStorageReader(str(path))
        keys = reader.read_metadata().state_dict_metadata.keys()
        # Parameters that never had a gradient have no state. An example is a tower's layers after
        # the one whose output is used.
        stateless = {
            n: p for n, p in model.named_parameters() if f"optimizer.state.{n}.step" not in keys
        }
        states = tuple(f"optimizer.state.{name}." for name in stateless)
        saved = {
            name: value
            for name, value in _tensors(model_state, optimizer_state).items()
            if not name.startswith(states)
        }
        try:
            load(
                saved,
                storage_reader=reader,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as failed:
            error, _ = next(iter(failed.failures.values()))
            raise CheckpointError(f"{path} cannot be loaded: {error}.") from error
        restored: dict[str, Any] = {
            name: saved.get(f"optimizer.{name}", setting)
            for name, setting in optimizer_state.items()
        }
        set_state_dict(
            model,
            optimizer,
            model_state_dict={name: saved[f"model.{name}"] for name in model_state},
            optim_state_dict=restored,
            options=replace(_TRAINED, strict=False),
        )
        for parameter in stateless.values():
            optimizer.state.pop(parameter, None)
        return read_json(path / _STATE) if (path / _STATE).exists() else {}

    def _settle(self) -> str:
        """Wait for the pending checkpoint. Returns why it could not be written, or ""."""
        pending, self._pending = self._pending, None
        return _problem(pending) if pending else ""

    def _clear(self, writer: _Writer, done: Future, *, warn: bool) -> None:
        """Remove an unfinished checkpoint; called by the writer thread."""
        problem = ""
        with suppress(Exception):  # `_settle` raises all other errors
            problem = _problem(done)
        if not problem or rank() != 0:
            return
        shutil.rmtree(writer.path, ignore_errors=True)
        if warn:
            show(
                f"warning: the checkpoint of step {writer.step} could not be written ({problem}). "
                f"{self._newest_kept()} Training continues. Free some space before the next one.",
                error=True,
            )

    def _newest_kept(self) -> str:
        last = self.last()
        return f"The one of step {last} is kept." if last else "There is no earlier one."

    def _choose(self) -> int:
        paths = _steps(self.folder)[::-1]
        damaged = []
        for path in paths:
            if not (problem := _damage(path)):
                break
            damaged.append((path, problem))
        if paths and len(damaged) == len(paths):
            reasons = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
            raise CheckpointError(
                f"no checkpoint in {self.folder} is intact ({reasons}). Restore the files, or move "
                "the folder away to start a new run."
            )
        for path, problem in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            show(
                f"warning: {path} is damaged ({problem}) and was renamed to {aside.name}. The run "
                f"resumes from {paths[len(damaged)].name}.",
                error=True,
            )
        return _step(paths[len(damaged)]) if paths else 0


class _Writer(HuggingFaceStorageWriter):
    """Writes one safetensors file per rank. Rank 0 renames the folder when all are written."""

    def __init__(
        self, folder: Path, step: int, keep: int, best: int = 0, state: str = "{}"
    ) -> None:
        self.step = step
        self.keep = keep
        self.best = best
        self.state = state
        self.target = folder / _name(step)
        super().__init__(str(folder / f".{self.target.name}.partial"), save_distributed=True)

    def prepare_global_plan(self, plans: list) -> list:
        """Remove an earlier attempt: on rank 0, when all folders exist and no rank writes yet."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.makedirs(self.path, exist_ok=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan, planner) -> torch.futures.Future:
        """Write this rank's file. Returns [(name, digest)] for `finish`."""
        results = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in results})
        done = torch.futures.Future()
        done.set_result([(name, _digest(Path(self.path) / name)) for name in names])
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the manifest, rename the folder, delete old checkpoints: on rank 0 at the end."""
        partial, folder = Path(self.path), self.target.parent
        files = dict(pair for pairs in results for pair in pairs)
        if absent := [name for name in files if not (partial / name).exists()]:
            raise OSError(
                f"rank 0 does not see {absent[0]} of another rank; --output must be on a file "
                "system that all machines share"
            )
        _write_synced(partial / _STATE, self.state)
        files[_STATE] = _digest(partial / _STATE)
        manifest = json.dumps({"step": self.step, "files": files}, indent=2)
        _write_synced(partial / _MANIFEST, manifest)
        _sync(partial)
        shutil.rmtree(self.target, ignore_errors=True)
        partial.rename(self.target)
        _sync(folder)
        old = [path for path in _steps(folder)[: -self.keep] if _step(path) != self.best]
        for path in [*old, *folder.glob(".step-*.partial")]:
            shutil.rmtree(path, ignore_errors=True)


def _tensors(model_state: dict, optimizer_state: dict) -> dict[str, torch.Tensor]:
    """The tensors to save. Other entries of the optimizer are settings, which do not change."""
    states = {f"model.{name}": value for name, value in model_state.items()}
    states |= {f"optimizer.{name}": value for name, value in optimizer_state.items()}
    return {name: value for name, value in states.items() if isinstance(value, torch.Tensor)}


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders in the order of their steps; other files are ignored."""
    paths = (path for path in folder.glob("step-*") if path.name[len("step-") :].isdecimal())
    return sorted(paths, key=_step)


def _digest(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"bytes": path.stat().st_size, "blake2b": digest}


def _damage(path: Path) -> str:
    """A short description of a checkpoint's damage, "" if it is intact."""
    try:
        files = read_json(path / _MANIFEST)["files"]
        present = {p.name for p in path.iterdir() if p.match("*.safetensors") or p.name == _STATE}
        if not files:
            return f"{_MANIFEST} lists no files"
        if absent := sorted(files.keys() - present):
            return f"{absent[0]} is missing"
        if unlisted := sorted(present - files.keys()):
            return f"{unlisted[0]} does not belong to it"
        with ThreadPoolExecutor() as pool:
            digests = dict(
                zip(files, pool.map(_digest, [path / name for name in files]), strict=True)
            )
    except OSError as error:
        return str(error)  # names the file
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    for name, expected in files.items():
        if digests[name]["bytes"] != expected["bytes"]:
            return f"{name} has {digests[name]['bytes']} bytes of {expected['bytes']}"
        if digests[name] != expected:
            return f"the content of {name} has changed"
    return ""


def _problem(done: Future) -> str:
    """The disk error of a checkpoint, "" if it was written. Raises any other error."""
    try:
        done.result()
    except CheckpointException as failed:
        errors = [error for error, _ in failed.failures.values()]
        for error in errors:
            if not isinstance(error, OSError):
                raise error from failed
        return str(errors[0])
    return ""


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """fsync a folder, so that the names in it are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
