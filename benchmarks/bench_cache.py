"""Benchmark of the reference cache's table (against a Parquet dict and LMDB) and of packing.

A record is a random key of 16 bytes, a log-prob and a token count. A store gets prepared batches of
256 in its best format: arrays for ours, lists of bytes for the others. Files are in the page cache.
All answers of a store are checked before timing.

- lookup: 1M random known keys among 1M records, into arrays. LMDB uses one read transaction.
- insert: 200k records into an empty store. Ours and LMDB (a transaction per batch, sync=False)
  survive kill -9 after every batch. The dict is written to Parquet once, at the end, and a crash
  before that loses all records.
- insert, fsync: 20k records, on disk after every batch. Ours uses `sync`, LMDB sync=True.
- open: 1M records. LMDB only maps its file, so that its lookups pay for reading. A separate group
  opens 10M records (320 MB) with ours.
- pack: trees like LLaVA's, with 576 image tokens, a prompt of 24 to 124 tokens and two leaves of
  30 to 200. 20k trees also go to first-fit decreasing in numpy, to compare how full the rows are.
  Ours also validates its input.
"""

import shutil
import tempfile
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.race import race
from realign_kernels import _extension
from realign_kernels.refcache.packing import pack_forest
from realign_kernels.refcache.store import open_table

try:
    import lmdb
except ImportError:
    lmdb = None

OURS = "ours"
BATCH, STORED, INSERTED, SYNCED, LARGE = 256, 1_000_000, 200_000, 20_000, 10_000_000
FINGERPRINT = bytes(16)
VALUE = np.dtype([("logp", "<f8"), ("tokens", "<i4")])
ABSENT = (float("nan"), 0)
NOTHING = np.array([ABSENT], VALUE).tobytes()
BUDGETS = (4096, 8192, 16384)


class Records(NamedTuple):
    keys: np.ndarray  # (n,) V16
    logps: np.ndarray  # (n,) float64
    tokens: np.ndarray  # (n,) int32

    @classmethod
    def random(cls, n):
        rng = np.random.default_rng(n)
        keys = np.frombuffer(rng.bytes(16 * n), "V16")
        return cls(keys, -100 * rng.random(n), rng.integers(1, 200, n, dtype=np.int32))

    def split(self, size):
        starts = range(0, len(self.keys), size)
        return [Records(*(column[at : at + size] for column in self)) for at in starts]


class Store:
    """Store of records by key. `finish` is called after the last batch."""

    name: str

    def finish(self):
        pass

    def close(self):
        pass


class Ours(Store):
    name = OURS

    def __init__(self, folder):
        self.table = open_table(folder, FINGERPRINT)
        self.lookup, self.close = self.table.lookup, self.table.close

    def batch(self, records):
        return records

    def insert(self, batch):
        self.table.insert(*batch)

    def insert_and_sync(self, batch):
        self.table.insert(*batch)
        self.table.sync()


class Dict(Store):
    """Dict of (logp, tokens) by key, read from one Parquet file and written back as a whole."""

    name = "dict in Parquet"

    def __init__(self, folder):
        self.path, self.known = Path(folder) / "records.parquet", {}
        if self.path.exists():
            table = pq.read_table(self.path).combine_chunks()
            column = table["key"].chunk(0)  # column.to_pylist() is ten times slower
            keys = np.frombuffer(column.buffers()[1], "V16", len(column)).tolist()
            logps, tokens = (table[name].to_numpy().tolist() for name in ("logp", "tokens"))
            self.known = dict(zip(keys, zip(logps, tokens, strict=True), strict=True))

    def batch(self, records):
        values = zip(records.logps.tolist(), records.tokens.tolist(), strict=True)
        return records.keys.tolist(), list(values)

    def insert(self, batch):
        keep = self.known.setdefault  # keeps the first value of a key, like the other stores
        for key, value in zip(*batch, strict=True):
            keep(key, value)

    def lookup(self, keys):
        get = self.known.get
        logps, tokens = zip(*[get(key, ABSENT) for key in keys], strict=True)
        return np.array(logps), np.array(tokens, np.int32)

    def finish(self):
        logps, tokens = zip(*self.known.values(), strict=True)
        keys = pa.array(list(self.known), pa.binary(16))
        columns = {"key": keys, "logp": np.array(logps), "tokens": np.array(tokens, np.int32)}
        self.path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), self.path)


