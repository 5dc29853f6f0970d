"""Log files of a table in numpy, for table_python.py: csrc/refcache/table_log.h describes them."""

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype([("key", "V16"), ("logp", "<f8"), ("tokens", "<i4"), ("crc", "<u4")])
_HEADER = struct.Struct("<8s16sII")
_MAGIC, _VERSION, UNIT, _CHUNK = b"RALNREF1", 1, 32, 32 * 2**16
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_MINE = "; name a folder that you may write, or make this one writable"
_FOLDER = "; a table is a folder: name another path"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; make room there, then insert again"),
    errno.EFBIG: "; raise the limit on file sizes (ulimit -f), then insert again",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _MINE),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _FOLDER),
}
Index = dict[bytes, tuple[float, int]]


def _crc_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(0x82F63B78)
    return table


_CRC = _crc_table()


def crc32c(data: bytes, seed: int = 0) -> int:
    """CRC-32C of `data` behind bytes whose CRC is `seed`."""
    crc, table = ~seed & 0xFFFFFFFF, _CRC.tolist()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return ~crc & 0xFFFFFFFF


def record_crcs(records: NDArray[np.void], fingerprint: bytes) -> NDArray[np.uint32]:
    """(n,) what the last four bytes of each record must be."""
    columns = records.view(np.uint8).reshape(-1, UNIT)
    crc = np.full(len(records), ~crc32c(fingerprint) & 0xFFFFFFFF, np.uint32)
    for column in columns.T[:28]:
        crc = _CRC[(crc ^ column) & 255] ^ crc >> 8
    return ~crc


def system_error(code: int, what: str, path: str) -> OSError:
    """An OSError in the system's words, with what to do where that is known."""
    return OSError(code, f"{what}: {os.strerror(code)}{_REMEDIES.get(code, '')}", path)


@contextlib.contextmanager
def doing(what: str, path: str) -> Iterator[None]:
    """Says what was refused, and what to do about it."""
    try:
        yield
    except OSError as error:
        raise system_error(error.errno or errno.EIO, what, path) from error


def make_header(fingerprint: bytes) -> bytes:
    """The first 32 bytes of a log."""
    start = _HEADER.pack(_MAGIC, fingerprint, _VERSION, 0)[:28]
    return start + crc32c(start).to_bytes(4, "little")


def parse_header(raw: bytes) -> tuple[bytes, int] | None:
    """(fingerprint, version) of a log's first 32 bytes, or None where they fail their check."""
    if len(raw) < UNIT:
        return None
    magic, fingerprint, version, crc = _HEADER.unpack(raw[:UNIT])
    return (fingerprint, version) if magic == _MAGIC and crc == crc32c(raw[:28]) else None


def _header_is_good(raw: bytes, path: str, fingerprint: bytes) -> bool:
    found = parse_header(raw)
    if found is not None and found[1] != _VERSION:
        raise ValueError(
            f"{path} is of version {found[1]} of the format, and only {_VERSION} is known here: "
            "update realign, or use another folder"
        )
    if found is not None and found[0] != fingerprint:
        raise ValueError(
            f"{path} belongs to the table with fingerprint {found[0].hex()}, not "
            f"{fingerprint.hex()}: its values are of another model or data; use another folder, "
            "or delete this one"
        )
    return found is not None


@dataclass
class Log:
    """How far a log has been read, and what was wrong with it: see csrc/table_log.h."""

    file: tuple[int, int] = (0, 0)
    size: int = 0
    position: int = 0
    last: bytes = b""
    bad: int = 0
    late: int = 0


