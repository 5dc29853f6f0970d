"""Preference objectives: terms over leaf rewards.

A *leaf* is a response under an image. Its reward is r = beta * (log pi(y|x,v) - log pi_ref(y|x,v)),
the convention TRL logs. An objective lists its leaves and the *terms* that compare their rewards;
its loss for one example is the weighted sum of the terms.

To add an objective, write a preset (a function that returns an `Objective`) and list it in
`PRESETS`. To add a kind of comparison, write a `Term`: a frozen dataclass with `leaves` and
`__call__`. Nothing else changes.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Leaf(NamedTuple):
    """Which response is read under which image: two field names of a preference record."""

    response: str
    image: str


CHOSEN = Leaf("chosen", "image")
REJECTED = Leaf("rejected", "image")
VISUAL = Leaf("chosen", "retrieved_image")

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One comparison of rewards. A pure function: rewards (L, B) -> loss (B,), unweighted."""

    name: str
    """Under which the loss of this term is reported."""
    weight: float = 1.0
    """Its factor in the sum; 0 switches it off."""

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the leaves it reads."""
        raise NotImplementedError

    def __call__(self, rewards: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PairSigmoid(Term):
    """-log sigmoid(r[positive] - r[negative]): Bradley-Terry, DPO's link (2305.18290, eq. 7)."""

    positive: int
    negative: int

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.positive, self.negative)

    def __call__(self, rewards: Tensor) -> Tensor:
        return -F.logsigmoid(rewards[self.positive] - rewards[self.negative])


@dataclass(frozen=True, kw_only=True)
class AnchorSigmoid(Term):
    """-log sigmoid(r[leaf] - delta): holds one reward above delta (mDPO, 2406.11839)."""

    leaf: int
    delta: float = 0.0

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.leaf,)

    def __call__(self, rewards: Tensor) -> Tensor:
        return -F.logsigmoid(rewards[self.leaf] - self.delta)


class PreferenceOutput(NamedTuple):
    """Result of an objective. loss and logps carry gradient, the rest is detached."""

    loss: Tensor  # (), or (B,) with reduction="none"
    logps: Tensor  # (L, B)
    rewards: Tensor  # (L, B), beta * (logps - reference_logps)
    token_counts: Tensor | None  # (L, B) int64; None where only log-probs were given
    term_losses: Tensor  # (terms, B), unweighted


class RDPOOutput(NamedTuple):
    """Result of rdpo_loss; axis 0 is chosen, rejected, visual. loss and logps carry gradient."""

    loss: Tensor  # (), or (B,) with reduction="none"
    logps: Tensor  # (3, B)
    rewards: Tensor  # (3, B)
    token_counts: Tensor  # (3, B) int64


