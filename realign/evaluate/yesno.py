"""Scores of yes/no questions as in POPE (arXiv 2305.10355).

Three rules read yes or no from an answer. They give different figures for the same answers, so
each figure is labelled with its rule:

- `pope` is the rule of POPE's authors and of LLaVA. The answer is no if the first sentence has the
  word "No", "no" or "not". Any other answer is yes.
- `exact` is the rule of lmms-eval. The complete answer must be yes or no. Other answers are wrong.
- `word` is the rule of VLMEvalKit, without its judge. The answer is yes if it has the word "yes",
  but not "no", and no in the opposite case. Other answers are wrong and do not count as yes. White
  space separates words after some marks are removed (`vqa.strip_marks`). The marks "*", ":" and "'"
  are kept, so "*No*" is neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from realign.evaluate.vqa import strip_marks


def _pope(answer: str) -> str:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _exact(answer: str) -> str | None:
    verdict = answer.strip().lower()
    return verdict if verdict in ("yes", "no") else None


def _word(answer: str) -> str | None:
    """Rule `word`: strip the marks as in VQA accuracy, then look for the words yes and no."""
    verdicts = {"yes", "no"} & set(strip_marks(answer.lower()).split())
    return verdicts.pop() if len(verdicts) == 1 else None


RULES: dict[str, Callable[[str], str | None]] = {"pope": _pope, "exact": _exact, "word": _word}
"""Name of a rule -> function from an answer to "yes", "no", or None for neither."""


@dataclass(frozen=True)
class YesNo:
    """Figures of answers by one rule, shares in [0, 1].

    Attributes:
        rule: one of `RULES`.
        questions: number of questions.
        accuracy: share of right answers. An answer that is neither yes nor no is wrong.
        precision: precision of yes; 0 if no answer is yes.
        recall: recall of yes: 1 - share of "no" among answers to questions whose answer is yes. An
            answer that is neither counts as missed under `word`, and is left out under `exact`, as
            in the originals.
        f1: harmonic mean of precision and recall; 0 if both are 0.
        yes_rate: share of answers that are yes.
        unread: share of answers that are neither yes nor no.
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
        answers: answers of the model.
        labels: "yes" or "no" for each answer, in upper or lower case.
        rule: one of `RULES`.

    Raises:
        ValueError: for an unknown rule or label, a wrong number of labels, or without questions.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    if len(answers) != len(labels) or not labels:
        raise ValueError(f"there are {len(answers)} answers to {len(labels)} questions.")
    true = np.array([_label(label) for label in labels])
    verdicts = np.array([RULES[rule](answer) or "" for answer in answers])
    yes, positive = verdicts == "yes", true == "yes"
    true_yes = int((yes & positive).sum())
    false_no = positive & (verdicts == "no" if rule == "exact" else ~yes)
    precision = true_yes / max(1, int(yes.sum()))
    recall = true_yes / max(1, true_yes + int(false_no.sum()))
    total = precision + recall
    return YesNo(
        rule=rule,
        questions=len(true),
        accuracy=float((verdicts == true).mean()),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / total if total else 0.0,
        yes_rate=float(yes.mean()),
        unread=float((verdicts == "").mean()),
    )


def _label(label: str) -> str:
    if (normalized := str(label).strip().lower()) not in ("yes", "no"):
        raise ValueError(f"a label is {label!r}; it must be yes or no.")
    return normalized
