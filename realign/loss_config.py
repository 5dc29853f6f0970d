"""Settings of the objective: `LossConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from realign.checks import no_effect, not_negative, positive
from realign_kernels import Objective, objectives


@dataclass
class LossConfig:
    objective: str = "rdpo"
    """Preference objective, or a sum joined by +. With a visual term: rdpo, mdpo, mfpo, svco,
    symmpo, ovip, adavip, mispdpo, lpoi, chip. For the text: dpo (or sigmoid), cdpo, robust, ipo,
    ipo_norm, hinge, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down,
    discopop, rpo, mpo. Without a reference: simpo, cpo, orpo, sft. 'released' reproduces the loss
    of Re-Align's code."""
    loss_weights: str | None = None
    """Weights of the parts of a sum, such as 0.8,0.2,1. Without it, 1 each."""
    link: str | None = None
    """Objective, or sum, that rdpo uses for the text and for the image: simpo, mpo, ... Without it,
    that of DPO."""
    beta: float | None = None
    """Beta of the objective. A larger beta keeps the model closer to the reference model. Without
    it, 0.1, but 2 for simpo and 0.05 for discopop."""
    visual_weight: float = 1.0
    """Weight of the visual term of rdpo, mdpo, mfpo, lpoi and released. 1 weights it like the text
    term."""
    label_smoothing: float | None = None
    """Assumed share of flipped pairs for cdpo and robust (0.1), epsilon of exo_pair (0.001)."""
    gamma: float | None = None
    """Target margin of simpo. Without it, 1."""
    nll_weight: float | None = None
    """Weight of the loss of the chosen response's tokens in rpo, mpo and cpo. Without it, 1."""
    discopop_tau: float | None = None
    """Width of discopop's change between its two losses. Without it, 0.05."""

    def __post_init__(self) -> None:
        known = {**objectives.PRESETS, **objectives.ALIASES}
        for name in ("objective", "link"):
            if not set((getattr(self, name) or "rdpo").split("+")) <= known.keys():
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(objectives.PRESETS)}, or several joined by +."
                )
        if self.link is not None and self.objective != "rdpo":
            no_effect("link", f"{self.objective} has its own", "use --objective rdpo")
        accepted = objectives.settings(self.text_objective)
        if self.link is not None:
            accepted["visual_weight"] = 1.0
        for name, example in LOSS_SETTINGS.items():
            given = getattr(self, name)
            unset = 1.0 if name == "visual_weight" else None
            if name not in accepted and given != unset:
                no_effect(
                    name, f"{self.text_objective} has no such setting", f"use --objective {example}"
                )
        if self.loss_weights is not None and "+" not in self.text_objective:
            no_effect("loss_weights", f"{self.text_objective} is no sum", "join objectives by +")
        parts = self.text_objective.split("+")
        if self.loss_weights is not None and len(self._weights() or ()) != len(parts):
            raise ValueError(
                f"loss_weights is {self.loss_weights!r}; it must have {len(parts)} numbers, for "
                f"{', '.join(parts)}."
            )
        leaves = objectives.get(self.link).leaves if self.link in known else ()
        if leaves and set(leaves) != {objectives.CHOSEN, objectives.REJECTED}:
            raise ValueError(
                f"link is {self.link!r}; it must be an objective that compares the chosen with the "
                "rejected response, such as simpo or mpo."
            )
        if self.beta is not None:
            positive("beta", self.beta)
        not_negative("visual_weight", self.visual_weight)
        self.build()
        for name in LOSS_SETTINGS:
            if getattr(self, name) is None:
                setattr(self, name, accepted.get(name))

    @property
    def text_objective(self) -> str:
        """Name of the objective or sum that compares the responses."""
        return self.objective if self.link is None else self.link

    def build(self, negatives: int | None = None) -> Objective:
        """The objective with these settings.

        Args:
            negatives: number of visual negatives, for an objective that compares several.

        Raises:
            ValueError: the settings are invalid.
        """
        accepted = objectives.settings(self.text_objective)
        given = {name: getattr(self, name) for name in LOSS_SETTINGS} | {"negatives": negatives}
        own = {k: v for k, v in given.items() if k in accepted and v is not None}
        objective = objectives.get(self.text_objective, self._weights(), **own)
        if self.link is None:
            return objective
        return objectives.with_visual(objective, self.visual_weight)

    def _weights(self) -> list[float] | None:
        if self.loss_weights is None:
            return None
        try:
            return [float(weight) for weight in self.loss_weights.split(",")]
        except ValueError:
            raise ValueError(
                f"loss_weights is {self.loss_weights!r}. Give numbers with commas, as 0.8,0.2,1."
            ) from None


LOSS_SETTINGS = {
    "beta": "rdpo",
    "visual_weight": "rdpo",
    "label_smoothing": "cdpo",
    "gamma": "simpo",
    "nll_weight": "rpo",
    "discopop_tau": "discopop",
}
"""Setting of objectives -> an objective that has it."""
