"""`python -m realign.evaluate gallery`: states by rule, selection, images, texts and the page."""

import json
import os
import re
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from galleries import EVIL, TAGS, Gallery, dom, joined, needs_browser, operate
from PIL import Image

from realign.evaluate import __main__ as evaluate
from realign.evaluate.benchmarks import BENCHMARKS, Benchmark
from realign.evaluate.gallery import write_gallery

RANDOM = [  # id, label, answer of the first model, answer of the second model
    ("fix", "yes", "No", "yes"),
    ("break", "no", "no", "Yes, there is."),
    ("words", "yes", "Yes, there is one.", "yes"),  # the rule `exact` reads no sentence
    ("wrong", "no", "yes", "Yes"),
    ("right", "yes", "yes", "yes"),
]
POPULAR = [("more", "no", "Yes", "no"), ("same", "no", "no", "no")]


def _write(folder, name, model, lines, benchmark="pope"):
    folder.mkdir(exist_ok=True)
    rows = [{"asked": {"model": model}, "benchmark": benchmark}, *lines]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{name}.jsonl"


def _files(folder, name, table, models=("hub/base", "runs/rdpo"), **changes):
    """Two files with the answers of both models to a table of questions."""
    files = []
    for place, (part, model) in enumerate(zip(("before", "after"), models, strict=True)):
        lines = [
            {"id": row[0], "question": f"Is there a {row[0]}?", "image": f"{row[0]}.png"}
            | {"label": row[1], "answer": row[2 + place]}
            | changes
            for row in table
        ]
        files.append(_write(folder / part, name, model, lines))
    return files


def _page(folder, *files, **options):
    report = write_gallery(*files, folder / "page.html", **options)
    return Gallery(folder / "page.html"), report


def _labels(page, rule):
    return {card["id"]: card["labels"][rule] for card in page.data["cards"]}


def _totals(page):
    return {
        file: {rule: [number for _, number, _ in parts] for rule, parts in rules.items()}
        for file, rules in page.data["totals"].items()
    }


def _table(report):
    """The rows of the totals in a report, without their head."""
    lines = [" ".join(line.split()) for line in report.splitlines()]
    start = lines.index("file rule questions fixed broken both wrong both right") + 1
    return [line for line in lines[start:] if re.search(r"( \d+){5}$", line)]


def test_states_totals_and_verdicts_by_rule(tmp_path):
    page, report = _page(tmp_path, *_files(tmp_path, "random", RANDOM))
    data = page.data
    assert data["heading"] == "base → rdpo" and data["about"] == "5 questions in random"
    assert _labels(page, "pope") == {
        "fix": ["fixed", "answers differ", "image not shown"],
        "break": ["broken", "answers differ", "image not shown"],
        "words": ["both right", "answers differ", "image not shown"],
        "wrong": ["both wrong", "answers differ", "image not shown"],
        "right": ["both right", "image not shown"],
    }
    states = [labels[0] for labels in _labels(page, "exact").values()]
    assert states == ["fixed", "broken", "fixed", "both wrong", "both right"]
    totals = {"pope": [1, 1, 1, 2], "exact": [2, 1, 1, 1], "word": [1, 1, 1, 2]}
    assert _totals(page) == {"": totals, "random": totals}
    assert data["figures"][1] in report and _table(report)[1] == "random exact 5 2 1 1 1"
    words = data["cards"][2]
    (turn,) = words["turns"]
    assert turn["prompt"] == [["", "Is there a words?"], ["gold label", "yes"]]
    first, second = turn["answers"]
    assert (first["title"], second["title"]) == ("base", "rdpo")
    assert joined(first["segments"]) == "Yes, there is one." and joined(second["segments"]) == "yes"
    assert first["verdicts"]["exact"] == ["bad", "wrong"]
    assert first["verdicts"]["word"] == second["verdicts"]["exact"] == ["good", "right"]
    assert words["chips"] == [
        {"name": "pope, word", "value": "right → right", "tone": ""},
        {"name": "exact", "value": "wrong → right", "tone": "good"},
    ]
    assert [card["sort"]["changed"] for card in data["cards"]] == [1, 3, 4, 1, 0]


