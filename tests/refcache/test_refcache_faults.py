"""The reference cache with killed processes, many ranks, and removed folders."""

import json
import os
import pickle
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from forests import Scorer, fill, make_forests
from forked_ranks import run_ranks
from test_refcache import PRINT, exact

from realign_kernels import ReferenceCache, collect_leaves, refcache


def test_kill_9_at_random_points_loses_at_most_the_batch_in_flight(tmp_path):
    """Each pass over 600 leaves runs in a forked process that is killed, and is then resumed."""
    forests = make_forests(200)
    with ReferenceCache(tmp_path / "whole", PRINT) as cache:
        whole = fill(cache, forests)
        truth = cache.lookup(forests).logps
    in_flight = max(len(pairs) for pairs in whole.batches)
    rng, written = random.Random(0), []
    for trial in range(12):
        folder = tmp_path / f"trial {trial}"
        progress, report = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                begun = partial(os.write, report, b".")
                fill(ReferenceCache(folder, PRINT), forests, 0.001, begun)
            finally:
                os._exit(0)
        os.close(report)
        for _ in range(rng.randrange(len(whole.batches))):  # counts batches, because times vary
            assert os.read(progress, 1)
        time.sleep(rng.uniform(0.0, 0.003))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(progress)
        with ReferenceCache(folder, PRINT) as cache:
            before = int((~cache.missing(forests)).sum())
            rest = fill(cache, forests)
            assert cache.lookup(forests).logps.tolist() == truth.tolist()
        written.append(before)
        assert rest.filled.recomputed <= in_flight
        assert sum(map(len, rest.batches)) - (len(truth) - before) <= in_flight
    assert len([n for n in written if 0 < n < len(truth)]) > 7, written


def passes_of_a_rank(folder):
    """Passes with one shared folder, with one folder per rank, and with ranks that disagree."""
    dist.init_process_group("gloo")
    rank, forests = dist.get_rank(), make_forests(100)
    for place in ("shared", f"rank{rank}"):
        with ReferenceCache(folder / place, PRINT) as cache:
            done = fill(cache, forests)
            logps = cache.lookup(forests).logps.tolist()
            result = json.dumps([done.filled.leaves, len(cache), logps])
        (folder / f"{place[:4]} {rank}.json").write_text(result)
    few = make_forests(30)
    for name, own, parts, options in (
        ("leaves", few[rank::2], {}, {}),
        ("leaves", make_forests(30, seed=rank), {}, {}),
        ("fingerprint", few, {"weights": str(rank)}, {}),
        ("settings", few, {}, {"batch_rows": 4 + rank}),
    ):
        with ReferenceCache(folder / f"apart{rank}", PRINT | parts) as cache:
            message = f"rank 1 and rank 0 differ in: {name}. Give all ranks"
            with pytest.raises(ValueError, match=message):
                fill(cache, own, **options)
            assert len(cache) == 0
    dist.destroy_process_group()


def test_ranks_divide_the_work_and_must_agree(tmp_path):
    forests = make_forests(100)
    with ReferenceCache(tmp_path / "single", PRINT) as cache:
        fill(cache, forests)
        truth = cache.lookup(forests).logps.tolist()
    run_ranks(passes_of_a_rank, 2, tmp_path / "log", tmp_path)
    for place in ("shar", "rank"):
        results = [json.loads((tmp_path / f"{place} {rank}.json").read_text()) for rank in (0, 1)]
        assert sum(leaves for leaves, _, _ in results) == 300
        assert min(leaves for leaves, _, _ in results) > 100
        for _, held, logps in results:
            assert held == 300
            assert logps == truth  # the same batches, so bitwise equal for any number of ranks


def test_a_folder_removed_during_a_pass(tmp_path):
    forests = make_forests(60)
    with ReferenceCache(tmp_path, PRINT) as cache:
        scorer = Scorer(forests)

        def model(pairs):
            if len(scorer.batches) == 3:
                shutil.rmtree(cache.folder)
            return scorer(pairs)

        cache.fill(model, forests, build=scorer.build, row_tokens=64, batch_rows=4)
        assert len(scorer.batches) > 5
        assert cache.lookup(forests).logps == pytest.approx(exact(forests), rel=2e-5)
    with ReferenceCache(tmp_path, PRINT) as cache:  # has the values written after the removal
        assert 0 < cache.missing(forests).sum() < 180


def test_an_unwritable_cache_is_an_error_before_the_first_forward(tmp_path, monkeypatch):
    forests = make_forests(10)
    with ReferenceCache(tmp_path, PRINT) as cache:
        fill(cache, forests[:5])
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert fill(cache, forests[:5]).batches == []  # all leaves are known
        scorer = Scorer(forests)
        with pytest.raises(PermissionError, match="this folder is not writable. Choose another"):
            cache.fill(scorer, forests, build=scorer.build, row_tokens=64)
        assert scorer.batches == []
    with pytest.raises(ValueError, match="was closed. Open it again"):
        cache.fill(scorer, forests, build=scorer.build, row_tokens=64)
    assert len(cache.lookup(forests[:5]).logps) == 15  # from memory


def test_threads_may_begin_a_table_together(tmp_path, monkeypatch):
    """All threads find no description, write one, and move it into place."""
    forests = make_forests(8)
    both_written = threading.Barrier(2)
    replace = Path.replace

    def together(path, target):
        both_written.wait(10)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", together)
    with ReferenceCache(tmp_path, PRINT) as cache, ThreadPoolExecutor(2) as pool:
        halves = [forests[:4], forests[4:]]
        added = list(pool.map(lambda half: cache.insert(half, -np.ones(12)), halves))
    assert added == [12, 12]
    assert [parts for parts in refcache.tables(tmp_path).values()] == [PRINT]
    assert not list(tmp_path.glob("*/.table.json*"))


def test_a_cache_is_pickled_as_its_path(tmp_path):
    forests = make_forests(5)
    with ReferenceCache(tmp_path, PRINT) as cache:
        fill(cache, forests)
        with pickle.loads(pickle.dumps(cache)) as other:
            assert other.lookup(forests).logps.tolist() == cache.lookup(forests).logps.tolist()


def test_a_compaction_keeps_the_values_that_count(tmp_path):
    """Two writers disagree, and the second is alive. The log with the lowest name counts."""
    forests = make_forests(1)
    with ReferenceCache(tmp_path, PRINT) as one, ReferenceCache(tmp_path, PRINT) as two:
        leaves = collect_leaves(forests)
        for cache, value in ((one, -1.0), (two, -2.0)):  # without seeing each other, as in a race
            cache._table.insert(leaves.keys, np.full(3, value), leaves.lengths)
        one.close()
        with (one.folder / "00000.log").open("ab") as log:
            log.write(b"torn")  # a torn record to drop
        for merged in (1, 0):
            with ReferenceCache(tmp_path, PRINT) as reader:
                assert reader.lookup(forests).logps.tolist() == [-1.0] * 3
                assert reader.stats()["conflicts"] == 3
            done = refcache.compact(one.folder)
            assert (done["logs_merged"], done["logs_in_use"]) == (merged, 1)
        # `insert` finds an existing value first.
        assert two.insert(forests, np.full(3, -3.0)) == 0
