"""Tables of reference log-probs: the logs of the extension, and the database without it.

csrc/tests/table_tests.cpp tests faults of single logs: 500 damaged logs, full disks, failing system
calls, and compactions that stop halfway.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import table_records
from table_records import FINGERPRINT, SPAN, find, kill_writer, make, needs_extension

from realign_kernels.refcache import store
from realign_kernels.refcache.store import DATABASE, DatabaseTable, compact_table, open_table

STRESS_SECONDS = float(os.environ.get("REALIGN_STRESS_SECONDS", "1.5"))


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "a" / "table")


def test_an_inserted_record_is_found_and_never_changes(kind, folder):
    table = open_table(folder, FINGERPRINT)
    assert isinstance(table, DatabaseTable) == (kind == "database")
    assert table.writer is None and len(table) == 0
    logps, tokens = table.lookup(make([])[0])
    assert logps.shape == tokens.shape == (0,)
    assert table.insert(*make([])) == 0 and not os.listdir(folder)
    assert table.insert(*make(range(100))) == 100
    assert (
        table.insert(*make([5, 100, 100, 101, 7])) == 2
    )  # a known key, and a key that is twice in the batch
    keys, logps, tokens = make(range(102))
    assert table.insert(keys, logps - 1, tokens) == 0
    logps, tokens = table.lookup(make(range(100, 104))[0])
    assert logps.dtype == np.float64 and tokens.dtype == np.int32
    np.testing.assert_array_equal(logps, [-1 / 103, -1 / 104, np.nan, np.nan])
    assert tokens.tolist() == [101, 102, 0, 0]
    table.sync()
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    assert table.stats() == {
        **{"records": 102, "logs": 1, "bytes": size, "bad": 0, "torn_bytes": 0, "duplicates": 0},
        **{"conflicts": 0, "largest_difference": 0.0},
        **({"writer": "00000", "skipped": []} if kind == "logs" else {"writer": None}),
    }
    assert kind == "database" or size == 32 * 103
    table.close()
    table.close()
    assert table.writer is None and find(table, range(102)).all()
    for call in (table.sync, lambda: table.insert(*make([200]))):
        with pytest.raises(ValueError, match="was closed. Open"):
            call()
    table = open_table(folder, FINGERPRINT, read_only=True)
    assert find(table, range(102)).all() and len(table) == 102
    with pytest.raises(ValueError, match="read_only=True. Open"):
        table.insert(*make([200]))


def test_refresh_reads_records_of_other_writers(kind, folder):
    reader, one, two = (open_table(folder, FINGERPRINT) for _ in range(3))
    one.insert(*make(range(10)))
    keys, logps, tokens = make(range(5, 15))
    new = two.insert(keys, logps - 0.25 * (np.arange(10) == 0), tokens)
    assert new == (5 if kind == "database" else 10)  # `two` has not read the log of `one`
    assert reader.refresh() == 15 and reader.refresh() == 0
    assert find(reader, range(15)).all()  # a key keeps its first value
    if kind == "logs":
        stats = reader.stats()
        assert (one.writer, two.writer) == ("00000", "00001")
        assert (stats["logs"], stats["duplicates"], stats["conflicts"]) == (2, 5, 1)
        assert stats["largest_difference"] == 0.25
    assert find(open_table(folder, FINGERPRINT), range(15)).all()


def test_another_fingerprint_is_refused(kind, folder):
    open_table(folder, FINGERPRINT).insert(*make(range(10)))
    for call in (open_table, compact_table):
        with pytest.raises(ValueError, match="belongs to the table with") as caught:
            call(folder, bytes(16))
        assert bytes(16).hex() in str(caught.value) and FINGERPRINT.hex() in str(caught.value)


def test_damaged_records_are_missing_and_can_be_inserted_again(kind, folder):
    """Damages one bit of every third record. A compaction drops these records."""
    table = open_table(folder, FINGERPRINT)
    table.insert(*make(range(300)))
    table.close()
    (path,) = Path(folder).iterdir()
    data = bytearray(path.read_bytes())
    chance = random.Random(0)
    for number in range(0, 300, 3):
        at = data.index(b"".join(column.tobytes() for column in make([number])))
        data[at + chance.randrange(32)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    table = open_table(folder, FINGERPRINT)
    assert (find(table, range(300)) == (np.arange(300) % 3 > 0)).all()
    assert (table.stats()["records"], table.stats()["bad"]) == (200, 100)
    assert table.insert(*make(range(300))) == 100 and find(table, range(300)).all()
    table.close()
    assert open_table(folder, FINGERPRINT).stats()["bad"] == 100
    assert compact_table(folder, FINGERPRINT)["bad_dropped"] == 100
    table = open_table(folder, FINGERPRINT)
    assert find(table, range(300)).all() and table.stats()["bad"] == 0


def test_processes_write_read_and_compact_one_table(kind, tmp_path):
    folder, board = str(tmp_path / "table"), tmp_path / "board"
    os.mkdir(folder)
    np.zeros(3, np.int64).tofile(board)
    with ProcessPoolExecutor(6, multiprocessing.get_context("fork")) as pool:
        start = pool.submit
        writers = [start(table_records.write, folder, board, w, STRESS_SECONDS) for w in range(3)]
        readers = [start(table_records.read, folder, board, STRESS_SECONDS) for _ in range(2)]
        slack = 20 if kind == "logs" else 0
        compactor = start(table_records.compact, folder, STRESS_SECONDS, slack)
        written = [writer.result() for writer in writers]
        assert min(written) > 0 and min(reader.result() for reader in readers) > 0
        assert compactor.result() > 0 or kind == "database"
    table = open_table(folder, FINGERPRINT, read_only=True)
    assert len(table) == sum(written) and table.stats()["bad"] == 0
    for number, count in enumerate(written):
        assert find(table, number * SPAN + np.arange(count)).all()


def test_acknowledged_records_survive_kill_9_of_their_writer(kind, tmp_path):
    total, rounds = 0, 15 if kind == "logs" else 8
    for number in range(rounds):
        folder = str(
            tmp_path / str(number // 10)
        )  # small tables, because every round reads all records of its table
        total += (done := kill_writer(folder, number))
        table = open_table(folder, FINGERPRINT, read_only=True)
        assert find(table, number * SPAN + np.arange(done)).all(), "an acknowledged record is lost"
        stats = table.stats()
        assert stats["logs"] == 1 and stats["bad"] == stats["duplicates"] == 0, stats
    assert total > 100 * rounds


def test_mistakes_are_named(kind, folder, tmp_path):
    table = open_table(folder, FINGERPRINT)
    keys, logps, tokens = make(range(4))
    for value in (np.nan, np.inf, -np.inf):
        logps[2] = value
        with pytest.raises(ValueError, match=rf"logps\[2\] is {value}.* Nothing was written"):
            table.insert(keys, logps, tokens)
    with pytest.raises(ValueError, match=r"tokens.* is 0|of 0 tokens.* Nothing was written"):
        table.insert(keys, make(range(4))[1], tokens * (np.arange(4) < 3))
    assert len(table) == 0 and not os.listdir(folder)
    with pytest.raises(ValueError, match="array of V16"):
        table.lookup(keys.view(np.int64))
    logps = make(range(4))[1]
    for name, wrong in (
        ("keys", (keys[::2], logps[:2], tokens[:2])),
        ("logps", (keys, logps[:3], tokens)),
        ("logps", (keys, logps.astype(np.float32), tokens)),
        ("tokens", (keys, logps, tokens[:3])),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*"):
            table.insert(*wrong)
    if kind == "database":
        with pytest.raises(ValueError, match="keys must be a .* for each key, got list"):
            table.lookup(keys.tolist())
        with pytest.raises(ValueError, match="logps must be a .* for each key, got list"):
            table.insert(keys, logps.tolist(), tokens)
    with pytest.raises(ValueError, match="fingerprint must be 16 bytes, got b'short'. Hash"):
        open_table(folder, b"short")
    with pytest.raises(ValueError, match="folder must be a path, got ''"):
        open_table("", FINGERPRINT)
    with pytest.raises(ValueError, match="writer must be a string or None, got 3"):
        open_table(folder, FINGERPRINT, writer=3)
    with pytest.raises(ValueError, match="Drop one of them"):
        open_table(folder, FINGERPRINT, writer="mine", read_only=True)
    with pytest.raises(FileNotFoundError, match="Check the path"):
        open_table(tmp_path / "none", FINGERPRINT, read_only=True)
    with pytest.raises(FileNotFoundError):
        compact_table(tmp_path / "none", FINGERPRINT)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        open_table(tmp_path / "file" / "below", FINGERPRINT)


@needs_extension
def test_the_other_kind_of_table_is_named_and_not_read(folder, monkeypatch, recwarn):
    """Warns in one line. Each kind keeps its own values in the same folder."""
    keys, logps, tokens = make(range(10))
    open_table(folder, FINGERPRINT).insert(keys, logps, tokens)
    assert not recwarn.list
    with monkeypatch.context() as patch:
        patch.setattr(store, "extension", lambda: None)
        with pytest.warns(RuntimeWarning, match=r"0.log was written with the C\+\+ ext") as warned:
            table = open_table(folder, FINGERPRINT)
        assert warned[0].filename == "sys"  # the warning names no line of the package
        assert len(table) == 0 and table.insert(keys[:5], logps[:5] - 1, tokens[:5]) == 5
        with pytest.raises(ValueError, match="writer is 'mine', the name of a log"):
            open_table(folder, FINGERPRINT, writer="mine")
    with pytest.warns(RuntimeWarning, match=f"{DATABASE} was written without") as warned:
        open_table(folder, FINGERPRINT, read_only=True)
        compact_table(folder, FINGERPRINT)
        table = open_table(folder, FINGERPRINT)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert find(table, range(10)).all()


@pytest.fixture
def database(folder, monkeypatch):
    """A table with five records, made without the extension, and its file."""
    monkeypatch.setattr(store, "extension", lambda: None)
    table = open_table(folder, FINGERPRINT)
    table.insert(*make(range(5)))
    return table, Path(folder, DATABASE)


def test_a_removed_database_is_written_again(database, folder):
    """Lookups of records in memory still work. Inserting them writes them again."""
    table, path = database
    path.unlink()
    assert table.insert(*make(range(3))) == 3
    path.unlink()
    assert table.refresh() == 0 and find(table, range(5)).all() and len(table) == 5
    other = open_table(folder, FINGERPRINT)
    assert other.insert(*make(range(20, 25))) == table.refresh() == 5  # a new file
    assert table.insert(*make([*range(2), 20])) == 2 == other.refresh()
    assert find(open_table(folder, FINGERPRINT), range(5)).tolist() == [True] * 2 + [False] * 3


def test_a_record_of_another_type_is_damaged(database, folder):
    with contextlib.closing(sqlite3.connect(database[1])) as opened, opened:
        opened.execute("UPDATE records SET record = 7 WHERE id = 2")
        opened.execute("UPDATE records SET record = NULL WHERE id = 3")
    table = open_table(folder, FINGERPRINT)
    assert table.stats()["bad"] == 2
    assert find(table, range(5)).tolist() == [True, False, False, True, True]


def test_a_damaged_database_is_set_aside(database, folder):
    table, path = database
    table.insert(*make(range(1000)))
    malformed = path.read_bytes()[:-4096] + bytes(4096)  # SQLite reads the first records
    schema = path.read_bytes().replace(b"TABLE about", b"TAB\xff\xff about")  # invalid UTF-8
    for number, damaged in enumerate((b"no database" * 100, malformed, schema)):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"damaged \(.*next run that writes") as caught:
            open_table(folder, FINGERPRINT, read_only=True)
        assert caught.value.filename == str(path)
        aside = f"{path}.damaged{f'-{number}' if number else ''}"
        with pytest.warns(RuntimeWarning, match=f"was renamed to {aside}. ") as warned:
            table = open_table(folder, FINGERPRINT)
        assert len(warned) == 1 and Path(aside).read_bytes() == damaged
        assert len(table) == 0 and table.insert(*make(range(5))) == 5
        assert find(open_table(folder, FINGERPRINT), range(5)).all()


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE theirs (x)"],
        ["CREATE TABLE about (x)"],
        ["CREATE TABLE about (fingerprint, origin)", "CREATE TABLE records (id, record)"],
    ],
)
def test_a_database_of_something_else_is_refused_and_kept(database, folder, statements):
    table, path = database
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as foreign:
        for statement in statements:
            foreign.execute(statement)
    foreign = path.read_bytes()
    for call in (
        lambda: open_table(folder, FINGERPRINT),
        lambda: compact_table(folder, FINGERPRINT),
        lambda: table.insert(*make(range(9))),
    ):
        with pytest.raises(ValueError, match="is not a table of reference log-probs. Use another"):
            call()
    assert path.read_bytes() == foreign and os.listdir(folder) == [DATABASE]


@needs_extension
def test_a_forked_child_writes_a_log_of_its_own(folder):
    table = open_table(folder, FINGERPRINT, writer="mine")
    table.insert(*make(range(10)))
    with pytest.raises(BlockingIOError, match="log mine of .* by another process. Give each"):
        open_table(folder, FINGERPRINT, writer="mine")
    if (child := os.fork()) == 0:
        right = table.insert(*make(range(5, 15))) == 5 and table.writer == "00000"
        table.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert table.insert(*make(range(20, 25))) == 5 and table.writer == "mine"
    assert table.refresh() == 5 and find(table, [*range(15), *range(20, 25)]).all()
    if (child := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)  # stays alive with a copy of the descriptor
    os.waitpid(child, os.WUNTRACED)
    table.close()
    try:
        assert open_table(folder, FINGERPRINT, writer="mine").insert(*make([30])) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@needs_extension
def test_compaction_merges_logs_without_a_writer(folder):
    writers = [open_table(folder, FINGERPRINT) for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.insert(*make(range(number * 10, number * 10 + 20)))
    for writer in writers[:2]:
        writer.close()
    reader = open_table(folder, FINGERPRINT)
    path = Path(folder, "00001.log")
    data = bytearray(path.read_bytes() + b"torn")
    data[32 * 20] ^= 1
    path.write_bytes(data)
    assert compact_table(folder, FINGERPRINT) == {
        "records": 29,
        "bytes_before": 2 * 32 * 21 + 4,
        "bytes_after": 32 * 30,
        "logs_merged": 2,
        "logs_in_use": 1,
        "logs_skipped": 0,
        "bad_dropped": 1,
        "torn_bytes": 4,
        "duplicates_dropped": 10,
    }
    lock = f".compact-{os.geteuid()}.lock"
    assert sorted(os.listdir(folder)) == ["+compacted-00000.log", lock, "00002.log"]
    done = compact_table(folder, FINGERPRINT)  # a single clean log needs no merge
    assert done["logs_merged"] == 0 and done["bytes_after"] == done["bytes_before"] == 32 * 30
    assert reader.refresh() == 0 and reader.stats()["logs"] == 2
    writers[2].close()
    assert compact_table(folder, FINGERPRINT)["logs_merged"] == 2
    assert sorted(os.listdir(folder)) == ["+compacted-00001.log", lock]
    table = open_table(folder, FINGERPRINT)
    assert find(table, range(40)).all() and table.stats()["duplicates"] == 0
