"""Import: records of every format."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from import_cases import COCO, LLAVA, REALIGN, assistant, read_all, text, user, write_json
from PIL import Image
from stress_images import encode

from realign.data.records import Record, StoredImage, read_pairs, write_pairs
from realign.pairs.io.importers import import_pairs, main


def test_the_authors_json(tmp_path, image_folder):
    longer = [user("What is it?\n<image>"), assistant("A cat."), user("Which colour?")]
    second = {
        "id": 7,
        "image": "b.jpg",
        "retrieved_image": "c.jpg",
        "chosen": [*longer, assistant("Red.")],
        "rejected": [*longer, assistant("Blue.")],
    }
    data = write_json(tmp_path, [REALIGN, second])
    records, bad = read_all(data, images=str(image_folder))
    assert bad == {}
    root = image_folder.resolve()
    assert records["data.json:0"] == Record(
        "data.json:0",
        (user("What is it?"),),
        "A cat.",
        "A dog.",
        (StoredImage(path=str(root / "a.jpg")),),
        (StoredImage(path=str(root / "b.jpg")),),
    )
    placed = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    turns = (user(placed), assistant([text("A cat.")]), user([text("Which colour?")]))
    assert records["7"].prompt == turns
    assert (records["7"].chosen, records["7"].rejected) == ("Red.", "Blue.")
    assert read_all(data, images=str(image_folder), format="realign")[0] == records


def test_llava_instructions_first_turn(tmp_path, image_folder):
    # In the published file, several dialogues about an image share an id.
    other = LLAVA | {"conversations": [{"from": "human", "value": "Why?\n<image>"}]}
    records, bad = read_all(write_json(tmp_path, [LLAVA, other]), images=str(image_folder))
    assert bad == {}
    assert list(records) == ["33471", "33471-2"]
    first, second = records.values()
    assert (first.prompt, first.chosen) == ((user("What is it?"),), "A bus.")
    assert second.prompt == (user([text("Why?"), {"type": "image"}]),)
    assert second.chosen == ""  # without a response
    assert first.rejected == "" and first.retrieved_images == ()


def test_llava_instructions_all_turns(tmp_path, image_folder):
    system = {"from": "system", "value": "Be brief."}
    briefed = LLAVA | {"id": "x", "conversations": [system, *LLAVA["conversations"][:4]]}
    data = write_json(tmp_path, [LLAVA, briefed])
    records, bad = read_all(data, images=str(image_folder), format="llava:all")
    assert bad == {}
    assert list(records) == ["33471#1", "33471#2", "33471#3", "x#1", "x#2"]
    talk = [user("What is it?"), assistant("A bus."), user("Which colour?")]
    talk += [assistant("White and red."), user("Where?")]
    for name, end, answer in (
        ("1", 1, "A bus."),
        ("2", 3, "White and red."),
        ("3", 5, "In a street."),
    ):
        record = records[f"33471#{name}"]
        assert record.prompt == tuple(talk[:end])
        assert record.chosen == answer
    assert records["x#2"].prompt == ({"role": "system", "content": "Be brief."}, *talk[:3])


def test_llava_names_find_the_files_of_coco_2014(tmp_path):
    folder = tmp_path / "train2014"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "COCO_train2014_000000033471.jpg")
    data = write_json(tmp_path, [LLAVA | {"image": "000000033471.jpg"}])
    records, _ = read_all(data, images=str(folder))
    (stored,) = records["33471"].images
    assert stored.path == str(folder.resolve() / "COCO_train2014_000000033471.jpg")


def test_coco_captions(tmp_path, image_folder):
    data = write_json(tmp_path, COCO, "captions.json")
    records, bad = read_all(data, images=str(image_folder))
    assert bad == {}
    assert {name: r.chosen for name, r in records.items()} == {
        "9": "A cat on a mat",
        "3": "A dog <script>alert(1)</script> in the sun",
        "4": "",
    }
    assert records["9"].prompt == (user("Describe the image in one sentence."),)
    every, _ = read_all(data, images=str(image_folder), format="coco:all")
    assert {name: r.chosen for name, r in every.items()} == {
        "9#1": "A cat on a mat",
        "9#2": "A later caption",
        "3#1": "A dog <script>alert(1)</script> in the sun",
        "4": "",
    }


def test_a_folder_with_a_list(image_folder):
    lines = [
        {"image": "a.jpg", "question": "What?", "answer": "A cat."},
        {"id": "b", "images": ["b.jpg", "c.jpg"], "prompt": [user("Compare.")]},
        {"image": "c.jpg", "question": "What?", "chosen": "A cow.", "answer": "unused"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n\n{"image": "a.jpg", \n[1]\n'
    (image_folder / "list.jsonl").write_text(text)
    for data in (image_folder, image_folder / "list.jsonl"):
        records, bad = read_all(str(data))
        assert {n: (r.chosen, len(r.images)) for n, r in records.items()} == {
            "list.jsonl:0": ("A cat.", 1),
            "b": ("", 2),
            "list.jsonl:2": ("A cow.", 1),
        }
        assert records["b"].prompt == (user("Compare."),)
        assert bad == {"list.jsonl:3": "malformed", "list.jsonl:4": "malformed"}


PNG = encode(Image.new("RGB", (8, 8)))
TRL = {
    "prompt": [user("What is it?")],
    "chosen": [assistant("A cat.")],
    "rejected": [assistant("A dog.")],
}


@pytest.mark.parametrize("column", ["images", "image"])
def test_trls_sets(tmp_path, column):
    """Only TRL's columns. The tests of `entry_of` cover other forms of rows."""
    image = {"bytes": PNG, "path": "x.png"}
    row = TRL | {column: [image] if column == "images" else image, "note": "of no interest"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "set.parquet")
    for data in (tmp_path, tmp_path / "set.parquet"):
        records, bad = read_all(data)
        expected = ("set.parquet:0", (user("What is it?"),), "A cat.", "A dog.")
        assert records["set.parquet:0"] == Record(*expected, (StoredImage(PNG, "x.png"),))
        assert bad == {}


