"""Table of reference log-probs by key, persistent and shared by processes: `open_table`.

A table is a folder. With the C++ extension every writer appends to its own log, and every process
reads all logs into memory at opening (csrc/refcache/table_log.h has the format). Without the
extension the folder holds one SQLite database (`DatabaseTable`).

The checksum of a record includes the table's fingerprint, so damaged records and records of
another table are never returned. A wrong value is worse than a missing one. Lost records are
counted and may be inserted again.

Damage to a log costs single records. Damage to a database may cost all records. If SQLite cannot
read the file, a writer that opens it renames it to `records.sqlite.damaged` and creates an empty
one.

Logs and database may share a folder. A process reads and writes its own kind only. A writer warns
in one line that it does not read the other kind.

Several users may share a folder, and each is trusted for the values. A table follows no links,
waits for no pipes, and writes to own files only. It skips other files with one warning. A user
reads the logs of all users, but only own databases, because SQLite trusts its files.
"""

import contextlib
import errno
import itertools
import math
import os
import re
import sqlite3
import stat
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
from realign_kernels.refcache.files import check_folder, open_plain

DATABASE = "records.sqlite"
_RECORD = struct.Struct("<16sdi")  # key, logp, tokens. A CRC-32 of fingerprint and record follows.
_VALUE = np.dtype([("logp", "f8"), ("tokens", "i4")])
_MOST_DATABASES = 1000  # names that are tried in one folder
_ABOUT = "CREATE TABLE about (fingerprint BLOB, origin BLOB)"
# AUTOINCREMENT: the ids of rows that a compaction deleted are not used again.
_RECORDS = "CREATE TABLE records (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB)"
_SCHEMA = {
    ("table", "about", _ABOUT),
    ("table", "records", _RECORDS),
    ("table", "sqlite_sequence", "CREATE TABLE sqlite_sequence(name,seq)"),
}
_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # at the end of a journal with a super-journal
_STEPS = 100_000  # steps of SQLite between two calls of the progress handler


