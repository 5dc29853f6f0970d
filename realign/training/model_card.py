"""The model card of a trained model, from the template model_card.md in this folder."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from realign.config import OF_ADAM, LossConfig, TrainConfig
from realign_kernels import objectives

_SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "share of records whose chosen response has the higher reward",
    "rewards/margins": "mean margin of rewards, chosen over rejected",
    "rewards/visual_accuracies": "share of records whose own image gives the higher reward",
    "rewards/visual_margins": "mean margin of rewards, own image over retrieved",
}
_TAG = "preference-alignment"  # marks cards of this project
_EVALUATION = re.compile(r"\n## Evaluation\n.*?(?=\n## |\Z)", re.DOTALL)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings of a run for the card."""
    model, optim = config.model, config.optim
    more: dict[str, Any] = {}
    if model.recipe:
        more["recipe"] = f"{model.recipe}, with the values below"
    if model.quantize:
        more["base while training"] = f"quantized to {model.quantize}"
    if path := model.reference_model:
        more["reference"] = shown_name(path)
    if optim.projector_learning_rate:
        more["peak learning rate of the projector"] = optim.projector_learning_rate
    schedule = optim.schedule
    if optim.min_learning_rate:
        schedule += f" to {optim.min_learning_rate:g}"
    optimizer = optim.optimizer
    if optimizer in OF_ADAM:
        betas = f"betas {optim.adam_beta1:g} and {optim.adam_beta2:g}"
        optimizer += f", {betas}, epsilon {optim.adam_epsilon:g}"
    return {
        **loss_settings(config.loss),
        "trained weights": model.how,
        **more,
        "peak learning rate": optim.learning_rate,
        "schedule": schedule,
        "optimizer": optimizer,
        "weight decay": optim.weight_decay,
        "warm-up": optim.warmup,
        "gradient clipping": optim.clip,
        "records in a step": optim.batch_size,
        "compute dtype": model.dtype,
        "seed": config.run.seed,
    }


def shown_name(model: str) -> str:
    """A folder's name without its parents, or a Hub name. "" gives "Unnamed model"."""
    if not model:
        return "Unnamed model"
    return Path(model).name if Path(model).is_dir() else model


def loss_settings(loss: LossConfig) -> dict[str, Any]:
    """The settings of an objective for the card."""
    settings = asdict(loss)
    if "visual_weight" not in objectives.settings(loss.objective):
        del settings["visual_weight"]
    del settings["objective"]
    return {name.replace("_", " "): v for name, v in settings.items() if v is not None}


def model_card(
    objective: str,
    settings: Mapping[str, Any],
    *,
    base: str,
    adapter: bool,
    commands: str,
    records: int,
    images: int,
    digests: Mapping[str, str],
    last: Mapping[str, float],
    held_out: Mapping[str, Any] | None = None,
) -> str:
    """The text of a README.md for the Hub and `huggingface_hub.ModelCard`.

    Args:
        objective: name of the objective.
        settings: further settings, shown unchanged.
        base: folder or Hub name of the model that was trained. A folder is shown by its name only.
        adapter: whether the folder holds an adapter instead of a whole model.
        commands: Markdown with the commands to use it (`serving.commands`).
        records: number of preference records.
        images: number of distinct images in them.
        digests: digests of the base's weights and of the records, by the names to show.
        last: the last step's metrics from metrics.jsonl; empty if there is none.
        held_out: facts about held-out records (`evaluation.held_out_facts`), if there are any.
    """
    local = bool(base) and Path(base).is_dir()
    name = shown_name(base)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base if base and not local else None,
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys((_TAG, "vision-language", "dpo", objective))),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_suffix(".md")),
        name=name,
        objective=objective,
        commands=commands,
        records=records,
        images=images,
        digests=digests,
        settings=settings,
        last=last,
        shown=_shown(last),
        held_out=held_out,
        held_out_shown=_shown(held_out["metrics"] if held_out else {}),
        versions={p: _version(p) for p in ("realign", "torch", "transformers", "peft")},
    )
    return str(card) + "\n"


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {about: metrics[key] for key, about in _SHOWN.items() if key in metrics}


def without_adapter(card: str, commands: str) -> str | None:
    """Turn an adapter's card into the card of the merged model.

    Returns None for a card by another trainer, whose text describes an adapter.

    Args:
        card: the text of the adapter's card.
        commands: Markdown with the commands to use the merged model.
    """
    front, code, rest = card.partition("```python\n")
    _, data, rest = rest.partition("\n## Data\n")
    if f"- {_TAG}\n" not in card or not code or not data:
        return None
    front = front.replace("library_name: peft", "library_name: transformers", 1)
    return f"{front}{commands}\n{data}{rest}"


def with_evaluation(card: str, section: str) -> str | None:
    """Add a section "Evaluation" to a card. It replaces earlier sections of that name.

    Returns None for a card by another trainer.
    """
    front, versions, rest = _EVALUATION.sub("", card).partition("\n## Versions\n")
    return f"{front}\n## Evaluation\n\n{section}\n{versions}{rest}" if versions else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "not installed"
