"""The pairs pipeline on Ray Data: two workers of this machine, one of which is killed."""

import errno
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from pair_runs import ORDER, SHARDS, config_in, shard_times, stage_folder

from realign.pairs import pipeline
from realign.pairs.engines import Reply
from realign.pairs.pipeline import build_pairs, run_stages
from realign.pairs.stages import on_ray
from realign.pairs.stages.runner import RunError


@pytest.fixture(scope="module")
def two_workers():
    """Ray on this machine with two workers, ended with the module."""
    yield "local:2"
    ray.shutdown()


def _fatal(base, number, marker):
    """A stage whose worker dies while it makes a shard, the first time."""

    class Fatal(base):
        def run(self, inputs, at):
            if at == number and not os.path.exists(marker):
                with open(marker, "w") as file:
                    file.write(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(inputs, at)

    return Fatal


def test_two_workers_of_ray_make_the_same_bytes_though_one_is_killed(
    whole_run, tmp_path, two_workers, monkeypatch
):
    marker = tmp_path / "died"
    order = tuple(
        _fatal(stage, 2, str(marker)) if stage.name == "refill" else stage
        for stage in pipeline._ORDER
    )
    monkeypatch.setattr(pipeline, "_ORDER", order)
    config = config_in(tmp_path, ray=two_workers)
    for stage in ("read", "retrieve", "mask"):  # starting workers is most of the time
        there = stage_folder(whole_run.work, stage)
        shutil.copytree(there, config.work_folder / there.name)
    report = build_pairs(config)
    assert int(marker.read_text()) != os.getpid()
    assert (tmp_path / "pairs.parquet").read_bytes() == whole_run.bytes
    assert report.dropped == whole_run.report.dropped
    for stage in ORDER:
        assert len(shard_times(stage_folder(config.work_folder, stage))) == SHARDS
        assert not list(stage_folder(config.work_folder, stage).glob(".*.partial"))


def test_what_stops_a_worker_of_ray_stops_the_run(tmp_path, two_workers, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def failing(base):
        class Full(base):
            def run(self, inputs, at):
                raise full

        return Full

    order = tuple(failing(s) if s.name == "mask" else s for s in pipeline._ORDER)
    monkeypatch.setattr(pipeline, "_ORDER", order)
    with pytest.raises(RunError, match="no room is left on the disk"):
        run_stages(config_in(tmp_path, ray=two_workers, scenes=16), "mask")


def test_vllm_on_ray_goes_through_its_own_pipeline(tmp_path, two_workers, monkeypatch, engine):
    """A stand-in for `ray.data.llm` answers; the pairs are those of the plain run."""
    made = []

    def build_processor(config, preprocess, postprocess):
        made.append(config)

        def answered(row):
            import re

            text = row["messages"][-1]["content"]
            if not isinstance(text, str):
                assert text[0]["image_url"]["url"].startswith("data:image/png;base64,")
                text = text[-1]["text"]
            assert 32 < row["sampling_params"]["max_tokens"] < 100
            body = re.search(r"<answer>\n(.*)\n</answer>", text)[1]
            if "left [MASK]" in body:  # these are bad records
                return row | {"__inference_error__": "refused", "generated_text": ""}
            # The first neighbour's reply changes nothing, so a second round is needed.
            text = body.replace("[MASK]", "nine") if "right [MASK]" in body else "no"
            return row | {"generated_text": text, "num_generated_tokens": 9}

        def finish(row):
            error = row.get("__inference_error__", "")
            return row if error else postprocess(row) | {"__inference_error__": ""}

        return lambda data: data.map(preprocess).map(answered).map(finish).materialize()

    fake = SimpleNamespace(
        build_processor=build_processor, vLLMEngineProcessorConfig=lambda **kw: kw
    )
    monkeypatch.setitem(sys.modules, "ray.data.llm", fake)

    def say(text):
        body = re.search(r"<answer>\n(.*)\n</answer>", text)[1]
        if "left [MASK]" in body:
            return Reply("", "refused")
        return body.replace("[MASK]", "nine") if "right [MASK]" in body else "no"

    engine(say)
    settings = {"scenes": 16, "k": 2, "refill": "prompt", "engine": "vllm:some/model"}
    settings |= {"max_bad": 1.0}
    plain = build_pairs(config_in(tmp_path / "plain", **settings))
    for folder in (tmp_path / "plain" / "pairs.work").glob("*-*"):
        if not folder.name.startswith("refill"):
            shutil.copytree(folder, tmp_path / "ray" / "pairs.work" / folder.name)
    report = build_pairs(config_in(tmp_path / "ray", ray=two_workers, **settings))
    assert report.path.read_bytes() == plain.path.read_bytes()
    assert (report.bad, report.dropped) == (plain.bad, plain.dropped)
    assert report.bad["no reply"] > 0 and report.written > 0
    assert made == [
        {
            "model_source": "some/model",
            "concurrency": max(1, int(ray.cluster_resources().get("GPU", 0))),
            "batch_size": 64,
            "should_continue_on_error": True,
            "prepare_multimodal_stage": True,
        }
    ]


def test_the_vllm_pipeline_is_called_as_ray_defines_it():
    """The names and arguments above are those of the installed Ray."""
    source = Path(ray.__file__).parent / "data" / "llm.py"
    text = source.read_text()
    assert "def build_processor(" in text and "class vLLMEngineProcessorConfig(" in text
    for name in ("preprocess:", "postprocess:", "should_continue_on_error:", "model_source:"):
        assert name in text or name[:-1] in text
    assert "prepare_multimodal_stage" in text and '"generated_text"' in text


def test_a_script_is_replayed_to_its_next_requests():
    def script():
        first = yield ["a", "b"]
        none = yield []
        assert none == []
        second = yield ["c"]
        return [{"id": r.text} for r in first + second], []

    assert on_ray.replay(script(), []) == (["a", "b"], None)
    told = [[{"text": "1", "error": "", "cut": False}] * 2]
    assert on_ray.replay(script(), told) == (["c"], None)
    told.append([{"text": "2", "error": "", "cut": False}])
    rows = [{"id": "1"}, {"id": "1"}, {"id": "2"}]
    assert on_ray.replay(script(), told) == (None, (rows, []))
    assert isinstance(Reply("x"), Reply)
