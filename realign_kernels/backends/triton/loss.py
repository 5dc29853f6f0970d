"""Preference loss and its coefficients from token log-probs, in one launch.

One program per example reads the rows of all examples and uses its own, so rows need no order and
sums need no atomics. The program that ends last adds the losses of the examples in order. Results
are bitwise deterministic.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.backends.triton.configs import LOSS_BLOCK, LOSS_WARPS
from realign_kernels.backends.triton.logits import launch
from realign_kernels.objectives import (
    AnchorSigmoid,
    LinearSigmoid,
    NegativeLogLikelihood,
    Objective,
    PairRobust,
    PairSigmoid,
)


class LossOutput(NamedTuple):
    """The loss of a batch, detached. L is leaves, B examples, K terms."""

    loss: Tensor  # () fp32, mean or sum over examples
    coefficients: Tensor  # (N,) fp32, d loss / d logps[i]
    sums: Tensor  # (L, B) fp32
    counts: Tensor  # (L, B) int64
    rewards: Tensor  # (L, B) fp32
    term_losses: Tensor  # (K, B) fp32, unweighted


class Link(NamedTuple):
    """A term as up * l(z) + down * l(-z) - linear * z, with l(z) = -log sigmoid(z).

    z = sum of factor * reward[leaf] - delta.
    """

    factors: tuple[tuple[int, float], ...]
    """(leaf, factor) pairs."""
    delta: float = 0.0
    shifted: bool = False
    """Whether `Objective.shift` is added to delta."""
    up: float = 0.0
    down: float = 0.0
    linear: float = 0.0


def _pair(positive: int, negative: int) -> tuple[tuple[int, float], ...]:
    return ((positive, 1.0), (negative, -1.0))


LINKS: dict[type, Callable[..., Link]] = {
    PairSigmoid: lambda positive, negative, label_smoothing, target: Link(
        _pair(positive, negative), target, up=1 - label_smoothing, down=label_smoothing
    ),
    PairRobust: lambda positive, negative, label_smoothing: Link(
        _pair(positive, negative),
        up=(1 - label_smoothing) / (1 - 2 * label_smoothing),
        down=-label_smoothing / (1 - 2 * label_smoothing),
    ),
    AnchorSigmoid: lambda leaf, delta, below, shifted: Link(
        ((leaf, 1.0),), delta, bool(shifted), up=float(not below), down=float(bool(below))
    ),
    LinearSigmoid: lambda coefficients: Link(coefficients, up=1.0),
    NegativeLogLikelihood: lambda leaf: Link(((leaf, 1.0),), linear=1.0),
}
"""Terms with a kernel. The parameters are all fields of the term that `Term` does not have.

A term with a field that its entry does not name, added later, is thus rejected.
"""

KINDS = {
    "log_ratio": (True, False),
    "mean_log_ratio": (True, True),
    "logp": (False, False),
    "mean_logp": (False, True),
}
"""Kinds of rewards: whether they subtract the reference, and whether they divide by the count."""

LEAF_FIELDS = {"response", "image", "detached", "rival"}
"""Fields of a leaf that the kernel supports. `rival` only affects the log-probs it receives."""


class Table(NamedTuple):
    """An objective as the kernel reads it: one entry per term, and `factors` per term and leaf."""

    weights: tuple[float, ...]
    deltas: tuple[float, ...]
    shifted: tuple[bool, ...]
    scaled: tuple[bool, ...]
    """Whether the rewards include beta."""
    ratio: tuple[bool, ...]
    """Whether the rewards subtract the reference. The last entry is for the reported rewards."""
    mean: tuple[bool, ...]
    """Whether the rewards divide by the count. The last entry is for the reported rewards."""
    factors: tuple[float, ...]
    """0 for a leaf that the term does not read."""
    up: tuple[float, ...]
    down: tuple[float, ...]
    linear: tuple[float, ...]


def _fields(thing: object, *known: str) -> set[str]:
    return set(vars(thing)) - set(known)


@functools.lru_cache(maxsize=64)
def encode(objective: Objective) -> Table | str:
    """The table of an objective, or the reason why the kernel does not support it."""
    known = _fields(objective, "name", "leaves", "terms", "beta", "shift") == set()
    if type(objective) is not Objective or not known:
        return f"{type(objective).__name__} {objective.name!r} has no fused kernel"
    for leaf in objective.leaves:
        if leaf.detached or not set(leaf._fields) <= LEAF_FIELDS:
            return f"{leaf} has no fused kernel"
    links = []
    for term in objective.terms:
        link, own = LINKS.get(type(term)), _fields(term, "name", "weight", "reward")
        if link is None or own != set(inspect.signature(link).parameters):
            return f"term {term.name!r} ({type(term).__name__}) has no fused kernel"
        links.append(link(**{name: getattr(term, name) for name in own}))
    terms, leaves = objective.terms, range(len(objective.leaves))
    kinds = [KINDS[kind] for kind in (*(term.reward for term in terms), objective.reward)]
    return Table(
        weights=tuple(float(term.weight) for term in terms),
        deltas=tuple(float(link.delta) for link in links),
        shifted=tuple(link.shifted for link in links),
        scaled=tuple(term.uses_beta for term in terms),
        ratio=tuple(ratio for ratio, _ in kinds),
        mean=tuple(mean for _, mean in kinds),
        factors=tuple(float(dict(link.factors).get(i, 0)) for link in links for i in leaves),
        up=tuple(float(link.up) for link in links),
        down=tuple(float(link.down) for link in links),
        linear=tuple(float(link.linear) for link in links),
    )


@triton.jit
def pick(values, leaves, leaf: tl.constexpr):
    """values[leaf], with `leaves` an arange."""
    return tl.sum(tl.where(leaves == leaf, values, 0.0), 0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in fp64, from log(1 + e) = e * log(u) / (u - 1) with u = 1 + e rounded."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    small = u == 1
    log1p = tl.where(small, e, e * tl.log(u) / tl.where(small, 1.0, u - 1))
    return tl.where(x > 0, x, 0.0) + tl.where(x != x, x, log1p)


@triton.jit
def sigmoid(x):
    """sigmoid(x) in fp64, without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def link(z, UP: tl.constexpr, DOWN: tl.constexpr, LINEAR: tl.constexpr):
    """The loss of `Link`, and its derivative by z."""
    loss = tl.zeros_like(z)
    slope = tl.zeros_like(z) - LINEAR
    if UP != 0:
        loss += UP * softplus(-z)
        slope -= UP * sigmoid(-z)
    if DOWN != 0:
        loss += DOWN * softplus(z)
        slope += DOWN * sigmoid(z)
    if LINEAR != 0:
        loss -= LINEAR * z
    return loss, slope