class Lmdb(Store):
    """LMDB with a transaction per written batch and one for all reads. A commit calls fsync."""

    name = "LMDB"
    options: dict[str, bool] = {}

    def __init__(self, folder):
        self.env, self.reader = lmdb.open(str(folder), map_size=2**30, **self.options), None

    def batch(self, records):
        values = np.empty(len(records.keys), VALUE)
        values["logp"], values["tokens"] = records.logps, records.tokens
        keys = records.keys.tolist()
        return keys, list(zip(keys, values.view("V12").tolist(), strict=True))

    def insert(self, batch):
        with self.env.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(batch[1], overwrite=False)

    insert_and_sync = insert

    def lookup(self, keys):
        if self.reader is None:
            self.reader = self.env.begin()
        get = self.reader.get  # cursor.getmulti is slower
        values = np.frombuffer(b"".join([get(key, NOTHING) for key in keys]), VALUE)
        return values["logp"], values["tokens"]

    def close(self):
        if self.reader is not None:
            self.reader.abort()
        self.env.close()


class LmdbNosync(Lmdb):
    name, options = "LMDB, no sync", {"sync": False}


def stores(*kinds):
    """Parametrizes a benchmark over stores, and skips LMDB if it is not installed."""
    reason = "lmdb is missing. Run pip install -c constraints.txt '.[peers]'"
    skip = pytest.mark.skipif(lmdb is None, reason=reason)
    marked = [pytest.param(k, marks=skip) if issubclass(k, Lmdb) else k for k in kinds]
    return pytest.mark.parametrize("kind", marked, ids=lambda kind: kind.__name__.lower())


def timed(benchmark, group, contestant, call, things, **info):
    """Races `call`. A call that must prepare a store returns its own seconds."""
    case = {"what": group, "count": things and things[0]}
    given = {"contestant": contestant, "call": call, "things": things}
    race(benchmark, f"cache, {group}", case=case, **given, **info)


def timed_store(benchmark, group, kind, make, things):
    """Races the call `make(kind)` with `make(Ours)`."""
    ours = None if kind is Ours else make(Ours)
    timed(benchmark, group, kind.name, make(kind), things, ours=ours)


def check(store, records):
    """Asserts that a store finds every record with its value, and no unknown key."""
    for part in records.split(BATCH):
        logps, tokens = store.lookup(store.batch(part)[0])
        assert np.array_equal(logps, part.logps) and np.array_equal(tokens, part.tokens)
    logps, tokens = store.lookup(store.batch(Records.random(7))[0])
    assert np.isnan(logps).all() and not tokens.any()


@pytest.fixture(scope="module")
def million():
    """1M records, and a function that returns the folder of a store with them."""
    records, made = Records.random(STORED), {}
    with tempfile.TemporaryDirectory() as parent:

        def folder_of(kind):
            if kind not in made:
                made[kind] = Path(parent) / kind.__name__
                with closing(kind(made[kind])) as store:
                    for part in records.split(100_000):
                        store.insert(store.batch(part))
                    store.finish()
            return made[kind]

        yield records, folder_of


@stores(Ours, Dict, LmdbNosync)
def test_lookup(benchmark, million, kind):
    records, folder_of = million
    picks = np.random.default_rng(0).integers(0, STORED, STORED)
    wanted = Records(*(part[picks] for part in records))
    with ExitStack() as stack:

        def lookups(kind):
            store = stack.enter_context(closing(kind(folder_of(kind))))
            check(store, wanted)
            batches = [store.batch(part)[0] for part in wanted.split(BATCH)]

            def lookup():
                for keys in batches:
                    store.lookup(keys)

            return lookup

        timed_store(benchmark, "lookup, 1M keys", kind, lookups, (STORED, "keys"))


def timed_insert(benchmark, group, kind, count, insert):
    """Races inserts of all batches into an empty store, followed by `finish`."""
    records = Records.random(count)
    with tempfile.TemporaryDirectory() as parent:

        def inserts(kind):
            folder = Path(parent) / kind.__name__

            def call():
                shutil.rmtree(folder, ignore_errors=True)
                with closing(kind(folder)) as store:
                    batches = [store.batch(part) for part in records.split(BATCH)]
                    began = time.perf_counter()
                    for batch in batches:
                        getattr(store, insert)(batch)
                    store.finish()
                    return time.perf_counter() - began

            call()
            with closing(kind(folder)) as store:
                check(store, records)
            return call

        timed_store(benchmark, group, kind, inserts, (count, "records"))


