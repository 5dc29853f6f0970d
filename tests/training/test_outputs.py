"""Early failure: outputs and evaluation files are checked before a model is loaded."""

import json
import os

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from experiments.study import __main__ as study
from realign import cache, doctor, export, train
from realign.demo import __main__ as demo
from realign.evaluate import __main__ as evaluate
from realign.files import check_file, check_folder
from realign.pairs import __main__ as pairs


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(*_, **__):
        raise AssertionError("a model is loaded")

    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(AutoModelForImageTextToText, name, load)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory: a file, a folder, and benchmark files with an image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("nothing can be below it")
    (tmp_path / "folder" / "model").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.png")
    question = {"question_id": 1, "text": "is there a dog ?", "image": "a.png", "label": "yes"}
    (tmp_path / "pope.json").write_text(json.dumps(question))
    facts = dict.fromkeys(("category", "subcategory", "set_id", "figure_id", "question_id"), "0")
    row = facts | {"question": "is it ?", "gt_answer": "1", "filename": "a.png"}
    (tmp_path / "hallusion.json").write_text(json.dumps([row]))
    instances = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 1}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    captions = {"annotations": [{"image_id": 1, "caption": "A dog."}]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


ASK = ["--model", "m", "--image-folder", "images", "--quiet"]
POPE = ["pope", "pope.json", *ASK, "--output", "out"]
CHAIR = ["chair", "--instances", "instances.json", "--reference", "captions.json", *ASK]
CHAIR += ["--output", "out"]
HALLUSION = ["hallusionbench", "hallusion.json", *ASK, "--output", "out"]


def _run(main, words, capsys):
    """The single line of an error."""
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 500, err
    return err


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, ["--output", "file/x"]),
        (train.main, ["--output", "file"]),
        (train.main, ["--output", "file/x", "--dry-run"]),
        (train.main, ["--reference-cache", "file/x", "--output", "new"]),
        (train.main, ["--tensorboard", "--output", "run"]),
        (pairs.main, ["--output", "file/x.parquet"]),
        (pairs.main, ["--output", "folder"]),
        (pairs.main, ["--output", os.devnull]),
        (pairs.main, ["import", "file", "--output", os.devnull]),
        (pairs.main, ["--output", "new/x.parquet", "--work", "file/x"]),
        (pairs.main, ["embed", "--work", "file/x"]),
        (pairs.main, ["import", "pope.json", "--output", "file/x.parquet"]),
        (pairs.main, ["import", "pope.json", "--output", "folder"]),
        (pairs.main, ["gallery", "pope.json", "--output", "file/x.html"]),
        (evaluate.main, ["--output", "file/x.json"]),
        (evaluate.main, ["--answers", "file/x.jsonl"]),
        (evaluate.main, ["--answers", "folder"]),
        (evaluate.main, [*POPE[:-1], "file/x"]),
        (evaluate.main, [*CHAIR[:-1], "file"]),
        (evaluate.main, [*HALLUSION[:-1], "file/x"]),
        (evaluate.main, ["gallery", "a", "b", "--output", "file/x.html"]),
        (evaluate.main, ["handoff", "--model", "m", "--output", "file/x"]),
        (cache.main, ["fill", "--pairs", "pope.json", "--reference-cache", "file/x"]),
        (export.main, ["--model", "m", "--output", "file/x"]),
        (export.main, ["--model", "m", "--output", "file"]),
        (demo.main, ["--output", "file/x"]),
        (study.main, ["--output", "file/x"]),
        (study.main, ["--docs", "file"]),
    ],
)
def test_an_output_that_cannot_be_written_is_one_error(main, words, place, capsys):
    before = sorted(place.rglob("*"))
    err = _run(main, words, capsys)
    assert "file" in err or "folder" in err
    assert "--" in err.split()[1] or "output" in err
    assert sorted(place.rglob("*")) == before


def test_places_that_can_be_written_are_left_as_they_are(place):
    before = sorted(place.rglob("*"))
    for path in ("new", "new/deep/x.json", "file", os.devnull, "folder/x"):
        check_file("--output", path)
    for path in ("new", "new/deep", "folder", "."):
        check_folder("--output", path)
    assert sorted(place.rglob("*")) == before
    for path in ("a" * 300, "a" * 240, "a\0b", "folder/" + "a" * 250):
        with pytest.raises(ValueError, match="--output .* cannot be written .*Name another place"):
            check_file("--output", path)
    (place / "link").symlink_to(place / "gone")
    with pytest.raises(ValueError, match="link: No such file"):
        check_folder("--output", "link/x")


def test_the_doctor_reports_a_cache_that_cannot_be_written(place, monkeypatch):
    monkeypatch.setenv("REALIGN_CACHE", str(place / "file"))
    (found,) = doctor._folders()
    assert found[0] == "BAD" and "cannot be written" in found[2]


LINE = '{"question_id": 1, "text": "is it ?", "image": "a.png", "label": "yes"}'
COCO = '{"annotations": [{"image_id": 1, "caption": "A dog."}]}'


