"""`python -m realign.cache`: commands, errors, several ranks, and the examples of its page."""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from forked_ranks import run_ranks

from realign import cache, distributed
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.modeling import encode
from realign_kernels import ReferenceCache
from realign_kernels.refcache import store


def test_the_commands(pairs_file, tmp_path, capsys):
    place = ["--reference-cache", str(tmp_path)]

    def run(*words):
        capsys.readouterr()
        code = cache.main([*map(str, words), *place])
        return code, capsys.readouterr()

    assert run("stats")[1].out == run("compact")[1].out == f"no tables in {tmp_path}\n"
    code, shown = run("fill", "--pairs", pairs_file, "--quiet")
    total = 3 * len(read_pairs(pairs_file))
    assert code == 0 and f"0 of {total} leaves known" in shown.out
    code, shown = run("stats")
    assert code == 0 and f"{total} log-probs in 1 log(s)" in shown.out
    assert "dtype float32" in shown.out and "attention sdpa,tree" in shown.out
    assert run("verify")[0] == 0
    (log,) = tmp_path.glob("*/*.log")
    data = bytearray(log.read_bytes())
    data[32 * 5 + 20] ^= 4
    log.write_bytes(data + b"torn")
    code, shown = run("verify")
    assert code == 1 and "1 unreadable records and 4 bytes" in shown.out
    assert "computes these log-probs again" in shown.err
    code, shown = run("compact")
    assert code == 0 and "1 unreadable records dropped" in shown.out
    assert run("verify")[0] == 0
    code, shown = run("fill", "--pairs", pairs_file, "--quiet")
    assert code == 0 and f"{total - 1} of {total} leaves known" in shown.out
    code, shown = run("fill", "--pairs", pairs_file, "--quiet")
    assert f"{total} of {total} leaves known" in shown.out
    (about,) = tmp_path.glob("*/table.json")
    about.write_text("{")
    foreign = tmp_path / ("0" * 32)
    foreign.mkdir()
    log = max(tmp_path.glob("*/*.log"), key=lambda path: path.stat().st_size)
    shutil.copy(log, foreign / "0.log")
    code, shown = run("verify")
    assert code == 1 and "belongs to the table with fingerprint" in shown.out
    assert "no description" in shown.out and f"{total:,} log-probs" in shown.out
    code, shown = run("compact")  # the other table is compacted all the same
    assert code == 1 and "1 table(s) cannot be read. The others are done." in shown.err
    assert f"{foreign}: the table cannot be read" in shown.out and "2 log(s) merged" in shown.out


def test_upkeep_of_a_database(tmp_path, monkeypatch, capsys):
    """Without the extension, the commands count databases and leave a damaged one unchanged."""
    monkeypatch.setattr(store, "extension", lambda: None)
    monkeypatch.setattr(cache, "missing_reason", lambda: "not built")
    place = ["--reference-cache", str(tmp_path)]
    with ReferenceCache.open(tmp_path, {"weights": "v1"}) as table:
        table.keep(np.zeros(1, "V16"), -np.ones(1), np.ones(1, np.int32))
    assert cache.main(["stats", *place]) == cache.main(["compact", *place]) == 0
    shown = capsys.readouterr().out
    assert "1 log-probs in 1 database, " in shown and ": 1 database, " in shown
    assert "log(s)" not in shown
    (path,) = tmp_path.glob("*/records.sqlite")
    path.write_bytes(b"damaged")
    assert cache.main(["verify", *place]) == cache.main(["compact", *place]) == 1
    assert "cannot be read: " in capsys.readouterr().out and path.read_bytes() == b"damaged"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fill"], "pairs is missing. Pass the training file"),
        (
            ["fill", "--pairs", "x", "--dtype", "fp8"],
            "dtype is 'fp8'; it must be one of auto, fp32, bf16",
        ),
        (["fill", "--pairs", "x", "--objective", "kto"], "objective is 'kto'"),
        (["fill", "--pairs", "x", "--batch-rows", "0"], "--batch-rows is 0; it must be 1 or more"),
        (["fill", "--pairs", "nowhere.parquet"], "there is nothing at"),
        (
            ["fill", "--pairs", "x", "--nproc-per-node", "-1"],
            "--nproc-per-node is -1; it must be 0",
        ),
        (["verify", "--reference-cache", "nowhere"], "there is no folder nowhere. Check --ref"),
        (["full"], "unknown command 'full'. The commands are fill, stats, verify, compact"),
    ],
)
def test_mistakes_of_the_commands(words, message, capsys):
    assert cache.main(words) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1


def test_diverged_ranks_report_their_own_errors(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    full = OSError(errno.ENOSPC, "No space left on device", "0.log")
    assert distributed.report(full)
    assert distributed.report(distributed.CommonError("all ranks have it"))
    assert capsys.readouterr().err == ""  # rank 0 reports it
    monkeypatch.setattr(distributed, "_diverged", True)
    assert distributed.report(full)
    shown = capsys.readouterr().err
    assert shown.startswith("error (rank 1): ") and "No space left on device" in shown
    assert distributed.report(RuntimeError("[gloo/x.cc:1] Connection closed by peer"))
    assert capsys.readouterr().err == (
        "error: another rank has ended. See its own message, if there is one.\n"
    )
    assert not distributed.report(RuntimeError("a fault of ours"))


def fails_on_rank_1(*words):
    """`realign.cache` as one of two ranks, of which rank 1 meets a damaged image."""

    def changed(self, key):
        if len(self) < 10:  # images of the start-up check
            return right(self, key)
        raise encode.RecordError("scene-1", "its image is not what it was.", "Let it be.")

    right = encode.ImageStore.bundle
    if os.environ["RANK"] == "1":
        encode.ImageStore.bundle = changed
    assert cache.main(words) == 1


def test_a_failure_of_one_rank_is_reported_by_that_rank(pairs_file, tmp_path):
    words = ["fill", "--pairs", pairs_file, "--quiet", "--reference-cache", tmp_path / "cache"]
    words = [*map(str, words), "--batch-rows", "4"]
    printed = run_ranks(fails_on_rank_1, 2, tmp_path / "log", *words)
    assert "error (rank 1): record 'scene-1': its image is not what it was." in printed
    assert "error: another rank has ended" in printed and "error (rank 0)" not in printed


def test_a_cache_folder_that_is_a_file(pairs_file, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    words = ["fill", "--pairs", pairs_file, "--quiet", "--reference-cache", tmp_path / "file"]
    assert cache.main([str(word) for word in words]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and str(tmp_path / "file") in shown


def test_the_examples_of_the_page_run(pairs_file, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "reference-cache.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/reference-cache.md", "exec"), names)
    assert names["loss"].item() == pytest.approx(np.log(2)) and (names["logps"] < 0).all()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "own"))
    shutil.copy(pairs_file, "pairs.parquet")
    Path("llava-hf").mkdir()
    Path("llava-hf/llava-1.5-7b-hf").symlink_to(ASSETS)
    (console,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    for line in console.splitlines():
        program, _, module, *words = line.split()
        assert (program, module) == ("python", "realign.cache")
        assert cache.main(words) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "own").glob("reference/*/*.log"))) == 1
