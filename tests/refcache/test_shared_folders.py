"""Caches in folders that other users can write to: links, pipes, foreign files and databases.

The truth is independent of the table: the bytes of a victim's file outside of the cache, the files
in its folder, and the time.
"""

import fcntl
import json
import os
import signal
import sqlite3
import stat
import struct
import tempfile
import threading
import time
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from forests import make_forests
from table_records import FINGERPRINT, find, make, needs_extension

from realign_kernels import ReferenceCache, refcache
from realign_kernels.refcache import store
from realign_kernels.refcache.cache import fingerprint_digest
from realign_kernels.refcache.store import DATABASE, compact_table, open_table

FIRST = {"logs": "00000.log", "database": DATABASE}
SECOND = {"logs": "00001.log", "database": "records-1.sqlite"}
PRINT = {"weights": "a" * 32, "dtype": "fp32"}
TEXT = b"export A=1\n" * 7  # 77 bytes, 13 of them after the last whole record
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to give files to another user"
)


@pytest.fixture
def victim(tmp_path):
    """A file of the victim outside of the cache. It must not change."""
    path = tmp_path / "home" / "bashrc"
    path.parent.mkdir()
    path.write_bytes(TEXT)
    yield path
    assert path.read_bytes() == TEXT and os.listdir(path.parent) == ["bashrc"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def within(seconds, call, *arguments):
    """The result or the error of a call, which must not block."""
    results = []

    def run():
        try:
            results.append(call(*arguments))
        except (OSError, ValueError) as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"the call failed with a strange error, or takes more than {seconds} s"
    return results[0]


def use(folder):
    """Insert and find records, and compact. Returns the warnings of the first opening."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = open_table(folder, FINGERPRINT)
        texts = [str(warning.message) for warning in caught]
        table.insert(*make(range(10)))
        table.close()
        compact_table(folder, FINGERPRINT)
        assert find(open_table(folder, FINGERPRINT, read_only=True), range(10)).all()
    return texts


def plant(what, path, victim):
    if what == "link":
        path.symlink_to(victim)
    elif what == "dangling link":
        path.symlink_to(victim.with_name("new"))
    elif what == "hard link":
        path.hardlink_to(victim)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif what == "device":
        path.symlink_to("/dev/zero")


PLANTED = ["link", "dangling link", "hard link", "pipe", "folder", "socket", "device"]


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_file_is_skipped_with_one_warning(kind, folder, victim, what):
    path = folder / FIRST[kind]
    plant(what, path, victim)
    before = os.lstat(path)
    (text, *more) = within(20, use, folder) or [""]
    if kind == "logs" and what == "hard link":  # it is read, but has no records
        assert text == ""
    else:
        assert str(path) in text and not more and "\n" not in text
    assert os.lstat(path).st_ino == before.st_ino  # it was not removed
    assert (folder / SECOND[kind]).is_file()


@pytest.mark.parametrize("what", PLANTED)
@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_a_file_beside_the_database_is_not_opened(folder, victim, what, suffix, monkeypatch):
    monkeypatch.setattr(store, "extension", lambda: None)
    victim.write_bytes(b"")  # SQLite writes a journal over an empty file
    open_table(folder, FINGERPRINT).insert(*make([50]))
    plant(what, Path(f"{folder / DATABASE}{suffix}"), victim)
    (text,) = within(20, use, folder)
    assert DATABASE + suffix in text and victim.read_bytes() == b""
    victim.write_bytes(TEXT)


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_write_ahead_log_beside_the_database_is_not_opened(folder, suffix, monkeypatch):
    """SQLite would read it, and map the other file. Its owner could cut the file during a read."""
    monkeypatch.setattr(store, "extension", lambda: None)
    open_table(folder, FINGERPRINT).insert(*make([50]))
    path = Path(f"{folder / DATABASE}{suffix}")
    path.write_bytes(b"planted")
    assert f"{path} exists" in use(folder)[0] and path.read_bytes() == b"planted"


@pytest.mark.parametrize("written", [0, 8, 12, 512])
def test_a_journal_that_another_process_writes_is_no_reason(written, tmp_path):
    """Its header starts with the bytes that a super-journal's record ends with."""
    database = tmp_path / DATABASE
    with closing(sqlite3.connect(database)) as table:
        table.execute("CREATE TABLE entries (key)")
    header = bytes.fromhex("d9d505f920a163d7") + bytes(504)
    (tmp_path / f"{DATABASE}-journal").write_bytes(header[:written])
    assert store._refusal(str(database)) == ""


def test_a_journal_that_another_process_removes_is_no_reason(tmp_path, monkeypatch):
    """Between the look-up of its name and that of its status, it has no name."""
    database = tmp_path / DATABASE
    with closing(sqlite3.connect(database)) as table:
        table.execute("CREATE TABLE entries (key)")
    with (tmp_path / "removed").open("wb") as journal:
        os.unlink(journal.name)
        status, lstat = os.fstat(journal.fileno()), os.lstat
        name = f"{database}-journal"
        monkeypatch.setattr(os, "lstat", lambda path: status if path == name else lstat(path))
        assert status.st_nlink == 0 and store._refusal(str(database)) == ""


def test_a_journal_cannot_make_sqlite_remove_a_file(folder, victim, monkeypatch):
    """A super-journal in a journal is removed after the rollback: SQLite calls it stale."""
    monkeypatch.setattr(store, "extension", lambda: None)
    open_table(folder, FINGERPRINT).insert(*make(range(5)))
    page = (folder / DATABASE).read_bytes()[:4096]
    pages = (folder / DATABASE).stat().st_size // 4096
    magic = bytes.fromhex("d9d505f920a163d7")
    header = (magic + struct.pack(">IIIII", 1, 0, pages, 512, 4096)).ljust(512, b"\0")
    total = sum(page[place] for place in range(4096 - 200, 0, -200))
    name = os.fsencode(victim)
    final = struct.pack(">I", (1 << 30) // 4096 + 1) + name
    final += struct.pack(">II", len(name), sum(name)) + magic
    journal = header + struct.pack(">I", 1) + page + struct.pack(">I", total) + final
    Path(f"{folder / DATABASE}-journal").write_bytes(journal)
    assert "SQLite would delete" in use(folder)[0]


CONTENTS = {
    "text": TEXT,
    "part of a header": b"RALNREF1" + bytes(12),
    "zeros": bytes(96),
    "a damaged header": b"RALNREF2" + bytes(56),
}


@needs_extension
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_file_without_a_header_is_neither_written_nor_removed(folder, content):
    path = folder / "00000.log"
    path.write_bytes(content)
    use(folder)
    assert path.read_bytes() == content
    with pytest.raises(OSError, match="log 00000 is a file without the header"):
        open_table(folder, FINGERPRINT, writer="00000").insert(*make([77]))
    assert path.read_bytes() == content


@needs_extension
@pytest.mark.parametrize("what", PLANTED)
def test_the_log_of_a_requested_name_is_not_opened_through_a_link(folder, victim, what):
    plant(what, folder / "mine.log", victim)

    def insert():
        with warnings.catch_warnings(action="ignore"):
            open_table(folder, FINGERPRINT, writer="mine").insert(*make([1]))

    error = within(20, insert)
    assert isinstance(error, OSError) and "log mine is a" in str(error), error


@needs_extension
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_lock_stops_only_the_compaction(folder, victim, what):
    plant(what, folder / f".compact-{os.geteuid()}.lock", victim)
    table = open_table(folder, FINGERPRINT)
    table.insert(*make(range(3)))
    error = within(20, compact_table, folder, FINGERPRINT)
    assert isinstance(error, OSError) and "the lock of compactions is a" in str(error), error
    assert find(open_table(folder, FINGERPRINT), range(3)).all()


@needs_extension
def test_a_log_that_gets_a_second_link_is_no_longer_written(folder, tmp_path):
    table = open_table(folder, FINGERPRINT)
    table.insert(*make(range(5)))
    backup = tmp_path / "backup"
    backup.hardlink_to(folder / "00000.log")
    before = backup.read_bytes()
    assert table.insert(*make(range(5, 8))) == 3 and table.writer == "00001"
    table.close()
    table = open_table(folder, FINGERPRINT)  # a later run
    assert find(table, range(8)).all()
    assert table.insert(*make(range(8, 9))) == 1 and table.writer == "00001"
    assert compact_table(folder, FINGERPRINT)["logs_skipped"] == 1
    assert backup.read_bytes() == before


@needs_extension
@needs_root
def test_logs_of_other_users_are_read_but_neither_written_nor_merged(folder):
    table = open_table(folder, FINGERPRINT)
    table.insert(*make(range(5)))
    table.close()
    theirs, foreign = folder / "00000.log", folder / "zz.log"
    foreign.write_bytes(theirs.read_bytes())
    open_table(folder / "other", bytes(16)).insert(*make(range(5)))
    foreign.write_bytes((folder / "other" / "00000.log").read_bytes())
    for path in (theirs, foreign):
        os.chown(path, 65534, 65534)
    before = theirs.read_bytes()
    with pytest.warns(
        RuntimeWarning, match=r"zz.log is a log of another table, .* by another user"
    ):
        table = open_table(folder, FINGERPRINT)
    assert find(table, range(5)).all()  # writers are trusted for the values
    assert table.insert(*make(range(10))) == 5 and table.writer == "00001"
    table.close()
    assert compact_table(folder, FINGERPRINT)["logs_skipped"] == 2
    assert theirs.read_bytes() == before and foreign.exists()
    os.chown(foreign, os.geteuid(), -1)  # an own log of another table is a mistake to report
    with pytest.raises(ValueError, match="belongs to the table with fingerprint 0000"):
        open_table(folder, FINGERPRINT)


@needs_root
def test_a_database_of_another_user_is_not_opened(folder, monkeypatch):
    monkeypatch.setattr(store, "extension", lambda: None)
    open_table(folder, FINGERPRINT).insert(*make(range(5)))
    os.chown(folder / DATABASE, 65534, 65534)
    before = (folder / DATABASE).read_bytes()
    assert "belongs to another user" in use(folder)[0]
    assert (folder / DATABASE).read_bytes() == before and (folder / "records-1.sqlite").exists()


@needs_extension
def test_names_of_other_programs(folder):
    """A number beyond 64 bits, and names that would change a terminal."""
    for number in ("99999999999999999999", "9223372036854775807"):
        name = f"+compacted-{number}.log"
        open_table(folder, FINGERPRINT).insert(*make([len(os.listdir(folder))]))
        (folder / "00000.log").rename(folder / name)
    (folder / "x\x1b[2J.log").symlink_to("/dev/zero")
    assert use(folder) == []
    names = sorted(os.listdir(folder))
    assert names[:2] == ["+compacted-00000.log", f".compact-{os.geteuid()}.lock"], names


@needs_extension
def test_a_huge_sparse_log_takes_no_time_and_no_memory(folder):
    with (folder / "big.log").open("wb") as file:
        file.truncate(1 << 43)  # 8 TB
    began = time.monotonic()
    table = within(20, open_table, folder, FINGERPRINT)
    assert table.insert(*make(range(5))) == 5 and time.monotonic() - began < 5
    assert table.stats()["bad"] == (1 << 43) // 32


@needs_extension
@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="needs a system with file leases")
def test_a_leased_log_does_not_block(folder):
    (folder / "a.log").write_bytes(b"")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the holder of the lease gets it
    with (folder / "a.log").open("ab") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            began = time.monotonic()
            with pytest.warns(RuntimeWarning, match=r"a.log is leased by another process"):
                open_table(folder, FINGERPRINT)
            assert time.monotonic() - began < 5  # the system breaks a lease after 45 s
        finally:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            signal.signal(signal.SIGIO, before)


def test_a_link_in_place_of_the_folder_is_refused(kind, tmp_path, victim):
    for target in (victim.parent, tmp_path / "absent"):
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        for call in (open_table, compact_table):
            with pytest.raises(OSError, match="folder of a table is a symbolic link"):
                call(link, FINGERPRINT)
    assert not (tmp_path / "absent").exists()
    (tmp_path / "caches").mkdir()
    (tmp_path / "chosen").symlink_to(tmp_path / "caches")  # a parent may be a link
    (tmp_path / "caches" / fingerprint_digest(PRINT)).symlink_to(victim.parent)
    with pytest.raises(OSError, match="folder of a table is a symbolic link"):
        ReferenceCache(tmp_path / "chosen", PRINT)
    assert refcache.tables(tmp_path / "chosen") == {}
    with ReferenceCache(tmp_path / "chosen", PRINT | {"dtype": "bf16"}) as cache:
        assert cache.insert(make_forests(2), -np.ones(6)) == 6


def test_a_link_in_place_of_the_folder_during_a_run(kind, folder, victim):
    table = open_table(folder / "table", FINGERPRINT)
    cache = ReferenceCache(folder, PRINT)
    for path in (folder / "table", cache.folder):
        path.rename(folder / f"moved {path.name}")
        path.symlink_to(victim.parent)
    for call in (
        lambda: table.insert(*make(range(3))),
        lambda: compact_table(folder / "table", FINGERPRINT),
        lambda: cache.insert(make_forests(2), -np.ones(6)),
        cache.close,
    ):
        with pytest.raises(OSError, match="folder of a table is a symbolic link"):
            call()


@needs_extension
def test_the_warning_of_an_unreadable_log_names_its_owner():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place, pytest.warns(RuntimeWarning) as caught:
        os.chmod(place, 0o755)
        open_table(place, FINGERPRINT, writer="a").insert(*make(range(3)))
        Path(place, "a.log").chmod(0)
        Path(place, "b.log").symlink_to("a.log")
        os.seteuid(user or 65534)  # root reads every file
        try:
            assert len(open_table(place, FINGERPRINT, read_only=True)) == 0
        finally:
            os.seteuid(user)
    unreadable, link = (str(warning.message) for warning in caught)
    assert unreadable.endswith("Ask its owner to make it readable (chmod a+r).")
    assert "Remove it" not in unreadable and "Remove it" in link


def test_new_files_honour_the_umask(kind, folder):
    for umask, mode in ((0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            for number in range(2):
                with ReferenceCache(folder / str(umask), PRINT) as cache:
                    cache.insert(make_forests(2, seed=number), -np.ones(6))
            with (cache.folder / (FIRST[kind])).open("ab") as file:
                file.write(b"torn" * (kind == "logs"))
            refcache.compact(cache.folder)
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in cache.folder.iterdir()}
        assert set(modes.values()) == {mode} and len(modes) >= 2, modes


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
DATABASES = {
    "an endless view": [f"CREATE VIEW records AS {ENDLESS} SELECT i AS id, x'' AS record FROM n"],
    "a trigger": [store._RECORDS, "CREATE TRIGGER t AFTER INSERT ON records BEGIN SELECT 1; END"],
    "a generated column": [
        "CREATE TABLE records (id INTEGER PRIMARY KEY, record AS (zeroblob(9)))"
    ],
}


@pytest.mark.parametrize("statements", DATABASES.values(), ids=DATABASES)
def test_a_database_with_other_objects_is_refused(folder, statements, monkeypatch):
    monkeypatch.setattr(store, "extension", lambda: None)
    with closing(sqlite3.connect(folder / DATABASE, isolation_level=None)) as made:
        made.execute(store._ABOUT)
        made.execute("INSERT INTO about VALUES (?, ?)", (FINGERPRINT, bytes(16)))
        for statement in statements:
            made.execute(statement)
    error = within(20, open_table, folder, FINGERPRINT)
    assert isinstance(error, ValueError) and "is not a table of" in str(error), error


@pytest.fixture
def database(folder, monkeypatch):
    """A database with three records."""
    monkeypatch.setattr(store, "extension", lambda: None)
    open_table(folder, FINGERPRINT).insert(*make(range(3)))
    return folder / DATABASE


def test_a_database_with_a_write_ahead_log_is_not_opened(folder, database):
    with closing(sqlite3.connect(database)) as made:
        made.execute("PRAGMA journal_mode = WAL")
    assert "write-ahead log" in use(folder)[0]


def test_a_large_record_is_not_read(folder, database):
    with closing(sqlite3.connect(database)) as made, made:
        made.execute("UPDATE records SET record = zeroblob(10000) WHERE id = 2")
    with pytest.warns(RuntimeWarning, match="is damaged .*too big"):
        open_table(folder, FINGERPRINT)


def test_an_interrupt_is_no_damage(folder, database, monkeypatch):
    """SQLite clears a KeyboardInterrupt in its progress handler, and reports an interruption."""
    open_table(folder, FINGERPRINT).insert(*make(range(2000)))
    monkeypatch.setattr(store, "_STEPS", 1)
    monkeypatch.setattr(os.path, "getsize", lambda path: 2**40)
    for _ in range(10):
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        try:
            with pytest.raises(KeyboardInterrupt):
                while True:
                    open_table(folder, FINGERPRINT)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert os.listdir(folder) == [DATABASE]


def endless_tree(path, root, leaf, start):
    """Replace the page `root` by a tree of 15 levels, whose 8**15 leaves are one page."""
    data = bytearray(path.read_bytes())
    pages = len(data) // 4096
    chain = [root, *range(pages + 1, pages + 15)]
    data += bytes(14 * 4096)
    moved = bytes(data[(leaf - 1) * 4096 + start : leaf * 4096])
    last = pages + 15
    content = struct.unpack(">H", moved[5:7])[0]
    page = bytearray(moved[:8] + moved[8 : 8 + 2 * 50]).ljust(4096, b"\0")
    page[content:] = data[(leaf - 1) * 4096 + content : leaf * 4096]
    data += page
    for level, number in enumerate(chain):
        child = chain[level + 1] if level < 14 else last
        first = start if number == root else 0
        cells = [struct.pack(">I", child) + bytes([key + 100]) for key in range(7)]
        body = struct.pack(">BHHHBI", 5, 0, len(cells), 4096 - 5 * len(cells), 0, child)
        for index in range(len(cells)):
            body += struct.pack(">H", 4096 - 5 * (index + 1))
        at = (number - 1) * 4096
        data[at + first : at + 4096] = bytes(4096 - first)
        data[at + first : at + first + len(body)] = body
        for index, cell in enumerate(cells):
            end = at + 4096 - 5 * index
            data[end - 5 : end] = cell
    data[28:32] = struct.pack(">I", len(data) // 4096)
    path.write_bytes(data)


@pytest.mark.parametrize("table", ["records", "sqlite_master"])
def test_pages_in_circles_do_not_read_for_ever(folder, database, table):
    with closing(sqlite3.connect(database)) as made, made:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'records'"
        root = made.execute(query).fetchone()[0] if table == "records" else 1
        if table == "sqlite_master":
            made.execute("PRAGMA writable_schema = ON")
            made.execute("DELETE FROM sqlite_master")
            made.execute("INSERT INTO sqlite_master VALUES ('index', 'i', 'records', 2, '')")
    endless_tree(database, root, root, 100 if root == 1 else 0)

    def opened():
        with warnings.catch_warnings(action="ignore"):
            return len(open_table(folder, FINGERPRINT))

    assert within(30, opened) == 0
    assert Path(f"{database}.damaged").exists()


DESCRIPTIONS = {
    "a list": b"[]",
    "a number": b"5",
    "depth": b"[" * 60000,
    "no UTF-8": b"\xff\xfe",
    "numbers": b'{"weights": 5}',
    "a control character": b'{"weights": "\\u001b[2J"}',
    "nested": b'{"weights": {"a": 1}}',
    "a large file": b" " * (1 << 17) + b"{}",
}


@pytest.mark.parametrize("content", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_an_unsuitable_description_counts_as_none(folder, content):
    described(folder, lambda path: path.write_bytes(content))


@pytest.mark.parametrize("what", PLANTED)
def test_a_description_is_not_opened_through_a_link(folder, victim, what):
    described(folder, lambda path: plant(what, path, victim))


def test_a_linked_description_is_not_read(folder, tmp_path):
    (tmp_path / "elsewhere").write_text(json.dumps(PRINT | {"dtype": "bf16"}))
    described(folder, lambda path: path.symlink_to(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("parts", "padding"),
    [
        ({"a": 5}, 0),
        ({"a": {"b": "c"}}, 0),
        ({"\x1b[2J": "a"}, 0),
        ({"a": "\u202e"}, 0),
        (PRINT, 99999),
    ],
)
def test_the_description_of_a_well_named_folder_is_checked_too(folder, parts, padding):
    """The folder has the digest of its description, which another user chose."""
    other = folder / fingerprint_digest(parts)
    other.mkdir()
    (other / "table.json").write_text(" " * padding + json.dumps(parts))
    with ReferenceCache(folder, PRINT | {"dtype": "bf16"}) as cache:
        assert refcache.tables(folder)[other] == {} and cache.nearest() is None


def described(folder, planted):
    """Open a table with a planted description next to another table, and write to it."""
    other = folder / fingerprint_digest(PRINT | {"dtype": "bf16"})
    other.mkdir()
    planted(other / "table.json")
    with ReferenceCache(folder, PRINT) as cache:
        planted(cache.folder / "table.json")
        assert within(20, refcache.tables, folder) == {other: {}, cache.folder: {}}
        assert not within(20, lambda: [cache.nearest()])[0]
        assert within(20, cache.insert, make_forests(2), -np.ones(6)) == 6
        about = cache.folder / "table.json"
        assert about.is_dir() or json.loads(about.read_text()) == PRINT  # it was replaced
        assert not list(cache.folder.glob(".table.json*"))