@dataclass(frozen=True)
class Objective:
    """A named list of terms over leaves.

    beta stands here and not in the terms: every method of this family has one beta, terms become
    functions of rewards alone, and the rewards that are reported are the ones that were compared.
    """

    name: str
    leaves: tuple[Leaf, ...]
    """In the order of the leading axis of log-probs and reference log-probs."""
    terms: tuple[Term, ...]
    beta: float = 0.1
    """Inverse temperature of the rewards, > 0."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta must be finite and > 0, got {self.beta}")
        if not self.terms:
            raise ValueError(f"objective {self.name!r} has no terms: give it at least one")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"objective {self.name!r} has two terms of one name: {names}")
        for term in self.terms:
            if not (math.isfinite(term.weight) and term.weight >= 0):
                raise ValueError(
                    f"weight of term {term.name!r} must be finite and >= 0, got {term.weight}"
                )
            for leaf in term.leaves:
                if not 0 <= leaf < len(self.leaves):
                    raise ValueError(
                        f"term {term.name!r} reads leaf {leaf}, but objective {self.name!r} has "
                        f"{len(self.leaves)} leaves: use an index in [0, {len(self.leaves)})"
                    )

    def __call__(
        self,
        logps: Tensor,  # (L, B)
        reference_logps: Tensor,  # (L, B)
        reduction: str = "mean",
        token_counts: Tensor | None = None,  # (L, B), passed through
    ) -> PreferenceOutput:
        """The loss and what is reported with it, in the dtype of logps. Inputs are not checked."""
        rewards = self.beta * (logps - reference_logps.to(logps.dtype))
        term_losses = torch.stack([term(rewards) for term in self.terms])
        pairs = zip(self.terms, term_losses, strict=True)
        loss = torch.stack([term.weight * term_loss for term, term_loss in pairs]).sum(0)
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        return PreferenceOutput(loss, logps, rewards.detach(), token_counts, term_losses.detach())


def check_reduction(reduction: str) -> None:
    """Refuses what is not in REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def as_objective(terms: Objective | Sequence[Term], beta: float | None = None) -> Objective:
    """An Objective as it is; a list of terms over unnamed leaves, as many as its highest index + 1.

    Raises:
        ValueError: beta beside an Objective, which has its own.
    """
    if isinstance(terms, Objective):
        if beta is None:
            return terms
        raise ValueError(
            f"beta={beta} beside objective {terms.name!r}, whose beta is {terms.beta}: "
            "give it to the objective"
        )
    count = 1 + max((leaf for term in terms for leaf in term.leaves), default=-1)
    leaves = tuple(Leaf(f"response_{i}", f"image_{i}") for i in range(count))
    return Objective("custom", leaves, tuple(terms), 0.1 if beta is None else beta)


def dpo(beta: float = 0.1) -> Objective:
    """DPO: Rafailov et al., arXiv 2305.18290, eq. 7. Leaves: chosen, rejected.

    -log sigmoid(r(chosen) - r(rejected))
    """
    pair = PairSigmoid(name="text", positive=0, negative=1)
    return Objective("dpo", (CHOSEN, REJECTED), (pair,), beta)


def rdpo(beta: float = 0.1, visual_weight: float = 1.0) -> Objective:
    """rDPO: Xing et al., Re-Align, arXiv 2502.13146. Leaves: chosen, rejected, visual.

    -log sigmoid(r(chosen) - r(rejected)) - visual_weight * log sigmoid(r(chosen) - r(visual)),
    where visual is the chosen response under the retrieved image.
    """
    text = PairSigmoid(name="text", positive=0, negative=1)
    visual = PairSigmoid(name="visual", weight=visual_weight, positive=0, negative=2)
    return Objective("rdpo", (CHOSEN, REJECTED, VISUAL), (text, visual), beta)


def mdpo(
    beta: float = 0.1, visual_weight: float = 1.0, anchor_weight: float = 1.0, delta: float = 0.0
) -> Objective:
    """mDPO: Wang et al., arXiv 2406.11839. Leaves: chosen, rejected, visual.

    rDPO's two terms and an anchor, -anchor_weight * log sigmoid(r(chosen) - delta). The paper's
    negative image is a random crop; the loss does not depend on where the image comes from.
    """
    text = PairSigmoid(name="text", positive=0, negative=1)
    visual = PairSigmoid(name="visual", weight=visual_weight, positive=0, negative=2)
    anchor = AnchorSigmoid(name="anchor", weight=anchor_weight, leaf=0, delta=delta)
    return Objective("mdpo", (CHOSEN, REJECTED, VISUAL), (text, visual, anchor), beta)


PRESETS: dict[str, Callable[..., Objective]] = {"dpo": dpo, "rdpo": rdpo, "mdpo": mdpo}


def get(name: str, **settings: float) -> Objective:
    """The preset of that name.

    Raises:
        ValueError: unknown name, or a setting the preset does not have.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown objective {name!r}: choose one of {', '.join(PRESETS)}")
    accepted = inspect.signature(PRESETS[name]).parameters
    if unknown := sorted(set(settings) - set(accepted)):
        raise ValueError(
            f"objective {name!r} has no setting {', '.join(unknown)}: "
            f"it takes {', '.join(accepted)}"
        )
    return PRESETS[name](**settings)
