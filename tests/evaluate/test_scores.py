"""Benchmark scores against examples worked by hand, and against scipy."""

import json

import numpy as np
import pytest
from scipy import stats

from realign.evaluate import chair, hallusionbench, paired, yesno
from realign.evaluate.benchmarks import BENCHMARKS

ANSWERS = {  # answer -> verdict of each rule: pope, exact, word
    "Yes": ("yes", "yes", "yes"),
    "yes.": ("yes", None, "yes"),
    "No": ("no", "no", "no"),
    " no ": ("no", "no", "no"),
    "NO": ("yes", "no", "no"),
    "No, there is no dog.": ("no", None, "no"),
    "Yes, there is a dog. It is not small.": ("yes", None, "yes"),
    "There is not a dog in the image.": ("no", None, None),
    "There isn't a dog in the image.": ("yes", None, None),
    "Yes and no": ("no", None, None),
    "I see a notebook; nothing else": ("yes", None, None),
    "": ("yes", None, None),
    # Markdown and other marks: `word` keeps * : and the apostrophe, and removes other marks.
    "**Yes**": ("yes", None, None),
    "**No**": ("yes", None, None),
    "*No*": ("yes", None, None),
    "No: there is none": ("yes", None, None),
    "Answer:no": ("yes", None, None),
    "'No'": ("yes", None, None),
    "(yes)": ("yes", None, "yes"),
    "`No`": ("yes", None, "no"),
    "<b>no</b>": ("yes", None, "no"),
    "Yes,there is": ("yes", None, "yes"),  # a comma without a space separates words,
    "Yes,one, no doubt": ("no", None, "no"),  # unless another has a space: "yesone"
    "Yes,of 1,000": ("yes", None, None),  # or a number has a comma
    "No.It is not": ("no", None, None),  # "noit"
    "No.\nIt is not": ("no", None, "no"),
    "no.5": ("no", None, None),
    "a. " * 31 + "no.": ("yes", None, "no"),
    "a. " * 32 + "no.": ("yes", None, None),  # the 33rd period stays
    "1.5 " * 32 + "no.": ("yes", None, "no"),  # periods in numbers are kept and not counted
}


@pytest.mark.parametrize("place, rule", [(0, "pope"), (1, "exact"), (2, "word")])
def test_the_verdict_of_each_rule(place, rule):
    read = {answer: yesno.RULES[rule](answer) for answer in ANSWERS}
    assert read == {answer: expected[place] for answer, expected in ANSWERS.items()}


def test_pope_by_hand():
    """Six questions, of which the first three have the answer yes."""
    answers = ["Yes", "No", "There isn't a cat.", "No", "Yes, there is.", "It is unclear."]
    labels = ["yes", "yes", "yes", "no", "no", "No"]
    # pope reads yes no yes | no yes yes: 2 hits of 4 yes, 1 missed, 3 right
    found = yesno.score(answers, labels, "pope")
    assert (found.accuracy, found.precision, found.recall) == (3 / 6, 2 / 4, 2 / 3)
    assert found.f1 == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert (found.yes_rate, found.unread) == (4 / 6, 0)
    # exact reads yes no - | no - -: 1 hit of 1 yes, 1 missed ("-" is none), 2 right
    found = yesno.score(answers, labels, "exact")
    assert (found.accuracy, found.precision, found.recall) == (2 / 6, 1, 1 / 2)
    assert (found.yes_rate, found.unread, found.f1) == (1 / 6, 3 / 6, pytest.approx(2 / 3))
    # word reads yes no - | no yes -: 1 hit of 2 yes, 2 missed, 2 right
    found = yesno.score(answers, labels, "word")
    assert (found.accuracy, found.precision, found.recall) == (2 / 6, 1 / 2, 1 / 3)
    assert (found.yes_rate, found.unread, found.f1) == (2 / 6, 2 / 6, pytest.approx(0.4))


def test_bad_yes_no_input_is_named():
    with pytest.raises(ValueError, match="rule is 'gpt'; it must be one of pope, exact, word"):
        yesno.score(["yes"], ["yes"], "gpt")
    with pytest.raises(ValueError, match="a label is 'maybe'"):
        yesno.score(["yes"], ["maybe"], "pope")
    with pytest.raises(ValueError, match="2 answers to 1 questions"):
        yesno.score(["yes", "no"], ["yes"], "pope")
    with pytest.raises(ValueError, match="0 answers to 0 questions"):
        yesno.score([], [], "pope")