@stores(Ours, Dict, LmdbNosync)
def test_insert(benchmark, kind):
    timed_insert(benchmark, "insert, 200k records", kind, INSERTED, "insert")


@stores(Ours, Lmdb)
def test_insert_and_fsync(benchmark, kind):
    timed_insert(benchmark, "insert, fsync, 20k", kind, SYNCED, "insert_and_sync")


def opened(kind, folder):
    """Opens and closes a store; returns the seconds of the opening."""
    began = time.perf_counter()
    with closing(kind(folder)):
        return time.perf_counter() - began


@stores(Ours, Dict, LmdbNosync)
def test_open(benchmark, million, kind):
    records, folder_of = million
    with closing(kind(folder_of(kind))) as store:
        check(store, records)
    things = None if issubclass(kind, Lmdb) else (STORED, "records")
    timed_store(
        benchmark, "open, 1M records", kind, lambda k: partial(opened, k, folder_of(k)), things
    )


@pytest.mark.slow
@pytest.mark.skipif(_extension.missing_reason() is not None, reason="takes minutes in pure Python")
def test_open_ours_with_10m(benchmark):
    records = Records.random(LARGE)
    with tempfile.TemporaryDirectory() as folder:
        for todo in (Ours.insert, check):
            with closing(Ours(folder)) as store:
                for part in records.split(1_000_000):
                    todo(store, part)
        del store, records, part
        call = partial(opened, Ours, folder)
        timed(benchmark, "open, 10M records", OURS, call, (LARGE, "records"))


def llava_like(trees):
    """Arguments of `pack_forest` without the budget, and the tokens of each tree."""
    rng = np.random.default_rng(trees)
    roots, leaves = 576 + rng.integers(24, 125, trees), rng.integers(30, 201, (trees, 2))
    return (roots, leaves.ravel(), np.repeat(np.arange(trees), 2)), roots + leaves.sum(1)


def first_fit_decreasing(lengths, budget):
    """(R,) row of each tree: the longest tree first, into the first row with room."""
    rooms, rows, opened = np.full(len(lengths), budget), np.empty(len(lengths), np.int64), 0
    for tree in np.argsort(-lengths, kind="stable"):
        row = int((rooms[: opened + 1] >= lengths[tree]).argmax())
        rows[tree], opened = row, max(opened, row + 1)
        rooms[row] -= lengths[tree]
    return rows


def our_rows(forest, packed):
    """(R,) row of each tree in the output of `pack_forest`."""
    rows = np.empty(len(forest[0]), np.int64)
    rows[packed.tree_root] = packed.tree_row
    assert np.array_equal(np.sort(packed.tree_root), np.arange(len(rows)))  # each once
    assert np.array_equal(packed.tree_root[packed.leaf_tree], forest[2])
    return rows


def filled(rows, lengths, budget):
    """Filled share of the rows; asserts that no row is empty or over the budget."""
    held = np.bincount(rows, lengths)
    assert held.max() <= budget and held.min() > 0 and held.sum() == lengths.sum()
    return float(held.sum() / (len(held) * budget))


def timed_pack(benchmark, trees, group, contestant, budget):
    """Races a contestant of packing with ours, and checks its rows with `filled`."""
    forest, lengths = llava_like(trees)
    ours = partial(pack_forest, *forest, budget)
    call = ours if contestant == OURS else partial(first_fit_decreasing, lengths, budget)
    rows = our_rows(forest, call()) if contestant == OURS else call()
    share, things = filled(rows, lengths, budget), (2 * trees, "leaves")
    timed(benchmark, f"pack, {group}, {budget}", contestant, call, things, ours=ours, filled=share)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("contestant", [OURS, "first fit decreasing"])
def test_pack_20k_trees(benchmark, contestant, budget):
    timed_pack(benchmark, 20_000, "20k trees", contestant, budget)


@pytest.mark.parametrize("budget", BUDGETS)
def test_pack_1m_leaves(benchmark, budget):
    timed_pack(benchmark, 500_000, "1M leaves", OURS, budget)
