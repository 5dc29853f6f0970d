"""Faults of disk and data: saved work stays, errors name the cause, and no rank hangs."""

import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import Forked, run_command, run_ranks
from ranks_worker import plant, restore, run_all
from runs import arguments, assert_same_run, encoded, run, wait_for_step
from torch.distributed.checkpoint.planner import SavePlan

from realign import distributed
from realign.data.records import RecordError, read_pairs
from realign.files import JsonlLog, read_jsonl
from realign.train import main
from realign.training.checkpoint import CheckpointError, Checkpoints, _Writer
from realign.training.run_dir import sole_writer
from realign.training.schedule import batches

EVERY_2 = ("--save-every", 2)
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def plain(pairs_file, tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("plain")
    run(pairs_file, output, *EVERY_2)
    return output


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of the run, to damage."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


# --- damaged checkpoints ---


def cut(shard):
    shard.write_bytes(shard.read_bytes()[:1000])


def flip(shard):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


OTHER = SHARD.replace("00001-model", "00002-model")
DAMAGES = {
    f"{SHARD} has 1000 bytes of": cut,
    f"the content of {SHARD} has changed": flip,
    f"{SHARD} is missing": Path.unlink,
    f"{OTHER} does not belong to it": lambda shard: shutil.copy(shard, shard.with_name(OTHER)),
    "manifest.json cannot be read": lambda shard: (shard.parent / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(pairs_file, plain, copy, reason, capsys):
    last, other = (copy / "checkpoints" / name for name in ("step-000006", "step-000006.bak"))
    shutil.copytree(last, other)  # not named like a checkpoint, so it is ignored
    DAMAGES[reason](last / SHARD)
    if DAMAGES[reason] is flip:  # the whole run, for one of the damages
        shutil.rmtree(copy / "model")
        run(pairs_file, copy, *EVERY_2, "--resume")
        assert_same_run(copy, plain)
    else:
        assert Checkpoints(copy / "checkpoints", keep=2).last_intact() == 4
    shown = capsys.readouterr()
    assert f"step-000006 is damaged ({reason}" in shown.err
    assert "renamed to damaged-step-000006. The run resumes from step-000004." in shown.err
    kept = {path.name for path in (copy / "checkpoints").iterdir()}
    new = {"step-000006"} if "resumed from step 4 of 6" in shown.out else set()
    assert kept == {"damaged-step-000006", "step-000004", "step-000006.bak"} | new
    assert bool(new) == (DAMAGES[reason] is flip)


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(pairs_file, copy, capsys):
    for step in (copy / "checkpoints").iterdir():
        cut(step / SHARD)
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is intact \(step-000006: .*4: "
    ):
        run(pairs_file, copy, *EVERY_2, "--resume")
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert len(list((copy / "checkpoints").glob("step-*"))) == 2


# --- a full disk ---


@contextmanager
def largest_file(size):
    """Limit files of this process to `size` bytes, and ignore the signal of the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_from(monkeypatch, first, last, kept=None):
    """Once `kept` exists, the disk is full while steps first .. last are logged."""
    write = JsonlLog.write
    disk = largest_file(1)

    def write_and_fill(log, entry):
        if entry["step"] == first:
            while kept and not kept.exists():
                time.sleep(0.01)
            disk.__enter__()
        write(log, entry)
        if entry["step"] == last:
            disk.__exit__(None, None, None)

    monkeypatch.setattr(JsonlLog, "write", write_and_fill)


def test_ranks_make_the_folder_of_a_checkpoint_in_any_order(tmp_path):
    """An earlier attempt is removed only after all ranks have made the folder."""
    folder, plan = tmp_path / ".step-000002.partial", SavePlan([])
    folder.mkdir()
    (folder / "old").touch()
    coordinator, other = (_Writer(tmp_path, 2, keep=1) for _ in range(2))
    for writer in (other, coordinator):
        writer.set_up_storage_writer(writer is coordinator, rank=int(writer is other))
        writer.prepare_local_plan(plan)
        assert (folder / "old").exists()
    coordinator.prepare_global_plan([plan, plan])
    assert folder.is_dir() and not any(folder.iterdir())


def test_training_outlives_a_full_disk(pairs_file, plain, tmp_path, monkeypatch, capsys):
    full_from(monkeypatch, first=4, last=5)
    run(pairs_file, tmp_path, *EVERY_2)
    shown = capsys.readouterr().err
    assert "warning: the checkpoint of step 4 could not be written ([Errno 27]" in shown
    assert "The one of step 2 is kept. Training continues" in shown
    assert shown.count("metrics.jsonl cannot be written") == 1
    assert_same_run(tmp_path, plain)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000006"]


def test_a_full_disk_at_the_end_loses_no_checkpoint(
    pairs_file, plain, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch, largest_file(resource.RLIM_INFINITY):
        full_from(patch, first=5, last=7, kept=tmp_path / "checkpoints" / "step-000004")
        assert main(arguments(pairs_file, tmp_path, *EVERY_2)) == 1
    shown = capsys.readouterr().err
    assert "error: the checkpoint of step 6 could not be written ([Errno 27]" in shown
    assert "The one of step 4 is kept. Free some space, and continue with --resume." in shown
    assert main(arguments(pairs_file, tmp_path, *EVERY_2, "--resume")) == 0
    assert_same_run(tmp_path, plain)


def test_an_export_without_disk_space_is_made_later(pairs_file, plain, copy, capsys):
    before = (copy / "model" / "config.json").exists(), sorted((copy / "model").iterdir())
    with largest_file(100_000):
        assert main(arguments(pairs_file, copy, *EVERY_2, "--resume")) == 1
    shown = capsys.readouterr().err
    assert f"error: {copy / 'model'} could not be written" in shown
    assert "free some space, and run the same command with --resume." in shown
    assert before[1] == sorted((copy / "model").iterdir()) and not list(copy.glob(".model*"))
    assert main(arguments(pairs_file, copy, *EVERY_2, "--resume")) == 0
    assert_same_run(copy, plain)


# --- numbers that are not finite ---


@pytest.fixture(scope="module")
def examples(pairs_file):
    """The examples of the pairs, as in training."""
    return encoded(pairs_file)[0]


def order(examples):
    """Example indices of steps 1 .. 6."""
    return dict(batches(len(examples), 8, 0, first=0, last=6))


def named(message):
    """The records that an error names."""
    return set(message.split("record(s) ")[1].split(". Check")[0].split(", "))


def test_the_bad_record_is_named_before_the_step(pairs_file, examples, tmp_path, capsys):
    """Its loss is finite and its gradient is not. `two_ranks` has other cases."""
    record = int(order(examples)[4][5])
    plant("gradient", record, 4)
    try:
        assert main(arguments(pairs_file, tmp_path, *EVERY_2)) == 1
    finally:
        restore()
    shown = capsys.readouterr().err
    assert named(shown) == {examples[record].name} and shown.startswith("error: step 4: loss ")
    assert shown.count("\n") == 1
    assert [entry["step"] for entry in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.fixture(scope="module")
def two_ranks(pairs_file, examples, tmp_path_factory):
    """Runs of two ranks (ranks_worker.py): their folder, and their stderr."""
    folder = tmp_path_factory.mktemp("two")
    record = order(examples)[4][5]  # of rank 1, which computes the last four
    given = (str(pairs_file), str(folder), int(record))
    return folder, run_ranks(run_all, 2, str(folder / "stderr.txt"), *given)


@pytest.mark.parametrize("what", ["pixels", "gradient"])
def test_all_ranks_stop_for_the_record_of_one(examples, two_ranks, what):
    folder, shown = two_ranks
    errors = [line for line in shown.splitlines() if line.startswith(("error", what))]
    error = errors[errors.index(f"{what} ends with 1") - 1]
    record = int(order(examples)[4][5])
    bad = {examples[record].name}
    if what == "pixels":  # all records that show the image
        image = examples[record].roots[0].images[0]
        step = [examples[i] for i in order(examples)[4]]
        bad = {e.name for e in step if any(image in root.images for root in e.roots)}
    assert named(error) == bad and len(bad) < 8 and error.startswith("error: step 4: ")
    assert sum(line.startswith("error: step 4") for line in errors) == 2  # one per run
    assert [p.name for p in (folder / what / "checkpoints").iterdir()] == ["step-000002"]


def test_a_bad_image_of_one_rank_stops_both(two_ranks):
    folder, shown = two_ranks
    last = shown.split("gradient ends with 1")[1]
    assert "error (rank 1): record 'scene-" in last and "has changed since" in last
    assert last.count("image ends with 1") == 2
    steps = [entry["step"] for entry in read_jsonl(folder / "image" / "metrics.jsonl")]
    assert steps == [1, 2]


def test_a_killed_rank_ends_the_job_and_nothing_is_lost(pairs_file, two_ranks, tmp_path):
    words = arguments(pairs_file, tmp_path, *EVERY_2, "--fsdp", "--nproc-per-node", 2)
    process = Forked(*words)
    step = random.randrange(3, 6)
    wait_for_step(process, tmp_path, step)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        os.kill(int(file.read().split()[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in errors and "Traceback" not in errors
    log = str(tmp_path / "resumed.txt")
    # The checkpoint of step 2 may be incomplete until that of step 4 starts, which waits for it.
    complete = list((tmp_path / "checkpoints").glob("step-*"))
    assert complete or step < 5
    shown = run_ranks(run_command, 2, log, "realign.train", [*words, "--resume"])
    assert ("resumed from step" in shown) == bool(complete)
    assert_same_run(tmp_path, two_ranks[0] / "whole")


def test_a_gradient_that_no_single_record_causes(pairs_file, tmp_path, monkeypatch):
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def clipped(parameters, limit):  # NaN in the fourth step, finite for its single records
        norms.append(clip(parameters, limit))
        return norms[-1] * (np.nan if len(norms) == 4 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    message = r"step 4: .*No single record causes it. Lower"
    with pytest.raises(distributed.CommonError, match=message):
        run(pairs_file, tmp_path, *EVERY_2)


def test_an_image_that_becomes_nan_is_refused_before_the_first_forward(processor, pairs_file):
    record = read_pairs(pairs_file)[3]
    broken = deepcopy(processor)
    broken.image_processor.image_std = [0.0, 0.0, 0.0]
    with pytest.raises(RecordError, match=rf"record '{record.name}': its image .* has NaN or inf"):
        encoded([record], broken)


def test_states_of_checkpoints(tmp_path):
    """A state is that of the time of `save`, and damage to it is found."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"mean": 0.1 + 0.2, "count": 3, "eval": {"best": -1e-300}}
    with Checkpoints(tmp_path, 2) as saved:
        saved.save(1, model, optimizer, state=state)
        state["count"] = 4
    assert saved.load(1, model, optimizer) == state | {"count": 3}
    with saved:
        saved.save(2, model, optimizer)
    assert saved.load(2, model, optimizer) == {}
    file = tmp_path / "step-000002" / "state.json"
    file.write_text('{"count": 9}\n')
    assert saved.last_intact() == 1
    file = tmp_path / "step-000001" / "state.json"
    file.unlink()
    with pytest.raises(CheckpointError, match="state.json is missing"):
        saved.last_intact()


# --- two runs ---


def test_two_runs_do_not_write_to_one_folder(pairs_file, tmp_path, capsys):
    words = arguments(pairs_file, tmp_path, steps=400)
    first = Forked(*words)
    wait_for_step(first, tmp_path, 1)
    try:
        assert main([*words, "--resume"]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: another run writes to {tmp_path}. Wait for its end")
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    with sole_writer(tmp_path):  # the lock ended with the process
        pass
