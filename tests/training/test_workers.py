"""Workers: the same bits for any number of threads, and damaged images are found before use."""

import random
import signal
import threading

import pytest
from forked_ranks import Forked, run_command, run_ranks
from runs import arguments, assert_same_run, encoded, run, wait_for_step

from realign.data.images import StoredImage
from realign.data.records import Record, RecordError, read_pairs, write_pairs
from realign.digits import ASSETS
from realign.modeling.images import ImageStore
from realign.modeling.layouts import Layout
from realign.modeling.loading import load_processor
from realign_kernels import objectives

EVERY_2 = ("--save-every", 2)


@pytest.fixture(scope="module")
def plain(pairs_file, tmp_path_factory):
    """The folder of a run without workers."""
    output = tmp_path_factory.mktemp("plain")
    run(pairs_file, output, *EVERY_2, "--workers", 0)
    return output


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_bits(
    pairs_file, plain, tmp_path, workers, monkeypatch
):
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ImageStore, "CACHE_BYTES", 0)
    run(pairs_file, tmp_path / "run", *EVERY_2, "--workers", workers)
    assert_same_run(tmp_path / "run", plain)


def test_a_killed_run_resumes_with_another_number_of_workers(pairs_file, plain, tmp_path):
    process = Forked(*arguments(pairs_file, tmp_path, *EVERY_2, "--workers", 4))
    wait_for_step(process, tmp_path, random.randrange(2, 6))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(pairs_file, tmp_path, *EVERY_2, "--workers", 2, "--resume")
    assert_same_run(tmp_path, plain)


@pytest.fixture
def damaged(pairs_file, tmp_path, monkeypatch):
    """Pairs whose record 17 has an image with a good header and truncated pixels."""
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    records = read_pairs(pairs_file)
    whole = records[17].images[0].data
    cut = StoredImage(whole[: len(whole) // 2])
    assert cut.size() == records[17].images[0].size()
    changed = Record(**vars(records[17]) | {"name": "cut", "images": (cut,)})
    write_pairs(tmp_path / "pairs.parquet", [*records[:17], changed, *records[18:]])
    return tmp_path / "pairs.parquet"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_before_the_first_step(damaged, tmp_path, workers):
    with pytest.raises(RecordError, match="record 'cut': its image .* cannot be read .*truncated"):
        run(damaged, tmp_path / "run", "--workers", workers)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_image_ends_all_ranks(damaged, tmp_path):
    words = arguments(damaged, tmp_path / "run", "--fsdp")
    given = (run_command, 2, str(tmp_path / "log.txt"), "realign.train", words, 1)
    shown = run_ranks(*given)
    assert shown.count("record 'cut': its image") == 1 and "Traceback" not in shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_invalid_header_ends_all_ranks_before_the_model_is_loaded(pairs_file, tmp_path):
    records = read_pairs(pairs_file)
    bad = Record(**vars(records[3]) | {"images": (StoredImage(b"GIF89a"),)})
    write_pairs(tmp_path / "pairs.parquet", [*records[:3], bad, *records[4:]])
    words = arguments(tmp_path / "pairs.parquet", tmp_path / "run", "--fsdp")
    shown = run_ranks(run_command, 2, str(tmp_path / "log.txt"), "realign.train", words, 1)
    assert shown.count(f"record '{records[3].name}': its image") == 1
    assert "Traceback" not in shown


def test_workers_decode_in_parallel_and_keep_the_order(pairs_file, monkeypatch):
    """Two images are in work at once, and a batch has its images in order."""
    examples, _ = encoded(read_pairs(pairs_file)[:4], objective=objectives.dpo())
    keys = [example.roots[0].images[0] for example in examples]
    plain_store = ImageStore(load_processor(ASSETS), Layout(4), examples)
    store = ImageStore(load_processor(ASSETS), Layout(4), examples, workers=2, cache_bytes=0)
    both, make = threading.Barrier(2, timeout=30), store._make
    store._make = lambda key: (both.wait(), make(key))[1]
    found = store.batch(keys).calls[0]["pixel_values"]
    assert found.equal(plain_store.batch(keys).calls[0]["pixel_values"])