@dataclass
class Contents:
    """What was read of a table's logs: the records by key, and how many of them came again."""

    index: Index = field(default_factory=dict)
    duplicates: int = 0
    conflicts: int = 0
    largest_difference: float = 0.0

    def add(self, records: NDArray[np.void]) -> None:
        """Takes in sound records; the first of a key stays."""
        for key, logp, tokens, _ in records.tolist():
            known = self.index.setdefault(key, value := (logp, tokens))
            if known is not value:
                self.duplicates += 1
                self.conflicts += known != value
                self.largest_difference = max(self.largest_difference, abs(known[0] - logp))

    def to_bytes(self, fingerprint: bytes) -> bytes:
        """All records as they stand in a log."""
        records = np.zeros(len(self.index), RECORD)
        records["key"] = np.frombuffer(b"".join(self.index), "V16")
        values = np.array(list(self.index.values()), [("logp", "f8"), ("tokens", "i4")])
        records["logp"], records["tokens"] = values["logp"], values["tokens"]
        records["crc"] = record_crcs(records, fingerprint)
        return records.tobytes()

    def read(self, fd: int, path: str, fingerprint: bytes, log: Log | None) -> Log:
        """Reads what stands behind the log's position."""
        with doing("reading a log", path):
            status = os.fstat(fd)
            file = (status.st_dev, status.st_ino)
            # A new file may have the inode number of a removed one, hence the comparison of bytes.
            if (
                log is None
                or log.file != file
                or status.st_size < log.position
                or (log.position and os.pread(fd, UNIT, log.position - UNIT) != log.last)
            ):
                log = Log(file)
            log.size, log.late, at = status.st_size, 0, log.position
            while raw := os.pread(fd, min(_CHUNK, log.size // UNIT * UNIT - at), at):
                raw = raw[: len(raw) // UNIT * UNIT]
                if not raw:
                    break
                self._take(raw, at, path, fingerprint, log)
                at += len(raw)
        return log

    def _take(self, raw: bytes, at: int, path: str, fingerprint: bytes, log: Log) -> None:
        records = np.frombuffer(raw, RECORD)
        sound = record_crcs(records, fingerprint) == records["crc"]
        sound &= (records["tokens"] >= 1) & np.isfinite(records["logp"])
        header = at == 0 and _header_is_good(raw, path, fingerprint)
        sound[0] &= at > 0  # the header is no record
        self.add(records[sound])
        sound[0] |= header
        if not sound.any():
            log.late += len(sound)
            return
        end = len(sound) - int(sound[::-1].argmax())
        log.bad += log.late + int((~sound[:end]).sum())
        log.late = len(sound) - end
        log.position, log.last = at + end * UNIT, raw[(end - 1) * UNIT : end * UNIT]


def list_logs(folder: str) -> list[str]:
    """File names of the logs, sorted."""
    with doing("listing a table", folder):
        names = os.listdir(folder)
    return sorted(n for n in names if n.endswith(".log") and len(n) > 4 and n[0] != ".")


def open_locked(path: str, create: bool) -> tuple[int | None, str]:
    """A descriptor with the lock of the log's writer, or None and why: busy, unsupported, gone."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        if not create and not os.path.exists(path):
            return None, "gone"
        with doing("opening a log for writing", path):
            fd = os.open(path, flags, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A compaction may have removed it between the two calls: then it is opened anew.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd, ""
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, *_NO_LOCKS):
                return None, "busy" if error.errno == errno.EAGAIN else "unsupported"
            raise system_error(error.errno or errno.EIO, "locking a log", path) from error
        os.close(fd)


def write_all(fd: int, data: bytes) -> tuple[int, OSError | None]:
    """How many bytes were written, and what stopped the rest."""
    done = 0
    try:
        while done < len(data):
            done += os.write(fd, memoryview(data)[done:])
    except OSError as error:
        return done, error
    return done, None


def sync_folder(folder: str) -> None:
    """Makes the names in a folder survive a crash of the machine."""
    with doing("syncing a table", folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def compact_table(folder: str, fingerprint: bytes) -> dict[str, int]:
    """See `realign_kernels.refcache.table.compact_table`."""
    guard = f"{folder}/.compact.lock"
    only, reason = open_locked(guard, create=True)
    if only is None:
        busy = f"another process is compacting {folder}; wait until it is done"
        no_locks = (
            "this file system has no locks, which tell the logs of live writers; compact a copy "
            "on another one"
        )
        if reason == "busy":
            raise system_error(errno.EWOULDBLOCK, busy, guard)
        raise system_error(errno.ENOLCK, no_locks, guard)
    held = [only]
    try:
        return _compact(folder, fingerprint, held)
    finally:
        for fd in held:
            os.close(fd)


def _compact(folder: str, fingerprint: bytes, held: list[int]) -> dict[str, int]:
    for name in os.listdir(folder):
        if name.startswith(".+compacted-"):  # what a compaction that crashed was writing
            os.unlink(f"{folder}/{name}")
    names, merged, logs, in_use, contents = list_logs(folder), [], [], 0, Contents()
    for name in names:
        path = f"{folder}/{name}"
        fd, reason = open_locked(path, create=False)
        in_use += reason in ("busy", "unsupported")
        if fd is not None:
            held.append(fd)
            merged.append(path)
            logs.append(contents.read(fd, path, fingerprint, None))
    size = sum(log.size for log in logs)
    done = {
        "records": len(contents.index),
        "bytes_before": size,
        "bytes_after": size,
        "logs_merged": 0,
        "logs_in_use": in_use,
        "bad_dropped": sum(log.bad + log.late for log in logs),
        "torn_bytes": sum(log.size % UNIT for log in logs),
        "duplicates_dropped": contents.duplicates,
    }
    dirty = done["bad_dropped"] or done["torn_bytes"] or done["duplicates_dropped"]
    if len(merged) > 1 or (merged and dirty):
        data = make_header(fingerprint) + contents.to_bytes(fingerprint)
        # One more than any result that is there: a name that comes back could be taken for the old.
        found = [re.match(r"\+compacted-(\d+)", name) for name in names]
        number = 1 + max((int(match[1]) for match in found if match), default=-1)
        _put(folder, f"+compacted-{number:05d}.log", data)
        for path in merged:
            with doing("removing a merged log", path):
                os.unlink(path)
        done |= {"bytes_after": len(data), "logs_merged": len(merged)}
    return done


def _put(folder: str, name: str, data: bytes) -> None:
    """A whole file under its name, or none."""
    partial = f"{folder}/.{name}.partial"
    with doing("compacting a table, which stays as it was", partial):
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _, error = write_all(fd, data)
            if error is not None:
                raise error
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, f"{folder}/{name}")
    sync_folder(folder)
