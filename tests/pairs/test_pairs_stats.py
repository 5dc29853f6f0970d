"""Statistics of pairs, against values computed by hand."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stress_images import encode

from realign.pairs.stages.runner import run_note
from realign.pairs.stats import collect, main


def _picture(shade):
    return [{"bytes": encode(Image.new("RGB", (8, 8), (shade, 0, 0))), "path": None}]


def _row(shade, rejected, **changes):
    row = {
        "prompt": "What is it?",
        "chosen": "A red cat sits here.",
        "rejected": rejected,
        "images": _picture(shade),
        "retrieved_images": _picture(shade + 1),
        "neighbour_rank": 0,
        "similarity": 0.5,
        "text_similarity": 0.8,
        "visual_margin": None,
    }
    return row | changes


ROWS = [
    _row(0, "A blue cat sits here."),
    _row(0, "A red dog runs.", similarity=0.7, neighbour_rank=3),  # differs only in rejected
    _row(0, "A red cat.", prompt="Which?", similarity=None, retrieved_images=_picture(0)),
    _row(9, "A big red cat sits here.", chosen="A cat.", similarity=float("nan")),
    _row(5, "One two three four.", similarity=0.9, visual_margin=-1.5),
]


@pytest.fixture
def pairs(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def test_figures(pairs):
    stats = collect(pairs)
    assert stats.pairs == 5
    assert {name: values.tolist() for name, values in stats.values.items()} == {
        "similarity": [0.5, 0.7, 0.9],
        "rank": [0, 3, 0, 0, 0],
        "text similarity": [0.8] * 5,
        "visual margin": [-1.5],
        "words of chosen": [5, 5, 5, 2, 5],
        "words of rejected": [5, 4, 3, 6, 4],
        "changed words": [1, 2, 0, 4, 4],
    }
    assert stats.duplicates == {
        "the same image": 2,
        "the same prompt and chosen": 2,
        "the same image, prompt and chosen": 1,
        "their own image as the negative": 1,
    }
    assert stats.dropped == stats.bad == {}


def test_the_command_with_the_records_that_were_left_out(pairs, capsys):
    work = pairs.with_suffix(".work")
    work.mkdir()
    listed = pa.table({"reason": ["missing", "corrupt", "missing"]})
    pq.write_table(listed, work / "rejected_records.parquet")  # by `import`, which drops no records
    assert collect(pairs).bad == {"missing": 2, "corrupt": 1} and collect(pairs).dropped == {}
    note = {"dropped": {"too similar": 3, "same as chosen": 1}, "bad": {"missing": 2}}
    run_note(work, str(pairs)).write_text(json.dumps(note))
    assert main([str(pairs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 pairs"
    assert lines[2].split() == ["mean", "min", "10", "%", "median", "90", "%", "max"]
    assert lines[3].split() == ["similarity", "0.700", "0.500", "0.540", "0.700", "0.860", "0.900"]
    assert lines[4].split() == ["rank", "0.600", "0", "0", "0", "1.800", "3"]
    assert lines[-6:] == [
        "pairs with the same image as an earlier one: 2",
        "pairs with the same prompt and chosen as an earlier one: 2",
        "pairs with the same image, prompt and chosen as an earlier one: 1",
        "pairs with their own image as the negative: 1",
        "records dropped: 4 (3 too similar, 1 same as chosen)",
        "records invalid: 2 (2 missing)",
    ]
    elsewhere = pairs.parent / "elsewhere"
    work.rename(elsewhere)
    assert collect(pairs).dropped == {}
    assert collect(pairs, work=elsewhere).dropped == note["dropped"]
    (pairs.parent / "moved").mkdir()
    moved = pairs.rename(pairs.parent / "moved" / pairs.name)
    assert main([str(moved), "--work", str(elsewhere)]) == 0
    assert "records dropped: 4" in capsys.readouterr().out
    for arguments, problem in (
        ([str(moved), "--work", str(work)], "pairs.work' is not a folder. Give the work folder"),
        ([str(pairs)], "there is no Parquet file at"),
    ):
        assert main(arguments) == 1 and problem in capsys.readouterr().err


ESCAPE = "\x1b]0;title\x07"


def test_a_downloaded_note_is_data(pairs, capsys):
    note = pairs.with_suffix(".work") / "pairs.parquet.x.json"
    note.parent.mkdir()
    for content in ([], {"dropped": 3, "bad": {}}, {"dropped": {"a": "b"}, "bad": {}}, {}):
        note.write_text(json.dumps(content))
        assert main([str(pairs)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert str(note) in line
    reasons = {f"{ESCAPE}{i} {'long ' * 9999}": 1 for i in range(50)}
    note.write_text(json.dumps({"dropped": reasons, "bad": {}}))
    assert main([str(pairs)]) == 0
    out = capsys.readouterr().out
    assert "records dropped: 50" in out and "\x1b" not in out and len(out) < 6000


def test_a_downloaded_list_of_records_is_data(pairs, capsys):
    work = pairs.with_suffix(".work")
    work.mkdir()
    pq.write_table(pa.table({"reason": [ESCAPE, "missing"]}), work / "rejected_records.parquet")
    assert main([str(pairs)]) == 0
    out = capsys.readouterr().out
    assert "records invalid: 2" in out and "1 missing" in out and "\x1b" not in out
    long = pa.array(["x" * (4 << 20)] * 100).dictionary_encode()
    pq.write_table(pa.table({"reason": long}), work / "rejected_records.parquet")
    assert main([str(pairs)]) == 1
    assert "decodes to more than 16 times its size" in capsys.readouterr().err


def test_columns_of_another_type_are_not_counted(tmp_path):
    rows = [_row(0, "A dog.", similarity="near", neighbour_rank=[1], text_similarity=b"x")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    stats = collect(tmp_path / "pairs.parquet")
    assert stats.pairs == 1 and not {"similarity", "rank", "text similarity"} & stats.values.keys()
