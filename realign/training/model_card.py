"""The model card of a trained model: base, data, objective, settings, metrics, versions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realign.config import LossConfig, TrainConfig
from realign_kernels import objectives

_SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "share of records whose chosen response has the higher reward",
    "rewards/margins": "mean margin of rewards, chosen over rejected",
    "rewards/visual_accuracies": "share with the higher reward on the own image",
    "rewards/visual_margins": "mean margin of rewards, own image over retrieved",
}
_OURS = "preference-alignment"  # a tag
_VERSIONS = ("realign", "torch", "transformers", "peft")
_WHOLE = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")"""
_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")"""


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What a card shows of a run's settings."""
    return {
        **loss_settings(config.loss),
        "what was trained": _trained(config),
        "peak learning rate": config.optim.learning_rate,
        "weight decay": config.optim.weight_decay,
        "warm-up": config.optim.warmup,
        "clipping": config.optim.clip,
        "records in a step": config.optim.batch_size,
        "computed in": config.model.dtype,
        "seed": config.run.seed,
    }


def loss_settings(loss: LossConfig) -> dict[str, float]:
    """What a card shows of an objective's settings: those that it has."""
    weighted = "visual_weight" in objectives.settings(loss.objective)
    return {"beta": loss.beta} | ({"visual weight": loss.visual_weight} if weighted else {})


def model_card(
    objective: str,
    settings: Mapping[str, Any],
    *,
    base: str,
    adapter: bool,
    records: int,
    images: int,
    digests: Mapping[str, str],
    last: Mapping[str, float],
) -> str:
    """The text of a README.md that the hub and `huggingface_hub.ModelCard` read.

    Args:
        objective: name of it.
        settings: further ones, to be shown as they are.
        base: folder or hub name of the model that was trained; a folder is named without its place.
        adapter: whether the folder holds an adapter, not a whole model.
        records: preference records.
        images: distinct images in them.
        digests: of the base's weights and of the records, by what they are of.
        last: the last step's line of metrics.jsonl; empty where there is none.
    """
    local = bool(base) and Path(base).is_dir()
    name = Path(base).name if local else base or "a model without a name"
    head = {"library_name": "peft" if adapter else "transformers"}
    head |= {"base_model": base} if base and not local else {}
    front = "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in head.items()),
            "pipeline_tag: image-text-to-text",
            "tags:",
            *(f"- {tag}" for tag in dict.fromkeys((_OURS, "vision-language", "dpo", objective))),
            "---",
        ]
    )
    found = [(about, f"{last[key]:.4g}") for key, about in _SHOWN.items() if key in last]
    versions = [(package, _version(package)) for package in _VERSIONS]
    load = (_ADAPTER if adapter else _WHOLE).replace("BASE", name)
    parts = [
        front,
        f"# {name}, aligned by {objective}",
        f"{name} after preference alignment with images by `{objective}` "
        "(rDPO: Re-Align, arXiv 2502.13146).",
        f"```python\n{load}\n```",
        "## Data",
        f"{records:,} preference records with {images:,} distinct images. "
        + "; ".join(f"digest of the {what}: `{digest}`" for what, digest in digests.items())
        + ".",
        "## Training",
        _table("setting", "value", [("objective", objective), *settings.items()]),
        f"## The last step ({last.get('step', 0):.0f})" if last else "",
        _table("on its training records", "value", found) if found else "",
        "These say how far training went, not how good the model is: evaluate it on records it was "
        "not trained on.",
        "## Versions",
        _table("package", "version", versions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def without_adapter(card: str) -> str | None:
    """The card of an adapter for the model with that adapter merged in; None for a foreign card,
    which would go on speaking of an adapter."""
    if f"- {_OURS}\n" not in card or "```python\n" not in card:
        return None
    front, rest = card.split("```python\n", 1)
    _, behind = rest.split("\n```", 1)
    front = front.replace("library_name: peft", "library_name: transformers", 1)
    return f"{front}```python\n{_WHOLE}\n```{behind}"


def with_evaluation(card: str, rates: Mapping[str, Mapping[str, float]]) -> str:
    """The card with a table of rates, each with `value`, `low` and `high` in [0, 1]."""
    rows = [
        (
            name.replace("_", " "),
            f"{100 * r['value']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]",
        )
        for name, r in rates.items()
    ]
    table = _table("on scenes it was not trained on", "share [95 % interval]", rows)
    return card.replace("\n## Versions\n", f"\n## Evaluation\n\n{table}\n\n## Versions\n", 1)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # as this package run from a checkout
        return "not installed"


def _trained(config: TrainConfig) -> str:
    model = config.model
    if model.tune == "lora":
        return f"LoRA on the language model, rank {model.lora_rank}, alpha {model.lora_alpha:g}"
    return "all weights" if model.train_vision else "all weights but the vision tower's"


def _table(first: str, second: str, rows: list[tuple]) -> str:
    lines = [f"| {first} | {second} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines)
