"""The table of reference log-probs: what its functions do, the same in C++ and in Python."""

import errno
import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import table_worker
from table_worker import FINGERPRINT, find, make

from realign_kernels._extension import extension
from realign_kernels.refcache import table as public
from realign_kernels.refcache import table_files, table_python

PACKAGE = str(Path(table_python.__file__).parent)
NAMES = ["python"] if extension() is None else ["extension", "python"]
needs_extension = pytest.mark.skipif(extension() is None, reason="the C++ extension is not built")


@pytest.fixture(params=NAMES)
def tables(request):
    """(Table, compact_table) of one implementation."""
    return table_worker.implementation(PACKAGE, request.param)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "a" / "table")


@pytest.mark.parametrize("name", NAMES)
def test_crc32c_is_castagnolis(name):
    crc32c = table_files.crc32c if name == "python" else extension().crc32c
    vectors = {  # RFC 3720, B.4, and the check value of the catalogue of CRCs
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(range(31, -1, -1)): 0x113FDB5C,
        b"123456789": 0xE3069283,
        b"": 0,
    }
    assert {data: crc32c(data) for data in vectors} == vectors
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283 != zlib.crc32(b"123456789")


def test_what_is_inserted_is_found(tables, folder):
    table = tables[0](folder, FINGERPRINT)
    assert table.writer is None and len(table) == 0 and not os.listdir(folder)
    logps, tokens = table.lookup(make([])[0])
    assert logps.shape == tokens.shape == (0,)
    assert table.insert(*make([])) == 0 and not os.listdir(folder)
    assert table.insert(*make(range(100))) == 100
    assert table.insert(*make([5, 100, 100, 101, 7])) == 2  # known, and twice in the batch
    keys, logps, tokens = make(range(102))
    assert table.insert(keys, logps - 1, tokens) == 0  # a value never changes
    logps, tokens = table.lookup(make(range(100, 104))[0])
    assert logps.dtype == np.float64 and tokens.dtype == np.int32
    np.testing.assert_array_equal(logps, [-1 / 103, -1 / 104, np.nan, np.nan])
    assert tokens.tolist() == [101, 102, 0, 0]
    table.sync()
    wanted = {"records": 102, "logs": 1, "bytes": 32 * 103, "bad": 0, "torn_bytes": 0}
    repeats = {"duplicates": 0, "conflicts": 0, "largest_difference": 0.0}
    assert table.stats() == {**wanted, **repeats, "writer": "00000"}
    table.close()
    table.close()
    assert table.writer is None and find(table, range(102)).all()
    with pytest.raises(ValueError, match="was closed: open it anew"):
        table.insert(*make([200]))
    table = tables[0](folder, FINGERPRINT, None, True)
    assert find(table, range(102)).all() and len(table) == 102
    with pytest.raises(ValueError, match="read_only=True: open it without"):
        table.insert(*make([200]))


@needs_extension
def test_both_write_the_same_bytes_and_read_each_other(tmp_path):
    batches = [range(50), range(40, 90), [3, 200, 200], range(1000, 3000)]
    folders = {name: str(tmp_path / name) for name in NAMES}
    for name, folder in folders.items():
        table = table_worker.implementation(PACKAGE, name)[0](folder, FINGERPRINT)
        for batch in batches:
            table.insert(*make(batch))
        table.close()
    one, two = (Path(folder, "00000.log") for folder in folders.values())
    assert one.read_bytes() == two.read_bytes() and one.stat().st_size == 32 * (1 + 91 + 2000)
    for name, folder in zip(NAMES, reversed(folders.values()), strict=True):
        table_class, compact = table_worker.implementation(PACKAGE, name)
        writer = table_class(folder, FINGERPRINT, "second")
        writer.insert(*make(range(5000, 5010)))
        writer.close()
        Path(folder, "third.log").write_bytes(one.read_bytes()[:-5] + b"wrong")
        assert compact(folder, FINGERPRINT)["duplicates_dropped"] == 2090
    one, two = (Path(folder, "+compacted-00000.log") for folder in folders.values())
    assert one.read_bytes() == two.read_bytes() and one.stat().st_size == 32 * (1 + 2101)


def test_refresh_reads_what_others_appended(tables, folder):
    table_class = tables[0]
    reader, one, two = (table_class(folder, FINGERPRINT) for _ in range(3))
    one.insert(*make(range(10)))
    keys, logps, tokens = make(range(5, 15))
    two.insert(keys, logps - 0.25 * (np.arange(10) == 0), tokens)
    assert (one.writer, two.writer) == ("00000", "00001")
    assert reader.refresh() == 15 and reader.refresh() == 0
    stats = reader.stats()
    assert (stats["logs"], stats["duplicates"], stats["conflicts"]) == (2, 5, 1)
    assert stats["largest_difference"] == 0.25
    assert find(reader, range(10)).all()  # the first one read stays
    one.insert(*make(range(20, 30)))
    path = Path(folder, "00000.log")
    whole = path.read_bytes()
    path.write_bytes(whole[: -9 * 32] + bytes(32) + whole[-8 * 32 : -64] + bytes(64))
    for news in (7, 0):  # the last two are tried again, and counted once
        assert reader.refresh() == news and reader.stats()["bad"] == 3
    path.write_bytes(whole)
    assert reader.refresh() == 2 and reader.stats()["bad"] == 1
    assert find(table_class(folder, FINGERPRINT), range(20, 30)).all()


