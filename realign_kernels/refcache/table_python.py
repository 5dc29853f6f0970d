"""The table of csrc/refcache/table.h over numpy and a dict: same files, same answers, same errors.

Stands in where the extension is missing; table.py says what each function does.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading

import numpy as np
from numpy.typing import NDArray

from realign_kernels.refcache.table_files import (
    RECORD,
    UNIT,
    Contents,
    Log,
    doing,
    list_logs,
    make_header,
    open_locked,
    record_crcs,
    sync_folder,
    system_error,
    write_all,
)

_VALUE = np.dtype([("logp", "f8"), ("tokens", "i4")])
_ABSENT = (float("nan"), 0)


def _flat(array: NDArray, name: str, dtype: str, size: int | None = None) -> NDArray:
    if array.ndim != 1 or array.dtype != np.dtype(dtype) or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a contiguous 1-D array of {dtype}")
    if size is not None and len(array) != size:
        raise ValueError(f"{name} must be {dtype}, one for each key")
    return array


class Table:
    """See `realign_kernels.refcache.table.Table`."""

    def __init__(
        self, folder: str, fingerprint: bytes, writer: str | None = None, read_only: bool = False
    ) -> None:
        self._fd: int | None = None
        self._closed = True  # for __del__, until the rest stands
        if writer is not None and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", writer):
            raise ValueError(
                f"writer is '{writer}'; use letters, digits, '.', '_' and '-', no dot in front"
            )
        if read_only and not os.path.exists(folder):
            what = "there is no table to read: check the path, or let a run that writes make it"
            raise system_error(errno.ENOENT, what, folder)
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise system_error(errno.ENOTDIR, "opening a table", folder)
        if not read_only:
            with doing("making the folder of a table", folder):
                os.makedirs(folder, exist_ok=True)
        self._folder, self._fingerprint, self._read_only = folder, fingerprint, read_only
        self._asked, self._owner = writer, os.getpid()
        self._name, self._end, self._folder_synced = "", 0, False
        self._contents, self._logs = Contents(), dict[str, Log]()
        self._lock = threading.RLock()
        self._read_logs()
        self._closed = False
        path = self._path(f"{writer}.log")
        if writer is not None and not read_only and os.access(path, os.W_OK):
            self._take_log()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()

    def __len__(self) -> int:
        with self._lock:
            return len(self._contents.index)

    @property
    def writer(self) -> str | None:
        """Name of the log this process writes."""
        return self._name.removesuffix(".log") if self._own() else None

    def lookup(self, keys: NDArray) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """(n,) log-probs and (n,) tokens of `keys`."""
        with self._lock:
            index = self._contents.index
            found = [index.get(key, _ABSENT) for key in _flat(keys, "keys", "V16").tolist()]
        values = np.array(found, _VALUE)
        return np.ascontiguousarray(values["logp"]), np.ascontiguousarray(values["tokens"])

    def insert(self, keys: NDArray, logps: NDArray, tokens: NDArray) -> int:
        """Appends the records whose key is not known yet.

        Raises:
            ValueError: for a value out of range, or a table opened to be read; nothing is written.
        """
        records = np.zeros(len(_flat(keys, "keys", "V16")), RECORD)
        records["key"] = keys
        records["logp"] = _flat(logps, "logps", "float64", len(keys))
        records["tokens"] = _flat(tokens, "tokens", "int32", len(keys))
        rules = (
            ("logps", "logp", ~np.isfinite(records["logp"]), "log-prob must be finite"),
            ("tokens", "tokens", records["tokens"] < 1, "count must be at least 1"),
        )
        for name, column, wrong, rule in rules:
            if wrong.any():
                at = int(wrong.argmax())
                raise ValueError(
                    f"{name}[{at}] is {records[column][at]}; every {rule}; nothing was written"
                )
        with self._lock:
            self._check_open()
            if self._read_only:
                raise ValueError(
                    f"the table in {self._folder} was opened with read_only=True: open it without "
                    "to insert"
                )
            if not self._intact():
                if all(key in self._contents.index for key in keys.tolist()):
                    return 0
                self._take_log()
            first = {}  # of each new key, where it stands
            for at, key in enumerate(keys.tolist()):
                if key not in self._contents.index:
                    first.setdefault(key, at)
            fresh = records[list(first.values())]
            if len(fresh):
                fresh["crc"] = record_crcs(fresh, self._fingerprint)
                self._append(fresh)
            return len(fresh)

    def refresh(self) -> int:
        """Reads what others have appended; returns the number of new keys."""
        with self._lock:
            before = len(self._contents.index)
            self._read_logs()
            return len(self._contents.index) - before

    def sync(self) -> None:
        """Makes what was inserted survive a crash of the machine."""
        with self._lock:
            self._check_open()
            if self._own():
                with doing("syncing a log", self._path(self._name)):
                    os.fsync(self._fd)
                if not self._folder_synced:
                    sync_folder(self._folder)
                self._folder_synced = True

    def close(self) -> None:
        """Syncs and releases the log; inserts raise from then on."""
        if self._closed:
            return
        with self._lock:
            try:
                self.sync()
            finally:
                self._closed = True
                self._drop_log()

    def stats(self) -> dict[str, object]:
        """Counts; see `realign_kernels.refcache.table.Table.stats`."""
        with self._lock:
            contents, logs = self._contents, self._logs.values()
            return {
                "records": len(contents.index),
                "logs": len(logs),
                "bytes": sum(log.size for log in logs),
                "bad": sum(log.bad + log.late for log in logs),
                "torn_bytes": sum(log.size % UNIT for log in logs),
                "duplicates": contents.duplicates,
                "conflicts": contents.conflicts,
                "largest_difference": contents.largest_difference,
                "writer": self.writer,
            }

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the table in {self._folder} was closed: open it anew")

    def _own(self) -> bool:
        return self._fd is not None and self._owner == os.getpid()

    def _intact(self) -> bool:
        status = os.fstat(self._fd) if self._own() else None
        return status is not None and status.st_nlink > 0 and status.st_size == self._end

    def _read(self, fd: int, name: str) -> None:
        log = self._logs.get(name)
        self._logs[name] = self._contents.read(fd, self._path(name), self._fingerprint, log)

    def _read_logs(self) -> None:
        names = list_logs(self._folder)
        while True:
            for name in names:
                if self._own() and name == self._name:
                    continue
                try:
                    with doing("opening a log", self._path(name)):
                        fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                try:
                    self._read(fd, name)
                finally:
                    os.close(fd)
            if (again := list_logs(self._folder)) == names:
                break
            names = again
        if self._own():
            names.append(self._name)
        self._logs = {name: log for name, log in self._logs.items() if name in names}

    def _take_log(self) -> None:
        self._drop_log()
        if self._asked is not None and self._owner == os.getpid():
            name = f"{self._asked}.log"
            fd, reason = open_locked(self._path(name), create=True)
            if reason == "busy":
                what = (
                    f"log {self._asked} of {self._folder} is being written by another process; "
                    "give each writer a name of its own, or none"
                )
                raise system_error(errno.EWOULDBLOCK, what, self._path(name))
            if fd is None:
                what = (
                    "this file system has no locks, so a named log is not safe from a second "
                    "writer; give no writer name"
                )
                raise system_error(errno.ENOLCK, what, self._path(name))
            return self._begin_log(fd, name)
        for number in range(100_000):
            name = f"{number:05d}.log"
            try:
                fd, reason = open_locked(self._path(name), create=True)
            except PermissionError:
                if not os.path.exists(self._path(name)):
                    raise
                continue
            if reason == "unsupported":
                name = f"w-{secrets.token_hex(8)}.log"
                flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL
                with doing("opening a log for writing", self._path(name)):
                    fd = os.open(self._path(name), flags, 0o666)
            if fd is not None:
                return self._begin_log(fd, name)
        raise system_error(errno.EAGAIN, "all numbers are taken by writers", self._folder)

    def _begin_log(self, fd: int, name: str) -> None:
        path = self._path(name)
        try:
            with doing("cutting a log", path):
                size = os.fstat(fd).st_size
                if size % UNIT:
                    os.ftruncate(fd, size := size // UNIT * UNIT)
            if size == 0:
                size, error = write_all(fd, make_header(self._fingerprint))
                if error is not None:
                    raise system_error(error.errno or errno.EIO, "no record was written", path)
            self._read(fd, name)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._name, self._owner = fd, name, os.getpid()
        self._end, self._folder_synced = size, False

    def _drop_log(self) -> None:
        if self._own():  # in words, for a child forked meanwhile keeps a copy open
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def _append(self, fresh: NDArray[np.void]) -> None:
        done, error = write_all(self._fd, fresh.tobytes())
        kept = fresh[: done // UNIT]
        log = self._logs[self._name]
        if len(kept):
            self._contents.add(kept)
            self._end += len(kept) * UNIT
            log.bad, log.late = log.bad + log.late, 0
            log.position = log.size = self._end
            log.last = kept[-1:].tobytes()
        if error is not None:
            if done % UNIT:
                with contextlib.suppress(OSError):  # if not now, the next insert cuts it
                    os.ftruncate(self._fd, self._end)
            what = f"{len(kept)} of {len(fresh)} records were written; those are kept"
            raise system_error(error.errno or errno.EIO, what, self._path(self._name))
