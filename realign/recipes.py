"""Recipes of `realign.train`: values in place of the defaults, each with its source.

A recipe gives values to options that are neither in `--config` nor on the command line. To add one,
add a table to `RECIPES`. docs/training.md compares the recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from realign_kernels import objectives


class Value(NamedTuple):
    """The value of an option in a recipe.

    Attributes:
        section: section of the settings, such as "optim".
        name: field of that section.
        value: the value.
        source: where the value comes from.
    """

    section: str
    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        title: its origin.
        values: values of options.
        notes: what the options of training cannot set.
    """

    title: str
    values: tuple[Value, ...]
    notes: tuple[str, ...] = ()


_LORA = "paper, training details: LoRA on all linear layers of the language model"
_PAPER = "paper, training details"
_RATES = (
    "study.md, learning rates: rDPO does best at 4e-4 on digits and at 2e-4 on photographs, and "
    "worst at 5e-5, the lowest rate tried"
)

RECIPES: Mapping[str, Recipe] = {
    "paper": Recipe(
        "Xing et al., Re-Align, arXiv 2502.13146v3",
        (
            Value("model", "tune", "lora", _LORA),
            Value("model", "lora_targets", "all-linear", _LORA),
            Value("model", "lora_rank", 128, _LORA),
            Value("model", "lora_alpha", 256.0, _LORA),
            Value("loss", "objective", "rdpo", "paper, method: rDPO"),
            Value("loss", "beta", 0.1, _PAPER),
            Value("loss", "visual_weight", 1.0, "paper, method: both terms have the same weight"),
            Value("optim", "learning_rate", 1e-5, _PAPER),
            Value("optim", "projector_learning_rate", 2e-5, _PAPER),
            Value("optim", "schedule", "cosine", _PAPER),
            Value("optim", "optimizer", "adamw", _PAPER),
            Value("optim", "weight_decay", 0.0, _PAPER),
            Value("optim", "warmup", 0.03, _PAPER),
            Value("optim", "batch_size", 32, _PAPER + ": 1 record, accumulated 8 times, on 4 GPUs"),
            Value("optim", "epochs", 1.0, _PAPER),
        ),
        ("the paper computes in bf16, which --dtype auto chooses on CUDA",),
    ),
    "recommended": Recipe(
        "the arms that did best in docs/study.md, on models of 1.1 M weights only",
        (
            Value("loss", "objective", "rdpo", "study.md, paired tests: better than DPO"),
            Value("loss", "beta", 0.1, "study.md, beta: 0.5 misnames more, 0.05 as many"),
            Value("loss", "visual_weight", 2.0, "study.md, weight: fewest misnamed in both runs"),
            Value("model", "lora_rank", 16, "study.md, training: the only rank that was run"),
            Value("model", "lora_alpha", 32.0, "study.md, training: twice the rank"),
            Value("optim", "learning_rate", 2e-4, _RATES),
        ),
        (
            "no larger model was trained, so compare the learning rate with 1e-5 on held-out pairs",
            "DPO does best on records with all words masked (realign.pairs --segments 0), where "
            "the visual term adds nothing",
        ),
    ),
}

_FOLLOWS = {"lora_alpha": "lora_rank"}
"""Options whose default follows from another one. If that is given, the recipe's value is not."""


def fill(values: dict[str, dict[str, Any]]) -> None:
    """Add the values of the chosen recipe to the settings that are given.

    Values of LoRA are left out for `--tune full`, beta for another objective, and the visual weight
    for objectives without one.

    Args:
        values: given settings by section and field. It is changed in place.
    """
    recipe = RECIPES.get(values["model"].get("recipe") or "")
    if recipe is None:  # `ModelConfig` reports unknown names
        return
    given = {name for fields in values.values() for name in fields}
    for section, name, value, _ in recipe.values:
        if name not in given and _FOLLOWS.get(name) not in given and applies(name, values):
            values[section][name] = value


def applies(name: str, values: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an option has an effect beside the settings that are given."""
    if name.startswith("lora_"):
        return values["model"].get("tune") != "full"
    loss = values["loss"]
    if name == "beta":  # of the recipe's objective
        return loss.get("objective", "rdpo") == "rdpo" and "link" not in loss
    if name == "visual_weight":
        parts = loss.get("objective", "rdpo").split("+")
        has = [name in objectives.settings(part) for part in parts if part in objectives.PRESETS]
        return any(has)
    return True


def rows(name: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Rows of the plan: all values of a recipe with their sources, and those that were overridden.

    Args:
        name: name of the recipe.
        settings: all settings of the run, by section and field.
    """
    recipe = RECIPES[name]
    lines = {"recipe": f"{name}: {recipe.title}"}
    for section, field, value, source in recipe.values:
        used = settings[section][field]
        changed = "" if used == value else f"; overridden: {used if used is not None else 'none'}"
        lines[f"  --{field.replace('_', '-')}"] = f"{value}{changed} ({source})"
    return lines | {f"  note {i + 1}": note for i, note in enumerate(recipe.notes)}
