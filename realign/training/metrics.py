"""Metrics of a step: TRL's names for the text side, and `visual` names for the visual side.

- `rewards/*`: beta times the log-ratio of policy and reference, or another kind of the objective
  (`realign_kernels.objectives.REWARDS`), in nats
- `rewards/accuracies`: share of examples whose chosen response has the higher reward
- `logps/*`: summed log-probs in nats
- `loss/*`: losses of an objective's terms before they are weighted

rDPO has `rewards/accuracies`, `rewards/margins`, `rewards/visual_accuracies` and
`rewards/visual_margins`. Its `rewards/` and `logps/` end with `chosen`, `rejected` and `visual`.
Leaves without such a name are called `{response}_under_{image}`. `step.py` adds `grad_norm` and
`learning_rate`. Metrics of held-out records begin with `eval/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from realign_kernels import Leaf, Objective, PreferenceOutput

EVALUATION = "eval/"
"""Prefix of the metrics of held-out records."""
_DIRECTIONS = {"loss": -1, "accuracies": 1, "margins": 1}
_NAMES = {("chosen", "image"): "chosen", ("rejected", "image"): "rejected"}


def leaf_names(objective: Objective) -> list[str]:
    """The metric name of each leaf of an objective.

    The chosen response under the retrieved images is visual, visual_2, ... The name of a rival leaf
    ends with _rival. It has no margins, since its rewards are not those of the response's tokens.
    """
    return [_name(leaf) for leaf in objective.leaves]


def _name(leaf: Leaf) -> str:
    name = _NAMES.get(leaf[:2], f"{leaf.response}_under_{leaf.image}")
    if leaf.response == "chosen" and leaf.image.startswith("retrieved_image"):
        name = leaf.image.replace("retrieved_image", "visual")
    return name + "_detached" * leaf.detached + "_rival" * leaf.rival


def by_example(output: PreferenceOutput, objective: Objective) -> dict[str, torch.Tensor]:
    """The metrics of each example of a batch besides the loss, (B,) fp64."""
    names = leaf_names(objective)
    rewards = dict(zip(names, output.rewards.double(), strict=True))
    logps = dict(zip(names, output.logps.detach().double(), strict=True))
    values: dict[str, torch.Tensor] = {}
    if len(objective.terms) > 1:
        parts = output.term_losses.detach().double()
        values |= {f"loss/{t.name}": part for t, part in zip(objective.terms, parts, strict=True)}
    values |= {f"rewards/{name}": value for name, value in rewards.items()}
    for other in names:
        if "chosen" in rewards and re.fullmatch(r"rejected|visual(_\d+)?", other):
            prefix = "" if other == "rejected" else f"{other}_"
            margin = rewards["chosen"] - rewards[other]
            values[f"rewards/{prefix}accuracies"] = (margin > 0).double()
            values[f"rewards/{prefix}margins"] = margin
    return values | {f"logps/{name}": value for name, value in logps.items()}


def example_losses(output: PreferenceOutput, objective: Objective) -> torch.Tensor:
    """The loss of each example of a batch, (B,) fp64 without gradient."""
    pairs = zip(objective.terms, output.term_losses.detach().double(), strict=True)
    return torch.stack([term.weight * losses for term, losses in pairs]).sum(0)


def sums(output: PreferenceOutput, objective: Objective) -> dict[str, torch.Tensor]:
    """Sums of all metrics over a batch's examples, as fp64 scalars."""
    added = {name: value.sum() for name, value in by_example(output, objective).items()}
    return {"loss": output.loss.detach().double()} | added


def shifted_mean(metrics: Mapping[str, float], objective: Objective) -> float:
    """Mean of the rewards that an objective's running mean includes, from means over a batch."""
    names = leaf_names(objective)
    rewards = [metrics[f"rewards/{names[leaf]}"] for leaf in objective.shifted_leaves]
    return sum(rewards) / len(rewards)


def better_direction(name: str) -> int:
    """1 if a higher value of a metric is better, -1 if a lower one is, 0 if neither is known.

    Args:
        name: a metric of this module, or one of RDPOTrainer, such as eval_SET_loss/text.
    """
    first, last = name.split("/")[0].split("_")[-1], name.split("_")[-1].split("/")[-1]
    return _DIRECTIONS.get(first, 0) or _DIRECTIONS.get(last, 0)


def is_evaluation(entry: dict[str, Any]) -> bool:
    """Whether an entry of the log is of held-out records instead of a step."""
    return f"{EVALUATION}loss" in entry


def legend(entry: dict[str, Any]) -> str:
    """The lines above the lines of the steps, which explain their columns."""
    visual = "rewards/visual_margins" in entry
    sides = " of the text side, then of the visual side" if visual else ""
    mfu = " mfu: share of the peak FLOP/s." if "mfu" in entry else ""
    return (
        f"margin, acc: reward margin and accuracy{sides}.\n"
        f"grad: gradient norm. lr: learning rate. tok/s: tokens per second.{mfu} GiB: peak memory."
    )


def step_line(entry: dict[str, Any], total: int) -> str:
    """One line about a step, in aligned columns and at most 130 characters.

    `margin` and `acc` are of the text side, then of the visual side where there is one.
    """
    parts = _figures(entry, "step", total)
    parts += [f"grad {entry['grad_norm']:.1e}", f"lr {entry['learning_rate']:.1e}"]
    parts += [f"{entry['tokens_per_second']:7,.0f} tok/s"]
    parts += [f"mfu {entry['mfu']:3.0%}"] if "mfu" in entry else []
    parts += [f"{entry['peak_memory_gib']:4.1f} GiB"]
    return "  ".join(parts)


def evaluation_line(entry: dict[str, Any], total: int) -> str:
    """One line about an evaluation, in the columns of the lines of steps."""
    figures = {name.removeprefix(EVALUATION): value for name, value in entry.items()}
    parts = _figures(figures, "eval", total)
    since = figures.get("since_best")
    if since is not None:
        parts += [f"{since} evaluation(s) since the best" if since else "best so far"]
    return "  ".join(parts)


def _figures(entry: dict[str, Any], title: str, total: int) -> list[str]:
    parts = [f"{title} {entry['step']:{len(str(total))}}/{total}", f"loss {entry['loss']:6.3f}"]
    for title, name, form in (("margin", "margins", "+7.3f"), ("acc", "accuracies", ".2f")):
        sides = [entry.get(f"rewards/{side}{name}") for side in ("", "visual_")]
        shown = " ".join(f"{value:{form}}" for value in sides if value is not None)
        parts += [f"{title} {shown}"] if shown else []
    return parts
