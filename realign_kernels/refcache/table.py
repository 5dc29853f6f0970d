"""Reference log-probs by key, kept across runs and shared by processes: `open_table`.

A table is a folder. Every writer appends to a log of its own in it; every opener reads all logs
into memory. A record is 32 bytes and carries a checksum that includes the table's fingerprint, so
bytes that a crash or a disk broke, or that are of another table, are never served: a wrong value is
worse than a missing one. Lost records are missing, are counted, and may be inserted again.

The work is done in csrc/refcache/table.cpp; table_python.py does the same, slower, where the extension is
missing. The format is described in csrc/refcache/table_log.h, and both write the same bytes.
"""

import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from realign_kernels._extension import extension
from realign_kernels.refcache import table_files, table_python


class Table(Protocol):
    """An open table. Threads may share it; a forked child that inserts gets a log of its own."""

    @property
    def writer(self) -> str | None:
        """Name of the log this process writes, or None before the first insert."""

    def __len__(self) -> int:
        """Number of keys."""

    def lookup(
        self,
        keys: NDArray[np.void],  # (n,) V16, contiguous
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """The log-probs (n,) and tokens (n,) of `keys`; NaN and 0 where a key is absent.

        Raises:
            ValueError: `keys` is not as described.
        """

    def insert(
        self,
        keys: NDArray[np.void],  # (n,) V16, contiguous
        logps: NDArray[np.float64],  # (n,) finite
        tokens: NDArray[np.int32],  # (n,) at least 1
    ) -> int:
        """Appends the records whose key is not known, in one write; returns how many.

        A key keeps its first value. The records survive a crash of this process from here on, one
        of the machine from `sync` on.

        Raises:
            ValueError: an argument is not as described (nothing was written then), or the table is
                closed or read-only.
            OSError: the system refused, or another process writes the log of this name. The message
                says how many records were written; those are kept.
        """

    def refresh(self) -> int:
        """Reads what other writers have appended since; returns the number of new keys.

        Raises:
            ValueError: a log of another table was put into the folder.
            OSError: a log cannot be read.
        """

    def sync(self) -> None:
        """Makes what was inserted survive a crash of the machine.

        Raises:
            OSError: the disk failed; what was inserted since the last sync may be lost.
            ValueError: the table is closed.
        """

    def close(self) -> None:
        """Syncs and releases the log; lookups go on, inserts raise ValueError."""

    def stats(self) -> dict[str, object]:
        """What is in the table, and what was wrong with it.

        `records` (keys), `logs`, `bytes`; `bad` (records and headers that failed their check, in
        the logs as they are now), `torn_bytes` (behind the last whole record of a log); `writer`.
        Of all records read by this object: `duplicates` (the key was known, as it is for every
        record of a log that is read again, such as the result of a compaction), of these
        `conflicts` (with another value: two writers disagree), and the `largest_difference` of
        their log-probs.
        """


def _check(folder: str | os.PathLike[str], fingerprint: bytes) -> tuple[str, bytes]:
    name = os.fspath(folder)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"folder must be a path, got {folder!r}")
    if not isinstance(fingerprint, bytes) or len(fingerprint) != 16:
        raise ValueError(
            f"fingerprint must be 16 bytes, got {fingerprint!r}; hash what the values depend on, "
            "say with hashlib.blake2b(..., digest_size=16).digest()"
        )
    return name, fingerprint


def open_table(
    folder: str | os.PathLike[str],
    fingerprint: bytes,
    *,
    writer: str | None = None,
    read_only: bool = False,
) -> Table:
    """Opens the table in `folder`, which is made if need be, and reads all its logs.

    10M records (320 MB) open in 0.6 s and take 427 MB of memory; without the extension every
    million takes 1.3 s and 230 MB.

    Args:
        folder: the table; any number of processes may have it open.
        fingerprint: 16 bytes that say what the values are of (model, data, settings). A log with
            another one is refused.
        writer: name of this process's log (letters, digits, '.', '_', '-'). Without it, the lowest
            number that no live process writes.
        read_only: refuse inserts, and a folder that is not there.

    Raises:
        ValueError: an argument is not as described, or the folder holds another table.
        OSError: the system refused, or another process writes the log of this name.
    """
    name, fingerprint = _check(folder, fingerprint)
    if writer is not None and not isinstance(writer, str):
        raise ValueError(f"writer must be a string or None, got {writer!r}")
    if writer is not None and read_only:
        raise ValueError(f"writer is {writer!r} and read_only is set; drop one of them")
    compiled = extension()
    table = table_python.Table if compiled is None else compiled.Table
    return table(name, fingerprint, writer, read_only)


def compact_table(folder: str | os.PathLike[str], fingerprint: bytes) -> dict[str, int]:
    """Merges the logs that no live process writes into one, without bad records and duplicates.

    May run beside readers and writers. A crash at any point loses nothing.

    Returns:
        `records` in the logs that were looked at, their `bytes_before` and `bytes_after`;
        `logs_merged` (0 where there was nothing to do) and `logs_in_use` (left alone);
        `bad_dropped`, `torn_bytes` and `duplicates_dropped`.

    Raises:
        ValueError: an argument is not as described, or the folder holds another table.
        OSError: the system refused, or another compaction is running.
    """
    name, fingerprint = _check(folder, fingerprint)
    compiled = extension()
    compact = table_files.compact_table if compiled is None else compiled.compact_table
    return compact(name, fingerprint)


def read_header(path: str | os.PathLike[str]) -> bytes | None:
    """The fingerprint in a log's header, or None where the header is missing or damaged.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        header = table_files.parse_header(file.read(table_files.UNIT))
    return None if header is None else header[0]
