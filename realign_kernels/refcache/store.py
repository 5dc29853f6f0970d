"""Reference log-probs by key, kept across runs and shared by processes: `open_table`.

A table is a folder. With the C++ extension every writer appends to its own log in it, and
every opener reads all logs into memory (csrc/refcache/table_log.h has the format). Without the
extension the folder holds one SQLite database (`DatabaseTable`). A record carries a checksum that
includes the table's fingerprint, so damaged bytes and bytes of another table are never served: a
wrong value is worse than a missing one. Lost records are counted and may be inserted again.

Damage to a log costs single records. Damage to a database may cost all: if SQLite cannot read the
file, a writer that opens it renames it to `records.sqlite.damaged` and begins an empty one.

Logs and database may share a folder. A process reads and writes its own kind only. A writer warns
in one line that it does not read the other.
"""

import contextlib
import errno
import itertools
import math
import os
import sqlite3
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from realign_kernels._extension import extension

DATABASE = "records.sqlite"
_RECORD = struct.Struct("<16sdi")  # key, logp, tokens; then a CRC-32 of the fingerprint and these
_VALUE = np.dtype([("logp", "f8"), ("tokens", "i4")])


class Table(Protocol):
    """An open table. Threads may share it; a forked child that inserts gets its own log."""

    @property
    def writer(self) -> str | None:
        """Name of the log this process writes, or None before the first insert."""
        ...

    def __len__(self) -> int:
        """Number of keys."""
        ...

    def lookup(
        self,
        keys: NDArray[np.void],  # (n,) V16, contiguous
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """The log-probs (n,) and tokens (n,) of `keys`; NaN and 0 where a key is absent.

        Raises:
            ValueError: `keys` is not as described.
        """
        ...

    def insert(
        self,
        keys: NDArray[np.void],  # (n,) V16, contiguous
        logps: NDArray[np.float64],  # (n,) finite
        tokens: NDArray[np.int32],  # (n,) at least 1
    ) -> int:
        """Appends the records with new keys, in one write; returns their number.

        A key keeps its first value. The records survive a crash of this process from here on, one
        of the machine from `sync` on.

        Raises:
            ValueError: an argument is not as described (nothing was written then), or the table is
                closed or read-only.
            OSError: the system refused, or another process writes the log of this name. The message
                gives the number of records that were written; those are kept.
        """
        ...

    def refresh(self) -> int:
        """Reads new records of other writers; returns the number of new keys.

        Raises:
            ValueError: a log of another table was put into the folder.
            OSError: a log cannot be read.
        """
        ...

    def sync(self) -> None:
        """Flushes inserted records to the disk, so that they survive a crash of the machine.

        Raises:
            OSError: the disk failed; records inserted since the last sync may be lost.
            ValueError: the table is closed.
        """
        ...

    def close(self) -> None:
        """Syncs and releases the log; lookups continue, inserts raise ValueError."""
        ...

    def stats(self) -> dict[str, object]:
        """Counts of the table's records and of its faults.

        `records` (keys), `logs`, `bytes`; `bad` (records and headers that failed their check, in
        the logs as they are now), `torn_bytes` (after the last complete record of a log); `writer`.
        Of all records read by this object: `duplicates` (the key was known, as it is for every
        record of a log that is read again, such as the result of a compaction), of these
        `conflicts` (with another value: two writers disagree), and the `largest_difference` of
        their log-probs.
        """
        ...


def open_table(
    folder: str | os.PathLike[str],
    fingerprint: bytes,
    *,
    writer: str | None = None,
    read_only: bool = False,
) -> Table:
    """Opens the table in `folder`, which is made if need be, and reads all of it.

    10M records (320 MB) open in 0.6 s and take 427 MB of memory. Where the folder holds a table of
    the other kind (see the module), a writer's warning names it.

    Args:
        folder: the table; any number of processes may have it open.
        fingerprint: 16 bytes that identify model, data and settings of the values. A table with
            another one is refused.
        writer: name of this process's log (letters, digits, '.', '_', '-'). Without it, the lowest
            number that no live process writes. The database has no logs and refuses a name.
        read_only: refuse inserts, and a folder that is not there.

    Raises:
        ValueError: an argument is not as described, or the folder holds another table.
        OSError: the system refused, another process writes the log of this name, or `read_only` is
            set and the database is damaged.
    """
    name, fingerprint = _check(folder, fingerprint)
    if writer is not None and not isinstance(writer, str):
        raise ValueError(f"writer must be a string or None, got {writer!r}")
    if writer is not None and read_only:
        raise ValueError(f"writer is {writer!r} and read_only is set; drop one of them")
    if not read_only:
        _warn_of_other_kind(name)
    compiled = extension()
    if compiled is not None:
        return compiled.Table(name, fingerprint, writer, read_only)
    if writer is not None:
        raise ValueError(
            f"writer is {writer!r}, the name of a log, but without the C++ extension there are no "
            "logs: drop it"
        )
    return DatabaseTable(name, fingerprint, read_only)


def compact_table(folder: str | os.PathLike[str], fingerprint: bytes) -> dict[str, int]:
    """Merges the logs that no live process writes into one, without bad records and duplicates.

    May run beside readers and writers. A crash at any point loses nothing. In a database only bad
    records are dropped.

    Returns:
        `records` in the logs that were looked at, their `bytes_before` and `bytes_after`;
        `logs_merged` (0 where there was nothing to do) and `logs_in_use` (skipped);
        `bad_dropped`, `torn_bytes` and `duplicates_dropped`.

    Raises:
        ValueError: an argument is not as described, or the folder holds another table.
        OSError: the system refused, or another compaction is running.
    """
    name, fingerprint = _check(folder, fingerprint)
    compiled = extension()
    if compiled is not None:
        return compiled.compact_table(name, fingerprint)
    return DatabaseTable(name, fingerprint, read_only=True).compact()


def _check(folder: str | os.PathLike[str], fingerprint: bytes) -> tuple[str, bytes]:
    name = os.fspath(folder)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"folder must be a path, got {folder!r}")
    if not isinstance(fingerprint, bytes) or len(fingerprint) != 16:
        raise ValueError(
            f"fingerprint must be 16 bytes, got {fingerprint!r}; hash what the values depend on, "
            "for example hashlib.blake2b(..., digest_size=16).digest()"
        )
    return name, fingerprint