class Table(Protocol):
    """An open table. Threads may share it. A forked child that inserts gets its own log."""

    @property
    def writer(self) -> str | None:
        """Name of the log that this process writes, or None before the first insert."""
        ...

    def __len__(self) -> int:
        """Number of keys."""
        ...

    def lookup(
        self,
        keys: NDArray[np.void],  # (n,) V16, contiguous
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Log-probs (n,) and token counts (n,) of `keys`, NaN and 0 if a key is absent.

        Raises:
            ValueError: the dtype or layout of `keys` is wrong.
        """
        ...

    def insert(
        self,
        keys: NDArray[np.void],  # (n,) V16, contiguous
        logps: NDArray[np.float64],  # (n,) finite
        tokens: NDArray[np.int32],  # (n,) at least 1
    ) -> int:
        """Appends the records with new keys in one write. Returns their number.

        A key keeps its first value. On return the records are safe from a crash of this process,
        and after `sync` from a crash of the machine.

        Raises:
            ValueError: an argument is invalid, or the table is closed or read-only. Nothing is
                written in this case.
            OSError: a system call failed, or another process writes the log of this name. The
                message has the number of written records, which are kept.
        """
        ...

    def refresh(self) -> int:
        """Reads new records of other writers. Returns the number of new keys.

        Raises:
            ValueError: the folder holds a log of this user for another table.
            OSError: a log cannot be read.
        """
        ...

    def sync(self) -> None:
        """Flushes inserted records to the disk, so that they survive a crash of the machine.

        Raises:
            OSError: the disk failed. Records inserted since the last sync may be lost.
            ValueError: the table is closed.
        """
        ...

    def close(self) -> None:
        """Syncs and releases the log. Lookups still work, inserts raise ValueError."""
        ...

    def stats(self) -> dict[str, object]:
        """Counts of the table's records and errors, and the name of the log.

        Current contents:

        - `records`: number of keys
        - `logs`, `bytes`
        - `bad`: records and headers that failed their check
        - `torn_bytes`: bytes after the last complete record of a log
        - `skipped`: a list of logs that are not read, each with the reason. A database lacks it.

        All records read by this object:

        - `duplicates`: records with a known key. They include logs that were read again, such as
          the result of a compaction.
        - `conflicts`: duplicates with a different value, because two writers disagree
        - `largest_difference` of their log-probs

        `writer` is the name of this process's log.
        """
        ...


def open_table(
    folder: str | os.PathLike[str],
    fingerprint: bytes,
    *,
    writer: str | None = None,
    read_only: bool = False,
) -> Table:
    """Opens the table in `folder` and reads all records. Creates the folder if needed.

    10M records (320 MB) open in 0.6 s and take 427 MB of memory. A writer warns if the folder also
    holds a table of the other kind (see the module).

    Args:
        folder: the table, which must not be a symbolic link. Its parents may be. Any number of
            processes may have it open.
        fingerprint: 16 bytes that identify model, data and settings of the values. They must match
            those of an existing table.
        writer: name of this process's log (letters, digits, '.', '_', '-'). The default is the
            lowest number that no live process writes. A database has no logs and accepts no name.
        read_only: reject inserts. The folder must exist.

    Raises:
        ValueError: an argument is invalid, or the folder holds another table of this user.
        OSError: a system call failed, or another process or user writes the log of this name.
            Also if `read_only` is set and the database is damaged.
    """
    name, fingerprint = _check(folder, fingerprint)
    if writer is not None and not isinstance(writer, str):
        raise ValueError(f"writer must be a string or None, got {writer!r}")
    if writer is not None and read_only:
        raise ValueError(f"writer is {writer!r} and read_only is set. Drop one of them.")
    if not read_only:
        _warn_of_other_kind(name)
    compiled = extension()
    if compiled is not None:
        # A path need not be UTF-8.
        table = compiled.Table(os.fsencode(name), fingerprint, writer, read_only)
        by_remedy: dict[str, list[str]] = {}
        for log in table.stats()["skipped"]:
            by_remedy.setdefault(_remedy(log), []).append(log)
        for remedy, (log, *others) in by_remedy.items():
            more = f" So are {len(others)} other files." if others else ""
            _warn(f"{log}, and is skipped.{more} Its log-probs are computed again. {remedy}")
        return table
    if writer is not None:
        raise ValueError(
            f"writer is {writer!r}, the name of a log, but without the C++ extension there are no "
            "logs. Omit writer."
        )
    return DatabaseTable(name, fingerprint, read_only)


def compact_table(folder: str | os.PathLike[str], fingerprint: bytes) -> dict[str, int]:
    """Merges this user's logs that no live process writes, without bad records and duplicates.

    It may run at the same time as readers and writers. A crash at any point loses no records. In a
    database it only drops bad records.

    Returns:
        Counts:

        - `records`, `bytes_before` and `bytes_after` of the logs that were read
        - `logs_merged`, 0 if there was nothing to do
        - `logs_in_use`, which were skipped
        - `logs_skipped`: logs of other users, and files that are no logs
        - `bad_dropped`, `torn_bytes` and `duplicates_dropped`

    Raises:
        ValueError: an argument is invalid, or the folder holds another table.
        OSError: a system call failed, or another compaction is running.
    """
    name, fingerprint = _check(folder, fingerprint)
    compiled = extension()
    if compiled is not None:
        return compiled.compact_table(os.fsencode(name), fingerprint)
    return DatabaseTable(name, fingerprint, read_only=True).compact()


def _check(folder: str | os.PathLike[str], fingerprint: bytes) -> tuple[str, bytes]:
    name = os.fspath(folder)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"folder must be a path, got {folder!r}")
    if not isinstance(fingerprint, bytes) or len(fingerprint) != 16:
        raise ValueError(
            f"fingerprint must be 16 bytes, got {fingerprint!r}. Hash all inputs of the values, "
            "for example with hashlib.blake2b(..., digest_size=16).digest()."
        )
    return name, fingerprint


def _warn_of_other_kind(folder: str) -> None:
    """Warns in one line if the folder holds a table that this process does not read."""
    without = extension() is None
    pattern = r"[A-Za-z0-9._+-]+\.log" if without else re.escape(DATABASE)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if found := sorted(f"{folder}/{name}" for name in names if re.fullmatch(pattern, name)):
        _warn(
            f"{found[0]} was written {'with' if without else 'without'} the C++ extension, but "
            f"this process runs {'without' if without else 'with'} it. Log-probs in the file are "
            "not read, and missing ones are computed again."
        )


def _remedy(refusal: str) -> str:
    """The step that lets a process read a log that it skips, by the reason of `csrc/refcache`."""
    if refusal.endswith("not accessible to this user"):
        return "Ask its owner to make it readable (chmod a+r)."
    if refusal.endswith("leased by another process"):
        return "Open the table again after that process ends."
    return "Remove it, or choose a cache folder that only trusted users can write to."


def _warn(message: str) -> None:
    """A RuntimeWarning without a source line, because its cause is a file."""
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

    Rows are only appended, and are read into a dict. Every call opens a new connection, so forks
    and threads do not share one. Each record has a checksum, because SQLite has none for its pages.
    """

    writer = None  # there are no logs

    def __init__(self, folder: str, fingerprint: bytes, read_only: bool = False) -> None:
        check_folder(folder)
        if not read_only:
            os.makedirs(folder, exist_ok=True)
        elif not os.path.isdir(folder):
            what = "there is no table to read. Check the path, or create the table with a writer"
            raise FileNotFoundError(errno.ENOENT, what, folder)
        self._path, self._fingerprint = _choose_database(folder), fingerprint
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
        """Log-probs and token counts, NaN and 0 if a key is absent. Raises as `Table.lookup`."""
        _check_column("keys", keys, "V16", (np.size(keys),))
        values = np.array([self._known.get(key, (math.nan, 0)) for key in keys.tolist()], _VALUE)
        return values["logp"].copy(), values["tokens"].copy()

    def insert(
        self, keys: NDArray[np.void], logps: NDArray[np.float64], tokens: NDArray[np.int32]
    ) -> int:
        """Appends records with new keys, in one transaction. Raises as `Table.insert` does."""
        if self._refusal:
            raise ValueError(f"{self._path} {self._refusal}. Open the table again to insert.")
        _check_column("keys", keys, "V16", (np.size(keys),))
        _check_column("logps", logps, "float64", keys.shape)
        _check_column("tokens", tokens, "int32", keys.shape)
        if wrong := np.flatnonzero(~np.isfinite(logps) | (tokens < 1)).tolist():
            raise ValueError(
                f"logps[{wrong[0]}] is {logps[wrong[0]]} of {tokens[wrong[0]]} tokens. Log-probs "
                "must be finite and of at least 1 token. Nothing was written."
            )
        self.refresh()  # the file may have been removed
        if self._lost.isdisjoint(keys.tolist()) and self.lookup(keys)[1].all():
            return 0
        with self._lock, self._transaction(create=True) as database:
            self._read(database)  # other writers' records stay
            if not self._origin:
                database.execute(_ABOUT)
                database.execute(_RECORDS)
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
        """Reads new records of other writers. Returns the number of new keys."""
        before = len(self._known)
        if os.path.lexists(self._path):
            with self._lock, self._transaction() as database:
                self._read(database)
        else:
            self._start_over(b"")
        return len(self._known) - before

    def sync(self) -> None:
        """Does nothing, because SQLite syncs every transaction.

        Raises:
            ValueError: the table is closed.
        """
        if self._closed:
            raise ValueError(f"{self._path} was closed. Open the table again.")

    def close(self) -> None:
        """Closes the table. Lookups still work, inserts raise ValueError."""
        self._refusal, self._closed = "was closed", True

    def stats(self) -> dict[str, object]:
        """Counts of a table with one log. A database holds no duplicate keys."""
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        counts = {"records": len(self), "logs": int(size > 0), "bytes": size, "bad": len(self._bad)}
        never = {"torn_bytes": 0, "duplicates": 0, "conflicts": 0, "largest_difference": 0.0}
        return {**counts, **never, "writer": None}

    def compact(self) -> dict[str, int]:
        """Deletes bad records, whose space SQLite reuses. Returns counts as `compact_table`."""
        if self._bad:
            with self._lock, self._transaction() as database:
                rows = [(row,) for row in self._bad]
                database.executemany("DELETE FROM records WHERE id = ?", rows)
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        done = {"records": len(self), "bytes_before": size, "bytes_after": size}
        never = ("logs_merged", "logs_in_use", "logs_skipped", "torn_bytes", "duplicates_dropped")
        return {**done, **dict.fromkeys(never, 0), "bad_dropped": len(self._bad)}

    @contextlib.contextmanager
    def _transaction(self, create: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction, for writing with `create`. It also reads a read-only database."""
        check_folder(os.path.dirname(self._path))
        if create:  # SQLite itself would follow a link
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if refusal := _refusal(self._path):
            raise OSError(errno.EINVAL, f"{refusal}. Remove it, or use another folder", self._path)
        # Each row takes 42 bytes and 12 steps. A file whose pages form circles has endless rows.
        budget = 100 + os.path.getsize(self._path) // 2**17
        calls = 0

        def is_endless() -> bool:
            nonlocal calls
            calls += 1
            return calls > budget

        uri = f"{Path(self._path).absolute().as_uri()}?mode=rw"
        try:
            opened = sqlite3.connect(uri, timeout=60, isolation_level=None, uri=True)
            with contextlib.closing(opened) as database:
                database.set_progress_handler(is_endless, _STEPS)
                database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4096)
                for setting in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
                    database.execute(f"PRAGMA {setting}")
                database.execute("BEGIN IMMEDIATE" if create else "BEGIN")
                yield database
                database.execute("COMMIT")
        except (sqlite3.Error, UnicodeDecodeError) as error:  # UnicodeDecodeError: damaged schema
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code == sqlite3.SQLITE_ERROR:  # no such table or column
                raise self._foreign() from error
            damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG)
            if code == sqlite3.SQLITE_INTERRUPT and calls <= budget:  # Ctrl-C in is_endless
                raise KeyboardInterrupt from error
            if code in (*damage, sqlite3.SQLITE_INTERRUPT):
                raise self._damaged(str(error)) from error
            what = f"{error}. Free some disk space, check permissions, or remove the file"
            raise OSError(errno.EIO, what, self._path) from error

    def _damaged(self, how: str) -> OSError:
        what = f"the database is damaged ({how}). The next run that writes replaces it"
        return _DamagedError(errno.EIO, what, self._path)

    def _foreign(self) -> ValueError:
        return ValueError(
            f"{self._path} is not a table of reference log-probs. Use another folder."
        )

    def _set_aside(self, damage: OSError) -> None:
        """Renames the damaged database and starts empty, with one warning."""
        names = (f"{self._path}.damaged{f'-{n}' if n else ''}" for n in itertools.count())
        name = next(name for name in names if not os.path.lexists(name))
        self._known.clear()
        self._start_over(b"")
        try:
            os.rename(self._path, name)
        except FileNotFoundError:  # another process has renamed it
            return
        _warn(
            f"{self._path} is damaged ({damage.__cause__ or damage.strerror}) and was renamed to "
            f"{name}. Its log-probs are computed again."
        )

    def _start_over(self, origin: bytes) -> None:
        """Resets the state of reading, because the file was replaced or removed.

        Known keys stay in memory.
        """
        self._lost = set(self._known)
        self._origin, self._last_id = origin, 0
        self._bad: list[int] = []  # ids of rows that failed their check

    def _is_new(self, key: bytes) -> bool:
        return key not in self._known or key in self._lost

    def _seal(self, record: bytes) -> bytes:
        return record + zlib.crc32(self._fingerprint + record).to_bytes(4, "little")

    def _read(self, database: sqlite3.Connection) -> None:
        """Reads rows after the last known one. The first intact record of a key counts."""
        schema = set(database.execute("SELECT type, name, sql FROM sqlite_master LIMIT 4"))
        if not schema:
            self._start_over(b"")
            return
        if schema != _SCHEMA:  # a view or trigger would run statements of a stranger
            raise self._foreign()
        # The casts are needed because damage may change the type of a value.
        about = "SELECT CAST(fingerprint AS BLOB), CAST(origin AS BLOB) FROM about LIMIT 1"
        fingerprint, origin = database.execute(about).fetchone() or (None, None)
        if not origin or not fingerprint or len(fingerprint) != len(self._fingerprint):
            raise self._foreign()
        if fingerprint != self._fingerprint:
            raise ValueError(
                f"{self._path} belongs to the table with fingerprint {fingerprint.hex()}, not "
                f"{self._fingerprint.hex()}. Its values are for another model or data. Use another "
                "folder, or delete this one."
            )
        if origin != self._origin:  # the first read, or the file was replaced
            self._start_over(origin)
        rows = database.execute(
            "SELECT id, IFNULL(CAST(record AS BLOB), x'') FROM records WHERE id > ?",
            (self._last_id,),
        )
        for number, record in rows:
            if number <= self._last_id:
                raise self._damaged("its rows are out of order")
            self._last_id = number
            if record == self._seal(record[: _RECORD.size]):
                key, *value = _RECORD.unpack_from(record)
                if self._is_new(key):
                    self._known[key] = tuple(value)
                    self._lost.discard(key)
            else:
                self._bad.append(number)
        database.set_progress_handler(None, _STEPS)  # inserts may take any number of steps


def _choose_database(folder: str) -> str:
    """The path of this user's database, present or not: records.sqlite, or the next free number.

    Warns in one line if another file has the first name.

    Raises:
        FileExistsError: other files have all names.
    """
    names = [DATABASE, *(f"records-{number}.sqlite" for number in range(1, _MOST_DATABASES))]
    first = ""
    for path in (f"{folder}/{name}" for name in names):
        if not (refusal := _refusal(path)):
            if first:
                _warn(f"{first}. Its log-probs are not read, and {path} is used instead.")
            return path
        first = first or refusal
    what = f"{first}, and no other name for a database is free. Use another folder"
    raise FileExistsError(errno.EEXIST, what, f"{folder}/{DATABASE}")


def _refusal(path: str) -> str:
    """The reason why this process must not open a database, or "" if it may, or if there is none.

    SQLite follows links and waits for pipes, also beside the database. It trusts a journal: if one
    names a super-journal, SQLite deletes the file of that name.
    """
    for name in (path, f"{path}-journal", f"{path}-wal", f"{path}-shm"):
        try:
            status = os.lstat(name)
            if status.st_nlink == 0:  # another process is removing its journal
                continue
            if name.endswith(("-wal", "-shm")):  # of a mode that the table does not use
                return f"{name} exists"
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_nlink != 1:
                return f"{name} has {status.st_nlink} hard links"
            if status.st_uid != os.geteuid():
                return f"{name} belongs to another user"
            with open_plain(name) as file:
                head = file.read(20)
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - len(_JOURNAL)))
                # A journal that another process is writing also starts with these bytes.
                end = file.read(len(_JOURNAL)) if size >= 2 * len(_JOURNAL) else b""
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{name} cannot be opened ({error.strerror})"
        if name == path and head.startswith(b"SQLite format 3\0") and 2 in head[18:20]:
            return f"{name} needs a write-ahead log, which maps a shared file"
        if name != path and end == _JOURNAL:
            return f"{name} names another file, which SQLite would delete"
    return ""
