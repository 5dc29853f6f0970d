"""The reference cache against killed processes, many ranks, and folders that go away."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forests import Scorer, fill, make_forests
from test_refcache import PRINT, exact

from realign_kernels import ReferenceCache, refcache
from realign_kernels.refcache.keys import collect_leaves


def test_kill_9_at_50_random_points_loses_at_most_the_batch_in_flight(tmp_path):
    """2,000 leaves; a process is forked for each pass, killed, and its work is then finished."""
    forests = make_forests(666) + make_forests(1, seed=5)[:1]
    with ReferenceCache(tmp_path / "whole", PRINT) as cache:
        whole = fill(cache, forests)
        truth = cache.lookup(forests).logps
    assert len(truth) >= 2000
    in_flight = max(len(pairs) for pairs in whole.batches)
    rng, recomputed, written = random.Random(0), [], []
    for trial in range(50):
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
        for _ in range(rng.randrange(len(whole.batches))):  # batches begun: a clock would drift
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
        recomputed.append(rest.filled.recomputed)
        assert sum(map(len, rest.batches)) - (len(truth) - before) <= in_flight
    assert max(recomputed) <= in_flight
    assert len([n for n in written if 0 < n < len(truth)]) > 40, written


RANK = """
import json, sys
from forests import fill, make_forests
from realign_kernels import ReferenceCache
import torch.distributed as dist
dist.init_process_group("gloo")
folder = sys.argv[1].format(rank=dist.get_rank())
forests = make_forests(100)
with ReferenceCache(folder, json.loads(sys.argv[2])) as cache:
    done = fill(cache, forests)
    logps = cache.lookup(forests).logps
with open(f"{sys.argv[3]}/{dist.get_rank()}.json", "w") as file:
    json.dump([done.filled.leaves, len(cache), logps.tolist()], file)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("folder", ["shared", "rank{rank}"])
def test_ranks_share_the_work_and_all_know_everything(tmp_path, folder):
    """With one folder for all and, as on machines without a shared disk, with one for each."""
    forests = make_forests(100)
    with ReferenceCache(tmp_path / "alone", PRINT) as cache:
        fill(cache, forests)
        truth = cache.lookup(forests).logps.tolist()
    (tmp_path / "script.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [tmp_path / "script.py", tmp_path / folder, json.dumps(PRINT), tmp_path]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert sum(leaves for leaves, _, _ in results) == 300
    assert min(leaves for leaves, _, _ in results) > 100
    for _, held, logps in results:
        assert held == 300
        assert logps == truth  # the same batches, so the same bits, whatever the number of ranks


DISAGREE = """
import json, sys
from forests import fill, make_forests
from realign_kernels import ReferenceCache
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
forests = make_forests(30)
told = []
for name, mine, parts, options in (
    ("leaves", forests[rank::2], {}, {}),
    ("leaves", make_forests(30, seed=rank), {}, {}),
    ("fingerprint", forests, {"weights": str(rank)}, {}),
    ("settings", forests, {}, {"batch_rows": 4 + rank}),
):
    with ReferenceCache(f"{sys.argv[1]}/rank{rank}", json.loads(sys.argv[2]) | parts) as cache:
        try:
            fill(cache, mine, **options)
        except ValueError as error:
            assert len(cache) == 0
            told.append([name, str(error)])
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(told, file)
dist.destroy_process_group()
"""


def test_ranks_that_do_not_agree_are_told_before_anything_is_computed(tmp_path):
    (tmp_path / "script.py").write_text(DISAGREE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [tmp_path / "script.py", tmp_path, json.dumps(PRINT)]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [name for name, _ in told] == ["leaves", "leaves", "fingerprint", "settings"]
        for name, message in told:
            assert message.startswith(f"rank 1 has another {name} than rank 0: give all ranks")


def test_a_folder_removed_in_mid_pass_costs_nothing_but_itself(tmp_path):
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
    with ReferenceCache(tmp_path, PRINT) as cache:  # what was in it is gone, the rest is there
        assert 0 < cache.missing(forests).sum() < 180


def test_a_cache_that_cannot_be_written_says_so_before_the_first_forward(tmp_path, monkeypatch):
    forests = make_forests(10)
    with ReferenceCache(tmp_path, PRINT) as cache:
        fill(cache, forests[:5])
        monkeypatch.setattr(refcache.os, "access", lambda path, mode: False)
        assert fill(cache, forests[:5]).batches == []  # everything is known
        scorer = Scorer(forests)
        with pytest.raises(PermissionError, match="this folder cannot be written; name another"):
            cache.fill(scorer, forests, build=scorer.build, row_tokens=64)
        assert scorer.batches == []
    with pytest.raises(ValueError, match="was closed: open it again"):
        cache.fill(scorer, forests, build=scorer.build, row_tokens=64)
    assert len(cache.lookup(forests[:5]).logps) == 15  # from memory


def test_threads_may_begin_a_table_together(tmp_path, monkeypatch):
    """All of them find no description, write one, and move it into place."""
    forests = make_forests(8)
    both_written = threading.Barrier(2)
    write = Path.write_text

    def together(path, *arguments):
        written = write(path, *arguments)
        both_written.wait(10)
        return written

    monkeypatch.setattr(Path, "write_text", together)
    with ReferenceCache(tmp_path, PRINT) as cache, ThreadPoolExecutor(2) as pool:
        halves = [forests[:4], forests[4:]]
        added = list(pool.map(lambda half: cache.insert(half, -np.ones(12)), halves))
    assert added == [12, 12]
    assert [parts for parts in refcache.tables(tmp_path).values()] == [PRINT]
    assert not list(tmp_path.glob("*/.table.json*"))


def test_a_cache_goes_to_another_process_as_its_place(tmp_path):
    forests = make_forests(5)
    with ReferenceCache(tmp_path, PRINT) as cache:
        fill(cache, forests)
        with pickle.loads(pickle.dumps(cache)) as other:
            assert other.lookup(forests).logps.tolist() == cache.lookup(forests).logps.tolist()


def test_what_counted_before_a_compaction_counts_after_it(tmp_path):
    """Two writers that disagree, the second one alive: the log with the lowest name counts."""
    forests = make_forests(1)
    with ReferenceCache(tmp_path, PRINT) as one, ReferenceCache(tmp_path, PRINT) as two:
        leaves = collect_leaves(forests)
        for cache, value in ((one, -1.0), (two, -2.0)):  # not seeing each other, as in a race
            cache._table.insert(leaves.keys, np.full(3, value), leaves.lengths)
        one.close()
        with (one.folder / "00000.log").open("ab") as log:
            log.write(b"torn")  # something to drop
        for merged in (1, 0):
            with ReferenceCache(tmp_path, PRINT) as reader:
                assert reader.lookup(forests).logps.tolist() == [-1.0] * 3
                assert reader.stats()["conflicts"] == 3
            done = refcache.compact(one.folder)
            assert (done["logs_merged"], done["logs_in_use"]) == (merged, 1)
        # The way `insert` goes, a value that is there is seen first.
        assert two.insert(forests, np.full(3, -3.0)) == 0
