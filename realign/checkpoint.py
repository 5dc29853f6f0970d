"""Checkpoints: what is trained, the optimizer and the step, through torch.distributed.checkpoint.

A checkpoint is written beside its final name and renamed when complete, so one that has its name
is whole; the order of the data follows from seed and step. The last two are kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from realign.parallel import barrier, rank

_KEEP = 2
_TRAINED = StateDictOptions(ignore_frozen_params=True)


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write `folder/step-NNNNNN`; every rank calls it. Returns its path."""
    target = folder / f"step-{step:06d}"
    partial = folder / f".{target.name}.partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    trained, state = get_state_dict(model, optimizer, options=_TRAINED)
    dcp.save(
        {"model": trained, "optimizer": state},
        checkpoint_id=partial,
        no_dist=not dist.is_initialized(),
    )
    barrier()
    if rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in sorted(folder.glob("step-*"))[:-_KEEP]:
            shutil.rmtree(old)
    barrier()
    return target


def last_step(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 when there is none."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    return max(steps, default=0)


def load(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore `folder/step-NNNNNN` in place, on any number of ranks."""
    trained, state = get_state_dict(model, optimizer, options=_TRAINED)
    saved = {"model": trained, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder / f"step-{step:06d}", no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
