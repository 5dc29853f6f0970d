"""The reference cache: log-probs of a frozen model, computed once per distinct leaf and kept.

    cache = ReferenceCache.open(directory, {"weights": digest, "dtype": "bf16"})
    cache.fill(model, forests, build=build)      # computes what is missing, divided over ranks
    logps, token_counts = cache.lookup(forests)  # (leaves,) each

Every method takes forests or, to hash a large data set once only, `collect_leaves(forests)`.

A leaf's key is a digest of its images, prompt and response (`keys.py`), so the learning rate, the
batch size and the order of records do not change it. Everything else that decides a log-prob is in
the fingerprint; each fingerprint has its own table, in its own folder. `store.py` has the
table, which is append-only and survives kill -9; `fill.py` has the pass over the model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from realign_kernels.refcache import fill as reference_pass
from realign_kernels.refcache.keys import Forest, Leaves, collect_leaves
from realign_kernels.refcache.store import compact_table, open_table

_ABOUT = "table.json"
_ROUNDING = 1e-3
"""Largest value above 0 that rounding may give a sum of log-probs, in nats."""


class References(NamedTuple):
    """Reference log-probs of leaves, in the order of forests and of the leaves in each."""

    logps: NDArray[np.float64]  # (leaves,) summed over response tokens, in nats
    token_counts: NDArray[np.int32]  # (leaves,)


class MissingReferences(ValueError):
    """Leaves without a reference log-prob were asked for.

    Attributes:
        leaves: their indices, in the order of forests and of the leaves in each.
    """

    def __init__(self, message: str, leaves: NDArray[np.int64]) -> None:
        super().__init__(message, leaves)
        self.leaves = leaves

    def __str__(self) -> str:
        return str(self.args[0])


class ReferenceCache:
    """Reference log-probs under one fingerprint; safe with other processes in the same folder.

    Args:
        directory: holds a folder for each fingerprint; made when needed.
        fingerprint: named parts that decide a log-prob besides the leaf, such as
            {"weights": ..., "dtype": ..., "processor": ...}. Any difference is another table.
        writer: name of this process's log in the table; the lowest free number when absent.
        read_only: refuse `insert` and `fill`, and make nothing.

    Raises:
        ValueError: the fingerprint is empty, the folder holds logs of another table, or with
            read_only there is no table.
        OSError: the folder cannot be made or read.
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
        """Mask of the leaves without a log-prob here, (leaves,); other processes' writes count."""
        return self.find(collect_leaves(forests).keys)[1] == 0

    def lookup(self, forests: Sequence[Forest] | Leaves) -> References:
        """The log-probs of all leaves of all forests.

        Raises:
            MissingReferences: some leaves have none.
            ValueError: a log-prob was stored for another number of tokens than its leaf has.
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
                f"{self.folder}: call fill(model, forests, ...) with the reference model first",
                absent,
            )
        if (at := np.flatnonzero(counts != lengths)).size:
            raise ValueError(
                f"leaf {at[0]} has {lengths[at[0]]} tokens, its log-prob in {self.folder} is of "
                f"{counts[at[0]]}: it was inserted for another leaf; remove the folder and fill it "
                "again"
            )
        return References(logps, counts)

    def insert(
        self,
        forests: Sequence[Forest] | Leaves,
        logps: ArrayLike,  # (leaves,) summed over response tokens
    ) -> int:
        """Store log-probs computed elsewhere; returns the number of new ones.

        Of a leaf that is known the value stays that is there.

        Raises:
            ValueError: another number of log-probs than leaves, or one that is not finite.
            OSError: they could not be written; log-probs written before are kept.
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

        `pack_forest` lays out all leaves of all forests, longest trees first, known or not. So a
        pass that was killed resumes with the same batches, and its values are the same bits. Where
        known leaves are scattered over many batches, only the missing ones are packed.

        With torch.distributed initialised every rank calls this with the same forests and computes
        a part; afterwards all ranks can look everything up, with a shared folder or without.

        Args:
            model: takes the output of `build`; gives per-token log-probs, (N,) fp32 on any device,
                leaf after leaf in the order given. It runs without gradients: a module under
                torch.inference_mode; one with FSDP2 in it (whose gathered parameters would stay
                inference tensors) and any other callable under no_grad. All ranks call it equally
                often. It must be the reference: adapters off, eval mode.
            forests: the examples.
            build: from (forest, leaf) index pairs to the model's input. Called in a thread, one
                batch ahead.
            row_tokens: most tokens in a row of the forest; raised to the longest root with one leaf
                if need be.
            batch_rows: rows in one forward.
            on_batch: called with (leaves, tokens of their roots and responses) after each batch.

        Raises:
            ValueError: a setting is below 1, the model returned another number of
                log-probs than there are tokens, one of them is not finite or is positive, the
                model is in training mode, or ranks have other forests, settings or fingerprints.
            OSError: a log-prob could not be written; those before are kept.
        """
        self._writable("fill")
        for name, value in {"row_tokens": row_tokens, "batch_rows": batch_rows}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        module = getattr(model, "__self__", model)  # of a method
        if isinstance(module, nn.Module) and module.training:
            raise ValueError("model is in training mode, with dropout: call model.eval() first")
        leaves = collect_leaves(forests)
        done = reference_pass.fill(self, model, leaves, build, row_tokens, batch_rows, on_batch)
        self._ensure_folder()
        self._table.sync()
        return done

    def find(
        self,
        keys: NDArray[np.void],  # (n,) V16
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Log-probs, NaN where absent, and token counts, 0 where absent; (n,) each."""
        self._ensure_folder()
        self._table.refresh()
        return self._table.lookup(keys)

    def keep(
        self,
        keys: NDArray[np.void],  # (n,) V16
        logps: NDArray[np.float64],  # (n,)
        counts: NDArray[np.int32],  # (n,)
    ) -> int:
        """Append new log-probs; returns their number. Raises as `insert` does.

        Raises:
            ValueError: for a positive log-prob; nothing is written then.
        """
        if (positive := np.flatnonzero(logps > _ROUNDING)).size:
            at = positive[0]
            raise ValueError(
                f"logps[{at}] is {logps[at]}: a log-prob cannot be positive. Pass log-probs, not "
                "losses; nothing was written"
            )
        self._writable("keep")
        if not len(keys):
            return 0
        self.prepare()
        self._table.refresh()  # other writers' records stay
        return self._table.insert(keys, logps, counts)

    def prepare(self) -> None:
        """Prepare the folder for writing, or raise; write the parts of the fingerprint into it.

        Raises:
            ValueError: when the cache was closed.
            PermissionError: when the folder cannot be written.
        """
        if self._closed:
            raise ValueError(f"the cache in {self.folder} was closed: open it again")
        self._ensure_folder()
        about = self.folder / _ABOUT
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(
                errno.EACCES,
                "log-probs are missing and this folder cannot be written; name another one",
                str(self.folder),
            )
        if not about.exists():
            # Threads and machines may do this at once: a process id is not a unique name.
            partial = about.with_name(f".{_ABOUT}.{uuid.uuid4().hex}")
            partial.write_text(json.dumps(self.fingerprint, indent=2) + "\n")
            partial.replace(about)

    def refresh(self) -> int:
        """Read new records of other processes; returns the number of new leaves."""
        return self._table.refresh()

    def stats(self) -> dict[str, Any]:
        """Counts of the table, as `inspect` gives them, and the name of this process's log."""
        return self._table.stats()

    def nearest(self) -> tuple[Path, list[str]] | None:
        """The most similar table under `directory`, and the parts in which it differs, if any.

        Explains why a cache did not hit: "processor", "dtype (fp32, here bf16)".
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
        """Write through to disk and release this process's log; lookups continue."""
        self._ensure_folder()
        self._closed = True
        self._table.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its path: the other process opens it again, with its own log."""
        return _reopen, (self.directory, self.fingerprint, self.read_only)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._table)

    def _writable(self, what: str) -> None:
        if self.read_only:
            raise ValueError(f"{what} needs a cache that was not opened with read_only=True")

    def _ensure_folder(self) -> None:
        """Create a folder that another process removed; records read before are in memory."""
        if not self.read_only and not self._closed:
            self.folder.mkdir(parents=True, exist_ok=True)


def _reopen(directory: Path, fingerprint: dict[str, str], read_only: bool) -> ReferenceCache:
    return ReferenceCache(directory, fingerprint, read_only=read_only)


def fingerprint_digest(parts: Mapping[str, str]) -> str:
    """128-bit digest of named parts, as hex; the name of the table's folder."""
    canonical = json.dumps(dict(parts), sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(canonical, digest_size=16, person=b"realign table").hexdigest()


def tables(directory: str | os.PathLike[str]) -> dict[Path, dict[str, str]]:
    """The tables under a directory and the parts of their fingerprints, by folder name.

    A table whose description is lost or damaged has no parts.
    """
    found = {}
    for folder in sorted(Path(directory).glob("*")):
        name = folder.name
        if len(name) == 32 and not set(name) - set("0123456789abcdef") and folder.is_dir():
            try:
                parts = json.loads((folder / _ABOUT).read_text())
            except (OSError, ValueError):
                parts = {}
            found[folder] = parts if fingerprint_digest(parts) == name else {}
    return found


def inspect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all logs of one table (a folder of `tables`) and count their records.

    Returns:
        records (distinct leaves), logs, bytes, bad (unreadable records), torn_bytes (of records cut
        short), duplicates, conflicts (duplicates that differ), largest_difference of these.
    """
    path = Path(folder)
    table = open_table(path, bytes.fromhex(path.name), read_only=True)
    try:
        return table.stats()
    finally:
        table.close()


def compact(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Merge the logs of one table (a folder of `tables`) without duplicates and bad records.

    Safe beside readers and writers: logs being written are skipped.

    Returns:
        Counts: records, bytes_before, bytes_after, logs_merged, logs_in_use, bad_dropped,
        torn_bytes, duplicates_dropped.
    """
    path = Path(folder)
    return compact_table(path, bytes.fromhex(path.name))


def _checked(fingerprint: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(fingerprint, Mapping) or not fingerprint:
        raise ValueError(
            "fingerprint must be a mapping of named parts that decide a log-prob, such as "
            f'{{"weights": ..., "dtype": "bf16"}}, got {fingerprint!r}'
        )
    for name, value in fingerprint.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(
                f"fingerprint[{name!r}] is {value!r}; names and values must be strings"
            )
    return dict(fingerprint)
