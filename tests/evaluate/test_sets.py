"""Questions from the files of each benchmark, and figures of answers that were scored by hand."""

import base64
import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from realign.digits import ASSETS
from realign.digits.scenes import make_scenes
from realign.evaluate import __main__ as evaluate
from realign.evaluate import sets
from realign.evaluate.benchmarks import read_answered, report


def _png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(file, rows):
    pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def _tsv(file, rows, mark="\t"):
    with file.open("w", newline="", encoding="utf-8") as output:
        writer = csv.DictWriter(output, list(rows[0]), delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def _source(tmp_path, *paths, **options):
    return sets.Source([str(path) for path in paths], str(tmp_path / "images"), **options)


def _only(sheets):
    (questions,) = sheets.values()
    return questions


def _lines(questions, answers):
    """The lines of an answers file."""
    return [
        {"id": q.id, "question": q.text, "image": q.image, **q.facts, "answer": answer}
        for q, answer in zip(questions, answers, strict=True)
    ]


def _rows(name, questions, answers, rule=None):
    rows = report(_lines(questions, answers), name)
    return {row.get("group", "all"): row for row in rows if rule in (None, row["rule"])}


# Multiple choice.


def _star(number, answer, category):
    text = f"Which is {number}?\nOptions: A: One, B: Two, three, C: 4, D: None of them"
    row = {"index": number, "question": text, "image": _png(number), "answer": answer}
    return row | {"category": category, "l2_category": "x", "meta_info": {"source": "y"}}


def test_mmstar_from_both_of_its_files(tmp_path):
    stars = [_star(0, "A", "math"), _star(1, "B", "math"), _star(2, "D", "logic")]
    file = _parquet(tmp_path / "mmstar.parquet", stars)
    questions = _only(sets.mmstar(_source(tmp_path, file)))
    first = questions[0]
    assert (first.id, first.text) == ("0", stars[0]["question"])  # the options are in the question
    options = {"A": "One", "B": "Two, three", "C": "4", "D": "None of them"}
    assert first.facts == {"label": "A", "options": options, "groups": ["math"]}
    written = tmp_path / "images" / first.image
    assert written.read_bytes() == _png(0) and written.suffix == ".png"
    found = _rows("mmstar", questions, ["A.", "It is two, three", "C"])
    assert {group: (row["questions"], row["accuracy"]) for group, row in found.items()} == {
        "all": (3, pytest.approx(2 / 3)),
        "math": (2, 1.0),
        "logic": (1, 0.0),
    }
    rows = [
        {"index": "7", "question": "Which?", "A": "One", "B": "Two", "C": "", "answer": "B"}
        | {"category": "math", "l2-category": "x", "image": base64.b64encode(_png(7)).decode()}
    ]
    (question,) = _only(sets.mmstar(_source(tmp_path, _tsv(tmp_path / "MMStar.tsv", rows))))
    assert question.text == "Which?\nA. One\nB. Two"
    assert question.facts["options"] == {"A": "One", "B": "Two"}
    assert (tmp_path / "images" / question.image).read_bytes() == _png(7)


def test_mmbench_counts_a_question_whose_rotations_are_all_right(tmp_path):
    image = base64.b64encode(_png(3)).decode()
    row = {"question": "Who?", "hint": "", "A": "Ann", "B": "Bob", "answer": "A", "image": "11"}
    rows = [
        row | {"index": "11", "hint": "Look.", "image": image, "l2-category": "people"},
        row | {"index": "21", "l2-category": "people"},
        row | {"index": "1000011", "A": "Bob", "B": "Ann", "answer": "B", "l2-category": "people"},
        row | {"index": "1000021", "A": "Bob", "B": "Ann", "answer": "B", "l2-category": "people"},
    ]
    questions = _only(sets.mmbench(_source(tmp_path, _tsv(tmp_path / "dev.tsv", rows))))
    assert questions[0].text == "Look.\nWho?\nA. Ann\nB. Bob"
    assert questions[3].text == "Who?\nA. Bob\nB. Ann"
    assert [question.facts["unit"] for question in questions] == ["11", "21", "11", "21"]
    assert len({question.image for question in questions}) == 1  # the image of row 11
    # Question 1 is right in both rotations. Question 2 is "A" in both.
    found = _rows("mmbench", questions, ["A", "A", "B", "A"])
    assert (found["all"]["questions"], found["all"]["accuracy"]) == (2, 0.5)
    with pytest.raises(ValueError, match="has no answer.*The test split has no answers"):
        rows = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
        sets.mmbench(_source(tmp_path, _tsv(tmp_path / "test.tsv", rows)))
    rows[0] |= {"image": "9", "answer": "A"}
    rows = [row | {"answer": "A", "image": image if i else "9"} for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match="row 1 of .* takes the image of row '9', which this file"):
        sets.mmbench(_source(tmp_path, _tsv(tmp_path / "dev.tsv", rows)))


def test_mmvp_counts_pairs(tmp_path):
    rows = [
        {"Index": i, "Question": "Is it open?", "Options": "(a) Open (b) Closed"}
        | {"Correct Answer": "(a)" if i % 2 else "(b)"}
        for i in range(1, 5)
    ]
    file = _tsv(tmp_path / "Questions.csv", rows, ",")
    questions = _only(sets.mmvp(_source(tmp_path, file)))
    assert questions[0].text == "Is it open?\nA. Open\nB. Closed"
    assert [question.image for question in questions] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert [question.facts["label"] for question in questions] == ["A", "B", "A", "B"]
    # Three of four questions are right, and one of two pairs.
    found = _rows("mmvp", questions, ["A", "(B)", "Open", "Open"])
    assert (found["all"]["accuracy"], found["all"]["both of a pair"]) == (0.75, 0.5)


def test_realworldqa_has_letters_and_short_answers(tmp_path):
    letters = "Which way?\nA. Left.\nB. Right.\nPlease answer directly with only the letter."
    rows = [
        {"image": "0.webp", "question": letters, "answer": "B"},
        {"image": "1.webp", "question": "How many?\nPlease answer with a number.", "answer": "3"},
        {"image": "2.webp", "question": "Up or down?", "answer": "Downhill"},
        {"image": "3.webp", "question": "How many?", "answer": "2"},
    ]
    file = tmp_path / "annotations.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    questions = _only(sets.realworldqa(_source(tmp_path, file)))
    assert [question.text for question in questions] == [row["question"] for row in rows]
    assert questions[0].facts["options"] == {"A": "Left.", "B": "Right."}
    found = _rows("realworldqa", questions, ["B. Right", "3.", "downhill", "two"])
    assert found["all"]["accuracy"] == 0.75
    image = base64.b64encode(_png(7)).decode()
    row = {"index": 0, "image": image, "question": "Which?", "A": "x", "B": "y", "answer": "A"}
    (question,) = _only(sets.realworldqa(_source(tmp_path, _tsv(tmp_path / "r.tsv", [row]))))
    assert question.text == "Which?\nA. x\nB. y" + sets.LETTER


def _problem(**changes):
    problem = {"question": "Which?", "choices": ["one", "two", "six"], "answer": 1, "hint": ""}
    problem |= {"image": None, "grade": "grade2", "subject": "natural science", "split": "test"}
    return problem | changes


def test_scienceqa_by_its_groups(tmp_path):
    problems = {
        "1": _problem(image="image.png"),
        "2": _problem(hint="Think.", answer=0, grade="grade8"),
        "3": _problem(subject="language science"),
        "4": _problem(split="val"),
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    splits = {"test": ["1", "2", "3"], "val": ["4"]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    source = _source(tmp_path, tmp_path / "problems.json")
    questions = _only(sets.scienceqa(source))
    assert [question.image for question in questions] == ["test/1/image.png", None, None]
    assert questions[1].text == "Think.\nWhich?\nA. one\nB. two\nC. six"
    found = _rows("scienceqa", questions, ["B", "B", "B."])
    assert {group: row["accuracy"] for group, row in found.items()} == {
        "all": pytest.approx(2 / 3),
        "NAT": 0.5,
        "LAN": 1,
        "IMG": 1,
        "TXT": 0,
        "NO": 1,
        "G1-6": 1,
        "G7-12": 0,
    }
    val = _source(tmp_path, tmp_path / "problems.json", split="val")
    assert [question.id for question in _only(sets.scienceqa(val))] == ["4"]
    with pytest.raises(ValueError, match="pid_splits.json has no split 'x'. It has test, val"):
        sets.scienceqa(_source(tmp_path, tmp_path / "problems.json", split="x"))
    row = _problem() | {"image": {"bytes": _png(1), "path": None}}
    file = _parquet(tmp_path / "test.parquet", [row, _problem()])
    questions = _only(sets.scienceqa(_source(tmp_path, file)))
    assert [bool(question.image) for question in questions] == [True, False]
    assert questions[0].facts["groups"] == ["NAT", "IMG", "G1-6"]


# VQA accuracy.


def test_textvqa_and_vizwiz(tmp_path):
    people = ["Nokia"] * 2 + ["nokia."] + ["phone"] * 7
    data = [{"question_id": 5, "question": "Brand?", "image_id": "ab", "answers": people}]
    (tmp_path / "val.json").write_text(json.dumps({"data": data}))
    (question,) = _only(sets.textvqa(_source(tmp_path, tmp_path / "val.json")))
    assert (question.id, question.image, question.facts["answers"]) == ("5", "ab.jpg", people)
    # Three people gave "nokia": 7 of the 10 subsets have all three, and 3 have two of them.
    found = _rows("textvqa", [question], ["nokia"], "evalai")
    assert found["all"]["accuracy"] == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    known = [{"answer": person, "answer_confidence": "yes"} for person in people]
    row = {"image": "v.jpg", "question": "Brand?", "answers": known, "answer_type": "other"}
    (tmp_path / "vizwiz.json").write_text(json.dumps([row, row | {"image": "w.jpg"}]))
    questions = _only(sets.vizwiz(_source(tmp_path, tmp_path / "vizwiz.json")))
    assert [question.id for question in questions] == ["v.jpg", "w.jpg"]
    found = _rows("vizwiz", questions, ["phone", "a tablet"], "vqa")
    assert {group: row["accuracy"] for group, row in found.items()} == {"all": 0.5, "other": 0.5}
    del row["answers"]
    (tmp_path / "vizwiz.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="has None as answers.*The test split has no answers"):
        sets.vizwiz(_source(tmp_path, tmp_path / "vizwiz.json"))


# MME.


def test_mme_from_its_folder_and_from_a_table(tmp_path):
    for place, inside in (("count", ""), ("OCR", "questions_answers_YN")):
        folder = tmp_path / "mme" / place
        (folder / inside).mkdir(parents=True)
        (folder / "images").mkdir()
        for name in ("1", "2[a]"):
            text = "Is it 1? Please answer yes or no.\tYes\nIs it 2? Please answer yes or no.\tNo\n"
            (folder / inside / f"{name}.txt").write_text(text)
            (folder / ("images" if inside else "") / f"{name}.png").write_bytes(_png(1))
    questions = _only(sets.mme(_source(tmp_path, tmp_path / "mme")))
    assert [question.image for question in questions[::2]] == [
        "count/1.png", "count/2[a].png", "OCR/images/1.png", "OCR/images/2[a].png",
    ]  # fmt: skip
    assert questions[0].text == "Is it 1? Please answer yes or no."
    answers = ["Nothing", "no", "I see", "No", "Yes", "No", "yes", "Yes."]
    found = _rows("mme", questions, answers, "authors")
    # count: "Nothing" is no, so 2 of 4 questions, no image. OCR: 3 of 4 questions, 1 of 2 images.
    assert [(g, row["score"], row["accuracy"], row["acc+"]) for g, row in found.items()] == [
        ("count", 50, 0.5, 0),
        ("OCR", 125, 0.75, 0.5),
    ]
    (tmp_path / "mme" / "eval_tool").mkdir()
    (tmp_path / "mme" / "eval_tool" / "readme.txt").write_text("How to score")  # as in the release
    assert len(_only(sets.mme(_source(tmp_path, tmp_path / "mme", limit=3)))) == 4  # whole pairs
    rows = [
        {"question_id": f"OCR/{i // 2}.png", "image": {"bytes": _png(i // 2), "path": None}}
        | {"question": f"{i}?", "answer": "Yes" if i % 2 else "No", "category": "OCR"}
        for i in range(4)
    ]
    questions = _only(sets.mme(_source(tmp_path, _parquet(tmp_path / "mme.parquet", rows))))
    assert [question.facts["pair"] for question in questions] == ["OCR/OCR/0.png"] * 2 + [
        "OCR/OCR/1.png"
    ] * 2
    for number, row in enumerate(rows):
        row["question_id"] = str(number)
    with pytest.raises(ValueError, match="MME asks two questions about an image, and OCR/0 has 1"):
        sets.mme(_source(tmp_path, _parquet(tmp_path / "mme.parquet", rows)))
    assert len({question.image for question in questions}) == 2
    (tmp_path / "mme" / "count" / "1.png").unlink()
    with pytest.raises(ValueError, match="1.txt has 0 images in"):
        sets.mme(_source(tmp_path, tmp_path / "mme"))


# AMBER.


@pytest.fixture
def amber_data(tmp_path):
    """AMBER's folder `data` with two captions and three yes/no questions."""
    folder = tmp_path / "data"
    (folder / "query").mkdir(parents=True)
    notes = [
        {"id": 1, "type": "generative", "truth": ["person", "dog"], "hallu": ["cat", "car"]},
        {"id": 2, "type": "generative", "truth": ["tree"], "hallu": ["bird"]},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 5, "type": "relation", "truth": "no"},
    ]
    relation = {"person": ["man", "woman"], "dog": [], "cat": [], "car": [], "tree": ["bush"]}
    relation |= {"bird": [], "can": [], "light": []}
    (folder / "annotations.json").write_text(json.dumps(notes))
    (folder / "relation.json").write_text(json.dumps(relation))
    (folder / "safe_words.txt").write_text("light\nline")
    for part, ids in (("generative", (1, 2)), ("discriminative", (3, 4, 5))):
        rows = [{"id": i, "image": f"{i}.png", "query": f"{part} {i}?"} for i in ids]
        (folder / "query" / f"query_{part}.json").write_text(json.dumps(rows))
    return folder


def test_amber_by_hand(amber_data, tmp_path):
    from realign.evaluate import amber

    lists = amber.Lists(amber_data / "relation.json", amber_data / "safe_words.txt")
    sheets = sets.amber(_source(tmp_path, amber_data))
    assert list(sheets) == ["amber-generative", "amber-discriminative"]
    texts = [
        "A man and two cats can be seen by the light.",  # man, cat, light; "can" is a verb
        "Bushes, a can and birds.",  # bush, can, bird
    ]
    counted = [
        amber.caption(text, question.facts, lists)
        for text, question in zip(texts, sheets["amber-generative"], strict=True)
    ]
    assert [c.hallucinated for c in counted] == [["cat"], ["can", "bird"]]
    found = amber.generative(counted)
    # 3 of 6 nouns; person and tree of 3 objects; both captions; cat and bird of 3 imagined objects
    assert (found.chair, found.cover, found.hal, found.cog) == (3 / 6, 2 / 3, 1, 2 / 3)
    questions = sheets["amber-discriminative"]
    rows = _rows("amber-discriminative", questions, ["Yes", "No.", "Yes"], "word")
    figures = {
        group: [row[f] for f in ("accuracy", "precision", "recall", "F1")]
        for group, row in rows.items()
    }
    assert figures == {
        "all": [2 / 3, 1, 0.5, pytest.approx(2 / 3)],
        "attribute": [1, 0, 0, 0],
        "state": [1, 0, 0, 0],
        "existence": [1, 1, 1, 1],
        "relation": [0, 0, 0, 0],
    }


def test_amber_without_the_authors_packages_is_named(amber_data, tmp_path, capsys):
    words = ["amber", str(amber_data), "--authors-words", "--model", "m", "--output", str(tmp_path)]
    assert evaluate.main([*words, "--image-folder", str(tmp_path)]) == 1
    assert "pip install nltk spacy" in capsys.readouterr().err


# The command.


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, scene in enumerate(make_scenes(6, biased=False, split="test", seed=5)):
        scene.image.save(folder / f"{i}.png")
    return folder


def _run(tmp_path, *words, code=0):
    options = ["--model", str(ASSETS), "--image-folder", str(tmp_path / "images"), "--quiet"]
    output = tmp_path / "out"
    assert evaluate.main([*map(str, words), *options, "--output", str(output)]) == code
    return output


def test_the_commands_write_answers_and_figures(tmp_path, images, amber_data, capsys):
    questions = "is digit 1 a seven ?"
    rows = [
        {"index": i, "question": questions, "A": "yes", "B": "no", "answer": "A"} for i in "345"
    ]
    rows = [row | {"image": f"{row['index']}.png"} for row in rows]
    output = _run(tmp_path, "mmstar", _tsv(tmp_path / "m.tsv", rows), "--suffix", "")
    shown = capsys.readouterr().out
    assert "MMStar\nrule    questions  accuracy\n" in shown and "mmstar.json" in shown
    answered = read_answered(output)["mmstar"]
    assert (answered.benchmark, len(answered.lines)) == ("mmstar", 3)
    right = [line["answer"] in ("yes", "A") for line in answered.lines]
    (row,) = json.loads((output / "mmstar.json").read_text())["scores"]["parts"]["MMStar"]
    assert row["accuracy"] == sum(right) / 3
    # Corrected labels replace those of the answers, without asking again.
    rows = [row | {"answer": "B"} for row in rows]
    _run(tmp_path, "mmstar", _tsv(tmp_path / "m.tsv", rows), "--suffix", "")
    (row,) = json.loads((output / "mmstar.json").read_text())["scores"]["parts"]["MMStar"]
    assert row["accuracy"] == 1 - sum(right) / 3
    assert {line["label"] for line in read_answered(output)["mmstar"].lines} == {"B"}
    for i in range(1, 6):
        (images / f"{i}.jpg").write_bytes((images / f"{i}.png").read_bytes())
    _run(tmp_path, "amber", amber_data, "--suffix", "", "--caption-tokens", "16")
    shown = capsys.readouterr().out
    assert "AMBER, captions, by the word lists only" in shown and "AMBER, yes or no" in shown
    answered = read_answered(output)
    assert [answered[f"amber-{part}"].benchmark for part in ("discriminative", "generative")] == [
        "amber-discriminative", "amber-generative",
    ]  # fmt: skip
    assert all("hallucinated" in line for line in answered["amber-generative"].lines)
    parts = json.loads((output / "amber.json").read_text())["scores"]["parts"]
    (captions,), rows = parts.values()
    for row in rows:  # the paper's score: (1 - CHAIR + F1) / 2
        score = (1 - captions["CHAIR"] + row["F1"]) / 2 if row["group"] == "all" else None
        assert row["AMBER score"] == score


@pytest.mark.parametrize(
    ("name", "rows", "problem"),
    [
        (
            "mmstar",
            [{"index": "0", "question": "?", "A": "x", "answer": "B", "image": "0.png"}],
            "its answer is 'B', but",
        ),
        ("mmstar", [{"index": "0", "question": "?", "A": "x"}], "row 1 of .* has no answer"),
        (
            "mmstar",
            [{"index": "0", "question": "?", "answer": "A", "image": "!" * 99}],
            "not base64",
        ),
        (
            "mmstar",
            [{"index": "0", "question": "?", "answer": "A", "image": "QUJD" * 99}],
            "image cannot",
        ),
        (
            "mmbench",
            [{"index": "x", "question": "?", "A": "x", "B": "y", "answer": "A", "image": "0.png"}],
            "index is 'x'",
        ),
        ("mme", [{"question": "?", "answer": "maybe", "category": "OCR"}], "must be yes or no"),
    ],
)
def test_faulty_rows_are_named(name, rows, problem, tmp_path):
    file = _tsv(tmp_path / "x.tsv", rows)
    with pytest.raises(ValueError, match=problem):
        getattr(sets, name)(_source(tmp_path, file))


def test_tables_of_vlmevalkit(tmp_path):
    image = base64.b64encode(_png(7)).decode()
    row = {"index": 4, "image": image, "question": "Which?", "A": "x", "B": "y", "answer": "B"}
    (question,) = _only(sets.scienceqa(_source(tmp_path, _tsv(tmp_path / "s.tsv", [row]))))
    assert (question.id, question.facts["label"], question.text) == ("4", "B", "Which?\nA. x\nB. y")
    rows = [row | {"index": 1}, row | {"index": 2, "answer": "A"}]
    questions = _only(sets.mmvp(_source(tmp_path, _tsv(tmp_path / "p.tsv", rows))))
    assert [(q.facts["label"], q.facts["pair"]) for q in questions] == [("B", "0"), ("A", "0")]
    people = str(["red"] * 9 + ["a 'b'"])
    row = {"index": 4, "image": image, "question": "Which?", "answer": people}
    (question,) = _only(sets.textvqa(_source(tmp_path, _tsv(tmp_path / "t.tsv", [row]))))
    assert question.facts["answers"] == ["red"] * 9 + ["a 'b'"]
    row = {"index": 4, "image": image, "question": "Dog?", "answer": "Yes", "category": "random"}
    (question,) = sets.pope(_source(tmp_path, _tsv(tmp_path / "POPE.tsv", [row])))["POPE"]
    assert question.facts == {"label": "yes", "groups": ["random"]}


def test_empty_cells_are_no_options(tmp_path):
    rows = [
        {"index": 1, "question": "?", "hint": float("nan"), "A": 3, "B": 4, "C": None}
        | {"D": float("nan"), "answer": "A", "image": {"bytes": _png(1), "path": None}},
        {"index": 2, "question": "?", "hint": None, "A": 3, "B": 4, "C": 1, "D": "None"}
        | {"answer": "A", "image": {"bytes": _png(1), "path": None}},
    ]
    for row in rows:
        row["D"] = str(row["D"])
    file = _parquet(tmp_path / "m.parquet", rows)  # C has a gap, so it is a column of floats
    questions = _only(sets.mmbench(_source(tmp_path, file)))
    assert questions[0].text == "?\nA. 3\nB. 4"
    assert questions[1].text == "?\nA. 3\nB. 4\nC. 1\nD. None"
    row = {"index": 1, "question": 'a "b" c', "A": "x", "B": "NaN", "answer": "A", "image": "1.png"}
    (tmp_path / "q.tsv").write_text(
        "\t".join(row) + "\n" + "\t".join(map(str, row.values())) + "\n"
    )
    (question,) = _only(sets.mmstar(_source(tmp_path, tmp_path / "q.tsv")))
    assert question.text == 'a "b" c\nA. x'


def test_rows_without_an_image_are_named(tmp_path):
    row = {
        "index": 1,
        "question": "?",
        "A": "x",
        "answer": "A",
        "decoded_image": {"bytes": _png(1)},
    }
    for name, more in (("mmstar", {}), ("realworldqa", {}), ("vizwiz", {"answers": ["a", "b"]})):
        file = _parquet(tmp_path / f"{name}.parquet", [row | more])
        with pytest.raises(ValueError, match="has no image. Name the column of the images `image`"):
            getattr(sets, name)(_source(tmp_path, file))
    row = {"question": "?", "answer": "Yes", "category": "OCR", "image_path": "a/1.png"}
    rows = [row, row | {"answer": "No"}]
    questions = _only(sets.mme(_source(tmp_path, _tsv(tmp_path / "m.tsv", rows))))
    assert [question.image for question in questions] == ["a/1.png"] * 2


def test_pairs_and_rotations_are_not_cut(tmp_path):
    rows = [
        {"Index": i, "Question": f"Is it {(i - 1) // 2}?", "Options": "(a) Yes (so) (b) No"}
        | {"Correct Answer": "(a)"}
        for i in range(1, 7)
    ]
    file = _tsv(tmp_path / "Questions.csv", rows, ",")
    questions = _only(sets.mmvp(_source(tmp_path, file, limit=3)))
    assert [question.facts["pair"] for question in questions] == ["0", "0", "1", "1"]
    assert questions[0].facts["options"] == {"A": "Yes (so)", "B": "No"}
    with pytest.raises(ValueError, match="pair 1 has 2 images and 2 questions"):
        sets.mmvp(_source(tmp_path, _tsv(tmp_path / "Questions.csv", rows[1:], ",")))
    row = {"question": "?", "A": "x", "B": "y", "answer": "A", "image": "1.png"}
    rows = [row | {"index": i + 1_000_000 * turn} for turn in range(2) for i in range(1, 5)]
    questions = _only(sets.mmbench(_source(tmp_path, _tsv(tmp_path / "d.tsv", rows), limit=3)))
    assert [q.id for q in questions] == ["1", "2", "1000001", "1000002"]
    fields = {"category": "VD", "subcategory": "s", "question": "?", "gt_answer": "0"}
    rows = [fields | {"set_id": i // 4, "figure_id": i % 2, "question_id": i} for i in range(12)]
    (tmp_path / "hb.json").write_text(json.dumps(rows))
    questions = _only(sets.hallusion(_source(tmp_path, tmp_path / "hb.json", limit=5)))
    assert [q.facts["set_id"] for q in questions] == [0] * 4 + [1] * 4


def test_several_files_are_one_benchmark(tmp_path):
    people = ["red"] * 10
    for name, number in (("a", 1), ("b", 2)):
        data = [{"question_id": number, "question": "?", "image_id": "x", "answers": people}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": data}))
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    assert [q.id for q in _only(sets.textvqa(_source(tmp_path, *paths)))] == ["1", "2"]
    with pytest.raises(FileNotFoundError, match="c.json"):
        sets.textvqa(_source(tmp_path, *paths, tmp_path / "c.json"))
    with pytest.raises(ValueError, match="there are 2 files. Give one problems.json"):
        sets.scienceqa(_source(tmp_path, *paths))
    data[0]["answers"] = [""] * 10  # the Hub's test split
    paths[1].write_text(json.dumps({"data": data}))
    with pytest.raises(ValueError, match="must be the answers of at least two people"):
        sets.textvqa(_source(tmp_path, *paths))


def test_labels_of_realworldqa(tmp_path):
    text = "Which way?\nA. Left.\nB. Right."
    rows = [
        {"image": "0.webp", "question": text, "answer": label} for label in ("a", "(B)", "Left.")
    ]
    file = tmp_path / "annotations.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    questions = _only(sets.realworldqa(_source(tmp_path, file)))
    assert [question.facts["label"] for question in questions] == ["A", "B", "Left."]
    found = _rows("realworldqa", questions, ["A", "B", "left"])
    assert found["all"]["accuracy"] == 1


def test_faulty_files_are_named(tmp_path):
    (tmp_path / "x.tsv").write_text("index\tquestion\tanswer\n1\t2\n")
    with pytest.raises(ValueError, match="row 1 of .*too many or too few cells"):
        sets.mmstar(_source(tmp_path, tmp_path / "x.tsv"))
    (tmp_path / "x.tsv").write_text("index\tquestion\tanswer\n")
    with pytest.raises(ValueError, match="holds no rows. Give mmstar.parquet"):
        sets.mmstar(_source(tmp_path, tmp_path / "x.tsv"))
    (tmp_path / "x.parquet").write_text("no Parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        sets.mmstar(_source(tmp_path, tmp_path / "x.parquet"))
    for path in ("none.tsv", "none.parquet", "none.json"):
        with pytest.raises(FileNotFoundError, match=f"there is no file .*{path}"):
            sets.mmstar(_source(tmp_path, tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no questions. Give the folder of MME"):
        sets.mme(_source(tmp_path, tmp_path / "empty"))
