"""HallusionBench (arXiv 2310.14566): figures of its leaderboard from right and wrong answers.

Every question has a category (VD: visual dependent, VS: visual supplement), a subcategory, a set, a
figure and a question number. The same question about the figures of a set is a *question pair*, all
questions about one figure belong to that figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realign.evaluate.yesno import RULES

NEEDED = ("category", "subcategory", "set_id", "figure_id", "question_id", "gt_answer")


@dataclass(frozen=True)
class Hallusion:
    """Figures of the leaderboard, shares in [0, 1].

    Attributes:
        question_pair: question pairs of which all answers are right.
        figure: figures of which all answers are right; VS questions without a figure have none.
        easy: questions about the original figure (number 0).
        hard: the question pairs of the changed figures.
        question: all questions.
    """

    question_pair: float
    figure: float
    easy: float
    hard: float
    question: float


def correct(answers: Sequence[str], rows: Sequence[Mapping[str, Any]], rule: str) -> list[bool]:
    """Whether each answer is right: yes where `gt_answer` is 1, no where it is 0.

    The leaderboard has GPT-4 compare an answer with a reference text. A rule of `yesno.RULES` needs
    no model, and its figures are not those of the leaderboard.

    Raises:
        ValueError: for a row that lacks a field, or for a wrong number of answers.
    """
    if len(answers) != len(rows):
        raise ValueError(f"there are {len(answers)} answers to {len(rows)} questions.")
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise ValueError(f"a question has no {', '.join(missing)}; give HallusionBench.json.")
    labels = ["yes" if str(row["gt_answer"]) == "1" else "no" for row in rows]
    return [RULES[rule](a) == label for a, label in zip(answers, labels, strict=True)]


def score(right: Sequence[bool], rows: Sequence[Mapping[str, Any]]) -> Hallusion:
    """Score answers.

    Args:
        right: whether the answer to each question is right.
        rows: the questions of HallusionBench.json.

    Raises:
        ValueError: for no questions.
    """
    if not rows:
        raise ValueError("there are no questions.")

    def all_right(key: Callable, keep: Callable = lambda row: True) -> float:
        groups: dict[tuple, bool] = {}
        for is_right, row in zip(right, rows, strict=True):
            if keep(row):
                name = (row["category"], row["subcategory"], str(row["set_id"]), str(key(row)))
                groups[name] = groups.get(name, True) and bool(is_right)
        return sum(groups.values()) / len(groups) if groups else float("nan")

    def question(row: Mapping) -> Any:
        return row["question_id"]

    def original(row: Mapping) -> bool:
        return str(row["figure_id"]) == "0"

    return Hallusion(
        question_pair=all_right(question),
        figure=all_right(
            lambda row: row["figure_id"], lambda row: row["category"] != "VS" or not original(row)
        ),
        easy=all_right(question, original),
        hard=all_right(question, lambda row: not original(row)),
        question=sum(map(bool, right)) / len(rows),
    )
