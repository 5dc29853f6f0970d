"""Preference objectives: terms over the values of leaves.

A *leaf* is a response under an image. Its reward is r = beta * (log pi(y|x,v) - log pi_ref(y|x,v)),
the convention that TRL logs, or another kind of `REWARDS`. An objective lists its leaves and the
*terms* that compare them. Its loss for one example is the weighted sum of the terms.

`objective` has Leaf and Objective, `terms` the links, and `presets` the published methods.
`weighted_sum` adds objectives, and `with_visual` adds the visual term to any objective. To add
an objective, write a preset, a function that returns an `Objective`, and list it in `PRESETS`. To
add a kind of comparison, write a `Term`. docs/adding-an-objective.md explains both.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from realign_kernels.objectives.objective import (
    CHOSEN,
    REDUCTIONS,
    REJECTED,
    VISUAL,
    Leaf,
    Objective,
    PreferenceOutput,
    RDPOOutput,
    RunningMean,
    as_objective,
    check_reduction,
    weighted_sum,
)
from realign_kernels.objectives.presets import (
    adavip,
    apo_down,
    apo_zero,
    bco_pair,
    cdpo,
    chip,
    cpo,
    discopop,
    dpo,
    exo_pair,
    hinge,
    ipo,
    ipo_norm,
    lpoi,
    mdpo,
    mfpo,
    mispdpo,
    mpo,
    nca_pair,
    orpo,
    ovip,
    rdpo,
    released,
    robust,
    rpo,
    sft,
    sigmoid_norm,
    simpo,
    sppo_hard,
    svco,
    symmpo,
    with_visual,
)
from realign_kernels.objectives.terms import (
    REWARDS,
    AnchorProbability,
    AnchorSigmoid,
    AnchorSquared,
    LeafValues,
    LinearSigmoid,
    MarginDifference,
    NegativeLogLikelihood,
    OddsRatio,
    PairDiscoPOP,
    PairExo,
    PairHinge,
    PairProbability,
    PairRobust,
    PairSigmoid,
    PairSquared,
    PlackettLuce,
    SoftmaxNegatives,
    Term,
)

PRESETS: dict[str, Callable[..., Objective]] = {
    preset.__name__: preset
    for preset in (
        *(dpo, rdpo, mdpo, mfpo, svco, symmpo, ovip, adavip, mispdpo, lpoi, chip),
        *(cdpo, robust, ipo, ipo_norm, hinge, sigmoid_norm, exo_pair, nca_pair, bco_pair),
        *(sppo_hard, apo_zero, apo_down, discopop, rpo, mpo, simpo, cpo, orpo, sft, released),
    )
}
ALIASES = {"sigmoid": "dpo"}
"""Further names of presets: TRL's loss types."""


def settings(name: str) -> dict[str, Any]:
    """The settings of the preset with this name, with their defaults.

    For a sum of presets, as "sigmoid+bco_pair+sft", they are those of all its parts. `get` refuses
    a sum whose parts have different defaults of a setting that is not given.

    Raises:
        ValueError: a name is unknown.
    """
    accepted: dict[str, Any] = {}
    for part in name.split("+"):
        preset = PRESETS.get(ALIASES.get(part, part))
        if preset is None:
            raise ValueError(f"unknown objective {part!r}. Choose one of {', '.join(PRESETS)}.")
        parameters = inspect.signature(preset).parameters
        accepted = {key: value.default for key, value in parameters.items()} | accepted
    return accepted


def get(name: str, weights: Sequence[float] | None = None, **given: Any) -> Objective:
    """The preset with this name, or a sum of presets such as "sigmoid+bco_pair+sft".

    Args:
        name: a key of `PRESETS` or `ALIASES`, or several, joined by +.
        weights: a factor for each part of a sum, 1 by default.
        given: settings. Each part of a sum takes the settings that it has.

    Raises:
        ValueError: a name is unknown or occurs twice, or no part has a given setting. Also if the
            parts of a sum have different defaults of a setting that is not given, and as
            `weighted_sum`.
    """
    accepted = settings(name)
    if unknown := sorted(set(given) - set(accepted)):
        raise ValueError(
            f"objective {name!r} has no setting {', '.join(unknown)}. "
            f"Its settings are {', '.join(accepted)}."
        )
    names = [ALIASES.get(part, part) for part in name.split("+")]
    if len(set(names)) < len(names):
        raise ValueError(
            f"the sum {name!r} has an objective twice. Give it a larger weight instead."
        )
    for setting in accepted.keys() - given.keys():
        own = {part: settings(part)[setting] for part in names if setting in settings(part)}
        if len(set(own.values())) > 1:
            defaults = ", ".join(f"{value} of {part}" for part, value in own.items())
            raise ValueError(
                f"the parts of {name!r} have different defaults of {setting}: {defaults}. Give "
                f"{setting}."
            )
    parts = []
    for part, full in zip(name.split("+"), names, strict=True):
        own = {key: value for key, value in given.items() if key in settings(full)}
        parts.append(replace(PRESETS[full](**own), name=part))
    if len(parts) == 1 and weights is None:
        return replace(parts[0], name=ALIASES.get(name, name))
    return weighted_sum(parts, weights)


__all__ = [
    "ALIASES",
    "CHOSEN",
    "PRESETS",
    "REDUCTIONS",
    "REJECTED",
    "REWARDS",
    "VISUAL",
    "AnchorProbability",
    "AnchorSigmoid",
    "AnchorSquared",
    "Leaf",
    "LeafValues",
    "LinearSigmoid",
    "MarginDifference",
    "NegativeLogLikelihood",
    "Objective",
    "OddsRatio",
    "PairDiscoPOP",
    "PairExo",
    "PairHinge",
    "PairProbability",
    "PairRobust",
    "PairSigmoid",
    "PairSquared",
    "PlackettLuce",
    "PreferenceOutput",
    "RDPOOutput",
    "RunningMean",
    "SoftmaxNegatives",
    "Term",
    "adavip",
    "apo_down",
    "apo_zero",
    "as_objective",
    "bco_pair",
    "cdpo",
    "check_reduction",
    "chip",
    "cpo",
    "discopop",
    "dpo",
    "exo_pair",
    "get",
    "hinge",
    "ipo",
    "ipo_norm",
    "lpoi",
    "mdpo",
    "mfpo",
    "mispdpo",
    "mpo",
    "nca_pair",
    "orpo",
    "ovip",
    "rdpo",
    "released",
    "robust",
    "rpo",
    "settings",
    "sft",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "svco",
    "symmpo",
    "weighted_sum",
    "with_visual",
]