def test_pairs_files_without_responses(tmp_path):
    record = Record("a", (user("What?"),), "", "", (StoredImage(PNG),))
    write_pairs(tmp_path / "sources.parquet", [record])
    assert read_all(str(tmp_path / "sources.parquet")) == ({"a": record}, {})


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_saved_by_datasets(tmp_path, split):
    rows = [TRL | {"images": [Image.new("RGB", (8, 8), (i, i, i))]} for i in range(5)]
    features = datasets.Features(
        {name: [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
         for name in ("prompt", "chosen", "rejected")}
        | {"images": [datasets.Image()]}
    )  # fmt: skip
    saved = datasets.Dataset.from_list(rows, features=features).select([0, 3, 4])
    whole = datasets.DatasetDict({"train": saved, "test": saved.select([1])}) if split else saved
    whole.save_to_disk(str(tmp_path / "set"), **({} if split else {"num_shards": 2}))
    if split:
        with pytest.raises(ValueError, match="has the splits train, test. Add --split"):
            read_all(str(tmp_path / "set"))
    options = {"split": "train+test"} if split else {}
    records, bad = read_all(str(tmp_path / "set"), **options)
    greys = [np.asarray(r.images[0].open("r"))[0, 0, 0] for r in records.values()]
    assert greys == [0, 3, 4] and len(records) == 3
    assert list(bad.values()) == (["duplicate"] if split else [])


def test_pairs_of_the_authors_json_are_written(tmp_path, image_folder):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(image_folder / "ink.tif")
    whole = (image_folder / "c.jpg").read_bytes()
    (image_folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (8000, 8000)).save(image_folder / "large.png")
    items = [
        REALIGN | {"id": "good"},
        REALIGN | {"id": "ink", "image": "ink.tif"},
        REALIGN | {"id": "cut", "retrieved_image": "cut.jpg"},
        REALIGN | {"id": "cut again", "image": "cut.jpg"},
        REALIGN | {"id": "large", "image": "large.png"},
        REALIGN | {"id": "gone", "image": "gone.jpg"},
        REALIGN | {"id": "again"},
        "no record",
    ]
    data, output = write_json(tmp_path, items), tmp_path / "out" / "pairs.parquet"
    counts = import_pairs(data, str(image_folder), str(output))
    assert counts == {
        "pairs": 2,
        "corrupt": 2,
        "duplicate": 1,
        "malformed": 1,
        "missing": 1,
        "too large": 1,
    }
    good, ink = read_pairs(output, image_folder)
    assert good.images == (StoredImage(path=str(image_folder.resolve() / "a.jpg")),)
    assert good.retrieved_images == (StoredImage(path=str(image_folder.resolve() / "b.jpg")),)
    assert (good.name, good.chosen, good.rejected) == ("good", "A cat.", "A dog.")
    assert np.asarray(ink.images[0].open("ink")).tolist() == [[[0, 255, 255]] * 8] * 8
    listed = pq.read_table(output.with_suffix(".work") / "rejected_records.parquet").to_pylist()
    assert [(row["record"], row["reason"]) for row in listed] == [
        ("cut", "corrupt"),
        ("cut again", "corrupt"),
        ("large", "too large"),
        ("gone", "missing"),
        ("again", "duplicate"),
        ("data.json:7", "malformed"),
    ]
    assert all(row["stage"] == "read" for row in listed)
    assert listed[2]["detail"] == "8000 x 8000 is more than 50000000 pixels"


def test_records_without_a_rejected_response_are_not_pairs(tmp_path, image_folder):
    data = write_json(tmp_path, [LLAVA])
    with pytest.raises(ValueError, match="gave no pair .*'no response': 1.*rejected_records"):
        import_pairs(data, str(image_folder), str(tmp_path / "pairs.parquet"))
    assert not (tmp_path / "pairs.parquet").exists()
    (row,) = pq.read_table(tmp_path / "pairs.work" / "rejected_records.parquet").to_pylist()
    assert row["record"] == "33471" and row["detail"] == "it has no rejected response"


def test_the_command(tmp_path, image_folder, capsys):
    data, output = write_json(tmp_path, [REALIGN, REALIGN, 3]), tmp_path / "pairs.parquet"
    folder = ["--image-folder", str(image_folder)]
    assert main([data, *folder, "--output", str(output), "--format", "realign"]) == 0
    out = capsys.readouterr().out
    assert out == f"wrote {output}: 1 pairs; left out: 1 duplicate, 1 malformed\n"
    assert [record.rejected for record in read_pairs(output)] == ["A dog."]
    (tmp_path / "out").mkdir()
    elsewhere = tmp_path / "out" / "pairs.parquet"
    assert main([data, *folder, "--output", str(elsewhere)]) == 0
    flag, named = capsys.readouterr().out.split()[-2:]
    assert flag == "--image-folder" and len(read_pairs(elsewhere, named)) == 1
    before = elsewhere.read_bytes()
    shutil.copy(elsewhere, tmp_path / "out" / "more.parquet")
    for source in (elsewhere, tmp_path / "out"):
        assert main([str(source), *folder, "--output", str(elsewhere)]) == 1
        assert elsewhere.read_bytes() == before
    err = capsys.readouterr().err
    assert "is the data that is read" in err and "is in the folder of the data" in err
    assert main([str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error: there is nothing at ")
