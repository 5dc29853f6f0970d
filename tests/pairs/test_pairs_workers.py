"""Worker threads of pairs and evaluate: equal bytes, order, errors, a bounded window of images."""

import threading
import time
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from pair_runs import shard_times, stage_rows
from transformers import CLIPImageProcessorPil

from realign.data.images import StoredImage
from realign.data.records import write_pairs
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, make_scenes
from realign.evaluate import answering
from realign.evaluate.command import run
from realign.modeling.prefetch import Copies, ahead, default_workers
from realign.pairs.engines import make_engine
from realign.pairs.io.rows import load_in_threads
from realign.pairs.pipeline import PairsConfig, digit_sources, run_stages
from realign.pairs.retrieval.embed import Embedder

CPU = torch.device("cpu")
COUNTS = (0, 1, 4)


@pytest.fixture
def alive(monkeypatch):
    """Counts decoded images. `most` is the maximum at one time, `threads` the decoding threads."""
    decode, lock = StoredImage.decode, threading.Lock()
    counter = Counter()
    counter.pause = 0.0  # seconds that each decoding takes longer
    threads = set()

    def forget(_):
        with lock:
            counter["now"] -= 1

    def counted(stored, **options):
        image, plain = decode(stored, **options)
        with lock:
            counter["now"] += 1
            counter["most"] = max(counter["most"], counter["now"])
            threads.add(threading.current_thread().name)
        weakref.finalize(image, forget, None)
        time.sleep(counter.pause)
        return image, plain

    monkeypatch.setattr(StoredImage, "decode", counted)
    counter.threads = threads
    return counter


# The threads.


@pytest.mark.parametrize("workers", COUNTS)
def test_results_keep_their_order_when_later_tasks_end_first(workers):
    def task(i):
        time.sleep(0.004 * (i % 3 == 0))
        return i

    with ahead((partial(task, i) for i in range(12)), CPU, workers=workers) as results:
        assert list(results) == list(range(12))


@pytest.mark.parametrize("workers", [1, 4])
def test_only_depth_tasks_run_or_wait(workers):
    begun = []
    tasks = (partial(begun.append, i) for i in range(20))
    with ahead(tasks, CPU, workers=workers, depth=3) as results:
        for taken, _ in enumerate(results, 1):
            time.sleep(0.002)
            assert len(begun) <= taken + 3


def test_workers_run_at_the_same_time():
    """Each of four tasks waits until the others have begun."""
    together = threading.Barrier(4, timeout=5)
    with ahead([together.wait] * 4, CPU, workers=4) as results:
        assert sorted(results) == [0, 1, 2, 3]


def test_no_worker_means_the_callers_thread_and_no_work_ahead():
    threads = []
    tasks = [lambda: threads.append(threading.current_thread())] * 3
    with ahead(tasks, CPU, workers=0) as results:
        next(results)
        assert threads == [threading.main_thread()]


def test_threads_never_share_a_copy_and_copies_are_used_again():
    copies = Copies(original := [])
    with copies.borrow() as first, copies.borrow() as second:
        assert len({id(original), id(first), id(second)}) == 3
    with copies.borrow() as again, copies.borrow() as other:
        assert {id(again), id(other)} == {id(first), id(second)}


def test_the_default_is_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 7})
    assert default_workers() == 3 == PairsConfig().worker_threads
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert default_workers() == 8 and PairsConfig(workers=0).worker_threads == 0


def test_a_negative_number_of_workers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers is -1; it must be 0 or more"):
        PairsConfig(workers=-1)
    with pytest.raises(ValueError, match="workers is -1; it must be 0 or more"):
        make_engine("transformers:x", workers=-1)
    options = ["--model", "m", "--image-folder", ".", "--output", "o", "--workers", "-1"]
    with pytest.raises(ValueError, match="--workers is -1; it must be 0 or more"):
        run(["pope", "file.json", *options])


# Pairs.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """File of forty digit records. Number 9 has a torn image."""
    sources = digit_sources(PairsConfig(scenes=40))
    torn = StoredImage(sources[9].images[0].data[:60])
    sources[9] = replace(sources[9], images=(torn,))
    path = tmp_path_factory.mktemp("data") / "data.parquet"
    write_pairs(path, sources)
    return str(path)


def embedded(folder, data, **settings):
    """Folder of the shards of the embed stage."""
    output = str(folder / "pairs.parquet")
    config = PairsConfig(output=output, data=data, shard=20, quiet=True, batch_size=4, **settings)
    return run_stages(config, "embed").folders["embed"]


