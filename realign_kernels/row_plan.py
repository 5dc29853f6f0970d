"""The rows that a call scores, planned on the host: their number is a shape.

Labels and sequence numbers that are on the CPU already cost no wait for the device.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def host_values(*tensors: Tensor) -> list[np.ndarray]:
    """The values of int64 tensors of one length, with one wait if any of them is on a device."""
    apart = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if len(apart) > 1:
        read = iter(torch.stack(apart).cpu())
        tensors = [t if t.device.type == "cpu" else next(read) for t in tensors]
    return [tensor.cpu().numpy() for tensor in tensors]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without a wait: pinned first, then copied in stream order."""
    plain = type(tensor) is Tensor  # a fake one cannot be pinned
    if device.type == "cuda" and tensor.device.type == "cpu" and plain:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def indices_to_device(
    *arrays: np.ndarray | None,  # (n,) int64
    device: torch.device,
) -> list[Tensor | None]:
    """Copies of the arrays on `device`, by one transfer and without a wait; None stays None.

    Each starts at a multiple of 16 bytes: Triton compiles another kernel for other addresses.
    """
    places, end = [], 0
    for array in arrays:
        places.append(None if array is None else slice(end, end + len(array)))
        end += 0 if array is None else len(array) + len(array) % 2
    pinned = device.type == "cuda"
    staged = torch.empty(end, dtype=torch.int64, device="cpu", pin_memory=pinned)
    host = staged.numpy()
    for array, place in zip(arrays, places, strict=True):
        if place is not None:
            host[place] = array
    moved = staged.to(device, non_blocking=True)
    return [None if place is None else moved[place] for place in places]


def scored_rows(
    labels: np.ndarray,  # (N,) int64
    vocabulary: int,
    ignore_index: int,
) -> tuple[np.ndarray, np.ndarray | None]:  # (n,) int64, (n,) int64
    """Labels that are not ignored, and their indices; None if that is all of them.

    Raises:
        ValueError: a label is outside [0, vocabulary).
    """
    if not 0 <= ignore_index < vocabulary and not _any_outside(labels, vocabulary):
        return labels, None  # one pass of four, where no row is ignored
    valid = labels != ignore_index
    rows = None if valid.all() else valid.nonzero()[0]
    scored = labels if rows is None else labels[rows]
    if _any_outside(scored, vocabulary):
        outside = (scored.view(np.uint64) >= vocabulary).nonzero()[0]
        first = outside[0] if rows is None else rows[outside[0]]
        raise ValueError(
            f"labels: {len(outside)} outside [0, {vocabulary}), first {labels[first]} at flat row "
            f"{first}; rows to skip must hold ignore_index ({ignore_index})"
        )
    return scored, rows


def _any_outside(values: np.ndarray, limit: int) -> bool:
    """Whether an int64 value is outside [0, limit)."""
    return len(values) > 0 and bool(values.view(np.uint64).max() >= limit)  # -1 is 2**64 - 1


class RowPlan(NamedTuple):
    """The n scored rows of a batch, planned on the host."""

    rows: np.ndarray | None  # (n,) int64, flat positions; None where all rows are scored
    labels: np.ndarray  # (n,) int64; may be the caller's memory, and so may ids
    ids: np.ndarray  # (n,) int64, leaf * B + example
    counts: np.ndarray  # (L, B) int64, scored tokens of each sequence


def plan_rows(
    labels: Tensor,  # (L, B, T), or (N,), integer
    sequence_ids: Tensor | None,  # (N,) int64, leaf * B + example; not read where ignored
    vocabulary: int,
    ignore_index: int,
    leaves: int,
    examples: int,
) -> RowPlan:
    """Check labels and sequence_ids, and plan which rows are scored.

    Raises:
        ValueError: a label or a sequence number is out of range, or a sequence has no label.
    """
    flat = labels.reshape(-1).long()
    if sequence_ids is None:
        (known,) = host_values(flat)
        ids = np.arange(leaves * examples).repeat(labels.shape[-1])
    else:
        known, ids = host_values(flat, sequence_ids)
    known, rows = scored_rows(known, vocabulary, ignore_index)
    ids = ids if rows is None else ids[rows]
    if sequence_ids is not None:
        check_ids(ids, rows, leaves, examples)
    counts = np.bincount(ids, minlength=leaves * examples).reshape(leaves, examples)
    check_counts(counts, ignore_index)
    return RowPlan(rows, known, ids, counts)


def check_ids(
    ids: np.ndarray,  # (n,) int64
    rows: np.ndarray | None,  # (n,) int64, their flat positions; None: their own
    leaves: int,
    examples: int,
) -> None:
    """Check sequence numbers.

    Raises:
        ValueError: one is out of range.
    """
    if _any_outside(ids, leaves * examples):
        first = int((ids.view(np.uint64) >= leaves * examples).argmax())
        row = first if rows is None else rows[first]
        raise ValueError(
            f"sequence_ids[{row}] is {ids[first]}, outside [0, {leaves * examples}): "
            f"number sequences as leaf * {examples} + example, {leaves} leaves"
        )


def check_counts(
    counts: np.ndarray,  # (L, B) int64
    ignore_index: int,
) -> None:
    """Check that each sequence has a scored token.

    Raises:
        ValueError: one has none.
    """
    if not counts.all():
        leaf, example = np.argwhere(counts == 0)[0]
        raise ValueError(
            f"labels: the sequence (leaf {leaf}, example {example}) has no token to score, all "
            f"its labels are ignore_index ({ignore_index}): drop the example, or truncate less"
        )
