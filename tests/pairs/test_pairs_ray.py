"""Pairs pipeline on Ray Data with two local workers, one of which is killed."""

import errno
import os
import signal

import pytest
import ray
from pair_runs import ORDER, SHARDS, config_in, copy_run, shard_times, stage_folder

from realign.pairs import pipeline
from realign.pairs.pipeline import build_pairs, run_stages
from realign.pairs.stages import on_ray
from realign.pairs.stages.mask import Mask
from realign.pairs.stages.runner import RunError


@pytest.fixture(scope="module")
def two_workers():
    """A local Ray instance with two workers, for the tests of this module."""
    yield "local:2"
    ray.shutdown()


def _replace(monkeypatch, name, run):
    """Replaces `run` of one stage. The replacement gets the original as its first argument."""

    def changed(base):
        class Changed(base):
            def run(self, inputs, number):
                return run(super().run, inputs, number)

        return Changed

    order = tuple(changed(s) if s.name == name else s for s in pipeline._ORDER)
    monkeypatch.setattr(pipeline, "_ORDER", order)


def test_two_workers_make_the_same_bytes_though_one_is_killed(
    whole_run, tmp_path, two_workers, monkeypatch
):
    marker = tmp_path / "died"

    def die_once(run, inputs, number):
        if number == 2 and not os.path.exists(marker):
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return run(inputs, number)

    _replace(monkeypatch, "refill", die_once)
    done = [stage for stage in ORDER if stage != "refill"]
    config = copy_run(whole_run, tmp_path, done, ray=two_workers)
    # Filter runs as tasks, and refill as actors. A worker takes 7 s to import its modules.
    (stage_folder(config.work_folder, "filter") / "00003.parquet").unlink()
    report = build_pairs(config)
    assert int(marker.read_text()) != os.getpid()
    assert (tmp_path / "pairs.parquet").read_bytes() == whole_run.bytes
    assert report.dropped == whole_run.report.dropped
    for stage in ORDER:
        assert len(shard_times(stage_folder(config.work_folder, stage))) == SHARDS
        assert not list(stage_folder(config.work_folder, stage).glob(".*.partial"))


def test_the_error_of_a_worker_stops_the_run(tmp_path, two_workers, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(run, inputs, number):
        raise full

    _replace(monkeypatch, "mask", fail)
    with pytest.raises(RunError, match="the disk of .* is full"):
        run_stages(config_in(tmp_path, ray=two_workers, scenes=16), "mask")


def test_an_endpoint_s_cost_is_reported_from_one_shard(whole_run, tmp_path, engine):
    fake, lines = engine(lambda text: "[]"), []
    stage = Mask(config_in(tmp_path, masker="http://localhost:1/v1#m"))
    stage.folders = {"read": stage_folder(whole_run.work, "read")}
    stage.report, stage.records = lines.append, 40
    on_ray._report_cost(stage, 0)
    assert lines == ["mask: 8 of 40 requests cost nothing"] and not fake.asked
