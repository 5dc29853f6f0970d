"""Forest batches: every prompt is computed once for all its responses.

An example has *roots*, each of images and a prompt, and *leaves*, each a response to a root. A
batch lays out each distinct root once in a row, followed by its leaves. A token sees only the
earlier tokens of its own segment and of its root. A leaf's positions continue from the last of its
root. One forward over the rows therefore gives every leaf the hidden states of a separate forward,
and each distinct image passes the vision tower once. No token is repeated. The state of a root's
last token predicts the first token of each of its leaves, so the head lists that row once per leaf.

Without sharing (`layouts.Layout.separate`) each leaf has a row with its own copy of its root.

A batch may have no image. With several ranks, it then gets a prompt with an image, and a token
without a label. So every rank uses the same parameters, which FSDP gathers and reduces together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from realign.distributed import world_size
from realign.modeling.examples import Example as Example
from realign.modeling.examples import Leaf as Leaf
from realign.modeling.examples import Root as Root
from realign.modeling.images import Images, ImageStore
from realign.modeling.varlen_attention import Sequences, sequences
from realign_kernels import ForestPacking, pack_forest


@dataclass
class ForestBatch:
    """Tensors of one forward: R rows of T columns, I distinct images, N response tokens.

    Attributes:
        input_ids: (R, T) int64.
        position_ids: (R, T) int64, or (axes, R, T); a leaf continues from its root.
        depth: (R, T) int64, tokens before the token in its sequence; a leaf continues from its
            root.
        segment: (R, T) int64, one number per root or leaf, -1 on padding.
        parent: (R, T) int64, the segment of the token's root; a root is its own parent.
        columns: further integers of each token by name, (R, T) int64 each, 0 on padding.
        block: (R, T) int64, the block whose tokens see each other both ways, -1 for none. None for
            causal attention.
        shared: whether leaves share one copy of their root. If not, a row is a root and a leaf.
        images: the distinct images, preprocessed; None if there are none, or `features` are given.
        features: outputs of the vision tower for these images; None if `images` are given.
        slots: index of the image at each image place in the rows, in row-major order.
        grids: grids of the images by slot (`ImageStore.grids`).
        rows: (N,) int64 into the flattened (R * T): the position that predicts each label.
        labels: (N,) int64 response tokens, on the CPU; rows of one example are adjacent.
        sequence_ids: (N,) int64, leaf * examples + example, on the CPU.
        trees: for each row its trees in order, each the lengths of its root and leaves.
        sequences: `trees` as sequences of varlen attention. None unless `shared` and causal.
        rival: (N,) bool, True for tokens of rival leaves; None if there are no rival leaves.
        examples: number of examples B.
        names: names of the examples' records.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    depth: torch.Tensor
    segment: torch.Tensor
    parent: torch.Tensor
    columns: dict[str, torch.Tensor]
    block: torch.Tensor | None
    shared: bool
    images: Images | None
    features: tuple[dict[str, torch.Tensor], ...] | None
    slots: tuple[int, ...]
    grids: dict[str, torch.Tensor]
    rows: torch.Tensor
    labels: torch.Tensor
    sequence_ids: torch.Tensor
    trees: tuple[tuple[tuple[int, ...], ...], ...]
    sequences: Sequences | None
    rival: torch.Tensor | None
    examples: int
    names: tuple[str, ...]

    def sees(
        self, window: int | None = None, blocks_ignore_window: bool = False, blocks: bool = True
    ) -> Callable:
        """The attention mask, as a function of row, head, and columns of query and key.

        Args:
            window: tokens that a token sees, itself included, counted back along its sequence.
            blocks_ignore_window: whether tokens of a block see each other beyond the window.
            blocks: whether tokens of a block see each other both ways.
        """
        segment, parent, depth = self.segment, self.parent, self.depth
        block = self.block if blocks else None

        def seen(row, head, query, key):
            same = segment[row, query] == segment[row, key]
            in_root = parent[row, query] == segment[row, key]
            causal = (query >= key) & (same | in_root)
            near = window is None or depth[row, query] - depth[row, key] < window
            if block is None:
                return causal & near
            two_way = same & (block[row, query] == block[row, key]) & (block[row, query] >= 0)
            return (causal & near) | two_way if blocks_ignore_window else (causal | two_way) & near

        return seen

    def attention_mask(
        self, window: int | None = None, blocks_ignore_window: bool = False, blocks: bool = True
    ) -> torch.Tensor:
        """The attention mask, (R, 1, T, T) bool: True where a query sees a key."""
        rows, columns = (torch.arange(n, device=self.segment.device) for n in self.segment.shape)
        seen = self.sees(window, blocks_ignore_window, blocks)
        return seen(rows[:, None, None], None, columns[:, None], columns)[:, None]

    def leaf_sums(
        self,
        logps: torch.Tensor,  # (N,) per-token log-probs
    ) -> torch.Tensor:
        """Log-probs summed over each leaf, (L, B) fp64."""
        leaves = int(self.sequence_ids.numpy().max()) // self.examples + 1
        sums = torch.zeros(leaves * self.examples, dtype=torch.float64, device=logps.device)
        sums.index_add_(0, self.sequence_ids.to(logps.device, non_blocking=True), logps.double())
        return sums.view(leaves, self.examples)

    def to(self, device: torch.device | str) -> ForestBatch:
        """The same batch with its tensors on `device`.

        `labels` and `sequence_ids` stay on the host: the head plans its rows there.
        """

        def moved(value):
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, Images | Sequences):
                return value.to(device)
            if isinstance(value, dict):
                return {name: moved(one) for name, one in value.items()}
            return tuple(moved(one) for one in value) if isinstance(value, tuple) else value

        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        host = {"labels": self.labels, "sequence_ids": self.sequence_ids}
        return ForestBatch(**{name: moved(part) for name, part in parts.items()} | host)


