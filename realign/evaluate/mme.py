"""MME (arXiv 2306.13394): accuracy of questions and of pairs, and the sums of both.

Each image has two questions, one with the answer yes and one with no. The score of a subtask is its
accuracy in percent, plus the percentage of images whose questions are both answered right (acc+).
Perception and cognition are the sums of their subtasks, at most 2,000 and 800.

Rule `authors` is the rule of the benchmark's authors. An answer is yes if its first four letters
contain "yes", and no if they contain "no", so "Now" is no. Rule `word` is VLMEvalKit's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from realign.evaluate import yesno

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
_PREFIX = 4


def _authors(answer: str) -> str | None:
    start = answer.lower()[:_PREFIX]
    return "yes" if "yes" in start else "no" if "no" in start else None


RULES: dict[str, Callable[[str], str | None]] = {"authors": _authors, "word": yesno.RULES["word"]}
"""Name of a rule -> function from an answer to "yes", "no", or None for neither."""


def score(lines: Sequence[Mapping[str, Any]], right: Sequence[float]) -> list[dict[str, Any]]:
    """Scores of the subtasks in the file, and the sums of perception and cognition.

    Args:
        lines: answers with their `category`, and the `pair` of questions that they belong to.
        right: 1 or 0 for each answer.

    Returns:
        Rows with `group`, `questions`, `score` in points, and the shares `accuracy` and `acc+` for
        a subtask. A sum is given only if all its subtasks are in the file.
    """
    pairs: dict[str, dict[str, list[float]]] = {}
    for line, is_right in zip(lines, right, strict=True):
        pairs.setdefault(line["category"], {}).setdefault(line["pair"], []).append(is_right)
    rows = []
    for category, found in pairs.items():
        answers = [is_right for pair in found.values() for is_right in pair]
        accuracy = sum(answers) / len(answers)
        both = sum(map(min, found.values())) / len(found)
        points = 100 * (accuracy + both)
        rows.append(
            {"group": category, "questions": len(answers), "score": points}
            | {"accuracy": accuracy, "acc+": both}
        )
    by_name = {row["group"]: row for row in rows}
    sums = []
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if by_name.keys() >= set(subtasks):
            parts = [by_name[subtask] for subtask in subtasks]
            total = {key: sum(part[key] for part in parts) for key in ("questions", "score")}
            sums.append({"group": name, **total, "accuracy": None, "acc+": None})
    return sums + rows
