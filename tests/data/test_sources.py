"""Sources: names on the Hub, splits, identities, and streaming in little memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, FakeHub, table
from format_cases import ASK, both, embedded, make_images

from realign.data import hub
from realign.data.records import RecordError, read_pairs, stream_pairs
from realign.data.sources import identity, open_source
from realign.hf.records import records_of, stream_rows
from realign.pairs.io.importers import read_any

README = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
"""
CHECKS = """
import json
from realign.data import hub
from realign.data.records import read_pairs
from realign.data.sources import identity
from realign.hf.records import records_of
from realign.pairs.config import PairsConfig
from realign.pairs.io.importers import import_pairs
from realign.pairs.stages.read import Read

def outcome(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def row(record):
    return [record.name, record.chosen, record.rejected, record.images[0].data.hex()]

def pipeline():
    read = Read(PairsConfig(data="o/pairs", split="train", output="o/p.parquet"))
    return [record.chosen for shard in read.shards(0) for record in shard]

found = {
    "train": outcome(lambda: [row(r) for r in read_pairs("o/pairs", split="train")]),
    "both": outcome(lambda: [r.name for r in read_pairs("o/pairs", split="test+train")]),
    "import": outcome(lambda: import_pairs("o/pairs", None, "out.parquet", split="train")),
    "pipeline": outcome(pipeline),
    "no split": outcome(lambda: read_pairs("o/pairs")),
    "trainer": outcome(lambda: records_of("o/pairs")),
    "another split": outcome(lambda: read_pairs("o/pairs", split="val")),
    "gated": outcome(lambda: read_pairs("o/gated")),
    "code": outcome(lambda: read_pairs("o/code", split="train")),
    "absent": outcome(lambda: read_pairs("o/absent")),
    "same": identity("o/pairs", split="train") == identity("o/pairs", split="train"),
    "other": identity("o/pairs", split="train") == identity("o/pairs", split="test"),
    "revision": hub.revision("o/pairs"),
}
hub.SMALL = 100
found["row limit"] = outcome(lambda: read_pairs("o/pairs", split="train"))
print(json.dumps(found))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _rows(count=1, **columns):
    rows = [both(question=f"{ASK} {i}", image=embedded("a"), **columns) for i in range(count)]
    return rows


def _python(code, cwd, **environment):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(cwd / "home")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env=env | environment,
    )


def test_names_on_the_hub(folder):
    files = {
        "README.md": README,
        "data/train-00000-of-00001.parquet": table(_rows(2)),
        "data/test-00000-of-00001.parquet": table(_rows(1)),
    }
    code = files | {"code.py": b"open('ran', 'w')"}
    with FakeHub({"o/pairs": files, "o/code": code}) as fake:
        run = _python(CHECKS, folder, HF_ENDPOINT=fake.endpoint, HF_HUB_OFFLINE="0")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    data = embedded("a")["bytes"].hex()
    assert found["train"] == [[f"train:{i}", "A cat.", "A dog.", data] for i in range(2)]
    assert found["both"] == ["test:0", "train:0", "train:1"]
    assert found["import"] == {"pairs": 2} and found["pipeline"] == ["A cat.", "A cat."]
    for name, message in {
        "no split": "ValueError: o/pairs has the splits train, test. Add --split",
        "trainer": "ValueError: o/pairs has the splits train, test. Add --split",
        "another split": "ValueError: o/pairs has no split 'val'. It has train, test.",
        "gated": "ValueError: o/gated is gated on the Hub. Accept its terms",
        "absent": "FileNotFoundError: there is nothing at 'o/absent': neither a file",
        "code": "ValueError: o/code needs its own code, which never runs here",
        "row limit": "ValueError: o/pairs: row 0 of train decodes to",
    }.items():
        assert found[name].startswith(message), (name, found[name])
    assert found["same"] and not found["other"] and found["revision"] == COMMIT
    assert not (folder / "ran").exists()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Network is unreachable")

    hub.revision.cache_clear()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    for call in (lambda: read_pairs("o/pairs"), lambda: identity("o/pairs")):
        with pytest.raises(ValueError, match="o/pairs cannot be read from the Hub .*Connection"):
            call()


def test_an_existing_path_wins_over_a_name(folder, monkeypatch):
    monkeypatch.setattr(hub, "open_name", None)
    (folder / "o").mkdir()
    pq.write_table(pa.Table.from_pylist(_rows()), "o/pairs")  # the suffix does not matter
    assert len(read_pairs("o/pairs")) == 1
    for typo in ("o/paris.parquet", "nothing", "/o/paris"):
        with pytest.raises(FileNotFoundError, match="there is nothing at"):
            read_pairs(typo)


def test_images_of_the_hub_are_in_its_rows():
    with pytest.raises(hub.ImageError, match="is a path, and a data set of the Hub has no folder"):
        hub.NO_FOLDER.file("/etc/passwd")


def test_a_downloaded_data_set_has_splits(folder):
    (folder / "README.md").write_bytes(README)
    (folder / "data").mkdir()
    for split, count in (("train", 2), ("test", 1)):
        pq.write_table(pa.Table.from_pylist(_rows(count)), f"data/{split}-00000-of-00001.parquet")
    for read in (read_pairs, lambda path: list(read_any(str(path)))):
        with pytest.raises(ValueError, match="files of the splits test, train. Add --split"):
            read(folder)
    for split, count in (("train", 2), ("test", 1), ("train+test", 3)):
        assert len(read_pairs(folder, split=split)) == count
    with pytest.raises(ValueError, match="no Parquet file of the split 'val'"):
        read_pairs(folder, split="val")
    with pytest.raises(ValueError, match="--split train would have no effect"):
        read_pairs(folder / "data" / "test-00000-of-00001.parquet", split="train")


@pytest.mark.parametrize(
    ("names", "mixed"),
    [
        (("train_prefs-00000-of-00001", "test_prefs-00000-of-00001"), "test_prefs, train_prefs"),
        (("train-0", "testmini-0"), "testmini, train"),
        (("train2017", "val2017"), "train2017, val2017"),
        (("train", "held_out"), "held_out, train"),
        (("Train-0", "Test-0"), "Test, Train"),
        (("train-0", "testA-0"), "testA, train"),
        (("prefs_train-0", "prefs_test-0"), "prefs_test, prefs_train"),
        (("training-0", "evaluation-0"), "evaluation, training"),
        (("val-0", "dev-0"), None),
        (("train_a-0", "train_b-0"), None),
        (("device-0", "valuable-0", "testimony-0"), None),
    ],
)
def test_kinds_of_splits_are_not_mixed(names, mixed, folder):
    for name in names:
        pq.write_table(pa.Table.from_pylist(_rows(1)), f"{name}.parquet")
    if mixed is None:
        assert len(read_pairs(folder)) == len(names)
        return
    with pytest.raises(ValueError, match=f"files of the splits {mixed}. Add --split"):
        read_pairs(folder)


def test_a_saved_data_set_has_splits(folder):
    rows = datasets.Dataset.from_list(_rows(3))
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk("saved")
    with pytest.raises(ValueError, match="has the splits train, test. Add --split"):
        read_pairs("saved")
    assert [len(read_pairs("saved", split=s)) for s in ("train", "test", "test+train")] == [3, 1, 4]
    with pytest.raises(ValueError, match="has no split 'val'. It has train, test"):
        read_pairs("saved", split="val")
    rows.save_to_disk("one")
    assert len(read_pairs("one")) == 3


def test_identities_change_with_all_that_records_depend_on(folder):
    lines = "".join(f"{json.dumps(both(question=ASK, image='a.jpg'))}\n" for _ in range(2))
    for name in ("one.jsonl", "two.jsonl"):
        (folder / name).write_text(lines)
    meta = {"one": {"root": "", "annotation": "two.jsonl"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    one = folder / "one.jsonl"
    base = identity(one)
    assert identity(str(one)) == base == identity(os.path.relpath(one))
    others = [identity(one, folder), identity(one, format="parquet"), identity("two.jsonl")]
    (folder / "dataset_info.json").write_text(
        json.dumps({"x": {"file_name": "one.jsonl", "columns": {"prompt": "question"}}})
    )
    others.append(identity(one))
    os.remove("dataset_info.json")
    described = identity("meta.json")
    os.utime(one, ns=(1, 1))
    others.append(identity(one))
    one.write_text(lines + lines)
    os.utime(one, ns=(1, 1))
    others.append(identity(one))
    assert len({base, *others}) == 7
    os.utime("two.jsonl", ns=(1, 1))
    assert identity("meta.json") != described
    with pytest.raises(FileNotFoundError):
        identity("none.jsonl")


def test_streams_raise_at_their_end_and_count_what_is_skipped(folder):
    rows = _rows(3)
    rows[1] = rows[1] | {"rejected": ""}
    rows[2] = rows[2] | {"image": None}
    pq.write_table(pa.Table.from_pylist([*rows, *_rows(1)]), "rows.parquet")
    skipped: Counter[str] = Counter()
    stream = stream_pairs("rows.parquet", skipped=skipped)
    read = [next(stream) for _ in range(3)]
    assert [record.name for record in read] == [f"rows.parquet:{i}" for i in (0, 2, 3)]
    assert [len(record.images) for record in read] == [1, 0, 1]
    with pytest.raises(RecordError, match="'rows.parquet:1': its rejected response is empty"):
        next(stream)
    rated = {"prompt": "What is it?", "image": rows[0]["image"]}
    equal = [{"response": text, "score": 1} for text in ("A cat.", "A dog.")]
    better = [{"response": text, "score": score} for score, text in enumerate(("A dog.", "A cat."))]
    pq.write_table(
        pa.Table.from_pylist([rated | {"completions": these} for these in (equal, better)]),
        "rows.parquet",
    )
    assert len(list(stream_pairs("rows.parquet", skipped=skipped))) == 1
    assert skipped == {"tie": 1}


STREAM = """
import sys
from realign.data.records import stream_pairs
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
count = sum(len(record.images[0].data) == 108544 for record in stream_pairs("large.parquet"))
print(count, status("VmHWM") - before)
"""


def test_streaming_takes_little_memory(folder):
    """1,200 records with two images of 106 KiB: 248 MiB of images. As a list they take 300 MiB."""
    schema = pa.schema(
        dict.fromkeys(("prompt", "chosen", "rejected"), pa.string())
        | {"images": pa.list_(pa.binary())}
    )
    with pq.ParquetWriter("large.parquet", schema) as file:
        for group in range(12):
            images = [[os.urandom(108544), os.urandom(108544)] for _ in range(100)]
            texts = {name: [f"{name} {group} {i}" for i in range(100)] for name in schema.names[:3]}
            file.write_table(pa.table(texts | {"images": images}, schema=schema))
    run = _python(STREAM, folder)
    assert run.returncode == 0, run.stderr
    count, peak = run.stdout.split()
    assert int(count) == 1200 and float(peak) < 200  # 165 MiB measured


def test_rows_of_a_shuffled_set_are_read_in_slices(folder, monkeypatch):
    rows = datasets.Dataset.from_list(_rows(200)).shuffle(seed=0)
    lengths = []
    original = datasets.Dataset.iter

    def iterate(self, batch_size, *more):
        for part in original(self, batch_size, *more):
            lengths.append(len(part))
            yield part

    monkeypatch.setattr(datasets.Dataset, "iter", iterate)
    prompts = [record.prompt[0]["content"] for record in stream_rows(rows)]
    assert prompts == rows["question"][:] and max(lengths) <= 64
    assert [record.name for record in records_of(rows)] == [f"row {i}" for i in range(200)]


def test_an_unknown_format_is_named(folder):
    with pytest.raises(ValueError, match="format is 'trl'; use one of auto, llava"):
        open_source(folder, format="trl")
