"""Tables of benchmark figures, for the terminal and for a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Figures of a benchmark.

    Attributes:
        title: name of the benchmark; empty if the heads are enough.
        heads: heads of the columns.
        rows: rows with one cell per column.
    """

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def grouped(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table of figures with the same keys.

    Args:
        title: title of the table.
        rows: texts, whole numbers and shares in [0, 1] by the head of their column. `score` is in
            points. None is an empty cell.
    """
    heads = tuple(rows[0])

    def cell(name: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if name == "score" else f"{100 * value:.2f} %"
        return "" if value is None else str(value)

    return Table(title, heads, [tuple(cell(name, row[name]) for name in heads) for row in rows])


def tables_of(scores: Mapping[str, Any]) -> list[Table]:
    """The tables of the "scores" in the JSON file of a benchmark, such as pope.json.

    Raises:
        KeyError, TypeError, AttributeError: for other content.
    """
    return [grouped(title, rows) for title, rows in scores["parts"].items()]


def text(table: Table) -> str:
    """The table for a terminal, without its title."""
    widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
    lines = [table.heads, ["-" * width for width in widths], *table.rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(table: Table) -> str:
    """The table in Markdown, with its title, for a model card."""
    lines = [table.heads, ["---"] * len(table.heads), *table.rows]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table.title}:\n\n{shown}" if table.title else shown
