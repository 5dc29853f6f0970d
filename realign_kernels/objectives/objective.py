"""`Objective`: named leaves, the terms that compare them, and beta."""

import copy
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from realign_kernels.objectives.terms import REWARDS, LeafValues, Term

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
    rewards: Tensor  # (L, B), of the kind `Objective.reward`, times beta.
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
    beta. The reported rewards are then those that the terms compare.
    """

    name: str
    leaves: tuple[Leaf, ...]
    """Leaves in the order of the leading axis of log-probs and reference log-probs."""
    terms: tuple[Term, ...]
    beta: float = 0.1
    """Inverse temperature of the rewards, > 0."""
    shift: float | Tensor = field(default=0.0, compare=False, repr=False)
    """Running mean of rewards for terms that subtract it, set by `at`. A number, or a tensor ()."""

    def __post_init__(self) -> None:
        right = isinstance(self.beta, numbers.Real) and 0 < self.beta < math.inf
        if not right:
            raise ValueError(f"beta must be finite and > 0, got {self.beta!r}")
        for part, kind in (("leaves", Leaf), ("terms", Term)):
            value = getattr(self, part)
            if not (isinstance(value, tuple) and all(isinstance(entry, kind) for entry in value)):
                raise ValueError(
                    f"{part} of objective {self.name!r} must be a tuple of {kind.__name__}, got "
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
            if term.needs_shift and term.reward != self.reward:
                raise ValueError(
                    f"term {term.name!r} subtracts the running mean of {term.reward} rewards, but "
                    f"objective {self.name!r} reports {self.reward} rewards. Use the same kind."
                )

    @property
    def reward(self) -> str:
        """Kind of the reported rewards: the first one in `REWARDS` that a term compares."""
        kinds = {term.reward for term in self.terms}
        return [kind for kind in REWARDS if kind in kinds][0]

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on log-probs of the reference."""
        return any(term.needs_reference for term in self.terms)

    @property
    def needs_counts(self) -> bool:
        """Whether the loss depends on token counts."""
        return any(term.needs_counts for term in self.terms)

    @property
    def shifted_leaves(self) -> tuple[int, ...]:
        """Leaves whose rewards a running mean averages. Empty without a term that subtracts it."""
        used = {leaf for term in self.terms if term.needs_shift for leaf in term.leaves}
        return tuple(sorted(used))

    def at(self, shift: float | Tensor) -> Self:
        """The same objective with a running mean of rewards (`RunningMean`).

        Args:
            shift: a finite number, or a tensor () on the device of the log-probs.

        Raises:
            ValueError: it is a number that is not finite, or a tensor of another shape.
        """
        right = shift.dim() == 0 if isinstance(shift, Tensor) else math.isfinite(shift)
        if not right:
            raise ValueError(f"shift must be a finite number or a tensor (), got {shift!r}")
        if torch.compiler.is_compiling():  # Dynamo of torch 2.11 does not trace copy.copy
            moved = object.__new__(type(self))
            for entry in fields(self):
                object.__setattr__(moved, entry.name, getattr(self, entry.name))
        else:
            moved = copy.copy(self)
        object.__setattr__(moved, "shift", shift)
        return moved

    def __hash__(self) -> int:
        # Equal objectives have equal names. Dynamo of torch 2.11 hashes an object that it calls,
        # and one that is made in the traced code has no fields yet.
        return hash(self.__dict__.get("name"))

    def __call__(
        self,
        logps: Tensor,  # (L, B), sums over tokens
        reference_logps: Tensor,  # (L, B), sums over tokens, even if rewards are means
        reduction: str = "mean",
        token_counts: Tensor | None = None,  # (L, B)
    ) -> PreferenceOutput:
        """Loss, rewards and term losses, in the dtype of logps. Does not check the inputs.

        Raises:
            ValueError: the objective needs token counts but token_counts is None, or a term does
                not return one loss per example.
        """
        if token_counts is None and self.needs_counts:
            raise ValueError(
                f"token_counts is None, but objective {self.name!r} averages over tokens. Pass "
                "the counts, (leaves, examples), or use linear_preference_loss, which counts them."
            )
        policy = logps
        if any(leaf.detached for leaf in self.leaves):
            rows = zip(self.leaves, logps, strict=True)
            policy = torch.stack([row.detach() if leaf.detached else row for leaf, row in rows])
        reference = reference_logps.to(logps.dtype)
        rewards: dict[str, Tensor] = {}
        each = []
        for term in self.terms:
            if term.reward not in rewards:
                scores = policy - reference if term.needs_reference else policy
                if term.needs_counts:
                    assert token_counts is not None
                    scores = scores / token_counts
                rewards[term.reward] = self.beta * scores
            values = (rewards[term.reward], policy, reference, token_counts, self.shift)
            # __call__ by name: Dynamo of torch 2.11 hashes an object that it calls, but a dataclass
            # made in the traced code has no fields yet.
            each.append(term.__call__(LeafValues(*values)))
            if each[-1].shape != logps.shape[1:]:
                raise ValueError(
                    f"term {term.name!r} returned shape {tuple(each[-1].shape)}, but must return "
                    f"one loss per example, ({logps.shape[1]},)"
                )
        term_losses = torch.stack(each)
        pairs = zip(self.terms, term_losses, strict=True)
        loss = torch.stack([term.weight * term_loss for term, term_loss in pairs]).sum(0)
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        reported = rewards[self.reward].detach()
        return PreferenceOutput(loss, logps, reported, token_counts, term_losses.detach())


