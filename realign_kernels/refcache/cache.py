"""The reference cache: log-probs of a frozen model, computed once per distinct leaf.

    cache = ReferenceCache.open(directory, {"weights": digest, "dtype": "bf16"})
    cache.fill(model, forests, build=build)      # computes missing leaves, divided over ranks
    logps, token_counts = cache.lookup(forests)  # (leaves,) each

Every method takes forests, or `collect_leaves(forests)`, which hashes a large data set only once.

A leaf's key is a digest of its images, prompt and response (`keys.py`). The learning rate, the
batch size and the order of records do not affect it. All other inputs of a log-prob are in the
fingerprint. Each fingerprint has its own table, in its own folder. `store.py` has the table, which
is append-only and survives kill -9. `fill.py` has the pass over the model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from realign_kernels.refcache import fill as reference_pass
from realign_kernels.refcache.files import (
    check_folder,
    read_description,
    write_description,
)
from realign_kernels.refcache.keys import Forest, Leaves, collect_leaves
from realign_kernels.refcache.store import compact_table, open_table

_ABOUT = "table.json"
_ROUNDING = 1e-3
"""Largest positive value, in nats, that rounding may give to a sum of log-probs."""


class References(NamedTuple):
    """Reference log-probs of leaves, in the order of forests and of the leaves in each."""

    logps: NDArray[np.float64]  # (leaves,) summed over response tokens, in nats
    token_counts: NDArray[np.int32]  # (leaves,)


class MissingReferences(ValueError):
    """A lookup found leaves without a reference log-prob.

    Attributes:
        leaves: indices of these leaves, in the order of forests and of the leaves in each.
    """

    def __init__(self, message: str, leaves: NDArray[np.int64]) -> None:
        super().__init__(message, leaves)
        self.leaves = leaves

    def __str__(self) -> str:
        return str(self.args[0])


class ReferenceCache:
    """Reference log-probs under one fingerprint. Several processes may use the same folder.

    Args:
        directory: parent of the folders, one for each fingerprint. Created if needed.
        fingerprint: named inputs of a log-prob besides the leaf, such as
            {"weights": ..., "dtype": ..., "processor": ...}. Any difference selects another table.
        writer: name of this process's log in the table. The default is the lowest free number.
        read_only: reject `insert` and `fill`, and create no files.

    Raises:
        ValueError: the fingerprint is empty, the folder holds own logs of another table, or
            read_only is set and there is no table.
        OSError: the folder cannot be created or read, or is a symbolic link.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: Mapping[str, str],
        *,
        writer: str | None = None,
        read_only: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.fingerprint = _checked(fingerprint)
        self.digest = fingerprint_digest(self.fingerprint)
        self.folder = self.directory / self.digest
        self.read_only = read_only
        self._closed = False
        self._table = open_table(
            self.folder, bytes.fromhex(self.digest), writer=writer, read_only=read_only
        )

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        fingerprint: Mapping[str, str],
        **options: Any,
    ) -> ReferenceCache:
        """The same as the constructor."""
        return cls(directory, fingerprint, **options)

    def missing(self, forests: Sequence[Forest] | Leaves) -> NDArray[np.bool_]:
        """Mask of the leaves without a log-prob, (leaves,). Includes writes of other processes."""
        return self.find(collect_leaves(forests).keys)[1] == 0

    def lookup(self, forests: Sequence[Forest] | Leaves) -> References:
        """The log-probs of all leaves of all forests.

        Raises:
            MissingReferences: some leaves have no log-prob.
            ValueError: the token count of a stored log-prob differs from that of its leaf.
        """
        leaves = collect_leaves(forests)
        keys, lengths = leaves.keys, leaves.lengths
        logps, counts = self._table.lookup(keys)
        if not counts.all():  # another process may have written them
            logps, counts = self.find(keys)
        if not counts.all():
            absent = np.flatnonzero(counts == 0)
            raise MissingReferences(
                f"{len(absent)} of {len(keys)} leaves have no reference log-prob in "
                f"{self.folder}. Call fill(model, forests, ...) with the reference model first.",
                absent,
            )
        if (at := np.flatnonzero(counts != lengths)).size:
            raise ValueError(
                f"leaf {at[0]} has {lengths[at[0]]} tokens, but its log-prob in {self.folder} is "
                f"for {counts[at[0]]} tokens. It was inserted for another leaf. Remove the folder "
                "and fill it again."
            )
        return References(logps, counts)

    def insert(
        self,
        forests: Sequence[Forest] | Leaves,
        logps: ArrayLike,  # (leaves,) summed over response tokens
    ) -> int:
        """Store log-probs computed elsewhere. Returns the number of new ones.

        A known leaf keeps its value.

        Raises:
            ValueError: the numbers of log-probs and leaves differ, or a log-prob is not finite.
            OSError: the log-probs could not be written. Earlier log-probs are kept.
        """
        leaves = collect_leaves(forests)
        values = np.ascontiguousarray(logps, dtype=np.float64)
        if values.shape != leaves.keys.shape:
            raise ValueError(
                f"logps must have shape {leaves.keys.shape}, one for each leaf, got {values.shape}"
            )
        return self.keep(leaves.keys, values, leaves.lengths)

    def fill(
        self,
        model: Callable[[Any], Any],
        forests: Sequence[Forest] | Leaves,
        *,
        build: Callable[[Sequence[tuple[int, int]]], Any],
        row_tokens: int,
        batch_rows: int = 8,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> reference_pass.Filled:
        """Compute missing log-probs, each distinct leaf once, and write them batch by batch.

        `pack_forest` packs all leaves of all forests, longest trees first, including known ones.
        A killed pass thus resumes with the same batches, and its values are bitwise the same. If
        known leaves are scattered over many batches, only the missing ones are packed.

        If torch.distributed is initialized, every rank calls this with the same forests and
        computes a part. Afterwards every rank can look up all leaves, with or without a shared
        folder.

        Args:
            model: takes the output of `build` and returns per-token log-probs, (N,) fp32 on any
                device, leaf after leaf in the given order. It must be the reference model, with
                adapters off, in eval mode. A module runs under torch.inference_mode. A module with
                FSDP2 and any other callable run under no_grad, because gathered parameters would
                stay inference tensors. All ranks call it equally often.
            forests: the examples.
            build: maps (forest, leaf) index pairs to the model's input. Called in a thread, one
                batch ahead.
            row_tokens: largest number of tokens in a row of the forest. Raised to the longest root
                with one leaf if needed.
            batch_rows: rows in one forward.
            on_batch: called with (leaves, tokens of their roots and responses) after each batch.

        Raises:
            ValueError: a setting is below 1, the model is in training mode, or the number of
                log-probs is not that of the tokens. Also if a log-prob is positive or not finite,
                or if ranks differ in forests, settings or fingerprint.
            OSError: a log-prob could not be written. Earlier ones are kept.
        """
        self._writable("fill")
        for name, value in {"row_tokens": row_tokens, "batch_rows": batch_rows}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        module = getattr(model, "__self__", model)  # of a method
        if isinstance(module, nn.Module) and module.training:
            raise ValueError("model is in training mode, with dropout. Call model.eval() first.")
        leaves = collect_leaves(forests)
        done = reference_pass.fill(self, model, leaves, build, row_tokens, batch_rows, on_batch)
        self._ensure_folder()
        self._table.sync()
        return done

    def find(
        self,
        keys: NDArray[np.void],  # (n,) V16
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Log-probs (NaN if absent) and token counts (0 if absent), (n,) each."""
        self._ensure_folder()
        self._table.refresh()
        return self._table.lookup(keys)

    def keep(
        self,
        keys: NDArray[np.void],  # (n,) V16
        logps: NDArray[np.float64],  # (n,)
        counts: NDArray[np.int32],  # (n,)
    ) -> int:
        """Append new log-probs. Returns their number. Raises as `insert` does.

        Raises:
            ValueError: a log-prob is positive. Nothing is written in this case.
        """
        if (positive := np.flatnonzero(logps > _ROUNDING)).size:
            at = positive[0]
            raise ValueError(
                f"logps[{at}] is {logps[at]}, but a log-prob cannot be positive. Pass log-probs, "
                "not losses. Nothing was written."
            )
        self._writable("keep")
        if not len(keys):
            return 0
        self.prepare()
        self._table.refresh()  # other writers' records stay
        return self._table.insert(keys, logps, counts)

    def prepare(self) -> None:
        """Prepare the folder for writing, and write the parts of the fingerprint into it.

        Raises:
            ValueError: the cache was closed.
            PermissionError: the folder cannot be written.
        """
        if self._closed:
            raise ValueError(f"the cache in {self.folder} was closed. Open it again.")
        self._ensure_folder()
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(
                errno.EACCES,
                "log-probs are missing, but this folder is not writable. Choose another one",
                str(self.folder),
            )
        about = self.folder / _ABOUT
        if read_description(about) != self.fingerprint:
            write_description(about, self.fingerprint)

    def refresh(self) -> int:
        """Read new records of other processes. Returns the number of new leaves."""
        return self._table.refresh()

    def stats(self) -> dict[str, Any]:
        """Counts of the table, as returned by `inspect`, and the name of this process's log."""
        return self._table.stats()

    def nearest(self) -> tuple[Path, list[str]] | None:
        """The most similar table under `directory` with the parts that differ, or None.

        It explains a cache miss: "processor", "dtype (fp32, here bf16)".
        """
        found: list[tuple[int, Path, list[str]]] = []
        for folder, parts in tables(self.directory).items():
            if folder == self.folder or not parts:
                continue
            names = [name for name in {**self.fingerprint, **parts} if self._part(name, parts)]
            found.append((len(names), folder, [self._part(name, parts) for name in names]))
        return min(found)[1:] if found else None

    def _part(self, name: str, parts: Mapping[str, str]) -> str:
        here, there = self.fingerprint.get(name), parts.get(name)
        if here == there:
            return ""
        short = all(value is not None and len(value) < 24 for value in (here, there))
        return f"{name} ({there}, here {here})" if short else name

    def close(self) -> None:
        """Sync to disk and release this process's log. Lookups still work."""
        self._ensure_folder()
        self._closed = True
        self._table.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path. Another process opens the cache again, with its own log."""
        return _reopen, (self.directory, self.fingerprint, self.read_only)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._table)

    def _writable(self, what: str) -> None:
        if self.read_only:
            raise ValueError(f"{what} needs a cache opened without read_only=True")

    def _ensure_folder(self) -> None:
        """Create a folder that another process removed. Known records stay in memory."""
        if not self.read_only and not self._closed:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_folder(self.folder)


def _reopen(directory: Path, fingerprint: dict[str, str], read_only: bool) -> ReferenceCache:
    return ReferenceCache(directory, fingerprint, read_only=read_only)


def fingerprint_digest(parts: Mapping[str, str]) -> str:
    """128-bit hex digest of named parts, which is the name of the table's folder."""
    canonical = json.dumps(dict(parts), sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(canonical, digest_size=16, person=b"realign table").hexdigest()


def tables(directory: str | os.PathLike[str]) -> dict[Path, dict[str, str]]:
    """The tables under a directory, with the parts of their fingerprints, by folder.

    A table has no parts if its description is missing or damaged. A link is no table, because
    another user may have put it there.
    """
    found = {}
    for folder in sorted(Path(directory).glob("*")):
        name = folder.name
        is_digest = len(name) == 32 and not set(name) - set("0123456789abcdef")
        if is_digest and folder.is_dir() and not folder.is_symlink():
            parts = read_description(folder / _ABOUT)
            found[folder] = parts if fingerprint_digest(parts) == name else {}
    return found


def inspect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all logs of one table (a folder of `tables`) and count their records.

    Returns:
        Counts: records (distinct leaves), logs, bytes, bad (unreadable records), torn_bytes (of
        truncated records), duplicates, conflicts (duplicates that differ) and their
        largest_difference. With the extension also skipped: the logs that are not read.
    """
    path = Path(folder)
    table = open_table(path, bytes.fromhex(path.name), read_only=True)
    try:
        return table.stats()
    finally:
        table.close()


def compact(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Merge this user's logs of a table (a folder of `tables`), without duplicates and bad records.

    It may run at the same time as readers and writers. Logs being written are skipped.

    Returns:
        Counts: records, bytes_before, bytes_after, logs_merged, logs_in_use, logs_skipped (of other
        users), bad_dropped, torn_bytes, duplicates_dropped.
    """
    path = Path(folder)
    return compact_table(path, bytes.fromhex(path.name))


def _checked(fingerprint: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(fingerprint, Mapping) or not fingerprint:
        raise ValueError(
            "fingerprint must be a mapping of named inputs of a log-prob, such as "
            f'{{"weights": ..., "dtype": "bf16"}}, got {fingerprint!r}'
        )
    for name, value in fingerprint.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(
                f"fingerprint[{name!r}] is {value!r}. Names and values must be strings."
            )
    return dict(fingerprint)
