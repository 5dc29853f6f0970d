"""Preference objectives: terms over leaf rewards.

A *leaf* is a response under an image. Its reward is r = beta * (log pi(y|x,v) - log pi_ref(y|x,v)),
the convention that TRL logs. An objective lists its leaves and the *terms* that compare their
rewards. Its loss for one example is the weighted sum of the terms.

`objective` has Leaf and Objective, `terms` the links, and `presets` the published methods. To add
an objective, write a preset, a function that returns an `Objective`, and list it in `PRESETS`. To
add a kind of comparison, write a `Term`. docs/adding-an-objective.md explains both.
"""

import inspect
from collections.abc import Callable
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
    as_objective,
    check_reduction,
)
from realign_kernels.objectives.presets import (
    adavip,
    cdpo,
    chip,
    dpo,
    hinge,
    ipo,
    lpoi,
    mdpo,
    mfpo,
    mispdpo,
    ovip,
    rdpo,
    released,
    svco,
    symmpo,
)
from realign_kernels.objectives.terms import (
    AnchorSigmoid,
    LinearSigmoid,
    MarginDifference,
    PairHinge,
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
        *(cdpo, ipo, hinge, released),
    )
}


def settings(name: str) -> dict[str, Any]:
    """The settings of the preset with this name, with their defaults.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown objective {name!r}. Choose one of {', '.join(PRESETS)}.")
    parameters = inspect.signature(PRESETS[name]).parameters
    return {setting: parameter.default for setting, parameter in parameters.items()}


def get(name: str, **given: Any) -> Objective:
    """The preset with this name.

    Raises:
        ValueError: the name is unknown, or the preset does not have a given setting.
    """
    accepted = settings(name)
    if unknown := sorted(set(given) - set(accepted)):
        raise ValueError(
            f"objective {name!r} has no setting {', '.join(unknown)}. "
            f"Its settings are {', '.join(accepted)}."
        )
    return PRESETS[name](**given)


__all__ = [
    "CHOSEN",
    "PRESETS",
    "REDUCTIONS",
    "REJECTED",
    "VISUAL",
    "AnchorSigmoid",
    "Leaf",
    "LinearSigmoid",
    "MarginDifference",
    "Objective",
    "PairHinge",
    "PairSigmoid",
    "PairSquared",
    "PlackettLuce",
    "PreferenceOutput",
    "RDPOOutput",
    "SoftmaxNegatives",
    "Term",
    "adavip",
    "as_objective",
    "cdpo",
    "check_reduction",
    "chip",
    "dpo",
    "get",
    "hinge",
    "ipo",
    "lpoi",
    "mdpo",
    "mfpo",
    "mispdpo",
    "ovip",
    "rdpo",
    "released",
    "settings",
    "svco",
    "symmpo",
]
