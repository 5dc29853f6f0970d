"""Gallery: texts stay texts, nothing is loaded from outside, and the data is shown correctly."""

import base64
import hashlib
import html
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from galleries import EVIL, TAGS, Gallery, dom, joined, needs_browser, operate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stress_images import encode

from realign.pairs.gallery import main, write_gallery
from realign.pairs.stats import changed_words, collect, difference


def _png(shade):
    return encode(Image.new("RGB", (16, 16), (shade, 2, 3)))


def _user(text):
    return {"role": "user", "content": text}


def _row(number=0, **changes):
    row = {
        "id": f"pair-{number}",
        "prompt": [_user("What is it?")],
        "chosen": f"A red cat, number {number}.",
        "rejected": f"A blue dog, number {number}.",
        "images": [{"bytes": _png(number % 200), "path": None}],
        "retrieved_images": [{"bytes": _png(number % 200 + 1), "path": None}],
        "masked": "A [MASK], number.",
        "neighbour_rank": number % 5,
        "similarity": 0.5 + number / 1000,
        "text_similarity": 0.5,
        "visual_margin": None,
        "judge": None,
        "negative": "retrieved",
        "seed": 3,
    }
    return row | changes


def _file(folder, *rows, name="pairs.parquet"):
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)
    return folder / name


def _page(folder, *rows, **options):
    write_gallery(_file(folder, *rows), folder / "gallery.html", **options)
    return Gallery(folder / "gallery.html")


def _texts(card):
    """The prompt of a card with one turn, and the segments of its responses."""
    (turn,) = card["turns"]
    return turn["prompt"], *(answer["segments"] for answer in turn["answers"])


def test_the_page_shows_the_data_of_the_file(tmp_path):
    talk = [_user("What is it?"), {"role": "assistant", "content": "A pet."}, _user("Which?")]
    judge = json.dumps({"rejected": False, "chosen on the negative": None})
    judged = _row(1, prompt=talk, visual_margin=0.25, judge=judge)
    other = _row(2, visual_margin=-0.5, negative="crop")
    data = _page(tmp_path, _row(0), judged, other).data
    assert data["about"] == "3 pairs in pairs.parquet"
    assert data["figures"] == ["Statistics of all pairs", str(collect(tmp_path / "pairs.parquet"))]
    first, second, third = data["cards"]
    prompt, chosen, rejected = _texts(first)
    assert first["id"] == "pair-0" and prompt == [["", "What is it?"]]
    assert joined(chosen) == "A red cat, number 0."
    assert rejected == [["A ", False], ["blue dog", True], [", number 0.", False]]
    answers = first["turns"][0]["answers"]
    assert [(a["title"], a["verdicts"]) for a in answers] == [
        ("Chosen", {"": ["good", ""]}),
        ("Rejected", {"": ["bad", ""]}),
    ]
    assert first["sort"] == {"rank": 0, "similarity": 0.5, "changed": 2}
    retrieved = {
        "caption": "Retrieved",
        "images": [1],
        "note": "similarity 0.500, rank 0",
        "bar": 0.5,
    }
    assert first["figures"] == [
        {"caption": "Image", "images": [0], "note": "", "bar": None},
        retrieved,
    ]
    assert ["masked", "A [MASK], number."] in first["facts"] and ["seed", "3"] in first["facts"]
    assert [v["name"] for v in first["chips"]] == ["text similarity"] and first["labels"] == {
        "": []
    }
    assert _texts(second)[0] == [[m["role"], m["content"]] for m in talk]
    assert second["chips"][1:] == [
        {"name": "visual margin", "value": "+0.25", "tone": "good"},
        {"name": "judge: rejected", "value": "false", "tone": "good"},
        {"name": "judge: chosen on the negative", "value": "no verdict", "tone": ""},
    ]
    assert second["labels"][""] == [
        "visual margin above 0",
        "judge: rejected false",
        "judge: chosen on the negative no verdict",
    ]
    # The similarity is for the neighbour, which is not the visual negative here.
    similarity = {"name": "similarity of the neighbour", "value": "0.502", "tone": ""}
    margin = {"name": "visual margin", "value": "-0.50", "tone": "bad"}
    assert third["chips"][::2] == [similarity, margin]
    assert third["figures"][1] == {"caption": "Crop", "images": [3], "note": "", "bar": None}
    assert third["labels"][""] == ["visual margin not above 0"]


