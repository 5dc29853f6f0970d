"""Every format gives the records it holds, and every record that cannot be used its reason."""

import io
import json
import re
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from realign.pairs import formats
from realign.pairs.importers import FORMATS, import_pairs, main, read_any
from realign.pairs.stage import Bad
from realign.pairs.texts import problem_of, without_placeholder
from realign.records import Record, StoredImage, read_pairs, write_pairs


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def pictures(tmp_path):
    """A folder with a.jpg, b.jpg, c.jpg, each of its own grey."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (16, 16), (80 * i,) * 3).save(folder / f"{name}.jpg")
    return folder


def _json(folder, content, name="data.json"):
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def _read(data, **options):
    """(records by name, bad records as {name: reason})."""
    found = list(read_any(data, **options))
    bad = [entry for entry in found if isinstance(entry, Bad)]
    assert all(entry.stage == "read" for entry in bad)
    records = [entry for entry in found if isinstance(entry, Record)]
    assert len({r.name for r in records} | {b.record for b in bad}) == len(found)
    return {r.name: r for r in records}, {b.record: b.reason for b in bad}


REALIGN = {
    "image": "a.jpg",
    "retrieved_image": "b.jpg",
    "chosen": [_user("<image>\nWhat is it?"), _assistant("A cat.")],
    "rejected": [_user("<image>\nWhat is it?"), _assistant("A dog.")],
}


def test_the_authors_json(tmp_path, pictures):
    longer = [_user("What is it?\n<image>"), _assistant("A cat."), _user("Which colour?")]
    second = {
        "id": 7,
        "image": "b.jpg",
        "retrieved_image": "c.jpg",
        "chosen": [*longer, _assistant("Red.")],
        "rejected": [*longer, _assistant("Blue.")],
    }
    data = _json(tmp_path, [REALIGN, second])
    records, bad = _read(data, images=str(pictures))
    assert bad == {}
    root = pictures.resolve()
    assert records["data.json:0"] == Record(
        "data.json:0",
        (_user("What is it?"),),
        "A cat.",
        "A dog.",
        (StoredImage(path=str(root / "a.jpg")),),
        (StoredImage(path=str(root / "b.jpg")),),
    )
    prompt = (_user("What is it?"), _assistant("A cat."), _user("Which colour?"))
    assert records["7"].prompt == prompt
    assert (records["7"].chosen, records["7"].rejected) == ("Red.", "Blue.")
    assert _read(data, images=str(pictures), format="realign")[0] == records


LLAVA = {
    "id": "33471",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "White and red."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "In a street."},
    ],
}


def test_llava_instructions_first_turn(tmp_path, pictures):
    # The published file has one id for several dialogues about a picture.
    other = LLAVA | {"conversations": [{"from": "human", "value": "Why?\n<image>"}]}
    records, bad = _read(_json(tmp_path, [LLAVA, other]), images=str(pictures))
    assert bad == {}
    assert list(records) == ["33471", "33471-2"]
    first, second = records.values()
    assert (first.prompt, first.chosen) == ((_user("What is it?"),), "A bus.")
    assert (second.prompt, second.chosen) == ((_user("Why?"),), "")  # to be answered
    assert first.rejected == "" and first.retrieved_images == ()


def test_llava_instructions_all_turns(tmp_path, pictures):
    system = {"from": "system", "value": "Be brief."}
    briefed = LLAVA | {"id": "x", "conversations": [system, *LLAVA["conversations"][:4]]}
    data = _json(tmp_path, [LLAVA, briefed])
    records, bad = _read(data, images=str(pictures), turns="all")
    assert bad == {}
    assert list(records) == ["33471#1", "33471#2", "33471#3", "x#1", "x#2"]
    talk = [_user("What is it?"), _assistant("A bus."), _user("Which colour?")]
    talk += [_assistant("White and red."), _user("Where?")]
    for name, end, answer in (
        ("1", 1, "A bus."),
        ("2", 3, "White and red."),
        ("3", 5, "In a street."),
    ):
        record = records[f"33471#{name}"]
        assert record.prompt == tuple(talk[:end])
        assert record.chosen == answer
    assert _read(data, images=str(pictures), format="llava:all")[0] == records
    assert records["x#2"].prompt == ({"role": "system", "content": "Be brief."}, *talk[:3])


def test_llava_names_find_the_files_of_coco_2014(tmp_path):
    folder = tmp_path / "train2014"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "COCO_train2014_000000033471.jpg")
    data = _json(tmp_path, [LLAVA | {"image": "000000033471.jpg"}])
    records, _ = _read(data, images=str(folder))
    (stored,) = records["33471"].images
    assert stored.path == str(folder.resolve() / "COCO_train2014_000000033471.jpg")


COCO = {
    "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in [(9, "a"), (3, "b"), (4, "c")]],
    "annotations": [
        {"id": 30, "image_id": 9, "caption": "A later caption"},
        {"id": 12, "image_id": 9, "caption": "A cat on a mat"},
        {"id": 13, "image_id": 3, "caption": "A dog <script>alert(1)</script> in the sun"},
    ],
}


def test_coco_captions(tmp_path, pictures):
    data = _json(tmp_path, COCO, "captions.json")
    records, bad = _read(data, images=str(pictures))
    assert bad == {}
    assert {name: r.chosen for name, r in records.items()} == {
        "9": "A cat on a mat",
        "3": "A dog <script>alert(1)</script> in the sun",
        "4": "",
    }
    assert records["9"].prompt == (_user("Describe the image in one sentence."),)
    asked, _ = _read(data, images=str(pictures), captions="all", caption_prompt="What?")
    assert {name: r.chosen for name, r in asked.items()} == {
        "9#1": "A cat on a mat",
        "9#2": "A later caption",
        "3#1": "A dog <script>alert(1)</script> in the sun",
        "4": "",
    }
    assert set(_read(data, images=str(pictures), format="coco:all")[0]) == set(asked)
    assert all(r.prompt == (_user("What?"),) for r in asked.values())
    with pytest.raises(ValueError, match="no caption of an image. COCO's captions are in"):
        read_any(_json(tmp_path, COCO | {"annotations": [{"bbox": []}]}), images=str(pictures))


def test_a_folder_with_a_list(pictures):
    lines = [
        {"image": "a.jpg", "question": "What?", "answer": "A cat."},
        {"id": "b", "images": ["b.jpg", "c.jpg"], "prompt": [_user("Compare.")]},
        {"image": "c.jpg", "question": "What?", "chosen": "A cow.", "answer": "unused"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n\n{"image": "a.jpg", \n[1]\n'
    (pictures / "list.jsonl").write_text(text)
    for data in (pictures, pictures / "list.jsonl"):
        records, bad = _read(str(data))
        assert {n: (r.chosen, len(r.images)) for n, r in records.items()} == {
            "list.jsonl:0": ("A cat.", 1),
            "b": ("", 2),
            "list.jsonl:2": ("A cow.", 1),
        }
        assert records["b"].prompt == (_user("Compare."),)
        assert bad == {"list.jsonl:3": "malformed", "list.jsonl:4": "malformed"}


def _bytes(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def _parts(text):
    return [{"type": "image", "text": None}, {"type": "text", "text": text}]


TRL = {
    "conversational": {
        "prompt": [_user("What is it?")],
        "chosen": [_assistant("A cat.")],
        "rejected": [_assistant("A dog.")],
    },
    "plain": {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
    "implicit prompt": {
        "chosen": [_user("What is it?"), _assistant("A cat.")],
        "rejected": [_user("What is it?"), _assistant("A dog.")],
    },
    "parts": {
        "prompt": [{"role": "user", "content": _parts("What is it?")}],
        "chosen": [{"role": "assistant", "content": _parts("A cat.")[1:]}],
        "rejected": [{"role": "assistant", "content": _parts("A dog.")[1:]}],
    },
}


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("form", TRL)
def test_trls_sets(tmp_path, form, column):
    image = {"bytes": _bytes(1), "path": "x.png"}
    row = TRL[form] | {column: [image] if column == "images" else image, "note": "of no interest"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "set.parquet")
    for data in (tmp_path, tmp_path / "set.parquet"):
        records, bad = _read(str(data))
        assert bad == {}
        (record,) = records.values()
        content = record.prompt[0]["content"]
        placed = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        assert content == (placed if form == "parts" else "What is it?")
        assert (record.name, record.chosen, record.rejected) == (
            "set.parquet:0",
            "A cat.",
            "A dog.",
        )
        assert record.images == (StoredImage(_bytes(1), "x.png"),)


def test_what_write_pairs_wrote_without_responses(tmp_path):
    record = Record("a", (_user("What?"),), "", "", (StoredImage(_bytes(1)),))
    write_pairs(tmp_path / "sources.parquet", [record])
    assert _read(str(tmp_path / "sources.parquet")) == ({"a": record}, {})


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_saved_by_datasets(tmp_path, split):
    rows = [
        TRL["conversational"] | {"images": [Image.new("RGB", (8, 8), (i, i, i))]} for i in range(5)
    ]
    features = datasets.Features(
        {name: [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
         for name in ("prompt", "chosen", "rejected")}
        | {"images": [datasets.Image()]}
    )  # fmt: skip
    saved = datasets.Dataset.from_list(rows, features=features).select([0, 3, 4])
    whole = datasets.DatasetDict({"train": saved, "test": saved.select([1])}) if split else saved
    whole.save_to_disk(str(tmp_path / "set"), **({} if split else {"num_shards": 2}))
    records, bad = _read(str(tmp_path / "set"))
    greys = [np.asarray(r.images[0].open("r"))[0, 0, 0] for r in records.values()]
    assert greys == [0, 3, 4] and len(records) == 3
    assert list(bad.values()) == (["duplicate"] if split else [])


MANY = "".join(f"<p class='x{i}'></p>" for i in range(9)) + "A cat."
BAD = {
    "empty": ({"answer": ""}, "empty text"),
    "blank": ({"answer": " \n\t"}, "empty text"),
    "marks": ({"answer": "?!"}, "empty text"),
    "empty question": ({"question": "<image>\n"}, "empty text"),
    "markup": ({"answer": MANY}, "mostly markup"),
    "null": ({"answer": "A\0cat"}, "control characters"),
    "escape": ({"answer": "A \x1b[31mcat"}, "control characters"),
    "surrogate": ({"answer": "A cat \ud83d"}, "not Unicode"),
    "token": ({"answer": "A <image> of a cat"}, "image token"),
    "token in the question": ({"question": "Is <image> a cat?"}, "image token"),
    "answer type": ({"answer": 3}, "malformed"),
    "answer messages": ({"answer": [_user("A cat.")]}, "malformed"),
    "no question": ({"question": None}, "malformed"),
    "no image": ({"image": None}, "no image"),
    "image type": ({"image": 3}, "no image"),
    "image name": ({"image": ""}, "no image"),
    "missing": ({"image": "z.jpg"}, "missing"),
    "folder": ({"image": "."}, "missing"),
    "null byte": ({"image": "a\0.jpg"}, "missing"),
    "up": ({"image": "../secret.jpg"}, "outside the folder"),
    "absolute": ({"image": "/etc/hostname"}, "outside the folder"),
    "link": ({"image": "link.jpg"}, "outside the folder"),
    "duplicate": ({}, "duplicate"),
}


def test_every_bad_record_has_its_reason(tmp_path, pictures):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    (pictures / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    good = {"image": "a.jpg", "question": "What?", "answer": "A cat."}
    lines = [good | {"id": "good"}]
    lines += [good | {"id": name} | changes for name, (changes, _) in BAD.items()]
    lines += [
        good | {"answer": "A cat <b>on</b> a mat & <script>alert('x')</script>", "id": "html"}
    ]
    (pictures / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records, bad = _read(str(pictures))
    assert set(records) == {"good", "html"}
    assert bad == {name: reason for name, (_, reason) in BAD.items()}
    details = {b.record: b.detail for b in read_any(str(pictures)) if isinstance(b, Bad)}
    assert details["duplicate"] == "it is the same as good"
    assert "'../secret.jpg'" in details["up"] and "'z.jpg'" in details["missing"]
    for detail in details.values():
        detail.encode()


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ({"conversations": []}, "holds no messages"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "the message .*robot"),
        ({"id": "r", "conversations": LLAVA["conversations"][1:]}, "do not alternate"),
        ({"id": "r", "conversations": [{"from": "system", "value": "x"}]}, "no dialogue"),
        (REALIGN | {"rejected": [_user("Other?"), _assistant("A dog.")]}, "differ before their"),
        (REALIGN | {"rejected": [_user("<image>\nWhat is it?")]}, "differ before their"),
        (REALIGN | {"retrieved_image": None}, "retrieved_image is missing"),
        (REALIGN | {"rejected": None}, "rejected is missing"),
        (REALIGN | {"chosen": "A cat."}, "prompt is missing"),
        (REALIGN | {"chosen": [*REALIGN["chosen"][:1], _assistant(None)]}, "not text or parts"),
        (REALIGN | {"rejected": [*REALIGN["chosen"][:1], _user("A dog.")]}, "does not end with"),
    ],
)
def test_what_is_malformed_says_how(tmp_path, pictures, item, problem):
    data = _json(tmp_path, [item])
    (found,) = read_any(data, images=str(pictures))
    assert isinstance(found, Bad) and found.reason == "malformed"
    assert re.search(problem, found.detail)


ROLES = ("system", "user", "assistant")


def test_texts_of_any_size_are_looked_at_in_time():
    for text in ("x" + " " * 300_000 + "x", "<" * 300_000, "<a" * 300_000, "<image>" * 3000 + "x"):
        began = time.perf_counter()
        without_placeholder(_user(text))
        problem_of(text)
        assert time.perf_counter() - began < 2
    content = "\n <image><image>\n Is <image> here? \n<image>\n"
    assert without_placeholder(_user(content)) == "Is <image> here?"
    assert without_placeholder(_user(" as it is\n")) == " as it is\n"
    assert without_placeholder(_assistant("<image>")) == "<image>"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["user", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "type",
                    "text",
                    "id",
                    "image",
                    "caption",
                    "file_name",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_json_is_a_record_or_malformed(data):
    keys = [
        "conversations",
        "image",
        "images",
        "chosen",
        "rejected",
        "prompt",
        "question",
        "answer",
    ]
    item = data.draw(st.dictionaries(st.sampled_from([*keys, "id", "retrieved_image"]), JSON))
    for kind in ("llava", "realign", "folder", "parquet"):
        for turns in ("first", "all"):
            try:
                entries = formats.PARSERS[kind](item, formats.Options(turns))
            except formats.Malformed as error:
                assert str(error)
                continue
            for entry in entries:
                assert entry.prompt and all(m["role"] in ROLES for m in entry.prompt)
                assert isinstance(entry.chosen, str | None) and isinstance(
                    entry.rejected, str | None
                )


def test_files_that_are_none_are_named(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="nothing at .*none.json"):
        read_any(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="format is 'csv'; use one of auto, llava, realign"):
        read_any(str(pictures), format="csv")
    with pytest.raises(ValueError, match="turns is 'some'; use 'first' or 'all'"):
        read_any(str(pictures), turns="some")
    with pytest.raises(ValueError, match="holds 0 JSON-lines files and no Parquet file"):
        read_any(str(pictures))
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": 1,')
    with pytest.raises(ValueError, match="broken.json is no JSON file"):
        read_any(str(broken))
    with pytest.raises(ValueError, match="without `images`"):
        read_any(_json(tmp_path, {"a": 1}))
    with pytest.raises(ValueError, match="no record of a known format; pass --format"):
        read_any(_json(tmp_path, [{"a": 1}, 3]))
    with pytest.raises(ValueError, match="--image-folder nowhere is no folder"):
        read_any(_json(tmp_path, [LLAVA]), images="nowhere")
    with pytest.raises(ValueError, match="format is 'coco', but .* looks like 'llava'"):
        read_any(_json(tmp_path, [LLAVA]), format="coco")
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet has the columns text. TRL's vision"):
        list(read_any(str(tmp_path / "other.parquet")))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="cut.parquet cannot be read"):
        list(read_any(str(tmp_path / "cut.parquet")))
    assert set(FORMATS) == {"auto", "parquet", "realign", "llava", "coco", "folder"}


def test_pairs_of_the_authors_json_are_written(tmp_path, pictures):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(pictures / "ink.tif")
    whole = (pictures / "c.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (3000, 3000)).save(pictures / "large.png")
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
    data, output = _json(tmp_path, items), tmp_path / "out" / "pairs.parquet"
    counts = import_pairs(data, str(pictures), str(output), max_pixels=5_000_000)
    assert counts == {
        "pairs": 2,
        "corrupt": 2,
        "duplicate": 1,
        "malformed": 1,
        "missing": 1,
        "too large": 1,
    }
    good, ink = read_pairs(output)
    assert good.images == (StoredImage(path=str(pictures.resolve() / "a.jpg")),)
    assert good.retrieved_images == (StoredImage(path=str(pictures.resolve() / "b.jpg")),)
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
    assert listed[2]["detail"] == "3000 x 3000 is more than 5000000 pixels"


def test_pairs_without_a_rejected_response_are_none(tmp_path, pictures):
    data = _json(tmp_path, [LLAVA])
    with pytest.raises(ValueError, match="gave no pair .*'no response': 1.*rejected_records"):
        import_pairs(data, str(pictures), str(tmp_path / "pairs.parquet"))
    assert not (tmp_path / "pairs.parquet").exists()
    (row,) = pq.read_table(tmp_path / "pairs.work" / "rejected_records.parquet").to_pylist()
    assert row["record"] == "33471" and row["detail"] == "it has no rejected response"


def test_the_command(tmp_path, pictures, capsys):
    data, output = _json(tmp_path, [REALIGN, REALIGN, 3]), tmp_path / "pairs.parquet"
    folder = ["--image-folder", str(pictures)]
    assert main([data, *folder, "--output", str(output), "--format", "realign"]) == 0
    out = capsys.readouterr().out
    assert out == f"wrote {output}: 1 pairs; left out: 1 duplicate, 1 malformed\n"
    assert [record.rejected for record in read_pairs(output)] == ["A dog."]
    assert main([str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error: there is nothing at ")


@pytest.mark.parametrize(
    "stored, reason",
    [
        ({"bytes": b"", "path": None}, "corrupt"),
        ({"bytes": b"", "path": "a.png"}, "corrupt"),
        ({"bytes": "aGk=", "path": None}, "malformed"),
    ],
)
def test_bytes_that_are_none_are_a_bad_record(tmp_path, stored, reason):
    rows = [{"prompt": [_user("What?")], "chosen": "A", "rejected": "B", "images": [stored]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (found,) = read_any(str(tmp_path / "pairs.parquet"))
    assert isinstance(found, Bad) and found.reason == reason


def test_a_line_nested_too_deep_is_malformed(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("[" * 200_000 + "\n" + json.dumps(LLAVA) + "\n")
    first, _ = read_any(str(file))
    assert isinstance(first, Bad) and first.reason == "malformed"


def test_annotations_of_coco_that_are_no_list(tmp_path):
    data = _json(tmp_path, COCO | {"annotations": 5}, "captions.json")
    with pytest.raises(ValueError, match="`annotations` that are no list: 5"):
        read_any(data, images=str(tmp_path))