def test_a_crashed_writers_log_is_continued(tables, folder):
    table = tables[0](folder, FINGERPRINT, "mine")
    table.insert(*make(range(10)))
    with pytest.raises(BlockingIOError, match="log mine of .* by another process; give each"):
        tables[0](folder, FINGERPRINT, "mine")
    table.close()
    path = Path(folder, "mine.log")
    path.write_bytes(path.read_bytes() + b"torn")
    assert tables[0](folder, FINGERPRINT).stats()["torn_bytes"] == 4
    table = tables[0](folder, FINGERPRINT, "mine")
    assert table.insert(*make(range(8, 12))) == 2 and path.stat().st_size == 32 * 13
    assert table.stats()["torn_bytes"] == 0 and table.writer == "mine"
    table.close()
    path.write_bytes(path.read_bytes()[:20])  # not even a header: begun anew
    table = tables[0](folder, FINGERPRINT, "mine")
    assert table.insert(*make(range(3))) == 3 and path.stat().st_size == 32 * 4
    path.write_bytes(path.read_bytes()[:70])  # cut under its writer: it is begun again
    assert table.insert(*make(range(3, 6))) == 3 and path.stat().st_size == 32 * 5
    assert len(tables[0](folder, FINGERPRINT)) == 4


def test_a_forked_child_writes_a_log_of_its_own(tables, folder):
    table = tables[0](folder, FINGERPRINT, "mine")
    table.insert(*make(range(10)))
    if (child := os.fork()) == 0:
        right = table.insert(*make(range(5, 15))) == 5 and table.writer == "00000"
        table.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert table.insert(*make(range(20, 25))) == 5 and table.writer == "mine"
    assert table.refresh() == 5 and find(table, [*range(15), *range(20, 25)]).all()
    if (child := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)  # stays, with a copy of the descriptor
    os.waitpid(child, os.WUNTRACED)
    table.close()
    try:
        assert tables[0](folder, FINGERPRINT, "mine").insert(*make([30])) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_compaction(tables, folder):
    table_class, compact = tables
    writers = [table_class(folder, FINGERPRINT) for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.insert(*make(range(number * 10, number * 10 + 20)))
    for writer in writers[:2]:
        writer.close()
    reader = table_class(folder, FINGERPRINT)
    path = Path(folder, "00001.log")
    data = bytearray(path.read_bytes() + b"torn")
    data[32 * 20] ^= 1
    path.write_bytes(data)
    Path(folder, ".+compacted-00000.log.partial").write_bytes(b"a crash left this")
    assert compact(folder, FINGERPRINT) == {
        "records": 29,
        "bytes_before": 2 * 32 * 21 + 4,
        "bytes_after": 32 * 30,
        "logs_merged": 2,
        "logs_in_use": 1,
        "bad_dropped": 1,
        "torn_bytes": 4,
        "duplicates_dropped": 10,
    }
    assert sorted(os.listdir(folder)) == ["+compacted-00000.log", ".compact.lock", "00002.log"]
    done = compact(folder, FINGERPRINT)  # one clean log: nothing to do
    assert done["logs_merged"] == 0 and done["bytes_after"] == done["bytes_before"] == 32 * 30
    assert reader.refresh() == 0 and reader.stats()["logs"] == 2
    writers[2].close()
    assert compact(folder, FINGERPRINT)["logs_merged"] == 2
    assert sorted(os.listdir(folder)) == ["+compacted-00001.log", ".compact.lock"]
    table = table_class(folder, FINGERPRINT)
    assert find(table, range(40)).all() and table.stats()["duplicates"] == 0
    # A new log under a removed one's name, longer than that was.
    table.insert(*make(range(100, 150)))
    assert table.writer == "00000" and reader.refresh() == 50
    table.close()
    other = table_class(folder + "2", FINGERPRINT)
    other.insert(*make(range(200, 300)))
    Path(folder, "00000.log").write_bytes(Path(folder + "2", "00000.log").read_bytes())
    assert reader.refresh() == 100  # even if it has that one's inode number


def test_logs_of_other_tables_and_versions_are_refused(tables, folder):
    table = tables[0](folder, FINGERPRINT)
    table.insert(*make(range(10)))
    table.close()
    other = bytes(16)
    with pytest.raises(ValueError, match="00000.log belongs") as caught:
        tables[0](folder, other)
    assert other.hex() in str(caught.value) and FINGERPRINT.hex() in str(caught.value)
    with pytest.raises(ValueError, match="00000.log belongs"):
        tables[1](folder, other)
    path = Path(folder, "00000.log")
    header = path.read_bytes()[:24] + (2).to_bytes(4, "little")
    path.write_bytes(header + table_files.crc32c(header).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="00000.log is of version 2 .* update realign"):
        tables[0](folder, FINGERPRINT)


def test_mistakes_are_named(tables, folder):
    table = tables[0](folder, FINGERPRINT)
    keys, logps, tokens = make(range(4))
    for value in (np.nan, np.inf, -np.inf):
        logps[2] = value
        with pytest.raises(ValueError, match=rf"logps\[2\] is {value}; .* nothing was written"):
            table.insert(keys, logps, tokens)
    tokens[3], logps[2] = 0, -1
    with pytest.raises(ValueError, match=r"tokens\[3\] is 0; .* nothing was written"):
        table.insert(keys, logps, tokens)
    assert len(table) == 0 and not os.listdir(folder)
    keys, logps, tokens = make(range(4))
    for wrong in (keys[::2], keys.view("V8"), keys.view(np.int64), keys.reshape(2, 2)):
        with pytest.raises(ValueError, match="keys must be a contiguous 1-D array of V16"):
            table.lookup(wrong)
    for arguments in ((logps[:3], tokens), (logps.astype("f4"), tokens), (logps, tokens[::-1])):
        with pytest.raises(ValueError, match="must be"):
            table.insert(keys, *arguments)
    for name in ("", ".hidden", "a/b", "ä", "+compacted-00000", "a\n"):
        with pytest.raises(ValueError, match="use letters, digits"):
            tables[0](folder, FINGERPRINT, name)


def test_what_the_system_refuses_is_an_oserror(tables, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    for name in (path, path / "below"):
        with pytest.raises(NotADirectoryError, match="a table is a folder") as caught:
            tables[0](str(name), FINGERPRINT)
        assert caught.value.filename == str(name) and caught.value.errno == errno.ENOTDIR
    with pytest.raises(FileNotFoundError, match="check the path"):
        tables[0](str(tmp_path / "none"), FINGERPRINT, None, True)
    with pytest.raises(FileNotFoundError):
        tables[1](str(tmp_path / "none"), FINGERPRINT)


def test_a_folder_that_cannot_be_written_can_be_read(folder, monkeypatch):
    table = table_python.Table(folder, FINGERPRINT)
    table.insert(*make(range(5)))
    table.close()
    opened = os.open

    def refuse(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "refused")
        return opened(path, flags, *mode)

    monkeypatch.setattr(table_files.os, "open", refuse)
    table = table_python.Table(folder, FINGERPRINT)
    assert find(table, range(5)).all() and table.insert(*make(range(5))) == 0
    with pytest.raises(OSError, match="a folder that you may write, or make this one writable"):
        table.insert(*make([9]))


def test_without_locks_logs_have_unique_names(folder, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "refused")

    monkeypatch.setattr(table_files.fcntl, "flock", refuse)
    one, two = (table_python.Table(folder, FINGERPRINT) for _ in range(2))
    for number, table in enumerate((one, two)):
        table.insert(*make([number]))
    assert one.writer != two.writer and one.writer.startswith("w-")
    with pytest.raises(OSError, match="give no writer name"):
        table_python.Table(folder, FINGERPRINT, "mine").insert(*make([3]))
    with pytest.raises(OSError, match="compact a copy"):
        table_files.compact_table(folder, FINGERPRINT)


@pytest.mark.parametrize("name", NAMES)
def test_open_table_takes_what_is_built(tmp_path, monkeypatch, name):
    if name == "python":
        monkeypatch.setattr(public, "extension", lambda: None)
    with pytest.raises(ValueError, match="fingerprint must be 16 bytes, got b'short'; hash"):
        public.open_table(tmp_path, b"short")
    with pytest.raises(ValueError, match="folder must be a path, got ''"):
        public.open_table("", FINGERPRINT)
    with pytest.raises(ValueError, match="writer must be a string or None, got 3"):
        public.open_table(tmp_path, FINGERPRINT, writer=3)
    with pytest.raises(ValueError, match="drop one of them"):
        public.open_table(tmp_path, FINGERPRINT, writer="mine", read_only=True)
    table = public.open_table(tmp_path, FINGERPRINT, writer="mine")
    table_class, _ = table_worker.implementation(PACKAGE, name)
    assert type(table) is table_class and table.insert(*make(range(3))) == 3
    assert public.read_header(tmp_path / "mine.log") == FINGERPRINT
    table.close()
    assert public.compact_table(tmp_path, FINGERPRINT)["records"] == 3
    (tmp_path / "mine.log").write_bytes(b"RALNREF1" + bytes(40))
    assert public.read_header(tmp_path / "mine.log") is None
    assert len(public.open_table(str(tmp_path), FINGERPRINT, read_only=True)) == 0
