"""Tables of benchmark figures, for the terminal and for a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from realign.evaluate.chair import Chair
from realign.evaluate.hallusionbench import Hallusion
from realign.evaluate.yesno import YesNo

OWN = "Re-Align's own list of synonyms, not that of published figures"


class Table(NamedTuple):
    """Figures of a benchmark.

    Attributes:
        title: name of the benchmark and rule; empty if the heads are enough.
        heads: heads of the columns.
        rows: rows with one cell per column.
    """

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def pope(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Table of POPE from file -> rule -> fields of `YesNo`."""
    rows = []
    for file, rules in scores.items():
        for f in (YesNo(**figures) for figures in rules.values()):
            shares = (f.accuracy, f.f1, f.precision, f.recall, f.yes_rate, f.unread)
            rows.append((file, f.rule, str(f.questions), *map(_percent, shares)))
    heads = ("file", "rule", "questions", "accuracy", "F1", "precision", "recall", "yes", "neither")
    return Table("POPE, by each rule for reading yes and no", heads, rows)


def chair(scores: Mapping[str, Any]) -> Table:
    """Table of CHAIR from the fields of `Chair` and `synonyms`, a file or `OWN`."""
    f = Chair(**{name: value for name, value in scores.items() if name != "synonyms"})
    shares = map(_percent, (f.chair_s, f.chair_i, f.recall))
    heads = ("captions", "mentions", "CHAIR-s", "CHAIR-i", "recall")
    title = (
        f"CHAIR, objects by {Path(scores['synonyms']).name}"  # without the folder, which is private
    )
    return Table(title, heads, [(str(f.captions), str(f.mentions), *shares)])


def hallusionbench(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Table of HallusionBench from rule -> fields of `Hallusion`."""
    rows = [
        (rule, *map(_percent, asdict(Hallusion(**figures)).values()))
        for rule, figures in scores.items()
    ]
    heads = ("rule", "question pair", "figure", "easy", "hard", "all questions")
    return Table("HallusionBench, scored by rules instead of the leaderboard's judge", heads, rows)


def table_of(scores: Mapping[str, Any]) -> Table:
    """The table of the "scores" in pope.json, chair.json or hallusionbench.json.

    Raises:
        TypeError: for unknown fields of the figures.
    """
    if "chair_s" in scores:
        return chair(scores)
    if all("question_pair" in figures for figures in scores.values()):
        return hallusionbench(scores)
    return pope(scores)


def markdown(table: Table) -> str:
    """The table in Markdown, with its title, for a model card."""
    lines = [table.heads, ["---"] * len(table.heads), *table.rows]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table.title}:\n\n{shown}" if table.title else shown


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"
