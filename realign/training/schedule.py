"""Schedule: examples of a step and of a rank, learning rate, random numbers.

The schedule depends only on the settings and the step. A run can therefore resume at any step, on
any number of ranks, without saved state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from realign.config import OptimConfig


def total_steps(count: int, optim: OptimConfig) -> int:
    """Number of steps of a run over `count` examples. Its last step may begin a further epoch."""
    # The margin is for products such as 1.1 * 10 = 11.000000000000002.
    return optim.steps or max(1, math.ceil(optim.epochs * count / optim.batch_size - 1e-9))


def batches(
    count: int, batch_size: int, seed: int, *, first: int, last: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Steps first+1 .. last with their example indices, from a new permutation for each epoch.

    A batch may span two epochs, so all batches are full. The order depends only on the seed.
    """
    for step in range(first + 1, last + 1):
        positions = np.arange((step - 1) * batch_size, step * batch_size)
        orders = {
            epoch: np.random.default_rng([seed, epoch]).permutation(count)
            for epoch in set((positions // count).tolist())
        }
        yield step, np.array([orders[i // count][i % count] for i in positions.tolist()])


def rank_slice(batch_size: int, rank: int, ranks: int) -> slice:
    """The slice of every global batch that a rank computes.

    Raises:
        ValueError: when the batch does not divide among the ranks.
    """
    if batch_size % ranks:
        raise ValueError(
            f"--batch-size {batch_size} does not divide among {ranks} ranks. Choose a multiple of "
            f"{ranks}."
        )
    return slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Learning rate of a step, counted from 0: a linear warm-up, then the schedule.

    The schedules are transformers' `cosine`, `linear` and `constant_with_warmup`. The warm-up
    starts at 1 / warm instead of 0, so the first step is not lost.
    """
    warm = max(1, round(optim.warmup * total))
    if step < warm:
        return optim.learning_rate * (step + 1) / warm
    if optim.schedule == "constant":
        return optim.learning_rate
    progress = (step - warm) / max(1, total - warm)
    falls = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.min_learning_rate + (optim.learning_rate - optim.min_learning_rate) * falls


def projector_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Learning rate of the projector in a step: that of the other weights, scaled to its peak."""
    share = optim.projector_learning_rate / optim.learning_rate
    return learning_rate(step, total, optim) * share


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the random numbers (dropout) of a step, on CPU and GPU.

    A resumed run therefore draws the same numbers without saved state. Another number of ranks
    divides the examples differently, so dropout masks differ.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
