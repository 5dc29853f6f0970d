"""Records on disk: round trips, agreement with TRL and `datasets`, and errors."""

import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from realign.data.records import (
    Record,
    RecordError,
    StoredImage,
    read_pairs,
    write_pairs,
)

IMAGE = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(10, 12, 3))
PNG = StoredImage.from_pil(IMAGE).data
PROMPT = [{"role": "user", "content": "what is this ?"}]


def _record(name="a", **changes) -> Record:
    values = {
        "name": name,
        "prompt": tuple(PROMPT),
        "chosen": "a cat .",
        "rejected": "a dog .",
        "images": (StoredImage(PNG),),
        "retrieved_images": (StoredImage(PNG),),
        "provenance": {"masked": "a [MASK] .", "neighbour_rank": 2, "similarity": 0.5, "seed": 3},
    }
    return Record(**(values | changes))


def _row(**changes) -> dict:
    answer = [{"role": "assistant", "content": "a cat ."}]
    other = [{"role": "assistant", "content": "a dog ."}]
    row = {"prompt": PROMPT, "chosen": answer, "rejected": other, "images": [{"bytes": PNG}]}
    return row | changes


def _file(folder, *rows, name="rows.parquet"):
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)
    return folder / name


def test_what_is_written_is_read(tmp_path):
    records = [
        _record(),
        _record("b", retrieved_images=(), provenance={}),
        _record("c", images=(StoredImage(PNG), StoredImage(PNG, "named.png"))),
    ]
    file = tmp_path / "new" / "folder" / "pairs.parquet"
    assert write_pairs(file, iter(records)) == 3
    assert read_pairs(file) == records
    assert read_pairs(str(file.parent)) == records
    assert os.listdir(file.parent) == ["pairs.parquet"]


def test_many_records_go_to_several_row_groups(tmp_path):
    # A row group can hold at most 2 GiB of image bytes.
    records = [_record(f"record-{i}") for i in range(600)]
    file = tmp_path / "pairs.parquet"
    write_pairs(file, records)
    assert pq.ParquetFile(file).num_row_groups == 3
    assert read_pairs(file) == records


def test_prompts_that_place_their_images_keep_them(tmp_path):
    placed = [
        {"type": "text", "text": "compare"},
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
    ]
    records = [
        _record("placed", prompt=({"role": "user", "content": placed},)),
        _record("plain"),
    ]
    file = tmp_path / "pairs.parquet"
    write_pairs(file, records)
    first, second = read_pairs(file)
    assert first.prompt[0]["content"] == placed
    assert second.prompt[0]["content"] == [{"type": "text", "text": "what is this ?"}]
    again = tmp_path / "again.parquet"
    write_pairs(again, [first, second])
    assert again.read_bytes() == file.read_bytes()
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert rows[0]["prompt"][0]["content"][1] == {"type": "image", "text": None}


def test_datasets_loads_it_in_trls_form(tmp_path):
    file = tmp_path / "pairs.parquet"
    write_pairs(file, [_record(), _record("b")])
    rows = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    image = datasets.List(datasets.Image())
    assert rows.features["images"] == rows.features["retrieved_images"] == image
    row = rows[0]
    assert row["prompt"] == PROMPT
    assert row["chosen"] == [{"role": "assistant", "content": "a cat ."}]
    assert row["rejected"] == [{"role": "assistant", "content": "a dog ."}]
    for column in ("images", "retrieved_images"):
        (image,) = row[column]
        assert isinstance(image, Image.Image)
        assert np.array_equal(np.asarray(image), np.asarray(IMAGE))
    assert {k: row[k] for k in ("id", "neighbour_rank", "similarity", "seed", "embed_model")} == {
        "id": "a",
        "neighbour_rank": 2,
        "similarity": 0.5,
        "seed": 3,
        "embed_model": None,
    }
    rows.to_parquet(str(tmp_path / "back.parquet"))
    assert read_pairs(tmp_path / "back.parquet") == read_pairs(file)


