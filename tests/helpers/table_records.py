"""Records with values computed from their numbers, and the processes in tests of the store."""

import os
import random
import signal
import time

import numpy as np
import pytest

from realign_kernels._extension import extension
from realign_kernels.refcache.store import compact_table, open_table

FINGERPRINT = bytes(range(1, 17))
needs_extension = pytest.mark.skipif(
    extension() is None, reason="needs the C++ extension; `make build` builds it"
)
SPAN = 2**40  # writer w uses numbers from w * SPAN


def make(numbers):
    """Keys, log-probs and tokens of the records with these numbers."""
    numbers = np.asarray(numbers, np.int64)
    keys = np.zeros((len(numbers), 2), np.int64)
    keys[:, 0] = numbers
    return keys.view("V16").ravel(), -1 / (numbers + 3), (numbers % 1000 + 1).astype(np.int32)


def find(table, numbers):
    """(n,) mask of the records that exist. A wrong value is an error."""
    keys, logps, tokens = make(numbers)
    found, counts = table.lookup(keys)
    absent = np.isnan(found) & (counts == 0)
    right = (found == logps) & (counts == tokens)
    assert (absent | right).all(), "a wrong value"
    return right


def write(folder, board, number, seconds):
    """Inserts records, sometimes reopens, and writes the acknowledged number to the board."""
    posted, until, done = np.memmap(board, np.int64, "r+"), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        table = open_table(folder, FINGERPRINT)
        for _ in range(20):
            count = random.randint(1, 100)
            assert table.insert(*make(number * SPAN + done + np.arange(count))) == count
            done += count
            posted[number] = done
            time.sleep(0.0005)
            if time.monotonic() > until:
                break
        table.close()
    return done


def read(folder, board, seconds):
    """Looks up records that were on the board before its refresh. None may be missing."""
    posted, until, checked = np.memmap(board, np.int64, "r"), time.monotonic() + seconds, 0
    table = open_table(folder, FINGERPRINT, read_only=True)
    while time.monotonic() < until:
        there = np.array(posted)
        table.refresh()
        for number, count in enumerate(there.tolist()):
            if count:
                numbers = np.random.default_rng(checked).integers(count, size=500)
                assert find(table, number * SPAN + numbers).all(), "a lost record"
                find(table, number * SPAN + count + np.arange(300))  # may be missing, but not wrong
                checked += 500
    stats = table.stats()
    assert stats["conflicts"] == stats["bad"] == 0 and stats["records"] >= there.sum()
    return checked


def compact(folder, seconds, slack):
    """Compacts repeatedly, and returns the number of merged logs.

    On a busy machine it continues for up to `slack` seconds, until it has merged a log.
    """
    until, merged = time.monotonic() + seconds, 0
    while time.monotonic() < until + (0 if merged else slack):
        merged += compact_table(folder, FINGERPRINT)["logs_merged"]
        time.sleep(0.1)
    return merged


def kill_writer(folder, number):
    """Forks a writer and kills it at a random time. Returns the number of acknowledged records."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        table, done = open_table(folder, FINGERPRINT), 0
        while True:
            count = random.randint(1, 400)
            table.insert(*make(number * SPAN + done + np.arange(count)))
            done += count
            os.write(send, done.to_bytes(8, "little"))
    os.close(send)
    last = os.read(receive, 8)  # after the first batch
    time.sleep(random.random() * 0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(receive, 8 * 8192):
        last = more[-8:]
    os.close(receive)
    return int.from_bytes(last, "little")
