"""Scored rows, planned on the host: ignored rows are dropped here, and only here.

The number of scored rows is a shape, so the host must know it. Labels and sequence numbers on the
CPU need no wait for the device.
"""

import math
from copy import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from realign_kernels.objectives import Objective


def host_values(*tensors: Tensor) -> list[np.ndarray]:
    """The values of int64 tensors of equal length, with one wait if any of them is on a device."""
    apart = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    read = iter(torch.stack(apart).cpu() if len(apart) > 1 else [t.cpu() for t in apart])
    return [(t if t.device.type == "cpu" else next(read)).numpy() for t in tensors]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a host tensor to `device` without a wait, through pinned memory in stream order."""
    plain = type(tensor) is Tensor  # a fake tensor cannot be pinned
    if device.type == "cuda" and tensor.device.type == "cpu" and plain:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def indices_to_device(
    *arrays: np.ndarray | None,  # (n,) int64
    device: torch.device,
) -> list[Tensor | None]:
    """Copies of the arrays on `device`, in one transfer without a wait. None stays None.

    Each starts at a multiple of 16 bytes, because Triton compiles a separate kernel for other
    addresses.
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
    """Labels that are not ignored, and their indices, or None if no label is ignored.

    Raises:
        ValueError: a label is outside [0, vocabulary).
    """
    if not 0 <= ignore_index < vocabulary and not _any_outside(labels, vocabulary):
        return labels, None  # without ignored rows, one pass over the labels instead of four
    valid = labels != ignore_index
    rows = None if valid.all() else valid.nonzero()[0]
    scored = labels if rows is None else labels[rows]
    if _any_outside(scored, vocabulary):
        outside = (scored.view(np.uint64) >= vocabulary).nonzero()[0]
        first = outside[0] if rows is None else rows[outside[0]]
        verb = "label is" if len(outside) == 1 else "labels are"
        raise ValueError(
            f"{len(outside)} {verb} outside [0, {vocabulary}). The first is {labels[first]}, in "
            f"flat row {first}. Labels must be token ids, or ignore_index ({ignore_index})."
        )
    return scored, rows


def _any_outside(values: np.ndarray, limit: int) -> bool:
    """Whether an int64 value is outside [0, limit)."""
    return len(values) > 0 and bool(values.view(np.uint64).max() >= limit)  # -1 is 2**64 - 1


class ScoredRows(NamedTuple):
    """The n rows that are not ignored, on the device of the head."""

    labels: Tensor  # (n,) int64.
    index: Tensor | None  # (n,) int64, flat positions among N rows. None: all rows in order.
    runner_up: Tensor | None = None  # (n,) bool, rows that score the strongest other token.

    def of(self, values: Tensor) -> Tensor:
        """The entries (n, ...) of values (N, ...) at these rows."""
        return values if self.index is None else values[self.index]


def drop_ignored(
    labels: Tensor,  # (N,) int64, on the CPU or on `device`
    runner_up: Tensor | None,  # (N,) bool
    device: torch.device,
    vocabulary: int,
    ignore_index: int,
) -> ScoredRows:
    """The rows of a call that are scored.

    Raises:
        ValueError: a label is outside [0, vocabulary).
    """
    (known,) = host_values(labels)
    rows = _on_device(labels, *scored_rows(known, vocabulary, ignore_index), device)
    if runner_up is None:
        return rows
    return rows._replace(runner_up=rows.of(to_device(runner_up, device)))


def _on_device(
    given: Tensor,  # (N,) int64, on the CPU or on `device`
    labels: np.ndarray,  # (n,) int64, scored labels among `given`
    rows: np.ndarray | None,  # (n,) int64
    device: torch.device,
) -> ScoredRows:
    """`ScoredRows` on the device. Labels that are already there are not copied."""
    if rows is None and given.device == device:
        return ScoredRows(given, None)
    on_device, index = indices_to_device(labels, rows, device=device)
    assert on_device is not None
    return ScoredRows(on_device, index)


def take_rows(
    hidden: Tensor,  # (..., H)
    index: Tensor | None,  # (n,) int64, of the flattened leading axes; None: all rows
) -> Tensor:  # (n, H)
    """Rows of hidden, without a copy of other rows, even if hidden has no flat view."""
    if index is None:
        return hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    if hidden.is_contiguous():
        return hidden.view(-1, hidden.shape[-1]).index_select(0, index)
    places = []
    for size in reversed(hidden.shape[:-1]):  # torch.unravel_index would copy the sizes to a GPU
        places.append(index % size)
        index = index // size
    return hidden[tuple(reversed(places))]