def test_answers_without_yes():
    found = yesno.score(["no", "no"], ["yes", "no"], "pope")
    assert (found.precision, found.recall, found.f1, found.accuracy) == (0, 0, 0, 0.5)


# CHAIR.


@pytest.fixture(scope="module")
def words():
    return chair.Vocabulary()


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two dogs and a puppy on a couch.", ["dog", "dog", "couch"]),
        ("A man rides a motor bike past traffic lights", ["person", "motorcycle", "traffic light"]),
        ("hot dogs and wine glasses", ["hot dog", "wine glass"]),
        ("a baby elephant beside a baby", ["elephant", "person"]),
        ("A passenger train; a toilet seat; a teddy bear", ["train", "toilet", "teddy bear"]),
        ("A toilet with the seat up.", ["toilet"]),  # the seat does not count
        ("Seats behind a chair; the toilets", ["chair", "toilet"]),
        ("A urinal, and a seat", ["toilet", "chair"]),  # the word "toilet" matters, not the object
        ("Train tracks and a train track past a train", ["train"]),
        ("A batter at home plate", ["person"]),
        ("A baby, cats. A hot, dog", ["person", "cat", "dog"]),  # a mark separates words
        ("A man-made lake at five o'clock, cats/dogs", []),  # these are single words
        ("An adult bird, a passenger jet, a bow tie", ["bird", "airplane", "tie"]),
        ("Knives, skis, scissors, buses, mice", ["knife", "skis", "scissors", "bus", "mouse"]),
        ("A person's remote controls", ["person", "remote"]),
        ("Nothing of the kind: grass, sky, gas", []),
        ("", []),
    ],
)
def test_objects_of_a_text(words, text, objects):
    assert words.objects(text) == objects