def test_graded_scores_and_units_of_several_questions(tmp_path, monkeypatch):
    """A score that rises is fixed. The lowest score of a unit counts, as in `compare`."""
    rule = {"accuracy": lambda line: line["score"]}
    unit = lambda line: line["id"].split("-")[0]  # noqa: E731
    monkeypatch.setitem(BENCHMARKS, "graded", Benchmark("Graded", rule, unit=unit))
    scores = {"up": (0.3, 0.6), "down": (1.0, 0.9), "low": (0.3, 0.3), "high": (0.6, 0.6)}
    scores |= {"turned-0": (1.0, 1.0), "turned-1": (0.0, 1.0)}
    files = [
        _write(
            tmp_path,
            f"file{place}",
            "m",
            [
                {"id": name, "question": f"{name}?", "image": None, "answers": ["a", "b", "a"]}
                | {"answer": "a", "score": pair[place]}
                for name, pair in scores.items()
            ],
            "graded",
        )
        for place in range(2)
    ]
    page, report = _page(tmp_path, *files)
    assert _table(report) == ["graded accuracy 5 2 1 1 1"]
    states = [card["labels"][""] for card in page.data["cards"]]
    assert states == [["fixed"], ["broken"], ["both wrong"], ["both right"], ["fixed"]]
    assert page.data["rules"][""] == [] and page.data["cards"][0]["chips"] == [
        {"name": "accuracy", "value": "0.30 → 0.60", "tone": "good"}
    ]
    turned = page.data["cards"][-1]
    asked = [turn["prompt"] for turn in turned["turns"]]
    assert asked == [[["", f"turned-{i}?"], ["gold label", "a x 2, b x 1"]] for i in range(2)]
    assert [a["note"] for a in turned["turns"][1]["answers"]] == ["score: 0.0", "score: 1.0"]
    verdicts = [[a["verdicts"][""][1] for a in turn["answers"]] for turn in turned["turns"]]
    assert verdicts == [["right", "right"], ["wrong", "right"]]
    # Models of one name get the names of their files.
    assert page.data["heading"] == "file0.jsonl → file1.jsonl"


@pytest.mark.parametrize(
    ("models", "heading"),
    [
        (("llava-hf/llava-1.5-7b-hf", "runs/llava/"), "llava-1.5-7b-hf → llava"),
        (("runs/a/model", "runs/b/model"), "a/model → b/model"),
        (("m", "runs/m"), "m → runs/m"),
        (("m", "m"), "before/random.jsonl → after/random.jsonl"),
    ],
)
def test_names_of_models_are_distinct(tmp_path, models, heading):
    page, _ = _page(tmp_path, *_files(tmp_path, "random", RANDOM, models))
    assert page.data["heading"] == heading


def test_changed_questions_are_selected_first(tmp_path):
    kinds = ["right"] * 20 + ["wrong"] * 10 + ["fix", "break", "words"]
    rows = {row[0]: row for row in RANDOM}
    table = [(f"{kind}{i}", *rows[kind][1:]) for i, kind in enumerate(kinds)]
    files = _files(tmp_path, "random", table)
    page, report = _page(tmp_path, *files, most=8)
    shown = [card["id"] for card in page.data["cards"]]
    wrong = ["wrong20", "wrong22", "wrong24", "wrong27", "wrong29"]
    assert shown == [*wrong, "fix30", "break31", "words32"]
    note = (
        "Questions shown: 3 of 3 fixed or broken by any rule, 5 of 10 both wrong, 0 of 20 both "
        "right. Each part is sampled evenly (--most 8)."
    )
    assert note in report and note in page.data["notes"]
    assert page.data["about"] == "8 of 33 questions in random"
    assert _totals(page)[""]["pope"] == [1, 1, 10, 21]
    shown = [card["id"] for card in _page(tmp_path, *files, most=2)[0].data["cards"]]
    assert shown == ["fix30", "words32"]
    page, report = _page(tmp_path, *files, most=0)
    assert len(page.data["cards"]) == 33 and "Questions shown" not in report


