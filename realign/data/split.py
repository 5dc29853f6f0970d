"""Held-out split: a share of the records, so that no image is on both sides.

Records that share an image, directly or through a chain of other records, form a group. A group is
held out as a whole. Images are equal if their encoded bytes are. All columns of images count, also
those that an objective does not use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from realign.data.record_table import RecordTable

_STREAM = 0x5E7
"""Added to the seed, since the order of the examples draws from the same seed."""
_FACTOR = 2
"""Largest ratio of the given share and the share that groups allow, either way round."""


def contents(
    table: RecordTable,
    rows: Sequence[int] | np.ndarray,  # (records,)
) -> tuple[np.ndarray, np.ndarray]:
    """Digests of the images of records. A record without an image has the digest of its prompt.

    Args:
        table: the records.
        rows: indices of records in the table.

    Returns:
        For each digest the place of its record in `rows`, (digests,) int64, and the digests,
        (digests,) S16.
    """
    place_of = np.full(len(table), -1, np.int64)
    place_of[rows] = np.arange(len(rows))
    owners, keys = [], []
    for column in ("images", "retrieved_images"):
        owners.append(np.repeat(place_of, table.counts(column)))
        keys.append(table.image_keys(column))
    found, digests = np.concatenate(owners), np.concatenate(keys)
    found, digests = found[found >= 0], digests[found >= 0]
    without = np.setdiff1d(np.arange(len(rows)), found)
    prompts = table.prompts(np.asarray(rows, np.int64)[without])
    texts = [hashlib.blake2b(prompt.encode(), digest_size=16).digest() for prompt in prompts]
    return np.append(found, without), np.append(digests, np.array(texts, "S16"))


def groups(
    table: RecordTable,
    rows: Sequence[int] | np.ndarray,  # (records,)
) -> np.ndarray:
    """The number of each record's group, (records,). Records of two groups share no image."""
    owners, digests = contents(table, rows)
    _, images = np.unique(digests, return_inverse=True)
    count = len(rows)
    size = count + int(images.max(initial=-1)) + 1
    graph = coo_array((np.ones(len(owners), bool), (owners, count + images)), (size, size))
    _, labels = connected_components(graph, directed=False)
    return np.unique(labels[:count], return_inverse=True)[1]


def held_out(
    table: RecordTable,
    rows: Sequence[int] | np.ndarray,  # (records,)
    share: float,
    seed: int,
) -> np.ndarray:
    """Choose groups of records for evaluation. It depends on its arguments only.

    Groups are taken in random order while they fit in the share. Then the smallest other group is
    added, if the share comes nearer.

    Args:
        table: the records.
        rows: indices of the records to split.
        share: share of the records to hold out, above 0 and below 1.
        seed: seed of the order of the groups.

    Returns:
        Whether each record is held out, (records,) bool.

    Raises:
        ValueError: if groups allow no share from half of `share` to twice.
    """
    group, count = groups(table, rows), len(rows)
    sizes = np.bincount(group)
    wanted = min(max(1, round(share * count)), count - 1)
    order = np.random.default_rng([seed, _STREAM]).permutation(len(sizes))
    chosen, total = np.zeros(len(sizes), bool), 0
    for one in order.tolist():
        if total + sizes[one] <= wanted:
            chosen[one] = True
            total += sizes[one]
    others = [one for one in order.tolist() if not chosen[one]]
    smallest = min(others, key=sizes.__getitem__)
    if total + sizes[smallest] - wanted < wanted - total and len(others) > 1:
        chosen[smallest] = True
        total += sizes[smallest]
    if not (total and share * count / _FACTOR <= total <= share * count * _FACTOR):
        raise ValueError(
            f"--eval-share is {share:g}, and {total:,} of {count:,} records can be held out. "
            f"Records that share images stay together. Their largest group has {sizes.max():,} "
            f"records, and the smallest {sizes.min():,}. Choose another share, or pass records "
            "with other images by --eval-pairs."
        )
    return chosen[group]


def shared_warning(
    what: str,
    table: RecordTable,
    rows: Sequence[int] | np.ndarray,  # (records,)
    training: RecordTable,
    training_rows: Sequence[int] | np.ndarray,  # (others,)
) -> str:
    """A warning about evaluation records that share images with training records, or "".

    Args:
        what: names the evaluation records.
        table: their table.
        rows: their indices in it.
        training: the table of the training records.
        training_rows: their indices in it.
    """
    records, images = shared_records(table, rows, training, training_rows)
    if not records:
        return ""
    return (
        f"warning: {records:,} of {len(rows):,} {what} share images (or a prompt without one) with "
        f"the training records: {images:,} in common. Their metrics are too good."
    )


def shared_records(
    table: RecordTable,
    rows: Sequence[int] | np.ndarray,  # (records,)
    other: RecordTable,
    other_rows: Sequence[int] | np.ndarray,  # (others,)
) -> tuple[int, int]:
    """Count overlaps of two sets: records of the first with an image of the second, and images.

    Records without an image overlap in their prompt.
    """
    owners, digests = contents(table, rows)
    shared = np.isin(digests, contents(other, other_rows)[1])
    return len(np.unique(owners[shared])), len(np.unique(digests[shared]))
