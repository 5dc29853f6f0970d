"""Records whose values follow from their numbers, and the processes that the table tests start.

    python table_worker.py PACKAGE IMPLEMENTATION ROLE ARGUMENT...

A worker imports numpy and the table alone: the package itself imports torch, which takes seconds.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np

FINGERPRINT = bytes(range(1, 17))
SPAN = 2**40  # the numbers of writer w start at w * SPAN


def make(numbers):
    """Keys, log-probs and tokens of records with these numbers."""
    numbers = np.asarray(numbers, np.int64)
    keys = np.zeros((len(numbers), 2), np.int64)
    keys[:, 0] = numbers
    return keys.view("V16").ravel(), -1 / (numbers + 3), (numbers % 1000 + 1).astype(np.int32)


def find(table, numbers):
    """(n,) which records are there. A value that is not the record's own is an error."""
    keys, logps, tokens = make(numbers)
    found, counts = table.lookup(keys)
    absent = np.isnan(found) & (counts == 0)
    right = (found == logps) & (counts == tokens)
    assert (absent | right).all(), "a wrong value"
    return right


def implementation(package, name):
    """(Table, compact_table) of `extension` or `python`, without importing torch."""
    if "realign_kernels" not in sys.modules:
        sys.modules["realign_kernels"] = types.ModuleType("realign_kernels")
        sys.modules["realign_kernels"].__path__ = [package]
    if name == "extension":
        from realign_kernels._C import Table, compact_table
    else:
        from realign_kernels.refcache.table_files import compact_table
        from realign_kernels.refcache.table_python import Table
    return Table, compact_table


def write(table_class, folder, board, number, seconds):
    """Inserts, reopens now and then, and posts on the board how many records are acknowledged."""
    posted, until, done = np.memmap(board, np.int64, "r+"), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        table = table_class(folder, FINGERPRINT)
        for _ in range(200):
            count = random.randint(1, 100)
            assert table.insert(*make(number * SPAN + done + np.arange(count))) == count
            done += count
            posted[number] = done
            time.sleep(0.0005)
            if time.monotonic() > until:
                break
        table.close()
    return {"written": done}


def read(table_class, folder, board, seconds):
    """Looks up what was posted before its refresh: none of it may be missing."""
    posted, until, checked = np.memmap(board, np.int64, "r"), time.monotonic() + seconds, 0
    table = table_class(folder, FINGERPRINT, None, True)
    while time.monotonic() < until:
        there = np.array(posted)
        table.refresh()
        for number, count in enumerate(there.tolist()):
            if count:
                numbers = np.random.default_rng(checked).integers(count, size=500)
                assert find(table, number * SPAN + numbers).all(), "a lost record"
                find(table, number * SPAN + count + np.arange(300))  # there or not, but right
                checked += 500
    stats = table.stats()
    assert stats["conflicts"] == 0 and stats["records"] >= there.sum()
    return {"checked": checked}


def compact(compact_table, folder, seconds):
    """Compacts again and again."""
    until, merged = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        merged += compact_table(folder, FINGERPRINT)["logs_merged"]
        time.sleep(0.1)
    return {"merged": merged}


def kill(table_class, folder, rounds):
    """Forks writers and kills each at a random moment; all it acknowledged must be there."""
    acknowledged, base = 0, folder
    for number in range(rounds):
        folder = f"{base}/{number // 10}"  # small tables: every round reads all of its own
        receive, send = os.pipe()
        if (child := os.fork()) == 0:
            table, done = table_class(folder, FINGERPRINT), 0
            while True:
                count = random.randint(1, 400)
                table.insert(*make(number * SPAN + done + np.arange(count)))
                done += count
                os.write(send, done.to_bytes(8, "little"))
        os.close(send)
        last = os.read(receive, 8)  # the first batch is in
        time.sleep(random.random() * 0.003)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(receive, 8 * 8192):
            last = more[-8:]
        os.close(receive)
        done = int.from_bytes(last, "little")
        acknowledged += done
        table = table_class(folder, FINGERPRINT, None, True)
        assert find(table, number * SPAN + np.arange(done)).all(), "an acknowledged record is lost"
        stats = table.stats()
        assert stats["logs"] == 1 and stats["bad"] == stats["duplicates"] == 0, stats
    return {"acknowledged": acknowledged}


def fill_disk(table_class, folder):
    """A limit on file sizes stands for a full disk: a short write, then an error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    table = table_class(folder, FINGERPRINT)
    table.insert(*make(range(100)))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * (101 + 7) + 5, hard))
    try:
        table.insert(*make(range(90, 130)))
    except OSError as error:
        refused = [error.errno, error.strerror, error.filename]
    kept = int(find(table, range(200)).sum())
    size = Path(folder, "00000.log").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    again = table.insert(*make(range(90, 130)))
    table.close()
    table = table_class(folder, FINGERPRINT, None, True)
    total = int(find(table, range(200)).sum())
    return {"refused": refused, "kept": kept, "size": size, "again": again, "total": total}


def main():
    """Runs one role and prints what it returns."""
    package, name, role, folder, *arguments = sys.argv[1:]
    table_class, compact_table = implementation(package, name)
    if role == "write":
        board, number, seconds = arguments
        result = write(table_class, folder, board, int(number), float(seconds))
    elif role == "read":
        result = read(table_class, folder, arguments[0], float(arguments[1]))
    elif role == "compact":
        result = compact(compact_table, folder, float(arguments[0]))
    elif role == "kill":
        result = kill(table_class, folder, int(arguments[0]))
    else:
        result = fill_disk(table_class, folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
