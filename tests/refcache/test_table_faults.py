"""The table against crashes, full disks, broken bytes and many processes at once."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import table_worker
from table_worker import FINGERPRINT, find, make

from realign_kernels._extension import extension
from realign_kernels.refcache import table_files, table_python

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(table_python.__file__).parent
STRESS_SECONDS = float(os.environ.get("REALIGN_STRESS_SECONDS", "5"))

NAMES = ["python"] if extension() is None else ["extension", "python"]
both = pytest.mark.parametrize("name", NAMES)


def start(name, *arguments):
    command = [sys.executable, table_worker.__file__, str(PACKAGE), name, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def result(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


@both
def test_broken_bytes_are_never_served_and_can_be_filled_again(tmp_path, name):
    table_class, _ = table_worker.implementation(PACKAGE, name)
    rounds, count = (1000, 300) if name == "extension" else (100, 300)
    foreign_folder, folder = str(tmp_path / "foreign"), str(tmp_path / "table")
    foreign = table_class(foreign_folder, bytes(16))
    foreign.insert(*make(range(count)))
    foreign.close()
    foreign = Path(foreign_folder, "00000.log").read_bytes()
    path = Path(folder, "name.log")
    table = table_class(folder, FINGERPRINT, "name")
    table.insert(*make(range(count)))
    table.close()
    whole = path.read_bytes()
    chance, lost = random.Random(0), 0
    for turn in range(rounds):
        broken, at = bytearray(whole), chance.randrange(len(whole))
        if turn % 4 == 0:
            for _ in range(chance.randint(1, 5)):
                broken[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        elif turn % 4 == 1:
            del broken[at:]
        elif turn % 4 == 2:
            broken[at // 4096 * 4096 : at // 4096 * 4096 + 4096] = bytes(4096)
        else:
            chunk = foreign[32 + at // 2 : 32 + at // 2 + chance.randint(1, 900)]
            broken[at : at + len(chunk)] = chunk
        del broken[len(whole) :]
        path.write_bytes(broken)
        units = [slice(at, at + 32) for at in range(0, len(broken) // 32 * 32, 32)]
        same = [broken[unit] == whole[unit] for unit in units]
        intact = np.array((same[1:] + [False] * count)[:count])

        reader = table_class(folder, FINGERPRINT, None, True)
        assert (find(reader, range(count)) == intact).all()
        stats = reader.stats()
        assert stats["bad"] == same.count(False) and stats["torn_bytes"] == len(broken) % 32
        assert stats["records"] == intact.sum() and stats["duplicates"] == 0
        lost += count - intact.sum()
        writer = table_class(folder, FINGERPRINT, "name")
        assert writer.insert(*make(range(count))) == count - intact.sum()
        writer.close()
        assert reader.refresh() == count - intact.sum() and find(reader, range(count)).all()
        assert find(table_class(folder, FINGERPRINT, None, True), range(count)).all()
    assert lost > 10 * rounds


@both
def test_nothing_is_lost_between_writers_readers_and_compactions(tmp_path, name):
    seconds = STRESS_SECONDS if name == "extension" else min(2, STRESS_SECONDS)
    workers = 4 if name == "extension" else 2
    folder, board = tmp_path / "table", tmp_path / "board"
    folder.mkdir()
    np.zeros(workers, np.int64).tofile(board)
    writers = [start(name, "write", folder, board, w, seconds) for w in range(workers)]
    readers = [start(name, "read", folder, board, seconds) for _ in range(workers)]
    # The other implementation compacts: the files are the same.
    compactor = start(NAMES[-1], "compact", folder, seconds)
    written = [result(worker)["written"] for worker in writers]
    checked = [result(worker)["checked"] for worker in readers]
    assert min(written) > 0 and min(checked) > 0 and result(compactor)["merged"] > 0
    table_class, _ = table_worker.implementation(PACKAGE, name)
    table = table_class(str(folder), FINGERPRINT, None, True)
    assert len(table) == sum(written) and table.stats()["bad"] == 0
    for number, count in enumerate(written):
        assert find(table, number * table_worker.SPAN + np.arange(count)).all()


@both
def test_records_survive_the_kill_of_their_writer(tmp_path, name):
    rounds = 100 if name == "extension" else 20
    done = result(start(name, "kill", tmp_path / "table", rounds))
    assert done["acknowledged"] > 100 * rounds


@both
def test_a_full_disk_keeps_what_was_written(tmp_path, name):
    done = result(start(name, "fill_disk", tmp_path / "table"))
    code, message, path = done["refused"]
    assert code == errno.EFBIG and path == str(tmp_path / "table" / "00000.log")
    assert "7 of 30 records were written; those are kept" in message and "ulimit -f" in message
    assert (done["kept"], done["size"]) == (107, 108 * 32)
    assert (done["again"], done["total"]) == (23, 130)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_in_the_middle_of_a_record(tmp_path, monkeypatch, code):
    table = table_python.Table(str(tmp_path), FINGERPRINT)
    table.insert(*make(range(5)))
    write, cut = os.write, os.ftruncate

    def short(fd, data):
        if len(data) < 32 * 5:
            raise OSError(code, "refused")
        return write(fd, data[: 32 * 3 + 7])

    def refused(fd, size):
        raise OSError(code, "refused")

    monkeypatch.setattr(table_files.os, "write", short)
    monkeypatch.setattr(table_python.os, "ftruncate", refused)
    with pytest.raises(OSError, match="3 of 6 records were written; those are kept") as caught:
        table.insert(*make(range(5, 11)))
    assert caught.value.errno == code
    assert ("make room" in str(caught.value)) == (code == errno.ENOSPC)
    monkeypatch.setattr(table_files.os, "write", write)
    with pytest.raises(OSError, match="cutting a log"):
        table.insert(*make(range(5, 11)))
    monkeypatch.setattr(table_python.os, "ftruncate", cut)
    assert table.insert(*make(range(5, 11))) == 3
    assert find(table_python.Table(str(tmp_path), FINGERPRINT), range(11)).all()


@pytest.mark.parametrize("step", ["fsync", "rename", "unlink"])
def test_a_compaction_that_stops_anywhere_loses_nothing(tmp_path, monkeypatch, step):
    for number in range(3):
        table = table_python.Table(str(tmp_path), FINGERPRINT, str(number))
        table.insert(*make(range(number * 10, number * 10 + 10)))
        table.close()

    def refuse(*arguments):
        raise OSError(errno.EIO, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(table_files.os, step, refuse)
        with pytest.raises(OSError, match="Input/output error"):
            table_files.compact_table(str(tmp_path), FINGERPRINT)
    assert find(table_python.Table(str(tmp_path), FINGERPRINT), range(30)).all()
    assert table_files.compact_table(str(tmp_path), FINGERPRINT)["records"] == 30
    assert len(table_files.list_logs(str(tmp_path))) == 1
    assert find(table_python.Table(str(tmp_path), FINGERPRINT), range(30)).all()


def test_logs_that_vanish_while_they_are_looked_for(tmp_path, monkeypatch):
    folder, path, vanish = str(tmp_path), tmp_path / "00000.log", [True]
    table = table_python.Table(folder, FINGERPRINT)
    table.insert(*make(range(10)))
    table.close()
    listings, flock = [[], table_files.list_logs(folder)], table_files.fcntl.flock
    with monkeypatch.context() as patch:  # at first the old name is gone and the new one not seen
        patch.setattr(table_python, "list_logs", lambda _: listings[0] or listings.pop(0))
        assert find(table_python.Table(folder, FINGERPRINT), range(10)).all()

    def locked_late(fd, how):
        if vanish.pop():
            path.unlink()
            path.touch()
        vanish.append(False)
        flock(fd, how)

    writer = table_python.Table(folder, FINGERPRINT)
    monkeypatch.setattr(table_files.fcntl, "flock", locked_late)
    assert writer.insert(*make(range(10, 20))) == 10 and path.stat().st_size == 32 * 11