def spread_rows(
    values: Tensor,  # (n, H)
    index: Tensor | None,  # (n,) int64, distinct
    shape: torch.Size,  # (..., H)
) -> Tensor:  # (..., H)
    """Inverse of `take_rows`, with 0 in the other rows."""
    if index is None:
        return values.view(shape)
    full = len(index) == shape[:-1].numel()
    every = values.new_empty(shape) if full else values.new_zeros(shape)
    every.view(-1, shape[-1]).index_copy_(0, index, values)
    return every


def scores_runner_ups(objective: Objective) -> bool:
    """Whether the objective has a leaf that scores the strongest token except the label."""
    return any(leaf.rival for leaf in objective.leaves)


def runner_up_rows(
    objective: Objective,
    sequence_ids: Tensor,  # (N,) int64, leaf * B + example; not read where ignored
    examples: int,
) -> Tensor:  # (N,) bool
    """Mask of the rows that score the strongest token except the label.

    The objective must have at least one such leaf (`scores_runner_ups`).
    """
    of_row = sequence_ids // max(examples, 1)
    leaves = [index for index, leaf in enumerate(objective.leaves) if leaf.rival]
    return torch.stack([of_row == leaf for leaf in leaves]).any(0)


class RowPlan:
    """The n scored rows of a batch, planned on the host.

    The constructor reads and checks the labels. Sequence numbers and counts are checked at first
    use. If no leaf is a rival, that is after the launch of the first GEMM.
    """

    def __init__(
        self,
        labels: Tensor,  # (L, B, T), or (N,), integer
        sequence_ids: Tensor | None,  # (N,) int64, leaf * B + example; not read where ignored
        device: torch.device,
        vocabulary: int,
        ignore_index: int,
        shape: tuple[int, int],
    ) -> None:
        """Plans the rows of sequences of `shape`, (leaves, examples).

        Raises:
            ValueError: a label is out of range.
        """
        self.device, self.shape, self.ignore_index = device, shape, ignore_index
        self._given, self._length = labels.reshape(-1).long(), labels.shape[-1]
        every = (self._given,) if sequence_ids is None else (self._given, sequence_ids)
        known, *self._sequence_ids = host_values(*every)
        self.labels, self.rows = scored_rows(known, vocabulary, ignore_index)

    def scored(self, objective: Objective) -> ScoredRows:
        """The rows on the device. Sequence numbers are needed only if a leaf is a rival."""
        rows = _on_device(self._given, self.labels, self.rows, self.device)
        if not scores_runner_ups(objective):
            return rows
        runner_up = runner_up_rows(objective, self.ids_on_device, self.shape[1])
        return rows._replace(runner_up=runner_up)

    @cached_property
    def numbers(self) -> tuple[np.ndarray, np.ndarray]:  # (n,), (L, B) int64
        """Sequence numbers of the rows, leaf * B + example, and number of rows per sequence.

        Raises:
            ValueError: a number is out of range, or a sequence has no row.
        """
        (ids,) = self._sequence_ids or (np.arange(math.prod(self.shape)).repeat(self._length),)
        ids = ids if self.rows is None else ids[self.rows]
        check_ids(ids, self.rows, *self.shape)
        counts = np.bincount(ids, minlength=math.prod(self.shape)).reshape(self.shape)
        check_counts(counts, self.ignore_index)
        return ids, counts

    @property
    def counts(self) -> np.ndarray:  # (L, B) int64
        """Scored tokens of each sequence."""
        return self.numbers[1]

    @cached_property
    def ids_on_device(self) -> Tensor:  # (n,) int64
        """The sequence numbers of the rows, on the device."""
        (ids,) = indices_to_device(self.numbers[0], device=self.device)
        assert ids is not None
        return ids

    def by_example(self) -> "RowPlan":
        """A plan with the same rows, stably sorted by example."""
        ids, counts = self.numbers
        order = (ids % self.shape[1]).argsort(kind="stable")
        plan = copy(self)
        plan.rows = order if self.rows is None else self.rows[order]
        plan.labels, plan.numbers = self.labels[order], (ids[order], counts)
        return plan


def check_ids(
    ids: np.ndarray,  # (n,) int64
    rows: np.ndarray | None,  # (n,) int64, flat positions; None: 0 to n - 1
    leaves: int,
    examples: int,
) -> None:
    """Check that sequence numbers are in [0, leaves * examples).

    Raises:
        ValueError: one is not.
    """
    if _any_outside(ids, leaves * examples):
        first = int((ids.view(np.uint64) >= leaves * examples).argmax())
        row = first if rows is None else rows[first]
        raise ValueError(
            f"sequence_ids[{row}] is {ids[first]}, outside [0, {leaves * examples}). "
            f"Number sequences as leaf * {examples} + example, with {leaves} leaves."
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
            f"labels: the sequence (leaf {leaf}, example {example}) has no token to score. All "
            f"its labels are ignore_index ({ignore_index}). Drop the example, or truncate less."
        )