class RunningMean:
    """Running mean of rewards over all examples seen: delta of BCO (2404.04656).

        mean = RunningMean()
        for batch in batches:
            out = linear_preference_loss(..., objective.at(mean.value))
            mean.update(objective, out.rewards)

    A step uses the mean of the examples before it. The trained head can then still finish one
    example before it computes the next. InternVL includes the current batch, which differs less and
    less as the count grows. Both are 0 in the first step if policy and reference start equal.
    """

    def __init__(self, value: float = 0.0, count: int = 0) -> None:
        self.value, self.count = value, count

    def update(self, objective: Objective, rewards: Tensor) -> None:
        """Include the rewards (L, B) of a batch. With several ranks, gather them first."""
        self.add(rewards[list(objective.shifted_leaves)].mean().item(), rewards.shape[1])

    def add(self, mean: float, count: int) -> None:
        """Include `count` examples with this mean of rewards."""
        if not count:
            return
        self.count += count
        self.value += (mean - self.value) * count / self.count


def weighted_sum(
    parts: Sequence[Objective], weights: Sequence[float] | None = None, name: str | None = None
) -> Objective:
    """The sum of objectives as one objective. A leaf that several parts read is scored once.

    Args:
        parts: objectives with the same beta. Parts without a term that depends on beta may differ.
        weights: a factor for each part, 1 by default.
        name: its name, by default the names of the parts, joined by +.

    Raises:
        ValueError: numbers of weights and parts differ, a weight is negative, all are 0, or the
            parts have different betas or shifts.
    """
    weights = [1.0] * len(parts) if weights is None else weights
    if len(weights) != len(parts) or not parts:
        raise ValueError(f"{len(parts)} objectives need as many weights, got {len(weights)}.")
    for weight in weights:
        if not (isinstance(weight, numbers.Real) and 0 <= weight < math.inf):
            raise ValueError(f"weights must be finite and >= 0, got {weight!r}")
    if not any(weights):
        raise ValueError("the weights of a sum are all 0, so it trains nothing. Raise one of them.")
    shifts = {part.shift for part in parts if part.shifted_leaves}
    if len(shifts) > 1:
        raise ValueError("the objectives have different shifts. Call `at` on their sum instead.")
    betas = {part.beta for part in parts if any(term.uses_beta for term in part.terms)}
    if len(betas) > 1:
        raise ValueError(
            f"the objectives have different betas, {', '.join(map(str, sorted(betas)))}. Give all "
            "the same beta."
        )
    leaves = list(dict.fromkeys(leaf for part in parts for leaf in part.leaves))
    terms = []
    for part, weight in zip(parts, weights, strict=True):
        places = {i: leaves.index(leaf) for i, leaf in enumerate(part.leaves)}
        for term in part.terms:
            full = part.name if len(part.terms) == 1 else f"{part.name}_{term.name}"
            moved = term.moved(places)
            terms.append(replace(moved, name=full, weight=weight * term.weight))
    beta = betas.pop() if betas else parts[0].beta
    full = "+".join(part.name for part in parts) if name is None else name
    return Objective(full, tuple(leaves), tuple(terms), beta, shifts.pop() if shifts else 0.0)


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
