"""Formats of other projects: what each becomes through all four entrances, and what is refused."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_cases import (
    ASK,
    ASKED,
    SHARE,
    TAGGED,
    VICUNA,
    Expected,
    both,
    cases,
    colour,
    embedded,
    make_images,
    rating,
    write_case,
)
from import_cases import assistant

from realign.data.records import Record, RecordError, read_pairs
from realign.hf.records import records_of
from realign.pairs.config import PairsConfig
from realign.pairs.io.importers import import_pairs, read_any
from realign.pairs.io.rows import FilteredRecord, InvalidRecord
from realign.pairs.stages.read import Read

CASES = (
    "TRL Parquet", "TRL JSON lines, single image", "TRL, implicit prompt", "RLAIF-V", "RLHF-V",
    "LLaMA-Factory's RLHF-V", "MMPR", "MMPR by its meta file", "ms-swift", "ms-swift messages",
    "ms-swift query", "LLaMA-Factory ShareGPT", "LLaMA-Factory Alpaca",
    "LLaMA-Factory, renamed Alpaca", "LLaMA-Factory, renamed ShareGPT", "POVID", "LLaVA-RLHF",
    "mDPO", "VLFeedback", "VLFeedback Parquet", "SENTINEL", "BPO", "OPA-DPO", "Re-Align",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _images(images):
    """The letters of images, by their colours."""
    letters = {colour(name)[0]: name for name in "abcd"}
    reds = [image.open("r").getpixel((0, 0))[0] for image in images]
    return "".join(letters[min(letters, key=lambda red: abs(red - found))] for found in reds)


def _seen(record: Record, placed=False) -> Expected:
    prompt = list(record.prompt)
    return Expected(
        record.chosen,
        record.rejected,
        prompt if not placed else ASKED,
        prompt if placed else None,
        _images(record.images),
        _images(record.retrieved_images),
    )


def _raw(expected: Expected) -> Expected:
    return Expected(**(vars(expected) | {"placed": None}))


def _placed(expected: Expected) -> Expected:
    return Expected(**(vars(expected) | {"prompt": ASKED, "placed": expected.placed or ASKED}))


@pytest.mark.parametrize("name", CASES)
def test_a_format_through_all_entrances(name, folder):
    case = cases()[name]
    file = write_case(folder, case)
    raw, placed = [_raw(e) for e in case.records], [_placed(e) for e in case.records]

    assert [_seen(record) for record in read_pairs(file)] == raw  # realign.train
    assert [_seen(record) for record in records_of(file)] == raw  # RDPOTrainer
    if case.rows:
        assert [_seen(record) for record in records_of(case.items)] == raw
    if case.rows and case.table:
        rows = datasets.Dataset.from_list(case.items)
        assert [_seen(record) for record in records_of(rows)] == raw

    counts = import_pairs(str(file), None, "out.parquet")  # realign.pairs import
    assert counts == {"pairs": len(placed)}
    if not any(expected.placed for expected in case.records):  # one typed prompt types all
        assert [_seen(record, True) for record in read_pairs("out.parquet")] == placed
    assert [_seen(record, True) for record in read_any(str(file))] == placed

    read = Read(PairsConfig(data=str(file), output="o/p.parquet"))  # realign.pairs
    (shard,) = read.shards(0)
    for record, expected in zip(shard, placed, strict=True):
        assert (list(record.prompt), record.chosen) == (expected.placed, expected.chosen)
        assert _images(record.images) == expected.images


def test_the_cases_are_all_listed(folder):
    assert tuple(cases()) == CASES


LLAVA = [
    {"id": "1", "image": "a.jpg", "conversations": [*SHARE, {"from": "gpt", "value": "A cat."}]}
]
COCO = {
    "images": [{"id": 9, "file_name": "a.jpg"}],
    "annotations": [{"id": 1, "image_id": 9, "caption": "A cat."}],
}


@pytest.mark.parametrize(
    "items", [LLAVA, COCO, [{"image": "a.jpg", "question": ASK, "answer": "A"}]]
)
def test_data_without_rejected_responses_is_for_pairs_only(items, folder):
    (folder / "data.json").write_text(json.dumps(items))
    for read in (read_pairs, records_of):
        with pytest.raises(
            ValueError, match="no rejected response. Make pairs .*realign.pairs --da"
        ):
            read(folder / "data.json")
    (record,) = read_any(str(folder / "data.json"))
    assert record.chosen.startswith("A") and record.rejected == "" and _images(record.images) == "a"


RATED = [
    {"response": "A cat.", "annotations": rating("4", "4", "4")},
    {"response": "A dog.", "annotations": rating("4", "5", "3")},
]
OUTPUTS = {"output_1": {"from": "llava", "value": "A"}, "output_2": {"from": "llava", "value": "B"}}
SWIFT = {"messages": [*TAGGED, assistant("A cat.")], "images": ["a.jpg"]}
IMAGE = {"image": "a.jpg"}
BAD = {  # problem: (item, message)
    "swapped columns": (both(chosen=ASK, prompt=None, **IMAGE), "it has no prompt"),
    "unknown rejected side": (
        {"question": ASK, "chosen": "A", "reject": "B", **IMAGE},
        r"keys \['reject'\] are unknown.*nearest format is rlaif-v with question, chosen, rejected",
    ),
    "unknown side beside a known one": (
        both(question=ASK, rejected_2="C", **IMAGE),
        r"\['rejected_2'\] are unknown",
    ),
    "unknown image": (both(question=ASK, image_2="b.jpg", **IMAGE), r"\['image_2'\] are unknown"),
    "rejected image's path": (
        both(question=ASK, rejected_image_path="b.jpg", **IMAGE),
        r"\['rejected_image_path'\] are unknown",
    ),
    "image under another name": (both(question=ASK, photo="a.jpg"), r"\['photo'\] are unknown"),
    "image's address": (both(question=ASK, photo_url="a.jpg"), "'photo_url'.* unknown"),
    "context": (both(question=ASK, context="A room.", **IMAGE), r"\['context'\] are unknown"),
    "lost image": (both(question="<image>\nWhat is it?"), "places an image, and it has no image"),
    "retrieved only": (
        both(prompt=ASK, retrieved_images=["a.jpg"]),
        "it has retrieved images and no image",
    ),
    "nested text": ({"text": json.dumps(both(question=ASK, y="C")), **IMAGE}, "unknown keys"),
    "repeated nested key": (
        {"text": '{"question": "q", "chosen": "a", "rejected": "b", "rejected": "c"}', **IMAGE},
        "'rejected' twice",
    ),
    "preference 0": (
        {"conversations": SHARE, **OUTPUTS, "preference": 0, **IMAGE},
        "preference is 0, not 1 or 2",
    ),
    "no preference": ({"conversations": SHARE, **OUTPUTS, **IMAGE}, "preference is None"),
    "other images of the rejected side": (
        SWIFT | {"rejected_response": "A dog.", "rejected_images": ["b.jpg"]},
        "no objective here does",
    ),
    "grounding": (
        SWIFT | {"rejected_response": "A dog.", "objects": {"bbox": [[1, 2]]}},
        "its objects .* would be lost",
    ),
    "video": (
        SWIFT | {"rejected_response": "A dog.", "videos": ["a.mp4"]},
        r"its videos \['a.mp4'\] would be lost, since videos are not supported",
    ),
    "video of Alpaca": (both(instruction="a", videos=["a.mp4"], **IMAGE), "videos are not supp"),
    "video of mDPO": (both(prompt=ASK, img_path="a.jpg", video="a.mp4"), "videos are not supp"),
    "video of SENTINEL": (
        {"question": ASK, "y_win": "A", "y_lose": "B", "video": "a.mp4", **IMAGE},
        "videos are not supported",
    ),
    "video of completions": (
        {"prompt": ASK, "completions": RATED, "videos": ["a.mp4"], **IMAGE},
        "videos are not supported",
    ),
    "video of LLaVA-RLHF": (
        {"conversations": SHARE, **OUTPUTS, "preference": 1, "video": "a.mp4", **IMAGE},
        "videos are not supported",
    ),
    "system of completions": (
        {"prompt": ASK, "completions": RATED, "system": "Be brief.", **IMAGE},
        "its system would be lost, since format completions does not read them",
    ),
    "system of mDPO": (both(prompt=ASK, img_path="a.jpg", system="x"), "its system would be lost"),
    "prompt of Alpaca": (both(instruction="a", prompt="b", **IMAGE), "its prompt would be lost"),
    "sides of completions": (
        both(prompt=ASK, completions=RATED, **IMAGE),
        "its chosen and rejected would be lost",
    ),
    "retrieved images of OPA-DPO": (
        {"queries": "a", "original_generate_response": "A", "standard_response": "B"}
        | {"retrieved_images": ["b.jpg"], **IMAGE},
        "its retrieved_images would be lost",
    ),
    "two prompts": (both(prompt=ASK, question="Why?", **IMAGE), "it has prompt and question"),
    "two rejected": (
        both(prompt=ASK, rejected_response="C", **IMAGE),
        "it has rejected and rejected_response",
    ),
    "a further response": (both(prompt=ASK, response="C", **IMAGE), "its response would be lost"),
    "tools of Alpaca": (both(instruction="a", tools="[{}]", **IMAGE), "its tools .* would be lost"),
    "video's address": (both(question=ASK, video_url="a.mp4"), "'video_url'.* unknown"),
    "completion without a response": (
        {"prompt": ASK, "completions": [{"score": 1}, {"score": 2}], **IMAGE},
        "without a response",
    ),
    "rendered turns": (
        both(prompt=VICUNA.format("a ASSISTANT: b USER: c"), img_path="a.jpg"),
        "several rendered turns",
    ),
    "two responses": (
        {"instruction": "a", "output": "b", "chosen": "c", "rejected": "d", **IMAGE},
        "it has chosen and output",
    ),
    "history": (both(instruction="a", history=["b"], **IMAGE), "not a question and an answer"),
    "base64": (
        {"queries": ASK, "AI_pseudo_response": "A", "original_generate_response": "B",
         "image_bytes": "?"},
        "are not base64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", BAD)
def test_what_would_change_the_meaning_is_an_error_at_every_entrance(problem, folder):
    item, message = BAD[problem]
    good = both(prompt=ASK, image="a.jpg", id="good")
    file = folder / "data.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(item)}\n")
    for read in (lambda: read_pairs(file), lambda: records_of([good, item])):
        with pytest.raises(RecordError, match=message) as error:
            read()
        assert error.value.record in ("data.jsonl:1", "row 1")
    _, bad = read_any(str(file))
    assert type(bad) is InvalidRecord and bad.record == "data.jsonl:1"
    with pytest.raises(AssertionError):  # the other record is written, and this one is not
        assert import_pairs(str(file), None, "out.parquet") == {"pairs": 2}


def test_an_unknown_side_in_a_table_is_an_error_unless_it_is_empty(folder):
    rows = [both(question=ASK, image=embedded("a"), loser=text) for text in ("", None, "A cow.")]
    pq.write_table(pa.Table.from_pylist(rows[:2]), "empty.parquet")
    assert len(read_pairs("empty.parquet")) == 2
    pq.write_table(pa.Table.from_pylist(rows), "full.parquet")
    with pytest.raises(RecordError, match=r"'full.parquet:2': its keys \['loser'\]"):
        read_pairs("full.parquet")


def test_missing_responses_are_errors_in_training(folder):
    for name, item, column in (
        ("null", both(question=ASK, rejected=None, **IMAGE), "rejected"),
        ("blank", both(question=ASK, chosen=" ", **IMAGE), "chosen"),
        ("negative only", SWIFT | {"rejected_images": ["b.jpg"]}, "rejected"),
    ):
        with pytest.raises(RecordError, match=f"its {column} response is empty"):
            records_of([both(question=ASK, **IMAGE), item])
        assert name


def test_other_images_of_ms_swift_are_visual_negatives(folder):
    (folder / "data.jsonl").write_text(json.dumps(SWIFT | {"rejected_images": ["b.jpg"]}))
    (record,) = read_any(str(folder / "data.jsonl"))
    assert (record.chosen, record.rejected) == ("A cat.", "")
    assert (_images(record.images), _images(record.retrieved_images)) == ("a", "b")


def test_ties_are_skipped_with_a_count_and_pairs_skip_rows_without_an_image(folder, capsys):
    items = [
        both(question="Which is larger?", id="text"),
        {"id": "tie", "prompt": ASK, "completions": RATED, "img_path": "a.jpg"},
        {"id": "one", "prompt": ASK, "completions": RATED[:1], "img_path": "a.jpg"},
    ]
    good = both(question=ASK, **IMAGE)
    file = folder / "data.jsonl"
    file.write_text("".join(f"{json.dumps(item)}\n" for item in [*items, good]))
    for read in (lambda: read_pairs(file), lambda: records_of([*items, good])):
        assert [len(record.images) for record in read()] == [0, 1]  # encoding counts the first
        out = capsys.readouterr().out
        assert out == "skipped 2 of 4 records: 1 no ratings, 1 tie\n"
    found = list(read_any(str(file)))
    assert [type(entry) for entry in found] == [FilteredRecord] * 3 + [Record]
    assert import_pairs(str(file), None, "out.parquet") == {
        "pairs": 1, "no image": 1, "no ratings": 1, "tie": 1,
    }  # fmt: skip
    file.write_text("".join(f"{json.dumps(item)}\n" for item in items[1:2] * 3))
    for read in (lambda: read_pairs(file), lambda: records_of(items[1:2])):
        with pytest.raises(RecordError, match="no record is left .[13] tie.*'tie': its compl"):
            read()
    with pytest.raises(ValueError, match="gave no pair"):
        import_pairs(str(file), None, "out.parquet")


def test_every_two_ratings_that_differ_make_a_pair(folder):
    scores = [("A", 2), ("B", 1), ("C", 2), ("D", None)]
    completions = [{"response": text, "score": score} for text, score in scores]
    item = {"id": "x", "prompt": ASK, "completions": completions, **IMAGE}
    (folder / "data.json").write_text(json.dumps([item]))
    records = read_pairs(folder / "data.json", format="completions:all")
    assert [(r.name, r.chosen, r.rejected) for r in records] == [
        ("x#1", "A", "B"),
        ("x#2", "C", "B"),
    ]


def test_markers_that_do_not_match_the_images(folder):
    item = both(question="Image-1: <image>\nImage-2: <image>\nCompare.", image=["a.jpg"])
    (folder / "data.jsonl").write_text(json.dumps(item))
    (bad,) = read_any(str(folder / "data.jsonl"))
    assert bad.reason == "image token" and "place 2 image(s)" in bad.detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotation": "../secret.jsonl"}, "outside the folder"),
        ({"annotation": "none.jsonl"}, "is missing. Unpack the annotations"),
        ({"root": "/etc"}, "the root of 'one' is outside the folder"),
        ({"root": ".."}, "the root of 'one' is outside the folder"),
    ],
)
def test_a_meta_file_names_only_files_in_its_folder(change, message, folder):
    inside = folder / "MMPR"
    inside.mkdir()
    line = json.dumps(both(question=ASK, **IMAGE))
    (folder / "secret.jsonl").write_text(line)
    (inside / "one.jsonl").write_text(line)
    entry = {"root": "", "annotation": "one.jsonl"} | change
    (inside / "meta.json").write_text(json.dumps({"one": entry}))
    with pytest.raises(ValueError, match=message):
        read_pairs(inside / "meta.json")


def test_a_meta_file_may_begin_with_its_folders_name_and_repeats_are_reported(folder, capsys):
    inside = folder / "MMPR"
    (inside / "images").mkdir(parents=True)
    os.rename("a.jpg", inside / "images" / "a.jpg")
    (inside / "one.jsonl").write_text(json.dumps(both(question=ASK, **IMAGE)))
    entry = {"root": "MMPR/images", "annotation": "MMPR/one.jsonl", "repeat_time": 3}
    (inside / "meta.json").write_text(json.dumps({"one": entry}))
    (record,) = read_pairs(inside / "meta.json")
    assert _images(record.images) == "a"
    assert "repeat_time of 1 data set(s) is not applied" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"columns": {"prompt": ["question"]}}], "must be objects with texts"),
        ([{"columns": "question"}], "must be objects with texts"),
        ([{"columns": {"prompt": "question"}}, {"columns": {"prompt": "ask"}}], "several times"),
    ],
)
def test_a_description_of_another_form_is_refused(entries, message, folder):
    (folder / "data.jsonl").write_text(json.dumps(both(question=ASK, **IMAGE)))
    entries = {str(i): entry | {"file_name": "data.jsonl"} for i, entry in enumerate(entries)}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        read_pairs(folder / "data.jsonl")


@pytest.mark.parametrize(
    "item",
    [
        both(instruction=ASK, **IMAGE),
        both(prompt=ASK, img_path="a.jpg"),
        {"conversations": SHARE, **OUTPUTS, "preference": 1, **IMAGE},
        {"question": ASK, "y_win": "A", "y_lose": "B", **IMAGE},
        {"prompt": ASK, "completions": RATED, **IMAGE},
    ],
)
def test_other_formats_keep_the_retrieved_images(item, folder):
    (folder / "data.jsonl").write_text(json.dumps(item | {"retrieved_images": ["b.jpg"]}))
    if "completions" in item:  # one rating differs
        item["completions"][0]["annotations"] = rating("1", "1", "1")
        (folder / "data.jsonl").write_text(json.dumps(item | {"retrieved_images": ["b.jpg"]}))
    (record,) = read_pairs(folder / "data.jsonl")
    assert _images(record.images) == "a" and _images(record.retrieved_images) == "b"


def test_equal_responses_are_skipped_with_a_count(folder, capsys):
    rows = [both(question=ASK, **IMAGE), both(question=ASK, rejected="A cat.", **IMAGE)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_pairs(folder / "data.jsonl")) == 1
    assert "skipped 1 of 2 records: 1 tie" in capsys.readouterr().out


def test_a_list_of_columns_replaces_the_defaults(folder):
    """As in LLaMA-Factory, whose parser sets every field that is not listed to None."""
    item = both(ask=ASK, input="unlisted", output="unlisted", **IMAGE)
    (folder / "data.json").write_text(json.dumps([item]))
    columns = {"prompt": "ask", "chosen": "chosen", "rejected": "rejected", "images": "image"}
    info = {"x": {"file_name": "data.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (record,) = read_pairs(folder / "data.json")
    assert record.prompt == ({"role": "user", "content": ASK},)


def test_a_described_column_keeps_unknown_sides(folder):
    """Columns that the description does not name are judged as in other files."""
    item = both(ask=ASK, reject="C", **IMAGE)
    (folder / "data.jsonl").write_text(json.dumps(item))
    info = {"x": {"file_name": "data.jsonl", "ranking": True, "columns": {"prompt": "ask"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(RecordError, match=r"keys \['reject'\] are unknown"):
        read_pairs(folder / "data.jsonl")


def test_json_lines_may_have_the_suffix_json(folder):
    line = json.dumps(both(question=ASK, **IMAGE))
    (folder / "data.json").write_text(f"{line}\n{line}\n")
    assert len(read_pairs(folder / "data.json")) == 2


def test_no_known_format_names_the_keys_and_the_nearest(folder):
    (folder / "data.json").write_text(json.dumps([{"question": ASK, "good": "A", "shot": "a"}]))
    for read in (read_pairs, read_any):
        with pytest.raises(ValueError, match=r"keys \['good', 'question', 'shot'\]. The nearest"):
            read(str(folder / "data.json"))
