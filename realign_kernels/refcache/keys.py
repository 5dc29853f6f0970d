"""Keys and lengths of leaves, which identify reference log-probs.

A leaf is a response under a root, (images, prompt). Its key is a digest of images, prompt and
response only. A change of one token or one pixel changes the key. Settings of a run do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

KEY = np.dtype("V16")
"""dtype of keys: 128 opaque bits."""


class RootLike(Protocol):
    """Images and a prompt."""

    @property
    def images(self) -> Sequence[str]: ...  # digests of the images as the model sees them
    @property
    def ids(self) -> NDArray[np.integer]: ...  # (P,) prompt token ids


class LeafLike(Protocol):
    """A response under a root."""

    @property
    def root(self) -> int: ...  # index into the forest's roots
    @property
    def ids(self) -> NDArray[np.integer]: ...  # (R,) response token ids, R >= 1
    @property
    def rival(self) -> bool: ...  # scored by the strongest other token at each position


class Forest(Protocol):
    """The roots of an example, and the leaves under them."""

    @property
    def roots(self) -> Sequence[RootLike]: ...
    @property
    def leaves(self) -> Sequence[LeafLike]: ...


@dataclass(frozen=True, eq=False)
class Leaves:
    """All L leaves of a list of forests, in order, with their R distinct roots."""

    keys: NDArray[np.void]  # (L,) V16
    lengths: NDArray[np.int32]  # (L,) response tokens
    pairs: NDArray[np.int64]  # (L, 2) index of the forest, index of the leaf in the forest
    roots: NDArray[np.int64]  # (L,) in [0, R)
    root_lengths: NDArray[np.int64]  # (R,) prompt tokens
    root_keys: NDArray[np.void]
    """(R,) V16, digests of images and prompts."""


def collect_leaves(forests: Sequence[Forest] | Leaves) -> Leaves:
    """Keys, lengths and roots of all leaves of all forests. `Leaves` are returned unchanged.

    A key is blake2b-128 over the root's digest, the rival flag of the leaf, and the response ids.
    A root's digest is over its images' digests and its prompt ids. Token ids are hashed as int64,
    independent of dtype. It takes about 5 us per leaf.

    Raises:
        ValueError: an image is not a digest, or ids are not a flat array of integers.
    """
    if isinstance(forests, Leaves):
        return forests
    keys = bytearray()
    lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    roots: list[int] = []
    index: dict[bytes, int] = {}
    root_lengths: list[int] = []
    for number, forest in enumerate(forests):
        digests = [_root_digest(root) for root in forest.roots]
        for place, leaf in enumerate(forest.leaves):
            above = digests[leaf.root]
            if above not in index:
                index[above] = len(root_lengths)
                root_lengths.append(len(forest.roots[leaf.root].ids))
            digest = hashlib.blake2b(above, digest_size=16, person=b"realign leaf")
            digest.update(b"\1" if leaf.rival else b"\0")
            digest.update(_id_bytes(leaf.ids))
            keys += digest.digest()
            lengths.append(len(leaf.ids))
            pairs.append((number, place))
            roots.append(index[above])
    return Leaves(
        keys=np.frombuffer(bytes(keys), dtype=KEY),
        lengths=np.array(lengths, np.int32),
        pairs=np.array(pairs, np.int64).reshape(-1, 2),
        roots=np.array(roots, np.int64),
        root_lengths=np.array(root_lengths, np.int64),
        root_keys=np.frombuffer(b"".join(index), dtype=KEY),
    )


def leaf_keys(forests: Sequence[Forest] | Leaves) -> NDArray[np.void]:
    """Keys of all leaves of all forests, in order: (leaves,) of dtype V16."""
    return collect_leaves(forests).keys


def array_digest(array: NDArray[Any]) -> str:
    """128-bit hex digest of dtype, shape and bytes of an array, such as preprocessed pixels."""
    array = np.ascontiguousarray(array)
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    digest.update(array.tobytes())
    return digest.hexdigest()


def _root_digest(root: RootLike) -> bytes:
    digest = hashlib.blake2b(digest_size=16, person=b"realign root")
    digest.update(len(root.images).to_bytes(8, "little"))
    for image in root.images:
        if not isinstance(image, str):
            raise ValueError(
                f"images of a root must be digests (array_digest of the pixels), got {image!r:.80}"
            )
        name = image.encode()
        digest.update(len(name).to_bytes(8, "little") + name)
    digest.update(_id_bytes(root.ids))
    return digest.digest()


def _id_bytes(ids: NDArray[np.integer]) -> bytes:
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"ids must be a flat array of token ids, got {array.dtype} of shape {array.shape}"
        )
    return array.astype("<i8").tobytes()
