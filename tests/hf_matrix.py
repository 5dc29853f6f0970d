"""RDPOTrainer on an adapter of a kind, loaded in a way: first loss, saving, resuming."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import adapter_kinds
import torch
from hf_runs import config, history
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from realign import adapters
from realign.hf import RDPOTrainer
from realign.records import Record

FRESH, GIVEN = "peft_config", "get_peft_model"
WAYS = (FRESH, GIVEN, *adapter_kinds.WAYS)


@dataclass(frozen=True)
class Bench:
    """A tiny model on disk, with all that its cells share."""

    base: Path
    model: PreTrainedModel
    processor: object
    records: Sequence[Record]


@dataclass(frozen=True)
class Cell:
    """What one training shows; nats, and 0 is right for all but `moved`."""

    loss: float
    """Of the first step, less 2 ln 2."""
    reward: float
    """Largest mean margin of the first step."""
    moved: float
    """Largest change of a log-prob by training, by a plain forward."""
    reloaded: float
    """Largest difference of a log-prob, trained model to PeftModel.from_pretrained."""


def handed_over(
    bench: Bench, kind: str, way: str, folder: Path
) -> tuple[nn.Module, PeftConfig | None]:
    """model and peft_config of a trainer; in `folder` there is the adapter that is loaded."""
    with adapter_kinds.quiet():
        if way == FRESH:
            return copy.deepcopy(bench.model), adapter_kinds.config_of(kind)
        if way == GIVEN:
            return adapter_kinds.adapt(bench.base, kind), None
        trained = adapter_kinds.save_trained(bench.base, kind, folder)
        model = adapter_kinds.WAYS[way](bench.base, folder)
    if "AutoModel" in way:  # it takes no is_trainable
        learns = {n.removeprefix("base_model.model.") for n, p in trained.named_parameters()
                  if p.requires_grad}  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learns)
    return model, None


def trainer_of(bench: Bench, kind: str, way: str, folder: Path, **settings) -> RDPOTrainer:
    """A trainer of two steps, which keeps all that it writes in a folder."""
    model, peft_config = handed_over(bench, kind, way, folder / "adapter")
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    with adapter_kinds.quiet():
        return RDPOTrainer(
            model, config(folder, **(options | settings)), bench.records,
            processing_class=bench.processor, peft_config=peft_config,
        )  # fmt: skip


def trained_cell(bench: Bench, kind: str, way: str, folder: Path) -> Cell:
    """Train two steps, save, and reload by PEFT on a fresh base.

    Raises:
        ValueError: where the kind cannot be loaded in this way, or is refused.
    """
    trainer = trainer_of(bench, kind, way, folder)
    inputs = adapter_kinds.inputs_of(bench.processor)
    before = adapter_kinds.logps(trainer.model.vlm, inputs)
    with adapter_kinds.quiet():
        trainer.train()
        after = adapter_kinds.logps(trainer.model.vlm, inputs)
        trainer.save_model(str(folder / "saved"))
        name = adapters.active_adapters(trainer.adapter)[0]
        place = adapters.place_of(trainer.adapter, name, folder / "saved")
        loaded = PeftModel.from_pretrained(copy.deepcopy(bench.model), place)
    margins = [history(trainer, f"rewards/{name}")[0] for name in ("margins", "visual_margins")]
    return Cell(
        history(trainer)[0] - 2 * torch.tensor(2.0).double().log().item(),
        max(map(abs, margins)),
        float((after - before).abs().max()),
        float((adapter_kinds.logps(loaded, inputs) - after).abs().max()),
    )
