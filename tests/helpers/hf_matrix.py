"""RDPOTrainer on adapters of all kinds and ways of loading: first loss, saving, resuming."""

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

from realign.data.records import Record
from realign.hf import RDPOTrainer, adapters

FRESH, GIVEN = "peft_config", "get_peft_model"
WAYS = (FRESH, GIVEN, *adapter_kinds.WAYS)
SEVERAL = "one of several"
OF_TRANSFORMERS = ("model.load_adapter", "AutoModel on the adapter's folder")

_HEAD = "output layer is neither plain LoRA"
_SHARED = "uses shared state"  # error of PEFT
_BIAS = "only 1 adapter with bias"  # error of PEFT
_DORA = "magnitudes of the base, since transformers does not load"
_TIED = "ensure_weight_tying"
REFUSED = {
    "AdaLoRA": "ADALORA: it needs a call in each step",
    "Lily": "LILY: its layers average over all tokens",
    "PVeRA": "PVERA: it draws random weights",
    "DoRA, lm_head": _HEAD,
    "LoKr, lm_head": _HEAD,
    "OFT, lm_head": _HEAD,
}
"""Kinds that cannot be trained in any way of loading -> part of the error."""

_REFUSED_AS_SEVERAL = {
    "LoRA, PiSSA": "changed the base",
    "LoRA, OLoRA": "changed the base",
    "LoRA, bias=all": _BIAS,
    "LoRA, bias=lora_only": _BIAS,
    "LoRA, both ends, tied": _TIED,
    "LoRA, modules_to_save tied": _TIED,
}
_REFUSED_OF_TRANSFORMERS = {
    "LoRA, DoRA": _DORA,
    "DoRA, embed_tokens": _DORA,
    "LoRA, both ends, tied": _TIED,
    "LoRA, modules_to_save tied": _TIED,
    "FRoD": _SHARED,
    "TinyLoRA": _SHARED,
    "Uni-LoRA": _SHARED,
    "VB-LoRA": _SHARED,
    "VeRA": _SHARED,
    "VeRA, no projections": _SHARED,
}


def refusal(kind: str, way: str, family: str) -> str | None:
    """Part of the error if a kind cannot be trained after this way of loading, or None."""
    if kind in REFUSED:
        return REFUSED[kind]
    if way == SEVERAL and kind == "Trainable tokens" and family in ("gemma3", "smolvlm"):
        return "an adapter on top of another one"  # PEFT's error for the tied head
    return {SEVERAL: _REFUSED_AS_SEVERAL}.get(
        way, _REFUSED_OF_TRANSFORMERS if way in OF_TRANSFORMERS else {}
    ).get(kind)


@dataclass(frozen=True)
class Bench:
    """A tiny model on disk, and everything that its cells share."""

    base: Path
    model: PreTrainedModel
    processor: object
    records: Sequence[Record]


@dataclass(frozen=True)
class Cell:
    """Results of a training, in nats. All should be 0, except `moved`."""

    loss: float
    """Loss of the first step minus 2 ln 2."""
    reward: float
    """Largest mean margin of the first step."""
    moved: float
    """Largest change of a log-prob by training, in a plain forward."""
    reloaded: float
    """Largest difference of log-probs between the trained and the reloaded model."""


def handed_over(
    bench: Bench, kind: str, way: str, folder: Path
) -> tuple[nn.Module, PeftConfig | None]:
    """model and peft_config of a trainer. A loaded adapter is first written to `folder`."""
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
    """A trainer of one step, with all its files in one folder."""
    model, peft_config = handed_over(bench, kind, way, folder / "adapter")
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    with adapter_kinds.quiet():
        return RDPOTrainer(
            model, config(folder, **(options | settings)), bench.records,
            processing_class=bench.processor, peft_config=peft_config,
        )  # fmt: skip


def trained_cell(bench: Bench, kind: str, way: str, folder: Path) -> Cell:
    """Train one step, save, and reload by PEFT on a fresh base.

    Raises:
        ValueError: if the kind cannot be loaded in this way, or is not supported.
    """
    trainer = trainer_of(bench, kind, way, folder)
    inputs = adapter_kinds.inputs_of(bench.processor)
    before = adapter_kinds.logps(trainer.model.vlm, inputs)
    with adapter_kinds.quiet():
        trainer.train()
        after = adapter_kinds.logps(trainer.model.vlm, inputs)
        trainer.save_model(str(folder / "saved"))
        place = adapters.place_of(trainer.adapter, folder / "saved")
        loaded = PeftModel.from_pretrained(copy.deepcopy(bench.model), place)
    margins = [history(trainer, f"rewards/{name}")[0] for name in ("margins", "visual_margins")]
    return Cell(
        history(trainer)[0] - 2 * torch.tensor(2.0).double().log().item(),
        max(map(abs, margins)),
        float((after - before).abs().max()),
        float((adapter_kinds.logps(loaded, inputs) - after).abs().max()),
    )
