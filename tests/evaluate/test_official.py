"""Our scorers give the figures of the official ones on 500 made answers.

`official.json` was written by tests/helpers/record_official.py, which ran the official scorers.
"""

import json
from collections import Counter
from pathlib import Path

import made_answers as made
import pytest

from realign.evaluate import amber, mme, vqa, yesno
from realign.evaluate.benchmarks import BENCHMARKS, report, units
from realign.evaluate.letters import letter

OFFICIAL = json.loads(Path(__file__).with_name("official.json").read_text())


@pytest.mark.parametrize(
    ("rule", "scores"),
    [
        ("vqa", OFFICIAL["vqa"]),
        ("evalai", OFFICIAL["textvqa"]),
        ("evalai", OFFICIAL["lmms_eval"]["vqa"]),
    ],
)
def test_vqa_accuracy(rule, scores):
    found = [vqa.RULES[rule](answer, people) for answer, people in made.vqa()]
    assert found == pytest.approx(scores, abs=1e-9)
    assert {round(score, 6) for score in scores} == {0, 0.3, 0.6, 0.9, 1}


def test_letters_are_those_of_vlmevalkit():
    found = [letter(answer, options) or "-" for answer, options, _ in made.letters()]
    official = OFFICIAL["vlmevalkit"]["letters"].replace("Z", "-")  # Z is a refusal
    assert "".join(found) == official
    assert len(set(official)) == 6 and official.count("-") > 100


def test_rotations_of_mmbench_are_those_of_vlmevalkit():
    lines = [
        {"id": str(row["index"]), "unit": str(row["index"] % 1_000_000), "image": "x"} | row
        for row in made.rotated()
    ]
    scores = units(lines, BENCHMARKS["mmbench"]).scores["letter"]
    assert "".join(str(int(score)) for score in scores) == OFFICIAL["vlmevalkit"]["circular"]
    (row,) = report([line | {"groups": []} for line in lines], "mmbench")
    assert (row["questions"], row["accuracy"]) == (125, pytest.approx(scores.mean()))


def test_yes_and_no_are_those_of_vlmevalkit():
    found = [(yesno.RULES["word"](answer) or "unknown")[0].upper() for answer, _ in made.yes_no()]
    assert "".join(found) == OFFICIAL["vlmevalkit"]["yes_no"]


def _mme_lines():
    return [
        {"id": str(i), "answer": answer, "label": label, "pair": str(i // 2), "image": "x"}
        | {"category": made.MME_CATEGORIES[i // 2 % len(made.MME_CATEGORIES)]}
        for i, (answer, label) in enumerate(made.yes_no())
    ]


def test_mme_is_that_of_its_authors():
    rows = [row for row in report(_mme_lines(), "mme") if row["rule"] == "authors"]
    assert {row["group"]: pytest.approx(row["score"]) for row in rows} == OFFICIAL["mme"]


def test_mme_differs_from_lmms_eval_only_in_single_letters_and_periods():
    """lmms-eval reads "y" and "n", and removes periods and white space at first."""
    words = {"yes": "y", "no": "n", None: "o"}
    differ = Counter(
        answer
        for (answer, _), official in zip(made.yes_no(), OFFICIAL["lmms_eval"]["mme"], strict=True)
        if words[mme.RULES["authors"](answer)] != official
    )
    assert {"y", "n"} <= set(differ) <= {"Y", "y", "N", "n"}


def _group(kind):
    group = kind.removeprefix("discriminative-")
    if group.startswith("attribute-"):
        return ["attribute", group.removeprefix("attribute-")]
    return ["existence" if group == "hallucination" else "relation"]


def test_ambers_questions_are_those_of_its_authors():
    """They count "Yes" and "No" only, round each figure, and add 0.001 to each number."""
    lines = [
        {"id": str(i), "answer": answer, "label": label} | {"groups": _group(kind), "image": "x"}
        for i, (kind, (answer, label)) in enumerate(
            zip(made.amber_types(), made.yes_no(), strict=True)
        )
    ]
    rows = {
        row["group"]: row
        for row in report(lines, "amber-discriminative")
        if row["rule"] == "authors"
    }
    checked = 0
    for name, official in OFFICIAL["amber"].items():
        heading, _, figure = name.rpartition(" ")
        if heading == "captions":
            continue
        row = rows[heading]
        figure = figure if figure == "F1" else figure.lower()
        # 0.05 for rounding; F1 is computed from two rounded figures.
        assert 100 * row[figure] == pytest.approx(official, abs=0.12 if figure == "F1" else 0.06)
        checked += 1
    assert checked == 4 * 7


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "relation.json").write_text(json.dumps(made.RELATION))
    (tmp_path / "safe_words.txt").write_text("\n".join(made.SAFE))
    return amber.Lists(tmp_path / "relation.json", tmp_path / "safe_words.txt")


def test_ambers_captions_are_those_of_its_authors(lists):
    """With the same tagger and the same similar words."""

    def similar(first, second):
        return first == second or frozenset((first, second)) in made.SIMILAR

    words = amber.Words(str.split, similar, "made words")
    counted = [amber.caption(text, note, lists, words) for text, note in made.amber_captions()]
    found = amber.generative(counted)
    for figure in ("CHAIR", "Cover", "Hal", "Cog"):
        official = OFFICIAL["amber"][f"captions {figure}"]
        assert 100 * getattr(found, figure.lower()) == pytest.approx(official, abs=0.06)
