"""A batch is a forest: every prompt is computed once, whatever responses hang under it.

An example has *roots*, (images, prompt), and *leaves*, a response under a root. In a batch each
distinct root is laid out once in a row, followed by its leaves; a token sees the earlier tokens of
its own segment and of its root, nothing else, and a leaf's positions continue from its root's last.
So one forward over the rows gives every leaf the hidden states it would have alone, and each
distinct image passes the vision tower once. No token is repeated: the state of a root's last token
predicts the first token of every leaf under it, so the head lists that row once per leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from realign_kernels import pack_forest


@dataclass(frozen=True)
class Root:
    """Images and a prompt."""

    images: tuple[str, ...]  # digests of preprocessed pixels, in the order of the image tokens
    ids: np.ndarray  # (P,) token ids, image tokens expanded

    @property
    def key(self) -> tuple:
        """Equal for equal images and prompts."""
        return self.images, self.ids.tobytes()


@dataclass(frozen=True)
class Leaf:
    """A response under a root."""

    root: int  # index into the example's roots
    ids: np.ndarray  # (R,) token ids, R >= 1
    rival: bool = False  # scored by the strongest other token at each position (objectives.Leaf)


@dataclass(frozen=True)
class Example:
    """The forest of one record, its leaves in the order of the objective's leaves."""

    name: str
    roots: tuple[Root, ...]
    leaves: tuple[Leaf, ...]

    @property
    def longest_tree(self) -> int:
        """Tokens of the longest root with all its leaves."""
        sizes = [len(root.ids) for root in self.roots]
        for leaf in self.leaves:
            sizes[leaf.root] += len(leaf.ids)
        return max(sizes)


@dataclass
class ForestBatch:
    """Tensors of one forward. R rows of T columns, I distinct images, N response tokens.

    Attributes:
        input_ids: (R, T) int64.
        position_ids: (R, T) int64; a leaf continues from its root.
        segment: (R, T) int64, one number per root or leaf, -1 on padding.
        parent: (R, T) int64, the segment of the token's root (its own, for roots).
        pixel_values: (I, C, H, W), each distinct image once.
        image_order: (image slots,) int64, which image fills each slot, in row-major order.
        rows: (N,) int64 into the flattened (R * T): the position that predicts each label.
        labels: (N,) int64 response tokens; rows of one example are adjacent.
        sequence_ids: (N,) int64, leaf * examples + example.
        rival: (N,) bool, the rows of rival leaves; None where there are none.
        examples: number of examples B.
        names: their records' names.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment: torch.Tensor
    parent: torch.Tensor
    pixel_values: torch.Tensor
    image_order: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    sequence_ids: torch.Tensor
    rival: torch.Tensor | None
    examples: int
    names: tuple[str, ...]

    def attention_mask(self) -> torch.Tensor:
        """(R, 1, T, T) bool: who may attend to whom."""
        segment, parent = self.segment, self.parent
        same = segment[:, :, None] == segment[:, None, :]
        ancestor = parent[:, :, None] == segment[:, None, :]
        length = segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
        return ((same | ancestor) & causal)[:, None]

    def leaf_sums(
        self,
        logps: torch.Tensor,  # (N,) per-token log-probs
    ) -> torch.Tensor:
        """Log-probs summed over each leaf, (L, B) fp64."""
        leaves = int(self.sequence_ids.max()) // self.examples + 1
        sums = torch.zeros(leaves * self.examples, dtype=torch.float64, device=logps.device)
        sums.index_add_(0, self.sequence_ids, logps.double())
        return sums.view(leaves, self.examples)

    def to(self, device: torch.device | str) -> ForestBatch:
        """The same batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return ForestBatch(**moved)


def build_batch(
    examples: Sequence[Example], store, *, row_tokens: int, pad_id: int = 0
) -> ForestBatch:
    """Lay examples out in rows.

    Args:
        examples: the examples; all have the same number of leaves.
        store: gives the preprocessed pixels of an image key (`encode.ImageStore`).
        row_tokens: most tokens in a row. Raised to the longest root with one leaf if need be; a
            root whose leaves do not fit in one row is repeated.
        pad_id: token id of unused columns.

    Returns:
        The batch. Its layout depends on the examples and `row_tokens` alone.
    """
    roots: list[Root] = []
    index: dict[tuple, int] = {}
    leaf_ids: list[np.ndarray] = []
    leaf_roots: list[int] = []
    rivals: list[bool] = []
    for example in examples:
        for leaf in example.leaves:
            root = example.roots[leaf.root]
            if root.key not in index:
                index[root.key] = len(roots)
                roots.append(root)
            leaf_roots.append(index[root.key])
            leaf_ids.append(leaf.ids)
            rivals.append(leaf.rival)
    root_lengths = np.array([len(root.ids) for root in roots])
    leaf_lengths = np.array([len(ids) for ids in leaf_ids])
    least = int((root_lengths[leaf_roots] + leaf_lengths).max())
    packing = pack_forest(root_lengths, leaf_lengths, leaf_roots, max(row_tokens, least))

    shape = (packing.num_rows, int(packing.row_lengths.max()))
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segment = np.full(shape, -1, dtype=np.int64)
    parent = np.full(shape, -1, dtype=np.int64)
    images: dict[str, int] = {}
    order: list[int] = []
    for tree, (root, row, start) in enumerate(
        zip(packing.tree_root, packing.tree_row, packing.tree_start, strict=True)
    ):
        span = slice(start, start + root_lengths[root])
        ids[row, span] = roots[root].ids
        positions[row, span] = np.arange(root_lengths[root])
        segment[row, span] = parent[row, span] = tree
        order += [images.setdefault(key, len(images)) for key in roots[root].images]
    predictors: list[np.ndarray] = []
    for leaf, (tree, start) in enumerate(zip(packing.leaf_tree, packing.leaf_start, strict=True)):
        row, length = packing.tree_row[tree], leaf_lengths[leaf]
        depth = root_lengths[packing.tree_root[tree]]
        span = slice(start, start + length)
        ids[row, span] = leaf_ids[leaf]
        positions[row, span] = depth + np.arange(length)
        segment[row, span] = packing.num_trees + leaf
        parent[row, span] = tree
        before = np.arange(start - 1, start + length - 1)
        before[0] = packing.tree_start[tree] + depth - 1
        predictors.append(row * shape[1] + before)

    leaves = len(examples[0].leaves)
    owner = np.arange(len(leaf_ids))
    sequence = owner % leaves * len(examples) + owner // leaves
    as_tensor = torch.from_numpy
    return ForestBatch(
        input_ids=as_tensor(ids),
        position_ids=as_tensor(positions),
        segment=as_tensor(segment),
        parent=as_tensor(parent),
        pixel_values=torch.stack([store.pixels(key) for key in images]),
        image_order=torch.tensor(order),
        rows=as_tensor(np.concatenate(predictors)),
        labels=as_tensor(np.concatenate(leaf_ids)),
        sequence_ids=as_tensor(np.repeat(sequence, leaf_lengths)),
        rival=as_tensor(np.repeat(rivals, leaf_lengths)) if any(rivals) else None,
        examples=len(examples),
        names=tuple(example.name for example in examples),
    )