def test_texts_stay_texts(tmp_path):
    texts = dict.fromkeys(("id", "chosen", "masked", "judge", "negative"), EVIL)
    row = _row(**texts, rejected="x " + EVIL, prompt=[_user(EVIL)])
    row["images"] = [{"bytes": None, "path": EVIL}]
    plain = _page(tmp_path, _row())
    page = _page(tmp_path, row)
    assert page.elements == plain.elements  # the texts added no element and no attribute
    (pair,) = page.data["cards"]
    prompt, chosen, rejected = _texts(pair)
    assert pair["id"] == pair["figures"][1]["caption"] == EVIL and prompt == [["", EVIL]]
    assert joined(chosen) == EVIL and joined(rejected) == "x " + EVIL
    assert dict(pair["facts"])["masked"] == EVIL
    assert page.data["images"][0] == {"problem": "missing"}
    text = (tmp_path / "gallery.html").read_text()
    block = text[text.index('id="data">') + 10 : text.index("</script>")]
    assert "<" not in block and "broken" in block
    _file(tmp_path, _row(), name="a&<b>.parquet")
    write_gallery(tmp_path / "a&<b>.parquet", tmp_path / "gallery.html")
    text = (tmp_path / "gallery.html").read_text()
    assert "<title>Preference pairs: a&amp;&lt;b&gt;.parquet</title>" in text


def test_nothing_is_loaded_from_outside(tmp_path):
    page = _page(tmp_path, _row())
    assert {tag for tag, _ in page.elements} == set(TAGS)
    for _, attributes in page.elements:
        assert not {"src", "href", "action", "srcset", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    text = (tmp_path / "gallery.html").read_text()
    assert not re.search(r"https?:|url\(|@import|innerHTML|insertAdjacent|eval\(", text)
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    hashes = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'"
        for tag, attributes, t in page.texts
        if not attributes
    }
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": hashes["style"],
        "script-src": hashes["script"],
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def _opened(entry):
    head, text = entry["source"].split(",", 1)
    return head, Image.open(io.BytesIO(base64.b64decode(text)))


def test_images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (900, 100), (200, 10, 10)).save(tmp_path / "images" / "wide.jpg")
    rows = [
        _row(0, images=[{"bytes": None, "path": "images/wide.jpg"}]),
        _row(1, images=[{"bytes": _png(1), "path": "kept.png"}]),  # the retrieved image of pair 0
        _row(2, images=[{"bytes": b"no image", "path": None}, {"bytes": _png(9), "path": None}]),
        _row(3, images=[{"bytes": _png(4), "path": None}]),  # the image is its own negative
        _row(4, retrieved_images=[]),
    ]
    data = _page(tmp_path, *rows, side=200).data
    places = [[figure["images"] for figure in card["figures"]] for card in data["cards"]]
    assert places == [[[0], [1]], [[1], [2]], [[3, 4], [5]], [[6], [6]], [[6], []]]
    head, image = _opened(data["images"][0])
    assert head == "data:image/jpeg;base64" and image.size == (200, 22)
    assert not data["images"][0]["small"]
    head, image = _opened(data["images"][1])
    assert head == "data:image/png;base64" and data["images"][1]["small"]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(_png(1)))))
    assert data["images"][3] == {"problem": "corrupt"}
    assert [pair["labels"][""] for pair in data["cards"]] == [[]] * 3 + [
        ["both images the same"],
        [],
    ]


