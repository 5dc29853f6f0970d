"""`Objective`: named leaves, the terms that compare their rewards, and beta."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from realign_kernels.objectives.terms import Term

REDUCTIONS = ("mean", "sum", "none")


class Leaf(NamedTuple):
    """A response under an image, as two field names of a preference record."""

    response: str
    image: str
    detached: bool = False
    """Whether its log-prob has no gradient (stop-gradient)."""
    rival: bool = False
    """Whether each position scores the strongest token except the label, instead of the label.
    For `objectives.released`."""


CHOSEN = Leaf("chosen", "image")
REJECTED = Leaf("rejected", "image")
VISUAL = Leaf("chosen", "retrieved_image")


class PreferenceOutput(NamedTuple):
    """Result of an objective. loss and logps carry gradient, other fields are detached."""

    loss: Tensor  # (), or (B,) with reduction="none".
    logps: Tensor  # (L, B), summed over tokens.
    rewards: Tensor  # (L, B), beta * (logps - reference_logps), per token if averaged.
    token_counts: Tensor | None  # (L, B) int64, None if only log-probs were given.
    term_losses: Tensor  # (terms, B), unweighted.


class RDPOOutput(NamedTuple):
    """Result of rdpo_loss. Axis 0 is chosen, rejected, visual. loss and logps carry gradient."""

    loss: Tensor  # (), or (B,) with reduction="none"
    logps: Tensor  # (3, B)
    rewards: Tensor  # (3, B)
    token_counts: Tensor  # (3, B) int64


@dataclass(frozen=True)
class Objective:
    """A named list of terms over leaves. Objectives are hashable, with equality by value.

    beta belongs to the objective instead of its terms, because every method of this family has one
    beta. Terms are then functions of rewards only, and the reported rewards are those compared.
    """

    name: str
    leaves: tuple[Leaf, ...]
    """Leaves in the order of the leading axis of log-probs and reference log-probs."""
    terms: tuple[Term, ...]
    beta: float = 0.1
    """Inverse temperature of the rewards, > 0."""
    average: bool = False
    """Whether rewards are per token. Log-probs and reference log-probs are still given as sums over
    tokens, and are divided by the token counts."""

    def __post_init__(self) -> None:
        right = isinstance(self.beta, numbers.Real) and 0 < self.beta < math.inf
        if not right:
            raise ValueError(f"beta must be finite and > 0, got {self.beta!r}")
        for field, kind in (("leaves", Leaf), ("terms", Term)):
            value = getattr(self, field)
            if not (isinstance(value, tuple) and all(isinstance(entry, kind) for entry in value)):
                raise ValueError(
                    f"{field} of objective {self.name!r} must be a tuple of {kind.__name__}, got "
                    f"{value!r}"
                )
        if not self.terms:
            raise ValueError(f"objective {self.name!r} has no terms. Give it at least one.")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"objective {self.name!r} has two terms with the same name, {names}. Rename one."
            )
        if len(set(self.leaves)) < len(self.leaves):
            raise ValueError(
                f"objective {self.name!r} lists a leaf twice, {self.leaves}. List it once. Several "
                "terms can read it."
            )
        for term in self.terms:
            for leaf in term.leaves:
                if leaf >= len(self.leaves):
                    raise ValueError(
                        f"term {term.name!r} reads leaf {leaf}, but objective {self.name!r} has "
                        f"{len(self.leaves)} leaves. Use an index in [0, {len(self.leaves)})."
                    )

    def __call__(
        self,
        logps: Tensor,  # (L, B), sums over tokens
        reference_logps: Tensor,  # (L, B), sums over tokens, even if rewards are averaged
        reduction: str = "mean",
        token_counts: Tensor | None = None,  # (L, B)
    ) -> PreferenceOutput:
        """Loss, rewards and term losses, in the dtype of logps. Does not check the inputs.

        Raises:
            ValueError: the objective averages but token_counts is None, or a term does not return
                one loss per example.
        """
        if self.average and token_counts is None:
            raise ValueError(
                f"token_counts is None, but objective {self.name!r} averages over tokens. Pass "
                "the counts, (leaves, examples), or use linear_preference_loss, which counts them."
            )
        policy = logps
        if any(leaf.detached for leaf in self.leaves):
            rows = zip(self.leaves, logps, strict=True)
            policy = torch.stack([row.detach() if leaf.detached else row for leaf, row in rows])
        ratios = policy - reference_logps.to(logps.dtype)
        if self.average:
            assert token_counts is not None
            ratios = ratios / token_counts
        rewards = self.beta * ratios
        # __call__ by name: Dynamo of torch 2.11 hashes an object that it calls, but a dataclass
        # made in the traced code has no fields yet.
        each = [term.__call__(rewards) for term in self.terms]
        for term, values in zip(self.terms, each, strict=True):
            if values.shape != rewards.shape[1:]:
                raise ValueError(
                    f"term {term.name!r} returned shape {tuple(values.shape)}, but must return one "
                    f"loss per example, ({rewards.shape[1]},)"
                )
        term_losses = torch.stack(each)
        pairs = zip(self.terms, term_losses, strict=True)
        loss = torch.stack([term.weight * term_loss for term, term_loss in pairs]).sum(0)
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        return PreferenceOutput(loss, logps, rewards.detach(), token_counts, term_losses.detach())


def check_reduction(reduction: str) -> None:
    """Check that a reduction is in REDUCTIONS.

    Raises:
        ValueError: it is not.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def as_objective(terms: Objective | Sequence[Term], beta: float | None = None) -> Objective:
    """Returns an Objective unchanged, or makes one from a list of terms, with unnamed leaves.

    Raises:
        ValueError: beta is given for an Objective, which has its own, or terms has another type.
    """
    if isinstance(terms, str) or (callable(terms) and not isinstance(terms, Objective | Term)):
        name = terms if isinstance(terms, str) else getattr(terms, "__name__", "rdpo")
        raise ValueError(
            f"terms is {terms!r}. Pass an Objective, objectives.get({name!r}), or a list of terms."
        )
    if isinstance(terms, Term):
        raise ValueError(f"terms is the single term {terms.name!r}. Pass a list of terms.")
    if isinstance(terms, Objective):
        if beta is None:
            return terms
        raise ValueError(
            f"beta={beta} is given, but objective {terms.name!r} has its own beta, {terms.beta}. "
            "Set beta in the objective."
        )
    count = 1 + max((leaf for term in terms for leaf in term.leaves), default=-1)
    leaves = tuple(Leaf(f"response_{i}", f"image_{i}") for i in range(count))
    return Objective("custom", leaves, tuple(terms), 0.1 if beta is None else beta)