@triton.jit
def score(sums, base, counts, beta, RATIO: tl.constexpr, MEAN: tl.constexpr):
    """Rewards of a kind of `KINDS`, and their derivatives by the sums. Not finite for count 0."""
    scale = tl.zeros_like(sums) + beta
    if MEAN:
        scale /= counts
    if RATIO:
        sums -= base
    return scale * sums, scale


# Numbers of rows differ from step to step, and divisible ones would compile another kernel.
@triton.jit(do_not_specialize=["rows"])
def loss_kernel(
    logps,  # (N,) fp32
    ids,  # (N,) int64
    reference,  # (L, B)
    coefficients,  # (N,) fp32
    sums_out,  # (L, B) fp32
    counts_out,  # (L, B) int64
    rewards_out,  # (L, B) fp32
    terms_out,  # (K, B) fp32
    losses_out,  # (B,) fp32
    loss_out,  # () fp32
    finished,  # () int64, 0
    rows,
    examples,
    beta,
    weights,  # K floats
    deltas,  # K floats
    shift,  # () of any float dtype, or None
    SHIFTED: tl.constexpr,  # this and the next are fields of `Table`
    SCALED: tl.constexpr,
    RATIO: tl.constexpr,
    MEAN: tl.constexpr,
    FACTORS: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    LINEAR: tl.constexpr,
    LEAVES: tl.constexpr,
    PADDED: tl.constexpr,  # LEAVES, up to a power of two
    DIVIDE: tl.constexpr,  # the mean over examples instead of the sum
    BLOCK: tl.constexpr,
):
    """Computes one example, in fp64: the work is small, and results are then exact in fp32."""
    example = tl.program_id(0)
    leaves = tl.arange(0, PADDED)
    slot = leaves.to(tl.int64) * examples + example  # the ids of this example
    sums = tl.zeros((PADDED, BLOCK), tl.float64)
    counts = tl.zeros((PADDED, BLOCK), tl.int32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < rows
        mine = tl.load(ids + at, inside, other=-1)[None, :] == slot[:, None]
        logp = tl.load(logps + at, inside, other=0.0).to(tl.float64)
        sums += tl.where(mine, logp[None, :], 0.0)
        counts += mine.to(tl.int32)

    real = leaves < LEAVES
    total = tl.sum(sums, 1)
    count = tl.sum(counts, 1)
    base = tl.load(reference + slot, real, other=0.0).to(tl.float64)
    tl.store(sums_out + slot, total.to(tl.float32), real)
    tl.store(counts_out + slot, count.to(tl.int64), real)
    rewards, _ = score(total, base, count, beta, RATIO[len(UP)], MEAN[len(UP)])
    tl.store(rewards_out + slot, rewards.to(tl.float32), real)

    loss = tl.zeros((), tl.float64)
    grads = tl.zeros((PADDED,), tl.float64)
    for term in tl.static_range(len(UP)):
        scaled = beta if SCALED[term] else 1.0
        rewards, scale = score(total, base, count, scaled, RATIO[term], MEAN[term])
        z = tl.zeros((), tl.float64) - deltas[term]
        if SHIFTED[term] and shift is not None:
            z -= tl.load(shift)
        for leaf in tl.static_range(LEAVES):
            if FACTORS[term * LEAVES + leaf] != 0:
                z += FACTORS[term * LEAVES + leaf] * pick(rewards, leaves, leaf)
        term_loss, slope = link(z, UP[term], DOWN[term], LINEAR[term])
        tl.store(terms_out + term * examples + example, term_loss.to(tl.float32))
        loss += weights[term] * term_loss
        for leaf in tl.static_range(LEAVES):
            if FACTORS[term * LEAVES + leaf] != 0:
                of_sum = weights[term] * slope * FACTORS[term * LEAVES + leaf] * scale
                grads += tl.where(leaves == leaf, of_sum, 0.0)
    tl.store(losses_out + example, loss.to(tl.float32))

    divisor = tl.full((), 1.0, tl.float64)
    if DIVIDE:
        divisor *= examples
    grads /= divisor
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < rows
        mine = tl.load(ids + at, inside, other=-1)[None, :] == slot[:, None]
        value = tl.sum(tl.where(mine, grads[:, None], 0.0), 0)
        tl.store(coefficients + at, value.to(tl.float32), tl.sum(mine.to(tl.int32), 0) > 0)

    # The barrier orders the stores of all warps before the release. The acquire of the program that
    # counts last orders its loads after the stores of all programs. .cg reads them from L2.
    tl.debug_barrier()
    before = tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if before == examples - 1:
        parts = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, examples, BLOCK):
            at = start + tl.arange(0, BLOCK)
            part = tl.load(losses_out + at, at < examples, other=0.0, cache_modifier=".cg")
            parts += part.to(tl.float64)
        tl.store(loss_out, (tl.sum(parts, 0) / divisor).to(tl.float32))