def test_a_name_of_three_words_is_found_by_its_words(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text("oven, stove, stove top oven\nplate\ntrain, bullet train\n")
    words = chair.Vocabulary(file)
    assert words.objects("A stove top oven") == ["oven", "oven"]
    assert words.objects("Plates at home, home plates") == ["plate"]
    assert words.objects("A bullet train on a train track") == ["train"]


def test_all_categories_of_coco_are_known(words):
    names = [line.split(",")[0] for line in chair.OWN_SYNONYMS.read_text().splitlines()]
    assert len(names) == 80
    assert all(words.objects(name) == [name] for name in names)


def _coco(folder):
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "dining table"}]
    images = [{"id": 7}, {"id": 8}, {"id": 9}]
    marks = [
        {"image_id": 7, "category_id": 1},
        {"image_id": 8, "category_id": 2},
        {"image_id": 9, "category_id": 1},
    ]
    captions = [
        {"image_id": 7, "caption": "A puppy beside a man."},
        {"image_id": 8, "caption": "Wood"},
    ]
    for name, content in (
        ("instances", {"images": images, "categories": categories, "annotations": marks}),
        ("captions", {"annotations": captions}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "instances.json", folder / "captions.json"


def test_chair_by_hand(tmp_path, words):
    captions = {
        7: "A dog and a woman with a frisbee.",  # the frisbee is not in the image
        8: "A table with two cats, and a cat under the table.",  # 2 of 4 mentions are false
    }
    shown = chair.shown_objects(*_coco(tmp_path), words, captions)
    assert shown == {7: {"dog", "person"}, 8: {"dining table"}}
    found = chair.score(captions, shown, words)
    assert (found.captions, found.mentions) == (2, 7)
    assert (found.chair_s, found.chair_i, found.recall) == (2 / 2, 3 / 7, 3 / 3)
    clean = chair.score({7: "A dog.", 8: "A view."}, shown, words)
    assert (clean.chair_s, clean.chair_i, clean.recall) == (0, 0, 1 / 3)


def test_the_seat_of_a_toilet_is_not_a_hallucinated_chair(words):
    found = chair.score({7: "A toilet with the seat up."}, {7: {"toilet"}}, words)
    assert (found.mentions, found.chair_s, found.chair_i, found.recall) == (1, 0, 0, 1)


def test_bad_annotations_are_named(tmp_path, words):
    files = _coco(tmp_path)
    with pytest.raises(ValueError, match="has no image 12, but there is a caption of it"):
        chair.shown_objects(*files, words, [7, 12])
    few = tmp_path / "synonyms.txt"
    few.write_text("dog, puppy\n")
    with pytest.raises(ValueError, match="the list of synonyms has no object 'dining table'"):
        chair.shown_objects(*files, chair.Vocabulary(few), [7])
    few.write_text("dog, puppy\nseal, puppy\n")
    with pytest.raises(ValueError, match="'puppy' is a synonym of 'dog' and 'seal'"):
        chair.Vocabulary(few)
    with pytest.raises(ValueError, match="there are no captions"):
        chair.score({}, {}, words)


# HallusionBench.


def _question(category, set_id, figure, question, answer):
    names = ("category", "subcategory", "set_id", "figure_id", "question_id", "gt_answer")
    return dict(zip(names, (category, "chart", set_id, figure, question, answer), strict=True))


def test_hallusionbench_by_hand():
    rows = [
        _question("VD", "0", "0", "0", "1"),  # right
        _question("VD", "0", "1", "0", "0"),  # wrong, as are its pair and its figure.
        _question("VD", "0", "0", "1", "1"),  # right
        _question("VD", "0", "1", "1", "0"),  # right, and completes a pair.
        _question("VS", "0", "0", "0", "1"),  # wrong, and without a figure
        _question("VS", "0", "1", "0", "1"),  # right, and completes a figure
    ]
    answers = ["Yes.", "Yes.", "Yes", "No", "no", "yes"]
    rule = BENCHMARKS["hallusionbench"].rules["word"]
    labels = ["yes", "no", "yes", "no", "yes", "yes"]
    lines = [{"answer": a, "label": b} for a, b in zip(answers, labels, strict=True)]
    right = [rule(line) == 1 for line in lines]
    assert right == [True, False, True, True, False, True]
    found = hallusionbench.score(right, rows)
    assert found.question_pair == 1 / 3
    assert found.figure == 2 / 3  # VD figure 0 and VS figure 1 of three
    assert found.easy == 2 / 3
    assert found.hard == 2 / 3
    assert found.question == 4 / 6


# Two models.


def test_mcnemar_is_scipys_binomial_test():
    rng = np.random.default_rng(0)
    first, second = rng.random(400) < 0.7, rng.random(400) < 0.75
    found = paired.compare(first, second)
    gained, lost = (second > first).sum(), (first > second).sum()
    assert (found.gained, found.lost) == (gained, lost)
    # The two tails of the binomial test are equal at p = 1/2.
    tail = stats.binom.cdf(min(gained, lost), gained + lost, 0.5)
    assert found.p == pytest.approx(min(1, 2 * tail), rel=1e-9)
    assert found.difference == pytest.approx(second.mean() - first.mean())


def test_the_interval_is_that_of_scipy():
    rng = np.random.default_rng(1)
    first, second = rng.random(300) < 0.6, rng.random(300) < 0.7
    found = paired.compare(first, second)
    theirs = stats.bootstrap(
        (second.astype(float) - first,), np.mean, n_resamples=10_000, method="percentile", rng=2
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.005)
    assert found.high == pytest.approx(theirs.high, abs=0.005)


def test_questions_of_one_image_are_drawn_together():
    """Ten equal answers for each of 40 images count as 40 answers, not 400."""
    rng = np.random.default_rng(2)
    first, second = rng.random(40) < 0.5, rng.random(40) < 0.6
    single = paired.compare(first, second)
    images = np.repeat(np.arange(40), 10)
    often = paired.compare(np.repeat(first, 10), np.repeat(second, 10), clusters=images)
    assert often.high - often.low == pytest.approx(single.high - single.low, rel=0.1)
    naive = paired.compare(np.repeat(first, 10), np.repeat(second, 10))
    assert naive.high - naive.low < 0.5 * (single.high - single.low)


def test_equal_models_and_bad_input():
    same = paired.compare(np.array([True, False]), np.array([True, False]))
    assert (same.p, same.difference, same.low, same.high) == (1.0, 0, 0, 0)
    with pytest.raises(ValueError, match="Give one answer of each model to every question"):
        paired.compare(np.array([True]), np.array([True, False]))
    with pytest.raises(ValueError, match="Give one answer of each model"):
        paired.compare(np.array([]), np.array([]))
