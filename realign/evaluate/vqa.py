"""VQA accuracy of short answers, as in TextVQA and VizWiz.

Ten people answered each question. An answer scores min(1, n / 3), where n is the number of people
who gave it. As in the original code, this is the mean over all subsets without one of the people.

Two rules normalize answers before they are compared. Both take away articles and marks, write
numbers up to ten as digits, and restore apostrophes. They are the rules of two public scorers:

- `evalai` is the rule of TextVQA's authors, LLaVA and lmms-eval. It normalizes every answer.
- `vqa` is the rule of VQA's authors. If all people gave the same answer, nothing is normalized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_CONTRACTIONS = Path(__file__).with_name("contractions.txt").read_text().split()
_APOSTROPHES = (
    {  # a contraction that lacks one of its apostrophes -> the contraction
        word[: mark.start()] + word[mark.end() :]: word
        for word in _CONTRACTIONS
        for mark in re.finditer("'", word)
    }
    | {"somebody'd": "somebodyd"}
)


def strip_marks(text: str) -> str:
    """Remove marks or replace them by spaces, as the code of VQA's authors does.

    A mark that is next to a space somewhere is removed. Any other mark becomes a space. If a number
    has a comma, all marks are removed. The first 32 periods without a following digit are removed.
    """
    number = re.search(r"\d,\d", text)
    replaced = {m: "" if number or f"{m} " in text or f" {m}" in text else " " for m in _MARKS}
    return re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(replaced)), count=32)


def _flat(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _words(answer: str) -> str:
    """Lower case, digits instead of numbers, no articles, contractions with apostrophes."""
    words = (_DIGITS.get(word, word) for word in strip_marks(answer).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _evalai(answer: str) -> str:
    lower = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_flat(lower))


def _scored_evalai(answer: str, people: Sequence[str]) -> float:
    return _agreement(_evalai(answer), [_evalai(person) for person in people])


def _scored_vqa(answer: str, people: Sequence[str]) -> float:
    answer, people = _flat(answer), [_flat(person) for person in people]
    if len(set(people)) > 1:
        answer, people = _words(answer), [_words(person) for person in people]
    return _agreement(answer, people)


def _agreement(answer: str, people: Sequence[str]) -> float:
    same = [person == answer for person in people]
    scores = [min(1.0, (sum(same) - left_out) / 3) for left_out in same]
    return sum(scores) / len(scores)


RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "evalai": _scored_evalai,
    "vqa": _scored_vqa,
}
"""Name of a rule -> function from an answer and the answers of people to a score in [0, 1]."""
