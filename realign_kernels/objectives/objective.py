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
    """A response under an image: two field names of a preference record."""

    response: str
    image: str
    detached: bool = False
    """Its log-prob is a constant for the gradient (stop-gradient)."""
    rival: bool = False
    """Scored by the strongest token that is not the label, at each position of the response,
    instead of the label itself. For `objectives.released`."""


CHOSEN = Leaf("chosen", "image")
REJECTED = Leaf("rejected", "image")
VISUAL = Leaf("chosen", "retrieved_image")


class PreferenceOutput(NamedTuple):
    """Result of an objective. loss and logps carry gradient, other fields are detached."""

    loss: Tensor  # (), or (B,) with reduction="none"
    logps: Tensor  # (L, B), summed over tokens
    rewards: Tensor  # (L, B), beta * (logps - reference_logps), per token if averaged
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
    """A named list of terms over leaves. Equal ones hash alike, so they can be dictionary keys.

    beta is here and not in the terms: every method of this family has one beta, terms become
    functions of rewards only, and the reported rewards are the ones that were compared.
    """

    name: str
    leaves: tuple[Leaf, ...]
    """In the order of the leading axis of log-probs and reference log-probs."""
    terms: tuple[Term, ...]
    beta: float = 0.1
    """Inverse temperature of the rewards, > 0."""
    average: bool = False
    """Whether a reward is per token: log-probs *and* reference log-probs, both given as sums over
    tokens, are divided by the token counts."""

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
            raise ValueError(f"objective {self.name!r} has no terms: give it at least one")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"objective {self.name!r} has two terms of one name, {names}: rename one"
            )
        if len(set(self.leaves)) < len(self.leaves):
            raise ValueError(
                f"objective {self.name!r} lists one leaf twice, {self.leaves}: list it once and "
                "let several terms read it"
            )
        for term in self.terms:
            for leaf in term.leaves:
                if leaf >= len(self.leaves):
                    raise ValueError(
                        f"term {term.name!r} reads leaf {leaf}, but objective {self.name!r} has "
                        f"{len(self.leaves)} leaves: use an index in [0, {len(self.leaves)})"
                    )

    def __call__(
        self,
        logps: Tensor,  # (L, B), sums over tokens
        reference_logps: Tensor,  # (L, B), sums over tokens, also if rewards are averaged
        reduction: str = "mean",
        token_counts: Tensor | None = None,  # (L, B)
    ) -> PreferenceOutput:
        """The loss, rewards and term losses, in the dtype of logps. Inputs are not checked.

        Raises:
            ValueError: the objective averages and there are no token counts, or a term does not
                return a loss per example.
        """
        if self.average and token_counts is None:
            raise ValueError(
                f"token_counts is None, but objective {self.name!r} averages over tokens: pass "
                "the counts, (leaves, examples), or use linear_preference_loss, which counts"
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
        # By name: Dynamo of torch 2.11 hashes an object that it calls, and a dataclass made in the
        # traced code has no fields yet.
        each = [term.__call__(rewards) for term in self.terms]
        for term, values in zip(self.terms, each, strict=True):
            if values.shape != rewards.shape[1:]:
                raise ValueError(
                    f"term {term.name!r} returned {tuple(values.shape)} for {rewards.shape[1]} "
                    f"examples: a loss per example is wanted, ({rewards.shape[1]},)"
                )
        term_losses = torch.stack(each)
        pairs = zip(self.terms, term_losses, strict=True)
        loss = torch.stack([term.weight * term_loss for term, term_loss in pairs]).sum(0)
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        return PreferenceOutput(loss, logps, rewards.detach(), token_counts, term_losses.detach())


def check_reduction(reduction: str) -> None:
    """Refuses a name that is not in REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def as_objective(terms: Objective | Sequence[Term], beta: float | None = None) -> Objective:
    """An Objective as it is; a list of terms over unnamed leaves, as many as its highest index + 1.

    Raises:
        ValueError: beta beside an Objective, which has its own; or an argument of another type.
    """
    if isinstance(terms, str) or (callable(terms) and not isinstance(terms, Objective | Term)):
        name = terms if isinstance(terms, str) else getattr(terms, "__name__", "rdpo")
        raise ValueError(
            f"terms is {terms!r}: pass an Objective, objectives.get({name!r}), or a list of terms"
        )
    if isinstance(terms, Term):
        raise ValueError(f"terms is one term, {terms.name!r}: pass a list of them")
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
