"""Forests without a model: random token ids, and log-probs that are a function of the ids.

`Scorer` gives per-token log-probs whose last bits depend on the leaves in the same forward, as in a
real model. Two passes are therefore bitwise equal only if they ran the same batches.
"""

import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Root:
    images: tuple[str, ...]
    ids: np.ndarray


@dataclass(frozen=True)
class Leaf:
    root: int
    ids: np.ndarray
    rival: bool = False


@dataclass(frozen=True)
class Forest:
    roots: tuple[Root, ...]
    leaves: tuple[Leaf, ...]


def make_forests(count, seed=0, longest=12):
    """Two roots and three leaves each, as for rDPO, with various lengths."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(0, 1000, rng.integers(low, high + 1))

    forests = []
    for i in range(count):
        prompt, chosen, rejected = ids(4, 20), ids(1, longest), ids(1, longest)
        roots = (Root((f"image {i}",), prompt), Root((f"other {i}",), prompt))
        forests.append(Forest(roots, (Leaf(0, chosen), Leaf(0, rejected), Leaf(1, chosen))))
    return forests


def token_logps(forest, leaf):
    """(R,) fp32, a function of images, prompt and response."""
    one = forest.leaves[leaf]
    root = forest.roots[one.root]
    seed = zlib.crc32(repr((root.images, root.ids.tolist(), one.ids.tolist())).encode())
    return -np.random.default_rng(seed).random(len(one.ids), np.float32)


class Scorer:
    """`build` and `model` of a pass over forests, with counts of their calls."""

    def __init__(self, forests, seconds=0.0, begun=lambda: None):
        self.forests, self.seconds, self.begun = forests, seconds, begun
        self.batches = []

    def build(self, pairs):
        return pairs

    def __call__(self, pairs):
        self.batches.append(pairs)
        self.begun()
        time.sleep(self.seconds)
        values = np.concatenate([token_logps(self.forests[i], leaf) for i, leaf in pairs])
        company = np.float32(1 + zlib.crc32(repr(pairs).encode()) / 2**32 * 1e-5)
        return torch.from_numpy(values * company)


def fill(cache, forests, seconds=0.0, begun=lambda: None, **options):
    """A pass over forests. Returns the scorer, which calls `begun` at the start of each batch."""
    scorer = Scorer(forests, seconds, begun)
    options = {"row_tokens": 64, "batch_rows": 4} | options
    scorer.filled = cache.fill(scorer, forests, build=scorer.build, **options)
    return scorer
