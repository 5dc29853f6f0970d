"""Evaluation: answers of a model to questions, and benchmark scores of the answers."""

from realign.evaluate.digits import (
    EVALUATION_SEED,
    Answers,
    EvaluateConfig,
    Rate,
    answer,
    caption,
    evaluate,
    table,
)

__all__ = [
    "EVALUATION_SEED",
    "Answers",
    "EvaluateConfig",
    "Rate",
    "answer",
    "caption",
    "evaluate",
    "table",
]
