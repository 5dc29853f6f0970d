"""Figures of pairs, against ones worked out by hand."""

import io
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from realign.pairs.io.rows import FilteredRecord as Dropped
from realign.pairs.io.rows import InvalidRecord as Bad
from realign.pairs.io.shards import LEFT_OUT, Shards, write_table
from realign.pairs.stats import collect, draw, main, table


def _picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return [{"bytes": buffer.getvalue(), "path": None}]


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
    _row(0, "A red dog runs.", similarity=0.7, neighbour_rank=3),  # the same but for rejected
    _row(0, "A red cat.", prompt="Which?", similarity=None, retrieved_images=_picture(0)),
    _row(9, "A big red cat sits here.", chosen="A cat.", similarity=float("nan")),
    _row(5, "One two three four.", similarity=0.9, visual_margin=-1.5),
]


@pytest.fixture
def pairs(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def _leave_out(folder):
    """A work folder and a list of bad records, as a run leaves them."""
    schema = pa.schema({"id": pa.string()})
    for stage, number, reasons in (
        ("filter-00000000", 0, ["too similar", "same as chosen"]),
        ("filter-00000000", 1, ["too similar"]),
        ("mask-11111111", 0, ["nothing to mask"]),
    ):
        entries = [Dropped(str(i), "filter", reason) for i, reason in enumerate(reasons)]
        entries.append(Bad("x", "filter", "no reply"))
        Shards(folder / "pairs.work" / stage, schema).write(number, [{"id": "a"}], entries)
    bad = [
        Bad(str(i), "read", reason) for i, reason in enumerate(["missing", "corrupt", "missing"])
    ]
    rows = pa.Table.from_pylist([vars(entry) for entry in bad], schema=LEFT_OUT)
    write_table(folder / "pairs.work" / "rejected_records.parquet", rows)


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
        "its own image as the negative": 1,
    }
    assert stats.dropped == stats.bad == {}


def test_what_was_left_out(pairs):
    _leave_out(pairs.parent)
    stats = collect(pairs)
    assert stats.dropped == {"too similar": 2, "same as chosen": 1, "nothing to mask": 1}
    assert stats.bad == {"missing": 2, "corrupt": 1}
    (pairs.parent / "pairs.work").rename(pairs.parent / "elsewhere")
    assert collect(pairs).dropped == {}
    assert collect(pairs, work=pairs.parent / "elsewhere").dropped == stats.dropped
    with pytest.raises(FileNotFoundError, match="work is '.*nowhere', which is no folder"):
        collect(pairs, work=pairs.parent / "nowhere")


def test_the_table(pairs):
    _leave_out(pairs.parent)
    lines = table(collect(pairs)).splitlines()
    assert lines[0] == "5 pairs"
    assert lines[2].split() == ["mean", "least", "10", "%", "median", "90", "%", "most"]
    assert lines[3].split() == ["similarity", "0.700", "0.500", "0.540", "0.700", "0.860", "0.900"]
    assert lines[4].split() == ["rank", "0.600", "0", "0", "0", "1.800", "3"]
    assert lines[-6:] == [
        "pairs with the same image as an earlier one: 2",
        "pairs with the same prompt and chosen as an earlier one: 2",
        "pairs with the same image, prompt and chosen as an earlier one: 1",
        "pairs with its own image as the negative: 1",
        "records dropped: 4 (2 too similar, 1 same as chosen, 1 nothing to mask)",
        "records unusable: 3 (2 missing, 1 corrupt)",
    ]


def test_the_plot(pairs, tmp_path):
    _leave_out(tmp_path)
    draw(collect(pairs), tmp_path / "new" / "full.png")
    with Image.open(tmp_path / "new" / "full.png") as image:
        assert image.size == (1650, 748)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # not blank
    # A set without provenance, with the dollar signs that matplotlib takes for formulas.
    row = {"prompt": "$x", "chosen": "$a$", "rejected": "$b", "images": _picture(1)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "plain.parquet")
    stats = collect(tmp_path / "plain.parquet")
    stats.dropped["$_{"] = 1
    draw(stats, tmp_path / "plain")
    assert Image.open(tmp_path / "plain").format == "PNG"


def test_the_command(pairs, capsys, monkeypatch):
    assert main([str(pairs)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("5 pairs\n") and out.endswith("pairs-stats.png\n")
    assert (pairs.parent / "pairs-stats.png").stat().st_size > 10_000
    assert main([str(pairs), "--no-plot"]) == 0
    assert "wrote" not in capsys.readouterr().out
    assert main([str(pairs.parent / "none.parquet")]) == 1
    assert "there is no Parquet file at" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(pairs), "--output", str(pairs.parent / "no.png")]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("5 pairs\n")
    assert "pip install 'realign[demo]', or add --no-plot" in printed.err
    assert main([str(pairs)]) == 0  # the table is what was asked for first
    assert "no plot: it needs matplotlib, pip install 'realign[demo]'" in capsys.readouterr().out
