"""Yes/no questions in the manner of POPE (arXiv 2305.10355).

Three rules are in use to read yes or no from an answer, and they give the same answers different
figures, so every figure here carries the name of its rule:

- `pope`: that of POPE's authors, which LLaVA took over. No where the first sentence has the word
  "No", "no" or "not", else yes: an answer that says neither is yes.
- `exact`: that of lmms-eval. The whole answer must be yes or no; another one is wrong.
- `word`: that of VLMEvalKit (without its judge). Yes where "yes" is among the words and "no" is
  not, and the other way round; another one is wrong, and no yes. Words are what white space parts
  when some marks are gone (`_word`): "*", ":" and "'" stay, so that "*No*" is neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # of rule `word`


def _pope(answer: str) -> str:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _exact(answer: str) -> str | None:
    said = answer.strip().lower()
    return said if said in ("yes", "no") else None


def _word(answer: str) -> str | None:
    """A mark that has a space beside it somewhere goes, another one parts words; all go where a
    number has a comma. Of the periods that no digit follows, the first 32 go."""
    text = answer.lower()
    number = re.search(r"\d,\d", text)
    gone = {m: "" if number or f"{m} " in text or f" {m}" in text else " " for m in _MARKS}
    words = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(gone)), count=32).split()
    said = {"yes", "no"} & set(words)
    return said.pop() if len(said) == 1 else None


RULES: dict[str, Callable[[str], str | None]] = {"pope": _pope, "exact": _exact, "word": _word}
"""Name of a rule -> answer -> "yes", "no", or None where it is neither."""


@dataclass(frozen=True)
class YesNo:
    """Figures of answers by one rule, shares in [0, 1].

    Attributes:
        rule: one of `RULES`.
        questions: how many.
        accuracy: right answers; one that is neither yes nor no is wrong.
        precision: of yes; 0 where none was said.
        recall: of yes: 1 - share of "no" among answers to questions whose answer is yes. An answer
            that is neither counts as missed by rule `word`, and not at all by `exact`, as there.
        f1: of precision and recall, 0 where both are.
        yes_rate: share of answers that are yes.
        unread: share of answers that are neither.
    """

    rule: str
    questions: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_rate: float
    unread: float


def score(answers: Sequence[str], labels: Sequence[str], rule: str) -> YesNo:
    """Score answers to yes/no questions.

    Args:
        answers: what the model said.
        labels: "yes" or "no" for each, in any case.
        rule: one of `RULES`.

    Raises:
        ValueError: for another rule or label, no questions, or another number of labels.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    if len(answers) != len(labels) or not labels:
        raise ValueError(f"there are {len(answers)} answers to {len(labels)} questions.")
    true = np.array([_label(label) for label in labels])
    said = np.array([RULES[rule](answer) or "" for answer in answers])
    yes, wanted = said == "yes", true == "yes"
    hits = int((yes & wanted).sum())
    missed = wanted & (said == "no" if rule == "exact" else ~yes)
    precision = hits / max(1, int(yes.sum()))
    recall = hits / max(1, hits + int(missed.sum()))
    both = precision + recall
    return YesNo(
        rule=rule,
        questions=len(true),
        accuracy=float((said == true).mean()),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / both if both else 0.0,
        yes_rate=float(yes.mean()),
        unread=float((said == "").mean()),
    )


def right(answers: Sequence[str], labels: Sequence[str], rule: str) -> np.ndarray:
    """Which answers are right, (questions,) bool, for a paired comparison."""
    read = RULES[rule]
    return np.array([read(a) == _label(b) for a, b in zip(answers, labels, strict=True)])


def _label(label: str) -> str:
    if (found := str(label).strip().lower()) not in ("yes", "no"):
        raise ValueError(f"a label is {label!r}; it must be yes or no.")
    return found