def test_image_paths_are_relative_to_their_file(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    (folder / "photos").mkdir(parents=True)
    IMAGE.save(folder / "photos" / "cat.png")
    IMAGE.save(folder / "dog.png")
    rows = [
        _row(images=["photos/cat.png"]),
        _row(images=[str(folder / "dog.png")]),
    ]
    file = _file(folder, *rows)
    monkeypatch.chdir(tmp_path)
    for path in (file, "data/rows.parquet", "data"):
        for record in read_pairs(path):
            image = record.images[0].open(record.name)
            assert np.array_equal(np.asarray(image), np.asarray(IMAGE))
    # Pairs in another folder still find the images.
    write_pairs("runs/pairs.parquet", read_pairs("data/rows.parquet"))
    monkeypatch.chdir("/")
    for record in read_pairs(tmp_path / "runs" / "pairs.parquet", tmp_path / "data"):
        assert record.images[0].open(record.name).size == IMAGE.size


@pytest.mark.parametrize(
    "images",
    [[{"bytes": PNG, "path": None}], {"bytes": PNG, "path": "x.png"}, [PNG], PNG, [{"bytes": PNG}]],
    ids=["struct list", "struct", "bytes list", "bytes", "no path"],
)
def test_forms_of_an_image_column(tmp_path, images):
    (record,) = read_pairs(_file(tmp_path, _row(images=images)))
    assert len(record.images) == 1
    assert record.images[0].open("r").size == IMAGE.size


def test_a_folder_is_read_in_order_and_other_files_are_left_out(tmp_path):
    for name in ("b", "a", "c"):
        _file(tmp_path, _row(id=name), name=f"{name}.parquet")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "photos").mkdir()
    assert [r.name for r in read_pairs(tmp_path)] == ["a", "b", "c"]


def test_a_record_without_id_is_named_by_its_place(tmp_path):
    _file(tmp_path, _row(), _row(), name="train.parquet")
    _file(tmp_path, _row(id=0), name="extra.parquet")
    assert [r.name for r in read_pairs(tmp_path)] == ["0", "train.parquet:0", "train.parquet:1"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("chosen", "", "its chosen response is empty. Write one"),
        ("chosen", [], "its chosen response is empty"),
        ("rejected", [{"role": "assistant", "content": " \n"}], "its rejected response is empty"),
        ("prompt", "", "it has no prompt"),
        ("prompt", [], "it has no prompt. Add one"),
    ],
)
def test_an_empty_value_is_named_with_its_remedy(tmp_path, column, value, message):
    _file(tmp_path, _row(id="good"), name="a.parquet")
    _file(tmp_path, _row(id="r") | {column: value}, name="b.parquet")
    with pytest.raises(RecordError, match=f"record 'r': {message}") as error:
        read_pairs(tmp_path)
    assert error.value.record == "r"


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing at .*none.*realign.pairs"):
        read_pairs(tmp_path / "none")
    with pytest.raises(ValueError, match="holds 0 JSON-lines files and no Parquet file"):
        read_pairs(tmp_path)
    write_pairs(tmp_path / "empty.parquet", [])
    with pytest.raises(ValueError, match="empty.parquet holds no records"):
        read_pairs(tmp_path / "empty.parquet")

    whole = _file(tmp_path, _row(rejected="no")).read_bytes()
    for name, content in {
        "text": b"a,b\n1,2\n",
        "cut": whole[: len(whole) // 2],
        "void": b"",
    }.items():
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.parquet is not a readable Parquet file"):
            read_pairs(file)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(ValueError, match="damaged.parquet is not a readable Parquet file"):
        read_pairs(damaged)


@pytest.mark.parametrize("column", ["chosen", "rejected", "images"])
def test_a_missing_column_is_named(tmp_path, column):
    row = _row(more="of no interest")
    del row[column]
    file = _file(tmp_path, row)
    message = f"rows.parquet lacks the column.s. {column}. The format is"
    with pytest.raises(ValueError, match=message):
        read_pairs(file)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_pylist([_row()])
    file = tmp_path / "rows.parquet"
    pq.write_table(table.append_column("rejected", table["chosen"]), file)
    with pytest.raises(ValueError, match="rows.parquet has 'rejected' as two columns"):
        read_pairs(file)


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path):
    file = tmp_path / "pairs.parquet"
    write_pairs(file, [_record("old")])
    before = file.read_bytes()

    def stops():
        yield from (_record(f"new-{i}") for i in range(300))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(file, stops())
    bad = [_record(f"new-{i}") for i in range(300)] + [_record("bad", provenance={"seed": "x"})]
    with pytest.raises(pa.ArrowInvalid):
        write_pairs(file, bad)  # in the second row group
    assert file.read_bytes() == before
    assert [r.name for r in read_pairs(tmp_path)] == ["old"]
    write_pairs(file, [_record("new")])
    assert [r.name for r in read_pairs(tmp_path)] == ["new"]


def test_the_metadata_describes_every_column(tmp_path):
    file = tmp_path / "pairs.parquet"
    write_pairs(file, [_record()])
    schema = pq.read_schema(file)
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert datasets.Features.from_dict(features).arrow_schema.types == schema.types
