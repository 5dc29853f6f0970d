"""Benchmark of the start: its data, its probes, the cut reference pass and the tables."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from forests import Scorer, make_forests
from PIL import Image

from benchmarks import start_up, start_up_data, start_up_table
from realign.data.records import read_pairs
from realign_kernels import ReferenceCache

SPIN = "import time, sys; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass\n"


@pytest.fixture
def marks(tmp_path):
    return start_up.Marks(str(tmp_path / "marks.json"))


def test_images_are_photographs_in_size_and_distinct_in_bytes_only():
    body = start_up_data.jpeg(np.random.default_rng(0), start_up_data.SIZE)
    one, two = (start_up_data.numbered(body, number) for number in (1, 2))
    assert 100 << 10 < len(one) < 112 << 10
    assert one != two
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in (body, one, two)]
    assert pixels[0].shape == (480, 640, 3)
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()


@pytest.mark.parametrize("kind", ["embedded", "files", "headers"])
def test_records_are_read_and_written_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(start_up_data, "BODIES", 2)
    path = start_up_data.pairs(tmp_path, kind, 3)
    records = read_pairs(path)
    assert len(records) == 3
    images = [image for record in records for image in (*record.images, *record.retrieved_images)]
    sizes = {image.open("record").size for image in images}
    small = kind == "headers"
    assert (max(sizes) <= (64, 48)) if small else (sizes == {(640, 480)})
    assert len({image.data or image.path for image in images}) == 6
    lengths = [len(record.chosen.split()) for record in records]
    assert all(12 <= n <= 20 if small else 60 <= n <= 100 for n in lengths), lengths
    written = path.stat().st_mtime_ns
    assert start_up_data.pairs(tmp_path, kind, 3).stat().st_mtime_ns == written


def test_qwen_images_take_as_many_tokens_as_in_its_release(tmp_path):
    """640 x 480 is resized to 644 x 476: 23 x 17 blocks of 28 pixels."""
    config, processor = start_up_data._qwen2_vl()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    )
    made = processor(text=[text], images=[Image.new("RGB", (640, 480))], return_tensors="pt")
    assert int((made["input_ids"] == config.image_token_id).sum()) == 23 * 17


def test_cpu_seconds_and_memory_include_a_live_child():
    before, others = start_up.cpu_seconds(), start_up.memory()["children"]
    block = "held = bytearray(64 << 20)\nprint('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", SPIN + block], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        live = start_up.cpu_seconds() - before
        assert start_up.memory()["children"] - others > 64
        child.communicate()
    ended = start_up.cpu_seconds() - before
    assert start_up.memory()["children"] - others < 32
    assert 0.45 < live < 2
    assert live - 0.05 < ended < live + 0.5


def test_a_mark_is_added_once_and_counts_from_the_start_of_the_process(tmp_path):
    program = (
        "import sys, time; time.sleep(0.4)\n"
        "from benchmarks.start_up import Marks\n"
        "marks, calls = Marks(sys.argv[1]), []\n"
        "class Stage: run = staticmethod(lambda: calls.append(1))\n"
        "marks.after(Stage, 'run', 'stage', lambda: calls.append('then'))\n"
        "Stage.run(); Stage.run(); print(calls)"
    )
    file = tmp_path / "marks.json"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, file], cwd=start_up.HERE, capture_output=True, check=True
    )
    took = time.monotonic() - began
    assert done.stdout.split() == b"[1, 'then', 1]".split()
    assert 0.4 < json.loads(file.read_text())["stage"]["wall"] < took + 0.02


def test_a_cut_reference_pass_computes_some_batches_and_knows_every_leaf(
    tmp_path, monkeypatch, marks
):
    monkeypatch.setattr(ReferenceCache, "fill", ReferenceCache.fill)  # restored after the test
    start_up.cut_reference_pass(marks, batches=2)
    forests = make_forests(20)
    scorer = Scorer(forests)
    with ReferenceCache.open(tmp_path, {"weights": "w"}) as cache:
        cache.fill(scorer, forests, build=scorer.build, row_tokens=64, batch_rows=2)
        assert not cache.missing(forests).any()
        logps = cache.lookup(forests).logps
    computed = int((logps != -1).sum())
    found = marks.found["batches"]
    assert 0 < computed < len(logps)
    assert (found["leaves"], found["known"]) == (computed, 0)


def test_waits_are_a_share_of_the_step(monkeypatch, marks):
    from realign.training import step

    def slow(parts):
        for part in parts:
            time.sleep(0.01)
            yield part

    monkeypatch.setattr(step, "accumulate", lambda model, parts: {"loss": float(sum(parts))})
    monkeypatch.setattr(start_up, "STEPS", 12)
    start_up.sleep_in_steps(marks, 0.03)
    found = [step.accumulate(None, slow([n])) for n in range(12)]
    assert found == [{"loss": 0.0}] * 12
    wait = marks.found["wait"]
    assert wait["steps"] == 10
    assert 0.15 < wait["share"] < 0.45
    assert 9 < wait["median_ms"] < 60


def start_file(folder, count, seconds, mib, **more):
    """Results of a start with one rank that took `seconds` after 5 s of imports."""
    marks = {"imports": {"wall": 5, "cpu": 4, "VmHWM": 100}}
    marks["set_up"] = {"wall": 5 + seconds, "cpu": 4 + seconds / 2, "VmHWM": mib}
    setting = {"what": "start", "family": "llava", "kind": "embedded", "ranks": "1"}
    runs = [{"cache": "cold", "ranks": [marks]}]
    text = json.dumps({"setting": setting | {"count": str(count)} | more, "runs": runs})
    (folder / f"{count}.json").write_text(text)


def test_tables_extend_the_slope_to_other_numbers_of_records(tmp_path):
    start_file(tmp_path, 1000, seconds=2, mib=500)
    start_file(tmp_path, 3000, seconds=4, mib=700)
    runs, slopes = start_up_table.table(tmp_path).split("\n\n")
    assert "| llava | embedded | 1 | cold | set_up | 3,000 | 5.0 | 4.0 | 2.0 | 0.67 |" in runs
    # 1 ms and 0.1 MiB a record: 2 s + 82,000 ms, 1 CPU s + 41 s, 500 MiB + 8,200 MiB
    assert "| 1,000 to 3,000 | 1.000 | 0.500 | 0.100 | 84 | 1,001 | 42 |" in slopes
    assert slopes.endswith("| 500 | 8,700 | 100,400 |")
