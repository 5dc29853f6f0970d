"""Preference loss and its coefficients from token log-probs, in one launch.

One program per example reads the rows of all examples and uses its own, so rows need no order and
sums need no atomics. The program that ends last adds the losses of the examples in order. Results
are bitwise deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.backends.triton.configs import LOSS_BLOCK, LOSS_WARPS
from realign_kernels.backends.triton.logits import launch
from realign_kernels.objectives import AnchorSigmoid, Objective, PairSigmoid


class LossOutput(NamedTuple):
    """The loss of a batch, detached. L is leaves, B examples, K terms."""

    loss: Tensor  # () fp32, mean or sum over examples
    coefficients: Tensor  # (N,) fp32, d loss / d logps[i]
    sums: Tensor  # (L, B) fp32
    counts: Tensor  # (L, B) int64
    rewards: Tensor  # (L, B) fp32
    term_losses: Tensor  # (K, B) fp32, unweighted


class Table(NamedTuple):
    """An objective as the kernel reads it: one entry per term."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]
    """-1 in a term that compares with delta instead of another leaf."""
    weights: tuple[float, ...]
    deltas: tuple[float, ...]


LEAF_FIELDS = {"response", "image", "detached", "rival"}
"""Fields of a leaf that the kernel supports. `rival` only affects the log-probs it receives."""

NEUTRAL = {
    "label_smoothing": 0,
    "target": 0,
    "below": False,
    "shifted": False,
    "reward": "log_ratio",
}
"""Settings that the kernel does not support, with the values that switch them off."""


def _known(thing: object, *names: str) -> bool:
    """Whether an object has only these fields and NEUTRAL fields with neutral values.

    A field added to the class later is thus rejected instead of ignored.
    """
    rest = {name: value for name, value in vars(thing).items() if name not in names}
    return all(name in NEUTRAL and NEUTRAL[name] == value for name, value in rest.items())


def supports(objective: Objective) -> bool:
    """Whether the kernel supports this objective: only plain PairSigmoid and AnchorSigmoid."""
    return (
        type(objective) is Objective
        and _known(objective, "name", "leaves", "terms", "beta", "shift")
        and all(set(leaf._fields) <= LEAF_FIELDS and not leaf.detached for leaf in objective.leaves)
        and all(
            (type(term) is PairSigmoid and _known(term, "name", "weight", "positive", "negative"))
            or (type(term) is AnchorSigmoid and _known(term, "name", "weight", "leaf", "delta"))
            for term in objective.terms
        )
    )


def encode(objective: Objective) -> Table:
    """The table of an objective that `supports` accepts."""
    assert supports(objective), objective.name
    rows = []
    for term in objective.terms:
        if isinstance(term, PairSigmoid):
            rows.append((term.positive, term.negative, float(term.weight), 0.0))
        else:
            assert isinstance(term, AnchorSigmoid)
            rows.append((term.leaf, -1, float(term.weight), float(term.delta)))
    return Table(*zip(*rows, strict=True))


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
    POSITIVE: tl.constexpr,  # K leaves
    NEGATIVE: tl.constexpr,  # K leaves or -1
    LEAVES: tl.constexpr,
    PADDED: tl.constexpr,  # LEAVES, up to a power of two
    MEAN: tl.constexpr,
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
    tl.store(sums_out + slot, total.to(tl.float32), real)
    tl.store(counts_out + slot, tl.sum(counts, 1).to(tl.int64), real)
    rewards = beta * (total - tl.load(reference + slot, real, other=0.0).to(tl.float64))
    tl.store(rewards_out + slot, rewards.to(tl.float32), real)

    loss = tl.zeros((), tl.float64)
    grads = tl.zeros((PADDED,), tl.float64)
    for term in tl.static_range(len(POSITIVE)):
        margin = pick(rewards, leaves, POSITIVE[term]) - deltas[term]
        if NEGATIVE[term] >= 0:
            margin -= pick(rewards, leaves, NEGATIVE[term])
        term_loss = softplus(-margin)
        tl.store(terms_out + term * examples + example, term_loss.to(tl.float32))
        loss += weights[term] * term_loss
        grad = weights[term] * sigmoid(-margin)
        grads += tl.where(leaves == POSITIVE[term], -grad, 0.0)
        if NEGATIVE[term] >= 0:
            grads += tl.where(leaves == NEGATIVE[term], grad, 0.0)
    tl.store(losses_out + example, loss.to(tl.float32))

    scale = tl.full((), 1.0, tl.float64)
    if MEAN:
        scale /= examples
    grads = grads * beta * scale
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
        tl.store(loss_out, (tl.sum(parts, 0) * scale).to(tl.float32))


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
    table = encode(objective)
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
            objective.beta,
            table.weights,
            table.deltas,
            POSITIVE=table.positive,
            NEGATIVE=table.negative,
            LEAVES=leaves,
            PADDED=triton.next_power_of_2(leaves),
            MEAN=reduction == "mean",
            BLOCK=LOSS_BLOCK,
            num_warps=LOSS_WARPS,
        )
    return LossOutput(loss.view(()), coefficients, sums, counts, rewards, terms)