def test_each_file_has_equal_room(tmp_path):
    """A small file leaves the rest of its share to the large ones."""
    for name, number in (("large", 300), ("middle", 100), ("small", 4)):
        _files(tmp_path, name, [(f"{name}{i}", "yes", "no", "yes") for i in range(number)])
    page, report = _page(tmp_path, tmp_path / "before", tmp_path / "after", most=60)
    shown = Counter(card["group"] for card in page.data["cards"])
    assert shown == {"large": 28, "middle": 28, "small": 4}
    assert "60 of 404 fixed or broken by any rule, 0 of 0 both wrong" in report
    assert "Each part is sampled evenly, with equal room for each file (--most 60)." in report


def test_images(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (900, 100)).save(images / "fix.png")
    (images / "wrong.png").write_text("no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    files = _files(tmp_path, "random", RANDOM)
    for file in files:
        text = file.read_text().replace('"break.png"', '"../secret.png"')
        file.write_text(text.replace('"words.png"', "null"))
    page, report = _page(tmp_path, *files, image_folder=images, side=100)
    shown = {}
    for card in page.data["cards"]:
        for figure in card["figures"]:
            (image,) = (page.data["images"][place] for place in figure["images"])
            shown[card["id"]] = image.get("problem") or image["source"][:16]
    assert shown == {
        "fix": "data:image/jpeg;",
        "break": "outside the folder",
        "wrong": "corrupt",
        "right": "missing",
    }
    assert page.data["cards"][0]["figures"][0]["note"] == "fix.png"
    problem = "Images that are not shown: 1 outside the folder, 1 corrupt, 1 missing. Check --image"
    assert problem in report and any(problem in note for note in page.data["notes"])
    labels = _labels(page, "pope")
    assert [name for name in labels if "image not shown" in labels[name]] == [
        "break",
        "wrong",
        "right",
    ]


def test_texts_stay_texts(tmp_path):
    rows = [(EVIL, "yes", EVIL, "x " + EVIL + " \ud800")]
    plain, _ = _page(tmp_path, *_files(tmp_path, "random", RANDOM))
    files = _files(tmp_path, "evil", rows, (EVIL, "b&<b>"), error=EVIL, odd={"a": [EVIL, None]})
    page, _ = _page(tmp_path, *files)
    assert page.elements[10:] == plain.elements[10:] and len(page.elements) == len(plain.elements)
    assert {tag for tag, _ in page.elements} == set(TAGS)
    (card,) = page.data["cards"]
    assert joined(card["turns"][0]["answers"][0]["segments"]) == EVIL
    assert joined(card["turns"][0]["answers"][1]["segments"]) == f"x {EVIL} ?"
    assert "b&amp;&lt;b&gt;</title>" in page.text and "<img src=x" not in page.text
    assert not re.search(r"https?:|url\(|@import|innerHTML|insertAdjacent|eval\(", page.text)


def test_invisible_characters_are_shown(tmp_path):
    """Text direction and characters without a shape must not hide the scored text."""
    hidden = "\u202eon\u202c \u2066\u2069\u061c\u200f\u200b\xad\ufeff\U000e0041"
    page, _ = _page(tmp_path, *_files(tmp_path, "random", [("a", "no", hidden, "no")]))
    (turn,) = page.data["cards"][0]["turns"]
    assert joined(turn["answers"][0]["segments"]) == (
        "⟨U+202E⟩on⟨U+202C⟩ ⟨U+2066⟩⟨U+2069⟩⟨U+061C⟩⟨U+200F⟩⟨U+200B⟩⟨U+00AD⟩⟨U+FEFF⟩⟨U+E0041⟩"
    )
    assert not any(unicodedata.category(letter) == "Cf" for letter in page.text)
    controls = "a\x00\x07\x08\x0c\x1b\\u0007\\\\b\t"
    page, _ = _page(tmp_path, *_files(tmp_path, "random", [("a", "no", controls, "no")]))
    shown = joined(page.data["cards"][0]["turns"][0]["answers"][0]["segments"])
    assert shown == "a⟨U+0000⟩⟨U+0007⟩⟨U+0008⟩⟨U+000C⟩⟨U+001B⟩\\u0007\\\\b\t"
    kept = "a👩\u200d🔬 می\u200cخواهم שלום é\n\t"  # joiners are part of emojis and of words
    page, _ = _page(tmp_path, *_files(tmp_path, "random", [("a", "no", kept, "no")]))
    assert joined(page.data["cards"][0]["turns"][0]["answers"][0]["segments"]) == kept


def test_captions_and_failed_answers(tmp_path):
    folders = [tmp_path / "before", tmp_path / "after"]
    for folder, objects in zip(folders, (["dog"], []), strict=True):
        line = {"id": "1", "question": "Describe it.", "image": "1.png", "answer": "A dog."}
        _write(folder, "chair", "m", [line], "chair")
        content = {"lists": {}, "captions": [line | {"hallucinated": objects}]}
        (folder / "chair-objects.json").write_text(json.dumps(content))
    _files(tmp_path, "random", RANDOM)
    lines = (folders[1] / "random.jsonl").read_text().splitlines()
    failed = json.loads(lines[1]) | {"answer": "", "error": "no reply in 60 s"}
    (folders[1] / "random.jsonl").write_text(
        "\n".join([lines[0], json.dumps(failed), *lines[2:]]) + "\n"
    )
    page, report = _page(tmp_path, *folders)
    caption, asked = page.data["cards"][:2]
    assert [answer["note"] for answer in caption["turns"][0]["answers"]] == [
        "hallucinated: dog",
        "hallucinated: none",
    ]
    # The rule `exact` does not exist for captions. They keep their own rule.
    assert caption["labels"]["exact"][0] == "fixed" and caption["group"] == "chair"
    assert caption["chips"][0]["name"] == "no hallucination"
    assert page.data["rules"] == {
        "": ["pope", "exact", "word"],
        "chair": ["no hallucination"],
        "random": ["pope", "exact", "word"],
    }
    assert asked["turns"][0]["answers"][1]["note"] == "error: no reply in 60 s"
    assert "no answer" in asked["labels"]["pope"]
    assert _totals(page)[""]["exact"] == [2, 1, 2, 1]
    assert _table(report)[::2] == ["chair no hallucination 1 1 0 0 0", "random exact 5 1 1 2 1"]


def test_answers_are_matched_by_id(tmp_path):
    first, second = _files(tmp_path, "random", RANDOM)
    head, *lines = second.read_text().splitlines()
    second.write_text("\n".join([head, *lines[2:], *lines[:2]]) + "\n")
    page, _ = _page(tmp_path, first, second)
    assert [card["labels"]["pope"][0] for card in page.data["cards"]] == [
        "fixed", "broken", "both right", "both wrong", "both right",
    ]  # fmt: skip
    for change, problem in (
        (lambda t: t + lines[0] + "\n", "answers 'fix' twice"),
        (
            lambda t: t.replace('"label": "no"', '"label": "yes"'),
            "different questions in .*: [0-9] differ",
        ),
        (lambda t: t.replace('"benchmark": "pope"', '"benchmark": "hallusionbench"'), "benchmarks"),
        (
            lambda t: t.replace("Is there", "Are there"),
            "answer different questions in .*: 5 differ",
        ),
    ):
        changed = tmp_path / "changed.jsonl"
        changed.write_text(change(second.read_text()))
        with pytest.raises(ValueError, match=problem):
            write_gallery(first, changed, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_command(tmp_path, capsys):
    files = [*map(str, _files(tmp_path, "random", RANDOM))]
    output = tmp_path / "new" / "page.html"
    assert evaluate.main(["gallery", *files, "--output", str(output), "--most", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"wrote .*page.html: 3 of 5 questions, 0.0 MB", printed[0])
    assert _table("\n".join(printed)) == [
        "random pope 5 1 1 1 2",
        "random exact 5 2 1 1 1",
        "random word 5 1 1 1 2",
    ]
    assert printed[5].startswith("Questions shown: 3 of 3 fixed or broken by any rule, 0 of 1 both")
    assert printed[6] == "Images that are not shown: 3 missing. Check --image-folder."
    for words, problem in (
        ([files[0], str(tmp_path / "none")], "ALIGNED: there is no answers file or folder"),
        ([str(tmp_path / "none"), files[0]], "BASE: there is no answers file or folder"),
        ([*files, "--most", "-1"], "--most is -1; it must be 0 or more"),
        ([*files, "--side", "8"], "side is 8; it must be at least 16"),
        ([*files, "--image-folder", "none"], "--image-folder none is not a folder"),
    ):
        assert evaluate.main(["gallery", *words, "--output", str(tmp_path / "x.html")]) == 1
        assert problem in capsys.readouterr().err and not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    "output",
    [
        "before/random.jsonl",
        "after/random.jsonl",
        "link.html",
        "before/metrics.json",
        "images/a.png",
    ],
)
@pytest.mark.parametrize("folders", [True, False])
def test_inputs_are_not_overwritten(tmp_path, monkeypatch, capsys, output, folders):
    files = _files(tmp_path, "random", RANDOM)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("before/metrics.json", "before/gallery.html", "images/a.png"):
        (tmp_path / name).write_text("kept")
    os.link(files[1], tmp_path / "link.html")
    paths = ["before", "after"] if folders else [str(file) for file in files]
    command = ["gallery", *paths, "--image-folder", "images", "--output"]
    before = Path(output).read_bytes()
    assert evaluate.main([*command, output]) == 1
    assert f"--output {output} is an input, or is in the folder" in capsys.readouterr().err
    assert Path(output).read_bytes() == before
    assert evaluate.main([*command, "before/gallery.html"]) == 0  # an earlier gallery


RULES = """
const seen = [];
const texts = (selector) => [...document.querySelectorAll(selector)].map((n) => n.textContent);
const rules = document.getElementById("rule");
const set = (id, value, event = "change") => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(event));
  seen.push([rules.hidden ? [] : texts("#rule option"), rules.value, texts("#totals :is(li, p)")]);
};
set("rule", "vqa");
for (const file of ["a", "choice", "drinks", ""]) set("group", file);
set("search", "COCO_2.png", "input");
seen.push(texts("summary code"));
document.body.dataset.seen = JSON.stringify(seen);
"""


def _mixed(tmp_path):
    """Files of three benchmarks with other rules: POPE, MMBench and TextVQA."""
    _files(tmp_path, "a", RANDOM)
    for folder, letter, drink in (("before", "A", "coke"), ("after", "B", "water")):
        line = {"id": "1", "question": "Which?", "image": "COCO_2.png", "unit": "1"}
        line |= {"options": {"A": "x", "B": "y"}, "label": "B", "answer": letter}
        _write(tmp_path / folder, "choice", "m", [line], "mmbench")
        line = {"id": "2", "question": "Which?", "image": "3.png", "answer": drink}
        line |= {"answers": ["pepsi", "coke"] * 3 + ["coke"] * 4}
        _write(tmp_path / folder, "drinks", "m", [line], "textvqa")
    return tmp_path / "before", tmp_path / "after"


def test_totals_of_files_with_other_rules(tmp_path):
    page, report = _page(tmp_path, *_mixed(tmp_path))
    rows = _table(report)
    assert [rows[0], rows[3]] == ["a pope 5 1 1 1 2", "choice letter 1 1 0 0 0"]
    assert rows[5] == "drinks vqa 1 0 1 0 0" and len(rows) == 6
    totals = _totals(page)
    assert totals["choice"] == {"letter": [1, 0, 0, 0]}
    assert totals[""]["vqa"] == [2, 2, 1, 2] and totals["drinks"]["vqa"] == [0, 1, 0, 0]
    turn = page.data["cards"][-1]["turns"][0]
    assert turn["prompt"][1] == ["gold label", "coke x 7, pepsi x 3"]


@needs_browser
def test_rules_of_each_file_in_a_browser(tmp_path):
    write_gallery(*_mixed(tmp_path), tmp_path / "page.html")
    steps = tmp_path / "steps.js"
    steps.write_text(RULES)
    everything, *files, again, _, found = operate(tmp_path / "page.html", steps)
    names = ["pope", "exact", "word", *BENCHMARKS["textvqa"].rules]
    assert everything == again == [
        [f"Rule: {name}" for name in names],
        "vqa",
        ["All 7 questions by vqa or their own rule", "fixed 2", "broken 2"]
        + ["both wrong 1", "both right 2"]
        + ["Files without the rule vqa keep their own: pope for a; letter for choice."],
    ]  # fmt: skip
    yes_no, choice, drinks = files
    assert yes_no[0] == [f"Rule: {name}" for name in names[:3]] and yes_no[1] == "pope"
    assert yes_no[2] == [
        "All 5 questions by pope", "fixed 1", "broken 1", "both wrong 1", "both right 2",
    ]  # fmt: skip
    assert choice[0] == [] and choice[2][:2] == ["All 1 questions by letter", "fixed 1"]
    assert drinks[0] == [f"Rule: {name}" for name in names[3:]] and drinks[1] == "vqa"
    assert found == ["1"]


@needs_browser
def test_in_a_browser(tmp_path):
    _files(tmp_path, "random", RANDOM)
    _files(tmp_path, "popular", POPULAR)
    page = tmp_path / "page.html"
    write_gallery(tmp_path / "before", tmp_path / "after", page)
    seen = operate(page, Path(__file__).with_name("gallery_steps.js"))
    options = partial(_options, hidden=7)
    everything = ["more", "same", "fix", "break", "words", "wrong", "right"]
    pope, exact = options(2, 1, 1, 3, 5), options(3, 1, 1, 2, 5)
    assert seen == [
        [everything, pope],
        ["All 7 questions by pope", "fixed 2", "broken 1", "both wrong 1", "both right 3"],
        ["Rule: pope", "Rule: exact", "Rule: word"],
        ["All files", "popular", "random"],
        [["more", "fix"], pope],
        [["break"], pope],
        [["wrong"], pope],
        [["same", "words", "right"], pope],
        [["more", "fix", "break", "words", "wrong"], pope],
        [["more", "fix", "break", "words", "wrong"], exact],
        ["All 7 questions by exact", "fixed 3", "broken 1", "both wrong 1", "both right 2"],
        [["more", "fix", "words"], exact],
        ["fixed"] * 3,
        ["base wrong", "rdpo right"],
        ["Yes", "no"],
        [["more"], _options(1, 0, 0, 1, 1, hidden=2)],
        [["more", "same"], _options(1, 0, 0, 1, 1, hidden=2)],
        [everything, exact],
        [["words", "break", "more", "fix", "wrong", "same", "right"], exact],
        True,
    ]
    assert "7 questions in 2 files" in dom(page)


def _options(*counts, hidden):
    names = ("fixed", "broken", "both wrong", "both right", "answers differ", "image not shown")
    return [f"{name} ({count})" for name, count in zip(names, (*counts, hidden), strict=True)]
