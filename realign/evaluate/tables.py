"""Tables of benchmark figures, for the terminal, a model card or a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from realign.terminal import printable


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


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which file names may contain."""
    return printable(" ".join(text.splitlines()))


def text(table: Table) -> str:
    """The table as aligned columns, without its title, for the terminal."""
    heads, rows = table.heads, [[one_line(cell) for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(table: Table) -> str:
    """The table in Markdown, with its title, for a model card."""
    rows = [map(markdown_text, row) for row in table.rows]
    lines = [table.heads, ["---"] * len(table.heads), *rows]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table.title}:\n\n{shown}" if table.title else shown


def markdown_text(text: str) -> str:
    """Text with the marks of Markdown escaped, on one line."""
    return _MARKS.sub(r"\\\g<0>", one_line(text))


def latex(table: Table, repeated: int = 0) -> str:
    """The table as a LaTeX tabular with the rules of booktabs, without its title.

    Args:
        table: the table. All its texts are escaped.
        repeated: number of leading columns that are left empty where they equal the row above.
            A thin rule separates such groups of rows.
    """
    lines, before = [], None
    for row in table.rows:
        key = row[:repeated]
        if key == before:
            row = ("",) * repeated + row[repeated:]
        elif before is not None:
            lines.append(r"\midrule")
        before = key
        lines.append(_latex_row(row))
    columns = "".join(
        "r" if all(map(_NUMBERS.fullmatch, column)) else "l"
        for column in zip(*table.rows, strict=True)
    )
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _latex_row(table.heads),
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def latex_text(text: str) -> str:
    """Text with the special characters of LaTeX escaped, on one line."""
    text = _LATEX.sub(lambda found: _LATEX_TEXT[found[0]], one_line(text))
    text = re.sub(r"(?<![^\s[])-(?=\d)", "$-$", text)  # a minus sign, not a hyphen
    return re.sub("-(?=-)", "-{}", text)  # two hyphens, not a dash


def _latex_row(cells: tuple[str, ...]) -> str:
    row = " & ".join(map(latex_text, cells))
    # After the end of the row above, [ and * would start an argument.
    return rf"{'{}' if row[:1] in '[*' else ''}{row} \\"


_MARKS = re.compile(r"[\\`*<>|~&]|(?<!\w)_|_(?!\w)|\](?=[(\[])")
"""Marks of Markdown in a name. An underscore inside of a word is none."""

_LATEX_TEXT = {character: f"\\{character}" for character in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_NUMBERS = re.compile(r"[-+<\d., \[\]]*")
_LATEX = re.compile("[" + re.escape("".join(_LATEX_TEXT)) + "]")
