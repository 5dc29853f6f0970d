"""HallusionBench (arXiv 2310.14566): figures of its leaderboard from right and wrong answers.

Each question has a category (VD: visual dependent, VS: visual supplement), a subcategory, a set, a
figure and a question number. A *question pair* is the same question about the figures of a set.

On the leaderboard, GPT-4 compares an answer with a reference text. A rule of `yesno.RULES` needs no
model, but its figures cannot be compared with the leaderboard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SET = ("category", "subcategory", "set_id")
"""Fields that identify a set of figures with their questions."""
NEEDED = ("category", "subcategory", "set_id", "figure_id", "question_id", "gt_answer")


@dataclass(frozen=True)
class Hallusion:
    """Figures of the leaderboard, shares in [0, 1].

    Attributes:
        question_pair: share of question pairs with only right answers.
        figure: share of figures with only right answers, without VS questions that have no figure.
        easy: share of questions about the original figure (number 0) that are answered right.
        hard: share of question pairs about changed figures with only right answers.
        question: share of right answers to all questions.
    """

    question_pair: float
    figure: float
    easy: float
    hard: float
    question: float


def score(right: Sequence[bool], rows: Sequence[Mapping[str, Any]]) -> Hallusion:
    """Score answers.

    Args:
        right: whether the answer to each question is right.
        rows: questions of HallusionBench.json.

    Raises:
        ValueError: without questions.
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