def test_embeddings_have_the_same_bytes_for_any_number_of_workers(tmp_path, data):
    folders = [embedded(tmp_path / str(n), data, workers=n) for n in COUNTS]
    assert len({folder.name for folder in folders}) == 1  # so runs resume each other
    contents = [[f.read_bytes() for f in sorted(folder.iterdir())] for folder in folders]
    assert len(contents[0]) == 3 and contents[0] == contents[1] == contents[2]
    ids = [row["id"] for row in stage_rows(folders[0])]
    assert ids == [f"scene-{i:05d}" for i in range(40) if i != 9]
    (bad,) = pq.read_table(folders[2] / "00000.bad.parquet").to_pylist()
    assert (bad["record"], bad["reason"]) == ("scene-00009", "corrupt")
    assert shard_times(folders[0]).keys() == {"00000.parquet", "00001.parquet"}


def test_embedding_holds_no_decoded_image_after_its_preprocessing(tmp_path, data, alive):
    embedded(tmp_path, data, workers=2)
    assert alive["most"] <= 2 + 1  # one a worker, and one that is being released
    assert all(name.startswith("prefetch") for name in alive.threads)


def test_embedding_preprocesses_at_most_two_batches_ahead(tmp_path, data, monkeypatch):
    prepare, encode, begun, encoded = Embedder.prepare, Embedder.encode, [], []

    def prepared(self, image):
        begun.append(0)
        return prepare(self, image)

    def slow(self, batch):
        time.sleep(0.02)  # the workers prepare as many as they may
        encoded.extend(batch)
        assert len(begun) <= len(encoded) + 8
        return encode(self, batch)

    monkeypatch.setattr(Embedder, "prepare", prepared)
    monkeypatch.setattr(Embedder, "encode", slow)
    embedded(tmp_path, data, workers=4)
    assert len(begun) == len(encoded) == 39


def test_no_processor_is_used_by_two_threads_at_once(tmp_path, data, monkeypatch):
    call, busy, clashes, used = CLIPImageProcessorPil.__call__, set(), [], set()

    def watched(self, *args, **options):
        clashes.append(id(self) in busy)
        busy.add(id(self))
        used.add(id(self))
        time.sleep(0.002)
        result = call(self, *args, **options)
        busy.discard(id(self))
        return result

    monkeypatch.setattr(CLIPImageProcessorPil, "__call__", watched)
    embedded(tmp_path, data, workers=4)
    assert len(used) > 1 and not any(clashes)


def test_images_are_loaded_in_the_callers_thread_without_workers():
    threads = load_in_threads(lambda _: threading.current_thread(), range(3), 0)
    assert threads == [threading.main_thread()] * 3


# Evaluate.


@pytest.fixture
def sheet_of(tmp_path):
    """Function: name -> sheet of twelve captions and one question without an image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, scene in enumerate(make_scenes(12, biased=False, split="test", seed=5)):
        scene.image.save(folder / f"{i}.png")
    asked = [answering.Question(f"q{i}", CAPTION_PROMPT, f"{i}.png") for i in range(12)]
    asked.insert(5, answering.Question("text", "one ?", None))

    def prepared(name):
        output = tmp_path / f"{name}.jsonl"
        return answering.prepare(asked, folder, output, model="m", max_tokens=24)

    return prepared


def ask(sheet, workers, batch=4):
    """Answers by the digits model, in batches of two."""
    engine = make_engine(f"transformers:{ASSETS}", batch_size=2, workers=workers)
    return answering.answer(engine, sheet, batch=batch, progress=False)


def test_answers_have_the_same_bytes_for_any_number_of_workers(sheet_of, processor):
    sheets = [sheet_of(str(n)) for n in COUNTS]
    lines = [ask(sheet, n) for sheet, n in zip(sheets, COUNTS, strict=True)]
    contents = [sheet.output.read_bytes() for sheet in sheets]
    assert contents[0] == contents[1] == contents[2]
    assert [line["id"] for line in lines[2]] == [question.id for question in sheets[2].questions]
    assert len({line["answer"] for line in lines[2]}) > 5


def test_a_corrupt_image_names_its_question_and_earlier_answers_are_kept(sheet_of, tmp_path):
    file = tmp_path / "images" / "7.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # its header is whole
    for workers in COUNTS:
        sheet = sheet_of(f"torn-{workers}")
        with pytest.raises(ValueError, match="the image of question 'q7': corrupt"):
            ask(sheet, workers)
        saved = answering.read_answers(sheet.output)
        # Questions without an image are shorter, so they come last.
        assert [line["id"] for line in saved] == ["q0", "q1", "q2", "q3"]
    file.write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(ValueError, match="the image of question 'q7': corrupt"):
        sheet_of("header")  # before a model is loaded


@pytest.mark.parametrize("workers", [0, 8])
def test_evaluation_holds_the_images_of_few_batches(sheet_of, alive, workers):
    alive.pause = 0.02  # all workers hold their images at the same time
    ask(sheet_of("s"), workers, batch=64)
    assert 2 <= alive["most"] <= 2 * 4
    assert any(name.startswith("prefetch") for name in alive.threads) == (workers > 0)
