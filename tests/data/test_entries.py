"""Rows of preference data: training, `RDPOTrainer` and pairs agree on every row."""

import io
import json
import math

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from import_cases import assistant, text, user
from PIL import Image
from trl.data_utils import apply_chat_template, maybe_extract_prompt, prepare_multimodal_messages

from realign.data.errors import short_repr
from realign.data.records import RecordError, read_pairs
from realign.digits.processor import build_processor
from realign.hf.records import records_of
from realign.pairs.io.importers import import_pairs, read_any
from realign.pairs.io.rows import InvalidRecord

_BUFFER = io.BytesIO()
Image.new("RGB", (8, 8)).save(_BUFFER, "PNG")
PNG = _BUFFER.getvalue()
IMAGES = [{"bytes": PNG, "path": None}]
SYSTEM = {"role": "system", "content": "Be brief."}
LONG = {"role": "system", "content": "Be long."}
ASKED = [user("What is it?"), assistant("A table."), user("What is on it?")]
A, B = assistant("An apple."), assistant("A knife.")


def _from(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def _struct(*messages, **more):
    """A struct of lists, as `datasets` stores a Sequence of objects."""
    return {key: [message[key] for message in messages] for key in ("role", "content")} | more


def _row(**columns):
    return {"id": "r", "images": IMAGES} | columns


def _imported(folder, row):
    (found,) = read_any(str(folder / "rows.parquet"))
    if isinstance(found, InvalidRecord):
        raise RecordError(found.record, found.detail, "")
    return found


def _readers(folder, row):
    """Reader -> record or error, for every reader that can represent the row."""
    found = {}
    readers = {"RDPOTrainer": lambda: records_of([row])[0]}
    try:
        pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
        readers["train"] = lambda: read_pairs(folder / "rows.parquet")[0]
        readers["pairs"] = lambda: _imported(folder, row)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        pass  # Parquet cannot represent it
    for name, read in readers.items():
        try:
            found[name] = read()
        except RecordError as error:
            found[name] = error
    return found


PLAIN = {"prompt": "What is on it?", "chosen": "An apple.", "rejected": "A knife."}
ONE = [user("What is on it?")]
GOOD = {  # form: (columns, the prompt's messages)
    "text": (PLAIN, ONE),
    "messages": ({"prompt": ASKED, "chosen": [A], "rejected": [B]}, ASKED),
    "implicit prompt": ({"chosen": [*ASKED, A], "rejected": [*ASKED, B]}, ASKED),
    "repeated prompt": (
        {"prompt": "What is on it?", "chosen": [*ONE, A], "rejected": [*ONE, B]},
        ONE,
    ),
    "repeated dialogue": ({"prompt": ASKED, "chosen": [*ASKED, A], "rejected": [*ASKED, B]}, ASKED),
    "repeated by one": ({"prompt": ASKED, "chosen": [*ASKED, A], "rejected": "A knife."}, ASKED),
    "shared turns": (
        {"prompt": ASKED[:1], "chosen": [*ASKED[1:], A], "rejected": [*ASKED[1:], B]},
        ASKED,
    ),
    "part repeated": (
        {"prompt": ASKED[:1], "chosen": [*ASKED, A], "rejected": [*ASKED, B]},
        ASKED,
    ),
    "system in responses": (
        {"prompt": "What is on it?", "chosen": [SYSTEM, *ONE, A], "rejected": [SYSTEM, *ONE, B]},
        [SYSTEM, *ONE],
    ),
    "system in the prompt": (
        {"prompt": [SYSTEM, *ONE], "chosen": [*ONE, A], "rejected": [*ONE, B]},
        [SYSTEM, *ONE],
    ),
    "system column": (
        {"messages": [*ONE, A], "rejected_response": "A knife.", "system": "Be brief."},
        [SYSTEM, *ONE],
    ),
    "parts": (
        {"prompt": [user([{"type": "image", "text": None}, text("What is on it?")])],
         "chosen": [assistant([text("An apple.")])], "rejected": [B]},
        [user([{"type": "image"}, text("What is on it?")])],
    ),
    "structs of lists": (
        {"chosen": _struct(*ASKED, A, extra=None), "rejected": _struct(*ASKED, B)},
        ASKED,
    ),
    "RLAIF-V": ({"question": "What is on it?", "chosen": "An apple.", "rejected": "A knife.",
                 "idx": 3, "origin_dataset": "x"}, ONE),
    "RLHF-V": ({"text": json.dumps({"question": "What is on it?", "chosen": "An apple.",
                                    "rejected": "A knife."}), "idx": 3}, ONE),
    "LLaMA-Factory": (
        {"conversations": _from("What is it?", "A table.", "What is on it?"),
         "chosen": {"from": "gpt", "value": "An apple."},
         "rejected": {"from": "gpt", "value": "A knife."}}, ASKED),
    "POVID": (
        {"conversations": _from("What is on it?", "An apple."),
         "rejected_conversations": _from("What is on it?", "A knife.")}, ONE),
    "ms-swift": ({"messages": [*ASKED, A], "rejected_response": "A knife."}, ASKED),
    "ms-swift messages": ({"messages": [*ASKED, A], "rejected_messages": [*ASKED, B]}, ASKED),
    "odd text": (
        {"prompt": "🦊 e\u0301 \u202eabc", "chosen": "An apple.", "rejected": "A knife."},
        [user("🦊 e\u0301 \u202eabc")],
    ),
    "long": (PLAIN | {"prompt": "why " * 50_000}, [user("why " * 50_000)]),
}  # fmt: skip


@pytest.mark.parametrize("form", GOOD)
def test_every_reader_reads_the_same_record(form, tmp_path):
    columns, prompt = GOOD[form]
    found = _readers(tmp_path, _row(**columns))
    assert len(found) == 3
    for reader, record in found.items():
        assert list(record.prompt) == prompt, reader
        assert (record.name, record.chosen, record.rejected) == ("r", "An apple.", "A knife.")
        assert [image.data for image in record.images] == [PNG]


@pytest.mark.parametrize("form", ["messages", "implicit prompt", "repeated prompt", "shared turns",
                                  "system in the prompt", "parts"])  # fmt: skip
def test_prompt_and_response_are_trls_text(form):
    """Compares the whole text that TRL renders. `form` affects only where scoring starts."""
    columns, processor = GOOD[form][0], build_processor()

    def rendered(row):
        row = {name: prepare_multimodal_messages(messages) for name, messages in row.items()}
        return apply_chat_template(row, processor)

    prompt = columns.get("prompt")
    if form == "parts":
        prompt = [user([text("What is on it?")])]  # TRL inserts the image
    row = {"prompt": prompt} if prompt else {}
    row = maybe_extract_prompt(row | {n: columns[n] for n in ("chosen", "rejected")})
    if form == "system in the prompt":  # TRL would repeat the prompt
        row = {"prompt": prompt, "chosen": [A], "rejected": [B]}
    theirs = rendered(row)
    (record,) = records_of([_row(**columns | ({"prompt": prompt} if prompt else {}))])
    ours = rendered(
        {
            "prompt": list(record.prompt),
            "chosen": [assistant(record.chosen)],
            "rejected": [assistant(record.rejected)],
        }
    )
    for response in ("chosen", "rejected"):
        assert theirs["prompt"] + theirs[response] == ours["prompt"] + ours[response]
        assert theirs[response].endswith(ours[response])
    # Shared turns add the same log-probs to both responses, so the margin equals TRL's.
    shared = theirs["chosen"].removesuffix(ours["chosen"])
    assert theirs["rejected"] == shared + ours["rejected"]


TURNS = [assistant("A cat."), user("Sure?")]
BAD = {  # problem: (columns, message)
    "differ before": ({"prompt": ONE, "chosen": [*TURNS, A],
                       "rejected": [assistant("A dog."), TURNS[1], B]}, "TRL scores all"),
    "another question": ({"prompt": ONE, "chosen": [user("How many?"), A],
                          "rejected": [user("How many?"), B]}, "does not continue the prompt"),
    "one of several turns": ({"prompt": ONE, "chosen": [*TURNS, A], "rejected": "A knife."},
                             "chosen and rejected differ before"),
    "another system message": ({"prompt": [SYSTEM, *ONE], "chosen": [LONG, *ONE, A],
                                "rejected": [LONG, *ONE, B]}, "a message of the system after"),
    "negative's preference": (PLAIN | {"retrieved_chosen": [*TURNS, A]},
                              "chosen and retrieved_chosen differ before"),
    "no last answer": (PLAIN | {"chosen": [*TURNS]}, "does not end with the assistant"),
    "prompt of the assistant": (PLAIN | {"prompt": [*ONE, A]}, "prompt ends with a message of the"),
    "prompt of the system": (PLAIN | {"prompt": [SYSTEM]}, "prompt ends with a message of the"),
    "two systems": ({"messages": [SYSTEM, *ONE, A], "rejected_response": "a", "system": "Be long."},
                    "Keep one of them"),
    "TRL's system": (PLAIN | {"system": "Be brief."}, "its system 'Be brief.' would be lost"),
    "system type": ({"messages": [*ONE, A], "rejected_response": "a", "system": ["Be brief."]},
                    "its system is ['Be brief.']"),
    "a struct of lists of several lengths": (
        {"prompt": {"role": ["user"], "content": ["a", "b"]}, "chosen": "a", "rejected": "b"},
        "the role ['user'] is not one of human",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b", "enquiry": "What?"},
                  "it has no prompt. Its keys ['enquiry'] are unknown|it has no prompt"),
    "prompt of white space": (PLAIN | {"prompt": " \n"}, "prompt is empty"),
    "prompt of tags": (PLAIN | {"prompt": "<image>\n"}, "prompt is empty"),
    "number": (PLAIN | {"chosen": 3}, "its chosen is 3, neither text nor messages"),
    "number as question": ({"question": 3, "chosen": "a", "rejected": "b"},
                           "its question is 3, neither text nor messages"),
    "NaN": (PLAIN | {"rejected": math.nan}, "its rejected is nan"),
    "bool": (PLAIN | {"prompt": True}, "its prompt is True"),
    "bytes": (PLAIN | {"chosen": b"An apple."}, "its chosen is 9 bytes"),
    "texts": (PLAIN | {"chosen": ["An apple."]}, "it is not an object"),
    "nested": (PLAIN | {"prompt": [[["a"]]]}, "the message [['a']]: it is not an object"),
    "array": (PLAIN | {"prompt": np.array([1, 2])}, "neither text nor messages|not an object"),
    "null message": (PLAIN | {"prompt": [*ONE, None]}, "it is not an object"),
    "no role": (PLAIN | {"prompt": [{"content": "What?"}]}, "the role None is not one of human"),
    "role": (PLAIN | {"prompt": [*ONE, {"role": "tool", "content": "x"}]}, "the role 'tool'"),
    "null content": (PLAIN | {"chosen": [assistant(None)]}, "its content is None"),
    "numbers": (PLAIN | {"prompt": [user(5)]}, "its content is 5"),
    "part without type": (PLAIN | {"prompt": [user([{"text": "a"}])]}, "not of type text or image"),
    "null part": (PLAIN | {"prompt": [user([None, text("a")])]}, "the part None is not"),
    "video": (PLAIN | {"prompt": [user([{"type": "video"}, text("a")])]}, "videos are not sup"),
    "null text": (PLAIN | {"prompt": [user([text(None), text("a")])]}, "has no text"),
    "image in text": (PLAIN | {"prompt": [user([text("a") | {"image": "a.png"}])]},
                      "'image' of a part would be lost"),
    "text in image": (PLAIN | {"prompt": [user([{"type": "image", "text": "a"}, text("a")])]},
                      "'text' of a part would be lost"),
    "tool calls": (PLAIN | {"prompt": [user("a") | {"tool_calls": [{"name": "f"}]}]},
                   "'tool_calls' would be lost"),
    "tools": (PLAIN | {"tools": "[{}]"}, "its tools '[{}]' would be lost"),
    "videos": (PLAIN | {"videos": ["a.mp4"]}, "would be lost, since videos are not supported"),
    "image in a response": (PLAIN | {"chosen": [assistant([{"type": "image"}])]}, "holds an image"),
    "empty response": (PLAIN | {"rejected": "  "}, "empty|no letter"),
    "surrogate": (PLAIN | {"chosen": "a \ud83d"}, "half of a surrogate pair"),
    "null character": (PLAIN | {"chosen": "a\0b"}, "null character"),
    "messages as JSON": (PLAIN | {"prompt": json.dumps(ASKED)}, "json.loads"),
    "messages as Python": (PLAIN | {"chosen": str([A])}, "json.loads"),
    "text of no JSON": ({"text": "What is it?"}, "is not a JSON object"),
    "two dialogues": ({"conversations": _from("a"), "messages": ASKED, "chosen": "a",
                       "rejected": "b"}, "Keep one form"),
    "two prompts": ({"prompt": "a", "messages": [*ASKED, A], "rejected_response": "b"},
                    "Keep one form"),
    "two images": (PLAIN | {"image": IMAGES[0]}, "it has images and image"),
    "no image for a place": (PLAIN | {"prompt": "<image> What is it?", "images": []}, "no image"),
    "retrieved image only": (PLAIN | {"images": [], "retrieved_images": IMAGES[:1]}, "no image"),
    "video in an unknown column": (PLAIN | {"images": [], "video_path": "a.mp4"},
                                   "'video_path'] are unknown"),
    "null image": (PLAIN | {"images": [IMAGES[0], None]}, "one of its images is null"),
    "id": (PLAIN | {"id": [1, 2]}, "its id is [1, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("problem", BAD)
def test_every_reader_rejects_the_row_and_names_the_record(problem, tmp_path):
    columns, message = BAD[problem]
    for reader, error in _readers(tmp_path, _row(**columns)).items():
        assert isinstance(error, RecordError), reader
        assert any(part in str(error) for part in message.split("|")), (reader, str(error))
        if problem != "id":
            assert error.record == "r"
        assert len(str(error)) < 700


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    rows = [_row(**PLAIN) | {"id": str(i)} for i in range(40)]
    table = pa.Table.from_pylist(rows)
    latin = pa.array([b"A caf\xe9." if i == 35 else b"An apple." for i in range(40)])
    column = pa.Array.from_buffers(pa.string(), 40, latin.buffers())
    table = table.set_column(table.schema.get_field_index("chosen"), "chosen", column)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(RecordError, match="record 'rows.parquet:35': it cannot be decoded"):
        read_pairs(tmp_path / "rows.parquet")
    found = list(read_any(str(tmp_path / "rows.parquet")))
    assert [
        bad.record for bad in found if isinstance(bad, InvalidRecord) and bad.reason == "malformed"
    ] == ["rows.parquet:35"]


def test_bad_records_are_counted_and_neighbours_kept(tmp_path):
    rows = [_row(**PLAIN) | {"id": f"{i}", "prompt": f"What is {i}?"} for i in range(8)]
    rows = [row | {"chosen": [A | {"role": "judge"}]} if i > 2 else row | {"chosen": [A]}
            for i, row in enumerate(rows)]  # fmt: skip
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    for read in (lambda: read_pairs(file), lambda: records_of(rows)):
        with pytest.raises(
            RecordError, match="'3': .*'judge'.* 4 more record.*'4', '5', '6', ..."
        ) as error:
            read()
        assert error.value.record == "3"
    counts = import_pairs(str(file), None, str(tmp_path / "pairs.parquet"))
    assert counts == {"pairs": 3, "malformed": 5}
    assert [r.name for r in read_pairs(tmp_path / "pairs.parquet")] == ["0", "1", "2"]


def test_ids_are_made_unique(tmp_path):
    ids = ["a", "a", 3, None, "a", " ", math.nan, "a-2"]
    rows = [_row(**PLAIN) | {"id": i, "prompt": f"{n}?"} for n, i in enumerate(ids)]
    names = ["a", "a-2", "3", "row 3", "a-3", "row 5", "row 6", "a-2-2"]
    assert [record.name for record in records_of(rows)] == names
    rows = [row | {"id": None if row["id"] is None else str(row["id"])} for row in rows[:6]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = [name.replace("row ", "rows.parquet:") for name in names[:6]]
    assert [record.name for record in read_pairs(tmp_path / "rows.parquet")] == expected
    found = read_any(str(tmp_path / "rows.parquet"))
    assert [entry.name for entry in found] == expected


def test_import_and_training_read_the_same_rows(tmp_path):
    row = _row(**PLAIN, retrieved_images=IMAGES, retrieved_chosen="A spoon.")
    row["prompt"] = "Is <image> on it?"
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    import_pairs(str(tmp_path / "rows.parquet"), None, str(tmp_path / "pairs.parquet"))
    (record,) = read_pairs(tmp_path / "pairs.parquet")
    assert record.retrieved_chosen == "A spoon."
    assert record.prompt == (user([text("Is"), {"type": "image"}, text("on it?")]),)


@pytest.mark.parametrize(
    "rows, message",
    [
        (pandas.DataFrame([PLAIN]), "pandas.*DataFrame.*from_pandas.*to_dict"),
        (pa.Table.from_pylist([PLAIN]), "pyarrow.*to_pylist"),
        ({"train": [PLAIN]}, r"dictionary of \['train'\]. Give one of its data sets"),
        (["a.parquet"], "row 0 of type builtins.str"),
        (3, "of type builtins.int"),
        (None, "of type builtins.NoneType"),
        ([], "holds no records"),
    ],
)
def test_a_data_set_of_another_type_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        records_of(rows)


def test_forms_of_a_data_set():
    row = _row(**PLAIN)
    with pytest.raises(RecordError, match="'row 1': it is 3, not a dictionary"):
        records_of([row, 3])
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", *PLAIN)} | {"images": [datasets.Image()]}
    )
    rows = datasets.Dataset.from_list([row, row | {"id": "s"}], features=features)
    forms = [rows, (row, row), (row for _ in "ab"), rows.with_format("torch"), list(rows)]
    forms += [
        rows.with_transform(lambda batch: batch),
        pandas.DataFrame([row, row]).to_dict("records"),
    ]
    for form in forms:
        records = records_of(form)
        assert [record.rejected for record in records] == ["A knife."] * 2
        assert records[0].images[0].open("r").size == (8, 8)
        assert records_of(records) == records
    arrays = datasets.Dataset.from_list(
        [PLAIN | {"images": np.zeros((2, 2, 3)).tolist()}],
        features=datasets.Features(
            {name: datasets.Value("string") for name in PLAIN}
            | {"images": datasets.Array3D((2, 2, 3), "uint8")}
        ),
    )
    with pytest.raises(RecordError, match="'row 0': its images has the image .*Give a PIL image"):
        records_of(arrays)


def test_long_values_are_shortened():
    assert len(short_repr(["x" * 10_000] * 100)) < 400 and short_repr(b"x" * 9) == "9 bytes"
    assert "\n" not in short_repr("a\nb") and short_repr("\ud83d").encode()