def preference_sums(
    logps: Tensor,  # (N,) fp32
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example in [0, L * B)
    reference_logps: Tensor,  # (L, B) fp32 or fp64
    objective: Objective,
    *,
    reduction: str = "mean",
) -> LossOutput:
    """Sums, rewards, terms, loss and d loss / d logps. See `objectives.Objective.__call__`.

    With reduction "none", `loss` is the sum, and the coefficients are those of this sum.
    """
    assert logps.dtype == torch.float32
    table, shift = encode(objective), objective.shift
    assert isinstance(table, Table), table
    deltas = table.deltas
    if not isinstance(shift, Tensor):  # a new number changes arguments of the kernel, not its code
        pairs = zip(deltas, table.shifted, strict=True)
        deltas = tuple(delta + float(shift) if shifted else delta for delta, shifted in pairs)
        shift = None
    leaves, examples = reference_logps.shape
    wide = logps.new_empty((2 * leaves + len(table.weights) + 1) * examples + 1)
    heights = (leaves, leaves, len(table.weights), 1)
    *blocks, loss = wide.split([*(height * examples for height in heights), 1])
    sums, rewards, terms, losses = (
        block.view(height, examples) for block, height in zip(blocks, heights, strict=True)
    )
    counts = torch.empty(leaves, examples, dtype=torch.int64, device=logps.device)
    coefficients = torch.empty_like(logps)
    # Zeroed for each call, because two streams could not share a counter that resets itself.
    finished = torch.zeros((), dtype=torch.int64, device=logps.device)
    if examples == 0:
        loss.zero_()
    else:
        launch(
            loss_kernel,
            (examples,),
            logps.contiguous(),
            sequence_ids.contiguous(),
            reference_logps.contiguous(),
            coefficients,
            sums,
            counts,
            rewards,
            terms,
            losses,
            loss,
            finished,
            len(logps),
            examples,
            float(objective.beta),
            table.weights,
            deltas,
            shift,
            SHIFTED=table.shifted,
            SCALED=table.scaled,
            RATIO=table.ratio,
            MEAN=table.mean,
            FACTORS=table.factors,
            UP=table.up,
            DOWN=table.down,
            LINEAR=table.linear,
            LEAVES=leaves,
            PADDED=triton.next_power_of_2(leaves),
            DIVIDE=reduction == "mean",
            BLOCK=LOSS_BLOCK,
            num_warps=LOSS_WARPS,
        )
    return LossOutput(loss.view(()), coefficients, sums, counts, rewards, terms)
