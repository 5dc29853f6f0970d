"""Arms of the study: the pairs and the training settings of each compared method."""

from __future__ import annotations

from dataclasses import dataclass

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
"""First rates of every tuned arm. If the best one is an end, further rates follow."""
LOWEST, HIGHEST = LEARNING_RATES[0] / 8, LEARNING_RATES[-1] * 4


@dataclass(frozen=True)
class Pairs:
    """Settings of the preference pairs (`realign.pairs`)."""

    negative: str = "retrieved"
    refill: str = "infill"
    segments: int = 1  # hidden words, or 0 for all
    k: int = 10

    @property
    def name(self) -> str:
        """Name of the pairs in file names."""
        return f"{self.negative}-{self.refill}-{self.segments or 'all'}-k{self.k}"


@dataclass(frozen=True)
class Arm:
    """A method to align the base, with its settings.

    Attributes:
        name: unique name.
        objective: objective of `realign.train`.
        pairs: settings of the training data.
        beta: beta of the objective, or None for its own default.
        visual_weight: weight of the visual term.
        link: objective that rDPO repeats for the image, or None for that of DPO.
        tuned_as: name of the arm with the learning rate, or empty for the arm itself.
    """

    name: str
    objective: str
    pairs: Pairs = Pairs()
    beta: float | None = 0.1
    visual_weight: float = 1.0
    link: str | None = None
    tuned_as: str = ""

    @property
    def tuned(self) -> bool:
        """Whether the learning rate is tuned for this arm."""
        return not self.tuned_as


NEGATIVES = ("random", "crop", "noise", "blank")
WEIGHTS = (0.0, 0.25, 0.5, 2.0)  # in addition to 1
BETAS = (0.05, 0.5)  # in addition to 0.1
NEIGHBOURS = (1, 50)  # in addition to 10
_METHODS = (
    Arm("dpo", "dpo"),
    Arm("rdpo", "rdpo"),
    Arm("mdpo", "mdpo", Pairs("crop")),
    Arm("symmpo", "symmpo"),
    Arm("released", "released"),
)
_BY_NEGATIVE = tuple(Arm(f"rdpo {kind}", "rdpo", Pairs(kind)) for kind in NEGATIVES)
_BY_WEIGHT = tuple(
    Arm(f"rdpo weight {weight:g}", "rdpo", visual_weight=weight, tuned_as="rdpo")
    for weight in WEIGHTS
)
_BY_BETA = tuple(
    Arm(f"{objective} beta {beta:g}", objective, beta=beta, tuned_as=objective)
    for objective in ("dpo", "rdpo")
    for beta in BETAS
)
_BY_K = tuple(Arm(f"rdpo k {k}", "rdpo", Pairs(k=k), tuned_as="rdpo") for k in NEIGHBOURS)
_BY_REFILL = tuple(
    Arm(f"{objective} prompt", objective, Pairs(refill="prompt")) for objective in ("dpo", "rdpo")
)
_BY_SEGMENTS = tuple(
    Arm(f"{objective} all segments", objective, Pairs(segments=0)) for objective in ("dpo", "rdpo")
)

ARMS = (
    *_METHODS, *_BY_NEGATIVE, *_BY_SEGMENTS, *_BY_REFILL, *_BY_WEIGHT, *_BY_BETA, *_BY_K,
)  # fmt: skip
LOSSES = (
    *_METHODS[:2],
    Arm("mpo", "mpo", beta=None),
    Arm("simpo", "simpo", beta=None),
    Arm("rdpo mpo", "rdpo", beta=None, link="mpo"),
    Arm("rdpo simpo", "rdpo", beta=None, link="simpo"),
)
"""Arms of the comparison of losses. MPO and SimPO have the settings of their authors."""
LOSS_RUNS = ("demo-losses", "digits-losses", "photographs-losses")
"""Runs that compare losses. The first part of a name is the testbed."""
ARMS_OF = {"digits": ARMS, "photographs": (*_METHODS[:2], _BY_NEGATIVE[0])}
ARMS_OF |= dict.fromkeys(LOSS_RUNS, LOSSES)
"""Arms of each run. Photographs have DPO, rDPO, and rDPO with a random negative."""

SECTIONS = {
    "Methods": ("base", "dpo", "rdpo", "mdpo", "symmpo", "released"),
    "The visual negative of rDPO": ("rdpo", *(arm.name for arm in _BY_NEGATIVE)),
    "The weight of the visual term": ("rdpo weight 0", "rdpo weight 0.25", "rdpo weight 0.5",
                                      "rdpo", "rdpo weight 2"),
    "Beta": ("dpo beta 0.05", "dpo", "dpo beta 0.5", "rdpo beta 0.05", "rdpo", "rdpo beta 0.5"),
    "Neighbours tried (k)": ("rdpo k 1", "rdpo", "rdpo k 50"),
    "Infill against prompt": ("dpo", "dpo prompt", "rdpo", "rdpo prompt"),
    "One masked segment against all": ("dpo", "dpo all segments", "rdpo", "rdpo all segments"),
}  # fmt: skip
"""Tables of the report: title -> arms."""

PRIMARY = ("dpo", "rdpo")
"""Primary comparison, (first, second), tested without correction."""
COMPARISONS = (
    ("base", "dpo"),
    ("base", "rdpo"),
    ("dpo all segments", "rdpo all segments"),
    *((f"rdpo {kind}", "rdpo") for kind in NEGATIVES),
    ("mdpo", "rdpo"),
    ("symmpo", "rdpo"),
    ("released", "rdpo"),
    ("rdpo all segments", "rdpo"),
    ("rdpo prompt", "rdpo"),
)
"""Further tested pairs of tuned arms, selected before any arm was run."""

LOSS_SECTIONS = {
    "Losses": ("base", "dpo", "rdpo", "mpo", "simpo"),
    "The visual term over other losses": ("dpo", "rdpo", "mpo", "rdpo mpo", "simpo",
                                          "rdpo simpo"),
}  # fmt: skip
"""Tables of a run that compares losses."""
LOSS_COMPARISONS = (
    ("rdpo", "mpo"),
    ("rdpo", "simpo"),
    ("dpo", "mpo"),
    ("dpo", "simpo"),
    ("mpo", "rdpo mpo"),
    ("simpo", "rdpo simpo"),
)
"""Tested pairs of a run that compares losses, selected before any of these arms was run."""