def test_many_pairs_are_sampled_evenly(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(2):
        rows = [_row(number) for number in range(50 * part, 50 * part + 50)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet", row_group_size=7)
    assert write_gallery(folder, tmp_path / "some.html", most=12) == (12, 100)
    page = Gallery(tmp_path / "some.html")
    assert page.data["about"] == "12 of 100 pairs in set"
    shown = [int(pair["id"].removeprefix("pair-")) for pair in page.data["cards"]]
    assert shown == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    assert write_gallery(folder, tmp_path / "all.html", most=0) == (100, 100)
    page = Gallery(tmp_path / "all.html")
    assert [pair["id"] for pair in page.data["cards"]] == [f"pair-{i}" for i in range(100)]


def test_data_sets_of_trl_are_shown(tmp_path):
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "images": [_png(1)]}
    (pair,) = _page(tmp_path, row).data["cards"]
    assert pair["id"] == "pairs.parquet:0" and _texts(pair)[0] == [["", "What?"]]
    assert pair["figures"][1] == {"caption": "Retrieved", "images": [], "note": "", "bar": None}
    assert (pair["sort"]["similarity"], pair["sort"]["rank"]) == (None, None)
    (pair,) = _page(tmp_path, row | {"prompt": None}).data["cards"]
    assert joined(_texts(pair)[1]) == "(it has no prompt. Add one or remove the record.)"


WORDS = st.lists(
    st.sampled_from(["a", "red", "cat", " ", ", ", "\n", "不", "了", "é", "<b>"]), max_size=12
)


@settings(max_examples=80, deadline=None)
@given(chosen=WORDS.map("".join), rejected=WORDS.map("".join))
def test_differences(chosen, rejected):
    sides = difference(chosen, rejected)
    assert [joined(side) for side in sides] == [chosen, rejected]
    shared = ["".join(text for text, changed in side if not changed).split() for side in sides]
    assert "".join(shared[0]) == "".join(shared[1])
    for side in sides:
        assert all(text for text, _ in side)
        flags = [changed for _, changed in side]
        assert all(a != b for a, b in zip(flags, flags[1:], strict=False))
    assert (changed_words(sides[0]) == changed_words(sides[1]) == 0) or chosen != rejected


@pytest.mark.parametrize(
    ("chosen", "rejected", "marked", "count"),
    [
        ("Two red dogs run.", "Two blue cats run.", ["blue cats"], 2),
        ("Two dogs.", "Two big dogs.", ["big"], 1),
        ("Two big dogs.", "Two dogs.", [], 0),
        ("two.", "Two!", ["Two!"], 1),
        ("图中有两只狗。", "图中有三只猫。", ["三", "猫"], 2),
        ("same", "same", [], 0),
        ("", "A dog.", ["A dog."], 2),
    ],
)
def test_words_that_are_marked(chosen, rejected, marked, count):
    _, side = difference(chosen, rejected)
    assert [text for text, changed in side if changed] == marked
    assert changed_words(side) == count


def test_the_ends_of_very_long_responses_are_compared():
    chosen, rejected = ("a b " * 100_000 + text + " c a" * 9 for text in ("x a", "y"))
    marked = difference(chosen, rejected)
    assert ["".join(text for text, _ in side) for side in marked] == [chosen, rejected]
    assert [[text for text, changed in side if changed] for side in marked] == [["x a"], ["y"]]


def test_the_command(tmp_path, capsys):
    file, output = _file(tmp_path, *map(_row, range(3))), tmp_path / "new" / "page.html"
    assert main([str(file), "--output", str(output), "--most", "2", "--side", "64"]) == 0
    assert re.fullmatch(r"wrote .*page.html: 2 of 3 pairs, 0.0 MB\n", capsys.readouterr().out)
    assert len(Gallery(output).data["cards"]) == 2
    pq.write_table(pa.Table.from_pylist([{"note": "x"}]), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    empty = _file(tmp_path, _row(), name="empty.parquet")
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    for arguments, problem in (
        ([str(tmp_path / "none.parquet")], "there is no Parquet file at"),
        ([str(tmp_path / "new")], "there is no Parquet file at"),
        ([str(tmp_path / "text.parquet")], "is not a readable Parquet file"),
        ([str(tmp_path / "other.parquet")], "lacks the column(s) chosen, rejected"),
        ([str(empty)], "holds no pairs"),
        ([str(file), "--most", "-1"], "most is -1; it must be at least 0"),
        ([str(file), "--side", "8"], "side is 8; it must be at least 16"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "x.html")]) == 1
        assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "x.html").exists()
        assert main(arguments) == 1
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize("output", ["pairs.parquet", "link.html", "notes.txt", "images/a.png"])
def test_inputs_are_not_overwritten(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    pairs = _file(tmp_path, _row(0))
    (tmp_path / "images").mkdir()
    for name in ("notes.txt", "images/a.png", "gallery.html"):
        (tmp_path / name).write_text("kept")
    os.link(pairs, tmp_path / "link.html")
    before = Path(output).read_bytes()
    command = [str(pairs), "--image-folder", "images", "--output"]
    assert main([*command, output]) == 1
    assert f"--output {output} is an input, or is in the folder of one" in capsys.readouterr().err
    assert Path(output).read_bytes() == before
    assert main([*command, "gallery.html"]) == 0  # an earlier gallery


@needs_browser
def test_in_a_browser(tmp_path):
    rows = [_row(number, visual_margin=number - 40.0) for number in range(45)]
    rows[0]["chosen"] = EVIL
    page = tmp_path / "page.html"
    write_gallery(_file(tmp_path, *rows), page)
    opened = dom(page)
    assert "<title>Preference pairs: pairs.parquet</title>" in opened
    assert opened.count("<article>") == 20 and opened.count("<script") == 2
    first = opened[opened.index("<article>") : opened.index("</article>")]
    shown = re.sub(r"</?mark>", "", first)
    assert html.escape(EVIL, quote=False) in shown and "<img src=x" not in opened
    driver = Path(__file__).with_name("gallery_steps.js")
    seen = operate(page, driver)
    ids = lambda *numbers: [f"pair-{number}" for number in numbers]  # noqa: E731
    assert seen == [
        ["1–20 of 45", ids(0, 1, 2)],
        ["21–40 of 45", ids(20, 21, 22)],
        ["41–45 of 45", ids(40, 41, 42)],
        ["21–40 of 45", ids(20, 21, 22)],
        "search",
        ["1–1 of 1", ids(41)],
        ["", []],
        ["1–20 of 45", ids(0, 1, 2)],
        ["1–20 of 45", ids(44, 43, 42)],
        ["1–20 of 45", ids(0, 5, 10)],
        ["1–4 of 4", ids(41, 42, 43)],
        ["red cat", "blue dog"],
        [16, 16],
    ]
    # The policy blocks a script that a text would add.
    assert operate(page, driver, relaxed=False) is None


def test_columns_of_another_type_are_shown_as_text(tmp_path):
    odd = {"similarity": "near", "neighbour_rank": [1], "negative": b"x", "visual_margin": "1"}
    (pair,) = _page(tmp_path, _row(**odd, judge=7, masked=[1])).data["cards"]
    assert pair["sort"]["similarity"] is None and pair["sort"]["rank"] is None
    assert pair["figures"][1]["caption"] == "B'x'"


def test_the_command_reads_images_of_the_named_folder(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(_png(7))
    row = _row(images=[{"bytes": None, "path": "a.png"}])
    file, page = str(_file(tmp_path / "out", row)), tmp_path / "gallery.html"
    for flags, shown in ([], 1), (["--image-folder", str(tmp_path / "images")], 2):
        assert main([file, "--output", str(page), *flags]) == 0
        assert page.read_text().count("data:image/png;base64") == shown
        report = "Images that are not shown: 1 missing. Check --image-folder."
        assert (report in capsys.readouterr().out) == (not flags)
    assert main([file, "--output", str(page), "--image-folder", "none"]) == 1
    assert "--image-folder none is not a folder" in capsys.readouterr().err
