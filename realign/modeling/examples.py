"""Examples: the forest of a record, and those of a data set in memory-mapped Arrow batches.

`Examples` is a sequence of `Example`s that are made when they are read. Token ids are int32, and a
run of image tokens is one token with its length. The encoded forest of a record of LLaVA-1.5 takes
about 1.5 kB instead of 10 kB. Lengths and keys of all leaves are columns, so a data set is packed
and compared with the reference cache without making its examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa

from realign.data.record_table import RecordTable
from realign_kernels import Objective, collect_leaves, refcache

_KEYS = pa.list_(pa.binary(16))
_IDS = pa.list_(pa.list_(pa.int32()))
_USED_IMAGE = pa.struct(
    [
        ("key", pa.binary(16)),
        ("column", pa.int8()),
        ("place", pa.int32()),
        ("several", pa.bool_()),
        ("tokens", pa.int32()),
        ("grids", pa.list_(pa.int64())),
    ]
)
_COLUMN = pa.struct(
    [("name", pa.string()), ("values", pa.list_(pa.int64())), ("lengths", pa.list_(pa.int32()))]
)
SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "root_images": pa.list_(_KEYS),
        "root_ids": _IDS,
        "root_runs": _IDS,
        "root_keys": _KEYS,
        "root_columns": pa.list_(pa.list_(_COLUMN)),
        "leaf_ids": _IDS,
        "leaf_keys": _KEYS,
        "images": pa.list_(_USED_IMAGE),
    }
)
"""Columns of encoded records. `root_runs` holds the lengths of the runs of image tokens, and
`root_columns` the runs of equal values in token columns."""

BLANK = "blank_image"
COLUMNS = ("images", "retrieved_images", BLANK)
"""Sources of an image of an example: a column of the record, or a blank image of that size."""


@dataclass(frozen=True)
class Root:
    """Images and a prompt, which leaves share.

    Attributes:
        images: digests of preprocessed pixels, in the order of the image tokens.
        ids: (P,) token ids, image tokens expanded.
        columns: further integers of each token by name, (P,) each, of the processor.
    """

    images: tuple[str, ...]
    ids: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """Equal for equal images and prompts."""
        return self.images, self.ids.tobytes()


@dataclass(frozen=True)
class Leaf:
    """A response to a root."""

    root: int  # index into the example's roots
    ids: np.ndarray  # (R,) token ids, R >= 1
    rival: bool = False  # scored by the strongest other token at each position (objectives.Leaf)


@dataclass(frozen=True)
class Example:
    """The forest of one record, with leaves in the order of the objective's leaves."""

    name: str
    roots: tuple[Root, ...]
    leaves: tuple[Leaf, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all roots and leaves."""
        return sum(len(part.ids) for part in (*self.roots, *self.leaves))

    @property
    def longest_tree(self) -> int:
        """Tokens of the longest root with all its leaves."""
        sizes = [len(root.ids) for root in self.roots]
        for leaf in self.leaves:
            sizes[leaf.root] += len(leaf.ids)
        return max(sizes)


@dataclass(frozen=True, slots=True)
class UsedImage:
    """An image in the prompts of an example.

    Attributes:
        key: digest that identifies the preprocessed image (`Root.images`).
        column: index into `COLUMNS`.
        place: index into the images of that column.
        several: whether its prompt has several images, for families that then process it
            differently.
        tokens: image tokens in a prompt.
        grids: the image inputs that the language model depends on (`images.flat_grids`).
    """

    key: bytes
    column: int
    place: int
    several: bool
    tokens: int
    grids: tuple[int, ...]


def collapse(
    ids: np.ndarray,  # (P,)
    image_token_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with one token for each run of image tokens, and the lengths of the runs."""
    image = ids == image_token_id
    first = image & ~np.append(False, image[:-1])
    starts = np.flatnonzero(first)
    ends = np.flatnonzero(image & ~np.append(image[1:], False)) + 1
    return ids[~image | first].astype(np.int32), (ends - starts).astype(np.int32)


def expand(
    ids: np.ndarray,  # (P',)
    runs: np.ndarray,  # (runs,)
    image_token_id: int,
) -> np.ndarray:
    """The inverse of `collapse`, (P,) int64."""
    counts = np.ones(len(ids), np.int64)
    counts[ids == image_token_id] = runs
    return np.repeat(ids.astype(np.int64), counts)


def _runs(name: str, column: np.ndarray) -> dict:
    """A token column as values and the lengths of their runs."""
    starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
    lengths = np.diff(np.append(starts, len(column))).astype(np.int32)
    return {"name": name, "values": column[starts], "lengths": lengths}


def encoded_row(example: Example, images: Iterable[UsedImage], image_token_id: int) -> dict:
    """A row of `SCHEMA`."""
    leaves = collect_leaves([example])
    parts = [collapse(root.ids, image_token_id) for root in example.roots]
    first = {leaf.root: place for place, leaf in reversed([*enumerate(example.leaves)])}
    return {
        "name": example.name.encode("utf-8", "replace").decode(),
        "root_images": [[bytes.fromhex(key) for key in root.images] for root in example.roots],
        "root_ids": [ids for ids, _ in parts],
        "root_runs": [runs for _, runs in parts],
        "root_keys": [
            leaves.root_keys[leaves.roots[first[root]]].tobytes() for root in range(len(parts))
        ],
        "root_columns": [
            [_runs(name, column) for name, column in root.columns.items()] for root in example.roots
        ],
        "leaf_ids": [leaf.ids.astype(np.int32) for leaf in example.leaves],
        "leaf_keys": [key.tobytes() for key in leaves.keys],
        "images": [{name: getattr(i, name) for name in UsedImage.__slots__} for i in images],
    }


class Chunk:
    """Encoded records of a record table.

    Args:
        batch: rows of `SCHEMA`.
        table: the records.
        rows: for each encoded record, its index in the table.
    """

    def __init__(
        self, batch: pa.RecordBatch, table: RecordTable, rows: Sequence[int] | np.ndarray
    ) -> None:
        self.table, self._rows = table, rows
        self._names = batch["name"]
        self._root_images = batch["root_images"]
        self.images = batch["images"]
        self._root_columns = batch["root_columns"]
        self._root_ids = _nested(batch["root_ids"])
        self._root_runs = _nested(batch["root_runs"])
        self._leaf_ids = _nested(batch["leaf_ids"])
        self.root_keys, self.leaf_keys = (
            key_array(batch[name].values) for name in ("root_keys", "leaf_keys")
        )

    def __len__(self) -> int:
        return len(self._names)

    def row(self, index: int) -> int:
        """Index of an encoded record in the table."""
        return int(self._rows[index])

    def name(self, index: int) -> str:
        """Name of a record."""
        return self._names[index].as_py()

    def roots(self, index: int, image_token_id: int) -> Iterator[Root]:
        """The roots of a record."""
        parts = _of(self._root_ids, index), _of(self._root_runs, index)
        images, named = self._root_images[index].as_py(), self._root_columns[index].as_py()
        for keys, columns, ids, runs in zip(images, named, *parts, strict=True):
            yield Root(
                tuple(key.hex() for key in keys),
                expand(ids, runs, image_token_id),
                {c["name"]: np.repeat(c["values"], c["lengths"]) for c in columns},
            )

    def leaf_ids(self, index: int) -> Iterator[np.ndarray]:
        """The token ids of the leaves of a record, (R,) int64 each."""
        return (ids.astype(np.int64) for ids in _of(self._leaf_ids, index))

    @cached_property
    def leaf_lengths(self) -> np.ndarray:
        """Response tokens of all leaves, (leaves,) int32."""
        return np.diff(self._leaf_ids[1])

    @cached_property
    def image_tokens(self) -> np.ndarray:
        """Image tokens of all roots, (roots,) int64."""
        _, bounds, runs = self._root_runs
        return np.diff(np.append(0, np.cumsum(runs, dtype=np.int64))[bounds])

    @cached_property
    def root_lengths(self) -> np.ndarray:
        """Prompt tokens of all roots, (roots,) int64."""
        return np.diff(self._root_ids[1]) - np.diff(self._root_runs[1]) + self.image_tokens


class Examples(Sequence[Example]):
    """The forests of a data set.

    Args:
        chunks: the encoded records, in order. All have the leaves of one objective.
        objective: the objective.
        image_token_id: the token in whose place image features are put.
    """

    def __init__(self, chunks: Sequence[Chunk], objective: Objective, image_token_id: int) -> None:
        self.chunks, self._image_token_id = chunks, image_token_id
        images = list(dict.fromkeys(leaf.image for leaf in objective.leaves))
        self._leaves = [(images.index(leaf.image), leaf.rival) for leaf in objective.leaves]
        self._roots = len(images)
        self._starts = np.append(0, np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        chunk, place = self.chunks[number], index - int(self._starts[number])
        roots = tuple(chunk.roots(place, self._image_token_id))
        leaves = zip(self._leaves, chunk.leaf_ids(place), strict=True)
        return Example(
            chunk.name(place),
            roots,
            tuple(Leaf(root, ids, rival) for (root, rival), ids in leaves),
        )

    def __add__(self, other: Examples) -> Examples:
        """Both data sets of one objective, in order."""
        both = object.__new__(Examples)
        both.__dict__.update(self.__dict__)
        both.chunks = [*self.chunks, *other.chunks]
        both._starts = np.append(self._starts, other._starts[1:] + len(self))
        both.__dict__.pop("leaves", None)
        return both

    def name(self, index: int) -> str:
        """Name of the record of an example."""
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self.chunks[number].name(index - int(self._starts[number]))

    def _all(self, name: str, columns: int) -> np.ndarray:
        """An array of all chunks, (examples, columns)."""
        arrays = [getattr(chunk, name) for chunk in self.chunks]
        return np.concatenate(arrays).reshape(-1, columns)

    @property
    def root_lengths(self) -> np.ndarray:
        """Prompt tokens, (examples, roots)."""
        return self._all("root_lengths", self._roots)

    @property
    def image_tokens(self) -> np.ndarray:
        """Image tokens of the prompts, (examples, roots)."""
        return self._all("image_tokens", self._roots)

    @property
    def longest_tree(self) -> int:
        """Tokens of the longest root with all its leaves."""
        sizes, lengths = self.root_lengths.copy(), self._all("leaf_lengths", len(self._leaves))
        for leaf, (root, _) in enumerate(self._leaves):
            sizes[:, root] += lengths[:, leaf]
        return int(sizes.max(initial=0))

    @cached_property
    def leaves(self) -> refcache.Leaves:
        """Keys and lengths of all leaves, equal to `collect_leaves` of all examples."""
        roots = [root for root, _ in self._leaves]
        keys = self._all("root_keys", self._roots)[:, roots].ravel()
        lengths = self.root_lengths[:, roots].ravel()
        # Keys sort as bytes. Distinct roots are numbered by their first leaf.
        _, first, inverse = np.unique(keys.view("S16"), return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        count = len(self._leaves)
        pairs = np.stack(np.divmod(np.arange(len(keys)), count), axis=1)
        return refcache.Leaves(
            keys=self._all("leaf_keys", 1).ravel(),
            lengths=self._all("leaf_lengths", 1).ravel().astype(np.int32),
            pairs=pairs,
            roots=rank[inverse],
            root_lengths=lengths[first[order]],
            root_keys=keys[first[order]],
        )


def leaves_of(examples: Sequence[Example]) -> refcache.Leaves:
    """Keys and lengths of all leaves of examples."""
    return examples.leaves if isinstance(examples, Examples) else collect_leaves(examples)


def _nested(array: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets of the records, offsets of their lists, and the values of all lists."""
    inner = array.values
    return array.offsets.to_numpy(), inner.offsets.to_numpy(), inner.values.to_numpy()


def _of(nested: tuple[np.ndarray, np.ndarray, np.ndarray], index: int) -> Iterator[np.ndarray]:
    """The lists of a record."""
    outer, bounds, values = nested
    for place in range(outer[index], outer[index + 1]):
        yield values[bounds[place] : bounds[place + 1]]


def key_array(values: pa.Array) -> np.ndarray:
    """Keys as an array, (keys,) V16."""
    if not len(values):
        return np.zeros(0, refcache.KEY)
    return np.frombuffer(values.buffers()[1], refcache.KEY, len(values), 16 * values.offset)