def _warn_of_other_kind(folder: str) -> None:
    """One line where the folder holds a table that this process does not read."""
    without = extension() is None
    if found := sorted(Path(folder).glob("*.log" if without else DATABASE)):
        _warn(
            f"{found[0]} has the format of {'' if without else 'installs without '}the C++ "
            f"extension, and this process runs {'without' if without else 'with'} it: log-probs in "
            "the file are not read, and missing ones are computed again"
        )


def _warn(message: str) -> None:
    """A RuntimeWarning that blames no line: its cause is a file."""
    warnings.warn(message, RuntimeWarning, stacklevel=1_000_000)  # beyond the first frame


def _check_column(name: str, column: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `column` is a contiguous array of this dtype and shape."""
    if not isinstance(column, np.ndarray):
        got = type(column).__name__
    elif column.dtype != dtype or column.shape != shape or not column.flags.c_contiguous:
        order = "" if column.flags.c_contiguous else ", not contiguous"
        got = f"{column.dtype} of shape {column.shape}{order}"
    else:
        return
    raise ValueError(
        f"{name} must be a contiguous 1-D array of {dtype}, one for each key, got {got}"
    )


class _DamagedError(OSError):
    """SQLite cannot read the file as a database."""


class DatabaseTable:
    """A `Table` in one SQLite database, for installs without the extension.

    Rows are only appended, and read into a dict. Every call opens the database anew, so neither
    forks nor threads share a connection. SQLite has no checksum of its pages, hence one per record.
    """

    writer = None  # there are no logs

    def __init__(self, folder: str, fingerprint: bytes, read_only: bool = False) -> None:
        if not read_only:
            os.makedirs(folder, exist_ok=True)
        elif not os.path.isdir(folder):
            what = "there is no table to read: check the path, or let a run that writes make it"
            raise FileNotFoundError(errno.ENOENT, what, folder)
        self._path, self._fingerprint = f"{folder}/{DATABASE}", fingerprint
        self._refusal = "was opened with read_only=True" if read_only else ""
        self._closed = False
        self._known: dict[bytes, tuple[float, int]] = {}
        self._lost: set[bytes] = set()  # keys in memory that a removed file held
        self._lock = threading.Lock()
        self._start_over(b"")
        try:
            self.refresh()
        except _DamagedError as damage:
            if read_only:
                raise
            self._set_aside(damage)

    def __len__(self) -> int:
        return len(self._known)

    def lookup(self, keys: NDArray[np.void]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """NaN and 0 tokens where a key is absent. Raises as `Table.lookup` does."""
        _check_column("keys", keys, "V16", (np.size(keys),))
        values = np.array([self._known.get(key, (math.nan, 0)) for key in keys.tolist()], _VALUE)
        return values["logp"].copy(), values["tokens"].copy()

    def insert(
        self, keys: NDArray[np.void], logps: NDArray[np.float64], tokens: NDArray[np.int32]
    ) -> int:
        """Appends records with new keys, in one transaction. Raises as `Table.insert` does."""
        if self._refusal:
            raise ValueError(f"{self._path} {self._refusal}: open the table anew to insert")
        _check_column("keys", keys, "V16", (np.size(keys),))
        _check_column("logps", logps, "float64", keys.shape)
        _check_column("tokens", tokens, "int32", keys.shape)
        if wrong := np.flatnonzero(~np.isfinite(logps) | (tokens < 1)).tolist():
            raise ValueError(
                f"logps[{wrong[0]}] is {logps[wrong[0]]} of {tokens[wrong[0]]} tokens; log-probs "
                "must be finite, of at least 1 token; nothing was written"
            )
        self.refresh()  # the file may have been removed
        if self._lost.isdisjoint(keys.tolist()) and self.lookup(keys)[1].all():
            return 0
        with self._lock, self._transaction("rwc") as database:
            self._read(database)  # other writers' records stay
            if not self._origin:
                database.execute("CREATE TABLE about (fingerprint BLOB, origin BLOB)")
                # AUTOINCREMENT: the id of a row that a compaction deleted is not given to another.
                database.execute(
                    "CREATE TABLE records (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB)"
                )
                about = (self._fingerprint, os.urandom(16))
                database.execute("INSERT INTO about VALUES (?, ?)", about)
            fresh: dict[bytes, tuple[bytes]] = {}
            for key, *value in zip(keys.tolist(), logps.tolist(), tokens.tolist(), strict=True):
                if self._is_new(key):
                    fresh.setdefault(key, (self._seal(_RECORD.pack(key, *value)),))
            database.executemany("INSERT INTO records (record) VALUES (?)", fresh.values())
        self.refresh()
        return len(fresh)

    def refresh(self) -> int:
        """Reads new records of other writers; returns the number of new keys."""
        before = len(self._known)
        if os.path.exists(self._path):
            with self._lock, self._transaction("rw") as database:
                self._read(database)
        else:
            self._start_over(b"")
        return len(self._known) - before

    def sync(self) -> None:
        """SQLite syncs every transaction.

        Raises:
            ValueError: the table is closed.
        """
        if self._closed:
            raise ValueError(f"{self._path} was closed: open the table anew")

    def close(self) -> None:
        """Lookups continue, inserts raise ValueError."""
        self._refusal, self._closed = "was closed", True

    def stats(self) -> dict[str, object]:
        """Counts as of a table with one log; no key is in a database twice."""
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        counts = {"records": len(self), "logs": int(size > 0), "bytes": size, "bad": len(self._bad)}
        never = {"torn_bytes": 0, "duplicates": 0, "conflicts": 0, "largest_difference": 0.0}
        return {**counts, **never, "writer": None}

    def compact(self) -> dict[str, int]:
        """Deletes bad records; SQLite reuses their room. Returns counts as `compact_table` does."""
        if self._bad:
            with self._lock, self._transaction("rw") as database:
                rows = [(row,) for row in self._bad]
                database.executemany("DELETE FROM records WHERE id = ?", rows)
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        done = {"records": len(self), "bytes_before": size, "bytes_after": size}
        never = {"logs_merged": 0, "logs_in_use": 0, "torn_bytes": 0, "duplicates_dropped": 0}
        return {**done, **never, "bad_dropped": len(self._bad)}

    @contextlib.contextmanager
    def _transaction(self, mode: str) -> Iterator[sqlite3.Connection]:
        """Mode "rw" also reads a database that cannot be written; "rwc" makes a missing one."""
        uri = f"{Path(self._path).absolute().as_uri()}?mode={mode}"
        try:
            opened = sqlite3.connect(uri, timeout=60, isolation_level=None, uri=True)
            with contextlib.closing(opened) as database:
                database.execute("BEGIN IMMEDIATE" if mode == "rwc" else "BEGIN")
                yield database
                database.execute("COMMIT")
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter quotes a damaged schema
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code == sqlite3.SQLITE_ERROR:  # no such table or column
                raise self._foreign() from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                what = f"the database is damaged ({error}); a run that writes replaces it"
                raise _DamagedError(errno.EIO, what, self._path) from error
            what = f"{error}; make room, check permissions, or remove the file"
            raise OSError(errno.EIO, what, self._path) from error

    def _foreign(self) -> ValueError:
        return ValueError(f"{self._path} is no table of reference log-probs: use another folder")

    def _set_aside(self, damage: OSError) -> None:
        """Renames the damaged database and starts empty, with one warning."""
        names = (f"{self._path}.damaged{f'-{n}' if n else ''}" for n in itertools.count())
        name = next(name for name in names if not os.path.exists(name))
        self._known.clear()
        self._start_over(b"")
        try:
            os.rename(self._path, name)
        except FileNotFoundError:  # another process was first
            return
        _warn(
            f"{self._path} is damaged ({damage.__cause__}) and was renamed to {name}: its "
            "log-probs are computed again"
        )

    def _start_over(self, origin: bytes) -> None:
        """The file is another one than before, or none; lookups of known keys continue."""
        self._lost = set(self._known)
        self._origin, self._last_id = origin, 0
        self._bad: list[int] = []  # ids of rows that failed their check

    def _is_new(self, key: bytes) -> bool:
        return key not in self._known or key in self._lost

    def _seal(self, record: bytes) -> bytes:
        return record + zlib.crc32(self._fingerprint + record).to_bytes(4, "little")

    def _read(self, database: sqlite3.Connection) -> None:
        """Reads the rows behind the last one; the first sound record of a key stays."""
        if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            self._start_over(b"")
            return
        # Damage may change the type of a value, hence the casts.
        about = "SELECT CAST(fingerprint AS BLOB), CAST(origin AS BLOB) FROM about"
        fingerprint, origin = database.execute(about).fetchone() or (None, None)
        if not fingerprint or not origin:
            raise self._foreign()
        if fingerprint != self._fingerprint:
            raise ValueError(
                f"{self._path} belongs to the table with fingerprint {fingerprint.hex()}, not "
                f"{self._fingerprint.hex()}: its values are of another model or data; use another "
                "folder, or delete this one"
            )
        if origin != self._origin:  # the first read, or the file was removed and made anew
            self._start_over(origin)
        rows = database.execute(
            "SELECT id, IFNULL(CAST(record AS BLOB), x'') FROM records WHERE id > ?",
            (self._last_id,),
        )
        for self._last_id, record in rows:
            if record == self._seal(record[: _RECORD.size]):
                key, *value = _RECORD.unpack_from(record)
                if self._is_new(key):
                    self._known[key] = tuple(value)
                    self._lost.discard(key)
            else:
                self._bad.append(self._last_id)