def build_batch(
    examples: Sequence[Example],
    store: ImageStore,
    *,
    row_tokens: int,
    pad_id: int = 0,
    shared: bool | None = None,
) -> ForestBatch:
    """Pack examples into the rows of a forest batch.

    Args:
        examples: the examples; all have the same number of leaves.
        store: their images, and the layout of the model.
        row_tokens: maximum number of tokens in a row, raised to the longest root with one leaf if
            necessary. A root whose leaves do not fit in one row is repeated. No effect without
            sharing, where a row is a root with one leaf.
        pad_id: token id of unused columns.
        shared: whether leaves share their root. None shares if the model supports it.

    Returns:
        The batch. It depends only on the examples, the layout and `row_tokens`.
    """
    layout = store.layout
    shared = layout.shares_prefix if shared is None else shared
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
    scored = len(leaf_ids)
    no_image = not any(root.images for root in roots)
    spare = store.spare if no_image and world_size() > 1 else None
    if spare is not None:
        leaf_roots.append(len(roots))
        roots.append(spare)
        leaf_ids.append(spare.ids[-1:])
    root_lengths = np.array([len(root.ids) for root in roots], np.int64)
    leaf_lengths = np.array([len(ids) for ids in leaf_ids])
    sequence_lengths = root_lengths[leaf_roots] + leaf_lengths
    if shared:
        budget = max(row_tokens, sequence_lengths.max())
        packing = pack_forest(root_lengths, leaf_lengths, leaf_roots, budget)
    else:
        packing = _pack_separately(root_lengths, sequence_lengths, leaf_roots)

    shape = (packing.num_rows, int(packing.row_lengths.max()))
    read = [layout.columns(root.ids, root.columns) for root in roots]
    prompts = [
        layout.positions(root.ids, store.grids(root.images), columns)
        for root, columns in zip(roots, read, strict=True)
    ]
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros((len(prompts[0]), *shape), dtype=np.int64)
    depth = np.zeros(shape, dtype=np.int64)
    segment, parent, block = (np.full(shape, -1, dtype=np.int64) for _ in range(3))
    columns = {name: np.zeros(shape, dtype=np.int64) for name in sorted(set().union(*read))}
    images: dict[str, int] = {}
    slots: list[str] = []
    for tree, (root, row, start) in enumerate(
        zip(packing.tree_root, packing.tree_row, packing.tree_start, strict=True)
    ):
        span = slice(start, start + root_lengths[root])
        ids[row, span] = roots[root].ids
        positions[:, row, span] = prompts[root]
        depth[row, span] = np.arange(len(roots[root].ids))
        segment[row, span] = parent[row, span] = tree
        for name, column in read[root].items():
            columns[name][row, span] = column
        if layout.both_ways:
            block[row, span] = layout.blocks(read[root])
        slots += roots[root].images
        for key in roots[root].images:
            images.setdefault(key, len(images))
    predictors: list[np.ndarray] = []
    for leaf, (tree, start) in enumerate(zip(packing.leaf_tree, packing.leaf_start, strict=True)):
        row, length, root = packing.tree_row[tree], leaf_lengths[leaf], packing.tree_root[tree]
        span = slice(start, start + length)
        ids[row, span] = leaf_ids[leaf]
        positions[:, row, span] = prompts[root].max() + 1 + np.arange(length)
        for name, column in read[root].items():
            columns[name][row, span] = layout.of_response(roots[root].ids, name, column)
        depth[row, span] = root_lengths[root] + np.arange(length)
        segment[row, span] = packing.num_trees + leaf
        parent[row, span] = tree
        if leaf == scored:
            continue
        before = np.arange(start - 1, start + length - 1)
        before[0] = packing.tree_start[tree] + root_lengths[root] - 1
        predictors.append(row * shape[1] + before)

    leaves = len(examples[0].leaves)
    owner = np.arange(scored)
    sequence = owner % leaves * len(examples) + owner // leaves
    as_tensor = torch.from_numpy
    features = store.features
    trees = _trees(packing, root_lengths, leaf_lengths)
    return ForestBatch(
        input_ids=as_tensor(ids),
        position_ids=as_tensor(positions[0] if len(positions) == 1 else positions),
        depth=as_tensor(depth),
        segment=as_tensor(segment),
        parent=as_tensor(parent),
        columns={name: as_tensor(column) for name, column in columns.items()},
        block=as_tensor(block) if layout.both_ways else None,
        shared=shared,
        images=store.batch(list(images)) if features is None and images else None,
        features=None if features is None else tuple(dict(features[key]) for key in images),
        slots=tuple(images[key] for key in slots),
        grids=store.grids(slots),
        rows=as_tensor(np.concatenate(predictors)),
        labels=as_tensor(np.concatenate(leaf_ids[:scored])),
        sequence_ids=as_tensor(np.repeat(sequence, leaf_lengths[:scored])),
        trees=trees,
        sequences=sequences(trees, shape[1]) if shared and layout.causal else None,
        rival=as_tensor(np.repeat(rivals, leaf_lengths[:scored])) if any(rivals) else None,
        examples=len(examples),
        names=tuple(example.name for example in examples),
    )


def _trees(
    packing, root_lengths: np.ndarray, leaf_lengths: np.ndarray
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    sizes = [[int(root_lengths[root])] for root in packing.tree_root]
    for leaf in np.argsort(packing.leaf_start, kind="stable"):
        sizes[packing.leaf_tree[leaf]].append(int(leaf_lengths[leaf]))
    rows: list[list[tuple[int, ...]]] = [[] for _ in range(packing.num_rows)]
    for tree in np.argsort(packing.tree_start, kind="stable"):
        rows[packing.tree_row[tree]].append(tuple(sizes[tree]))
    return tuple(map(tuple, rows))


def _pack_separately(
    root_lengths: np.ndarray, sequence_lengths: np.ndarray, leaf_roots: Sequence[int]
) -> ForestPacking:
    """A packing with one row per leaf, after its own copy of its root."""
    roots, leaves = np.array(leaf_roots), np.arange(len(leaf_roots))
    return ForestPacking(
        tree_root=roots,
        tree_row=leaves,
        tree_start=np.zeros_like(leaves),
        leaf_tree=leaves,
        leaf_start=root_lengths[roots],
        row_lengths=sequence_lengths,
        budget=int(sequence_lengths.max()),
    )
