"""`python -m realign.evaluate pope|chair|hallusionbench|compare` on generated images."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from realign.digits import ASSETS
from realign.digits.scenes import make_scenes
from realign.evaluate import __main__ as evaluate
from realign.evaluate import answering, tables
from realign.evaluate.benchmarks import read_answered
from realign.export import evaluation_of
from realign.pairs.engines import Chat, Engine, Reply

QUESTIONS = 12


class Counting(Engine):
    """Answers yes to odd questions, and records the questions."""

    name = "counting"

    def __init__(self, fail_after=None):
        self.asked, self._left = [], fail_after

    def chat(self, requests: list[Chat]) -> list[Reply]:
        if self._left is not None:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
        self.asked += [request.messages[0]["content"] for request in requests]
        return [
            Reply("Yes." if int(c.messages[0]["content"].split()[0]) % 2 else "No")
            for c in requests
        ]


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, scene in enumerate(make_scenes(QUESTIONS, biased=False, split="test", seed=5)):
        scene.image.save(folder / f"{i}.png")
    return [
        answering.Question(str(i), f"{i} ?", f"{i}.png", {"label": "yes"}) for i in range(QUESTIONS)
    ]


def _ask(engine, questions, folder, **settings):
    options = {"model": "m", "max_tokens": 4} | settings
    output = folder / "out" / "answers.jsonl"
    sheet = answering.prepare(questions, folder / "images", output, **options)
    return answering.answer(engine, sheet, batch=2, progress=False)


def test_a_stopped_run_resumes(questions, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _ask(Counting(fail_after=3), questions, tmp_path)
    file = tmp_path / "out" / "answers.jsonl"
    truncated = file.read_text() + '{"id": "6", "ques'  # as after a crash
    file.write_text(truncated)
    rest = Counting()
    lines = _ask(rest, questions, tmp_path)
    # The longest questions, 10 and 11, were asked first, then 0 to 3.
    assert rest.asked == [f"{i} ?" for i in range(4, 10)]
    assert [line["id"] for line in lines] == [str(i) for i in range(QUESTIONS)]
    assert [line["answer"] for line in lines] == ["No", "Yes."] * 6
    # The file has the order of the questions, too.
    assert answering.read_answers(file) == [line | {"file": "answers.jsonl"} for line in lines]
    again = Counting()
    assert _ask(again, questions, tmp_path) == lines and not again.asked


def test_batches_do_not_depend_on_earlier_answers(questions, tmp_path):
    _ask(Counting(), [questions[3], questions[10]], tmp_path)
    engine = Counting()
    groups = []
    engine.chats = lambda requests: (groups.append(r) or engine.chat(r) for r in requests)
    _ask(engine, questions, tmp_path)
    asked = [[chat.messages[0]["content"] for chat in group] for group in groups]
    # The longest first, in twos: 10 and 11, 0 and 1, 2 and 3, ...
    assert asked[:3] == [["11 ?"], ["0 ?", "1 ?"], ["2 ?"]] and len(asked) == 6


def test_an_answer_with_unusual_line_ends_is_one_line(questions, tmp_path):
    engine = Counting()
    engine.chat = lambda requests: [Reply("a\u2028b\x85c\nd\u4e00")] * len(requests)
    lines = _ask(engine, questions, tmp_path)
    assert {line["answer"] for line in lines} == {"a\u2028b\x85c\nd\u4e00"}
    assert _ask(Counting(), questions, tmp_path) == lines


def test_answers_of_two_models_are_not_mixed(questions, tmp_path):
    _ask(Counting(), questions, tmp_path)
    with pytest.raises(
        ValueError, match="holds answers for a different model. Name another --output"
    ):
        _ask(Counting(), questions, tmp_path, model="other")
    with pytest.raises(ValueError, match="holds answers for a different suffix"):
        _ask(Counting(), questions, tmp_path, suffix="!")
    changed = [answering.Question("0", "9 ?", "0.png"), *questions[1:]]
    with pytest.raises(ValueError, match="answers a different question under the id '0'"):
        _ask(Counting(), changed, tmp_path)


def test_missing_images_are_named(questions, tmp_path):
    gone = [answering.Question("a", "1 ?", "../secret.png")]
    with pytest.raises(ValueError, match="the image of question 'a': outside the folder"):
        _ask(Counting(), gone, tmp_path)
    with pytest.raises(ValueError, match="distinct ids: 1 occur twice or more, such as '0'"):
        _ask(Counting(), [questions[0], questions[0]], tmp_path)


def _pope_files(tmp_path, questions):
    for name in ("random", "popular"):
        lines = [
            {"question_id": int(q.id), "image": q.image, "text": f"is digit {i} a seven ?"}
            | {"label": "yes" if i % 2 else "no"}
            for i, q in enumerate(questions)
        ]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, lines)))
    return [str(tmp_path / "random.json"), str(tmp_path / "popular.json")]


def test_pope_from_its_files_to_a_comparison(questions, tmp_path, capsys):
    """With the digits model: every figure is named by its rule, and the answers are kept."""
    files = _pope_files(tmp_path, questions)
    options = ["--model", str(ASSETS), "--image-folder", str(tmp_path / "images"), "--quiet"]
    for name in ("a", "b"):
        output = ["--output", str(tmp_path / name)]
        assert evaluate.main(["pope", *files, *options, *output, "--suffix", ""]) == 0
    table = capsys.readouterr().out
    for file in ("random", "popular"):
        for rule in ("pope", "exact", "word"):
            assert any(line.split()[:3] == [file, rule, "12"] for line in table.splitlines())
    scores = json.loads((tmp_path / "a" / "pope.json").read_text())["scores"]
    assert "unanswered" not in scores
    rows = [tuple(line[:3]) for table in tables.tables_of(scores) for line in table.rows]
    files = [(f, r, "12") for f in ("random", "popular") for r in ("pope", "exact", "word")]
    assert rows == files
    answers = answering.read_answers(tmp_path / "a")
    assert len(answers) == 2 * QUESTIONS
    assert evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("random", "popular"))]
    assert {(f, rule, n) for f, rule, model, n, *_ in rows if model == "b"} == set(files)
    assert all(row[-5:] == ["0", "0", "1.0000", "1.0000", "1.0000"] for row in rows[1::2])
    for name, answer in (("a", "yes"), ("b", "no")):  # files of other benchmarks
        head = '{"asked": {}}'  # of an earlier version, without the benchmark
        line = {"id": "0", "question": "?", "image": None, "answer": answer, "gt_answer": "1"}
        for file, fields in (("hallusionbench", line), ("chair", {"id": "0", "answer": "A dog."})):
            text = f"{head}\n{json.dumps(fields)}\n"
            (tmp_path / name / f"{file}.jsonl").write_text(text)
    assert evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("hallusionbench") == 6 and printed.count("  12  ") == 12
    assert printed.count("chair") == 1 and "Skipped chair.jsonl: it has no scored" in printed
    for name in ("random", "popular", "hallusionbench"):
        (tmp_path / "a" / f"{name}.jsonl").unlink()
    assert evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "has no answers with labels" in capsys.readouterr().err


def test_answers_to_removed_questions_are_kept_but_not_compared(questions, tmp_path, capsys):
    files = _pope_files(tmp_path, questions)[:1]
    options = ["--model", str(ASSETS), "--image-folder", str(tmp_path / "images"), "--quiet"]
    options += ["--suffix", ""]
    for name in ("a", "b"):
        assert evaluate.main(["pope", *files, *options, "--output", str(tmp_path / name)]) == 0
    limited = [*options, "--limit", "5", "--output", str(tmp_path / "a")]
    assert evaluate.main(["pope", *files, *limited]) == 0
    assert len(read_answered(tmp_path / "a")["random"].lines) == 5
    capsys.readouterr()
    assert evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "7 are in only one" in capsys.readouterr().err
    kept = (tmp_path / "a" / "random.jsonl").read_text()
    assert kept.count('"unused": true') == 7
    assert evaluate.main(["pope", *files, *options, "--output", str(tmp_path / "a")]) == 0
    same = (tmp_path / "b" / "random.jsonl").read_text()
    assert (tmp_path / "a" / "random.jsonl").read_text() == same
    other = ["--dtype", "bf16", "--output", str(tmp_path / "a")]
    assert evaluate.main(["pope", *files, *options, *other]) == 1
    assert "holds answers for a different dtype" in capsys.readouterr().err


def _answered(file, answers, question="Is there a dog?"):
    """A file of answers to questions whose answer is yes."""
    lines = [{"asked": {}}] + [
        {"id": str(i), "question": question, "image": f"{i}.png", "label": "yes", "answer": answer}
        for i, answer in enumerate(answers)
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_two_files_of_any_names_are_compared(tmp_path, capsys):
    before = _answered(tmp_path / "before.jsonl", ["yes", "no", "no", "yes"])
    after = _answered(tmp_path / "after.v2.jsonl", ["yes", "yes", "yes", "no"])
    assert evaluate.main(["compare", before, after]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[4][:5] == ["pope", "exact", "before", "4", "50.00"]
    assert printed[5][:5] == ["pope", "exact", "after.v2", "4", "75.00"]
    assert printed[5][7] == "+25.00" and printed[5][10:12] == ["2", "1"]
    # In folders, the file name identifies the benchmark.
    (tmp_path / "b").mkdir()
    (tmp_path / "after.v2.jsonl").rename(tmp_path / "b" / "after.v2.jsonl")
    _answered(tmp_path / "a" / "before.jsonl", ["yes"] * 4)
    assert evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "different files: only one of them has after.v2, before." in capsys.readouterr().err


def test_a_giant_image_name_takes_no_memory_for_each_line(tmp_path, capsys):
    """An array of texts would take 4,000 times the longest name, 8 GB."""
    lines = [{"asked": {}}] + [
        {"id": str(i), "question": "q", "image": "y", "label": "yes", "answer": "yes"}
        for i in range(4000)
    ]
    lines[1]["image"] = "x" * 500_000
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # `ru_maxrss` would include the peak of the process that starts this one.
    script = "import sys; from realign.evaluate.command import run; run(sys.argv[1:]); "
    script += "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    command = [sys.executable, "-c", script, "compare", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 2_000_000  # kB
    lines[1]["image"] = {"a": 1}
    files[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate.main(["compare", *map(str, files)]) == 1
    assert "question or image of answer '0' is no text" in capsys.readouterr().err


def test_files_with_other_questions_under_their_ids_are_not_compared(tmp_path, capsys):
    first = _answered(tmp_path / "a" / "random.jsonl", ["yes", "no"])
    second = _answered(tmp_path / "popular.jsonl", ["yes", "no"], "Is there a cat?")
    assert evaluate.main(["compare", first, second]) == 1
    assert "different questions in pope: 2 differ, such as '0'" in capsys.readouterr().err


def test_chair_from_coco_files(questions, tmp_path, capsys):
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(QUESTIONS)]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": []})
    )
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": []}))
    flags = ["--instances", str(tmp_path / "instances.json"), "--most", "5", "--quiet"]
    flags += ["--reference", str(tmp_path / "captions.json"), "--prompt", "name the digits ."]
    flags += ["--model", str(ASSETS), "--image-folder", str(tmp_path / "images")]
    flags += ["--max-tokens", "16", "--output", str(tmp_path / "out")]
    assert evaluate.main(["chair", *flags]) == 0
    assert "objects by Re-Align's own list of synonyms" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "chair.json").read_text())["scores"]
    (table,) = tables.tables_of(found)
    assert table.heads == ("captions", "mentions", "CHAIR-s", "CHAIR-i", "recall")
    assert table.rows == [("5", "0", *["0.00 %"] * 3)]
    details = json.loads((tmp_path / "out" / "chair-objects.json").read_text())
    assert [line["hallucinated"] for line in details["captions"]] == [[]] * 5
    assert set(details["lists"]) == {"synonyms", "annotations"}


def test_hallusionbench_from_its_file(questions, tmp_path, capsys):
    rows = [
        {"category": "VD", "subcategory": "digits", "set_id": str(i // 4), "figure_id": str(i % 2)}
        | {"question_id": str(i // 2 % 2), "question": "is digit 1 a seven ?", "gt_answer": "0"}
        | {"visual_input": "1", "filename": f"{i}.png"}
        for i in range(QUESTIONS)
    ]
    (tmp_path / "hb.json").write_text(json.dumps(rows))
    flags = ["--model", str(ASSETS), "--image-folder", str(tmp_path / "images"), "--quiet"]
    flags += ["--suffix", "", "--output", str(tmp_path / "out")]
    assert evaluate.main(["hallusionbench", str(tmp_path / "hb.json"), *flags]) == 0
    assert "question pair" in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "hallusionbench.json").read_text())["scores"]
    (title,) = scores["parts"]
    assert title == "HallusionBench, scored by rules instead of the leaderboard's judge"
    rows = {row["rule"]: row for row in scores["parts"][title]}
    assert list(rows) == ["pope", "exact", "word"]
    answers = answering.read_answers(tmp_path / "out" / "hallusionbench.jsonl")
    right = [line["answer"] == "no" for line in answers]
    assert rows["exact"]["all questions"] == pytest.approx(sum(right) / QUESTIONS)


def test_questions_without_an_answer_are_counted(questions, tmp_path, capsys):
    """A special token in a text is an error of that question, whose answer is empty."""
    file = _pope_files(tmp_path, questions)[0]
    text = Path(file).read_text()
    Path(file).write_text(text.replace("is digit 1 a", "is </s> a"))
    flags = ["--model", str(ASSETS), "--image-folder", str(tmp_path / "images"), "--quiet"]
    for name in ("a", "b"):
        assert evaluate.main(["pope", file, *flags, "--output", str(tmp_path / name)]) == 0
        assert f"1 of {QUESTIONS} questions have no answer" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "pope.json").read_text())["scores"]["unanswered"] == 1
    assert "1 questions have no answer" in evaluation_of(tmp_path / "a" / "pope.json")
    assert evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    for name in ("a", "b"):
        assert f"{name} has no answer to 1 of {QUESTIONS} questions of random." in printed


def test_scores_do_not_replace_the_questions(questions, tmp_path, capsys):
    file = _pope_files(tmp_path, questions)[0]
    (tmp_path / "data").mkdir()
    questions = shutil.copy(file, tmp_path / "data" / "pope.json")
    before = questions.read_bytes()
    flags = ["--model", str(ASSETS), "--image-folder", str(tmp_path / "images"), "--quiet"]
    for output in (tmp_path / "data", tmp_path / "out"):
        code = evaluate.main(["pope", str(questions), *flags, "--output", str(output)])
        assert code == (output.name == "data")
    assert "pope.json holds no scores, so it would be overwritten" in capsys.readouterr().err
    assert questions.read_bytes() == before
    assert evaluate.main(["pope", str(questions), *flags, "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cider"], "unknown command 'cider'. The commands are pope, hallusionbench"),
        (
            ["compare", "a", "a"],
            "error: BASE: there is no answers file or folder a. Pass the --output of a run.",
        ),
    ],
)
def test_bad_commands_are_named(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(words) == 1
    assert message in capsys.readouterr().err