@pytest.mark.parametrize(
    ("words", "file", "content", "message"),
    [
        (POPE, "pope.json", b"", "pope.json is empty"),
        (POPE, "pope.json", b"\xef\xbb\xbf \n", "is empty"),
        (POPE, "pope.json", b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8 text"),
        (POPE, "pope.json", LINE.encode("utf-16"), "is not UTF-8 text"),
        (POPE, "pope.json", LINE.encode("utf-16-le"), "null bytes"),
        (POPE, "pope.json", b"[1, 2]", "question 1 of pope.json is 1, not an object"),
        (POPE, "pope.json", b"[[[", "neither JSON nor JSON lines"),
        (POPE, "pope.json", b"[" * 9999 + b"]" * 9999, "neither JSON nor JSON lines"),
        (POPE, "pope.json", b"[]", "holds no questions"),
        (POPE, "pope.json", COCO.encode(), "has no question_id, text, image, label"),
        (POPE, "pope.json", LINE.replace("yes", "maybe").encode(), "label is 'maybe'; it must be"),
        (POPE, "pope.json", LINE.replace('"is it ?"', "7").encode(), "text is 7; it must be text"),
        (POPE, "pope.json", LINE.replace("is it ?", "\\ud83d").encode(), "it must be text"),
        (POPE, "pope.json", LINE.replace("a.png", "b.png").encode(), "1 of 1 images are missing"),
        (POPE, "pope.json", LINE.replace("a.png", "../file").encode(), "outside the folder"),
        (POPE, "pope.json", f"{LINE}\n{LINE}".encode(), "distinct ids"),
        ([*POPE[:2], "b/pope.json", *POPE[2:]], "b/pope.json", LINE.encode(), "two files are"),
        ([*POPE[:2], "gone.json", *POPE[2:]], "x", b"", "there is no file gone.json"),
        ([*POPE[:2], "images", *POPE[2:]], "x", b"", "images is a folder"),
        ([*POPE, "--image-folder", "file"], "x", b"", "--image-folder file is not a folder"),
        ([*POPE, "--limit", "-1"], "x", b"", "--limit is -1; it must be 0 or more"),
        ([*POPE, "--batch-size", "0"], "x", b"", "--batch-size is 0; it must be 1 or more"),
        ([*CHAIR, "--most", "-1"], "x", b"", "--most is -1"),
        ([*CHAIR, "--max-tokens", "0"], "x", b"", "--max-tokens is 0"),
        (CHAIR, "instances.json", COCO.encode(), "no list `images`. Give COCO's instances"),
        (CHAIR, "instances.json", b"[]", "holds [], not an object. Give COCO"),
        (CHAIR, "instances.json", b"{", "instances.json is not JSON"),
        (CHAIR, "captions.json", b'{"annotations": [{"image_id": 1, "category_id": 1}]}',
         "Give COCO's captions, such as captions_val2014.json, to --reference"),
        (CHAIR, "captions.json", b'{"annotations": [7]}', "has 7 in `annotations`"),
        ([*CHAIR, "--synonyms", "captions.json"], "x", b"", "is not a list of synonyms: line 1"),
        ([*CHAIR, "--synonyms", "s.txt"], "s.txt", b"cat, kitten", "has no object 'dog'"),
        (HALLUSION, "hallusion.json", LINE.encode(), "has no question, category, subcategory"),
        (HALLUSION, "hallusion.json", b"[null]", "question 1 of hallusion.json is None"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_one_error(words, file, content, message, place, capsys):
    (place / file).parent.mkdir(exist_ok=True)
    (place / file).write_bytes(content)
    err = _run(evaluate.main, words, capsys)
    assert message in err
    assert not (place / "out").exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_lines_are_read(end, place, capsys):
    """The questions are read: the next error is that the model's folder is empty."""
    lines = [LINE, LINE.replace("1", "2")]
    (place / "pope.json").write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    words = ["folder" if word == "m" else word for word in POPE]
    err = _run(evaluate.main, words, capsys)
    assert "folder" in err and "pope" not in err


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pope.json", "pope.json holds one JSON object with the keys"),
        ("a.csv", "Write it as JSON lines"),
    ],
)
@pytest.mark.parametrize("main", [train.main, cache.main])
def test_pairs_of_another_kind_are_one_error(main, name, remedy, place, capsys):
    (place / "a.csv").write_text("prompt,chosen\n")
    words = ["fill"] if main is cache.main else ["--dry-run"]
    assert remedy in _run(main, [*words, "--pairs", name], capsys)


TOML = b'[optim]\r\nsteps = 3\r\n[model]\r\ntune = "full"\r\n'


def test_settings_have_a_byte_order_mark_but_no_other_encoding(place, capsys):
    (place / "c.toml").write_bytes(b"\xef\xbb\xbf" + TOML)
    config = train.parse(["--config", "c.toml"])
    assert (config.optim.steps, config.model.tune) == (3, "full")
    (place / "c.toml").write_bytes(TOML.decode().encode("utf-16"))
    assert "c.toml is not UTF-8 text" in _run(train.main, ["--config", "c.toml"], capsys)


def test_answers_that_were_edited_are_named(place, capsys):
    compare = ["compare", "a.jsonl", "a.jsonl"]
    for text, fault in (
        ("7\n", "is not a file of answers"),
        ("[]\n", "is not a file of answers"),
        ('{"asked": {}}\n7\n', "is not a file of answers"),
        ('{"asked": {}}\n{"id": 3, "answer": "x"}\n', "line 2 has no id or no answer"),
        ('{"asked": {}}\n{"id": "3", "answer": "x", "label": "y"}\n', "answer '3' has no question"),
    ):
        (place / "a.jsonl").write_text(text)
        assert fault in _run(evaluate.main, compare, capsys)
