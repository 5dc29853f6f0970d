"""Errors of records: `RecordError`, `Malformed`, and values shortened for their messages."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

_LONGEST = 80  # characters of a value in a message
_NAMED = 3  # further records that a message names


class RecordError(ValueError):
    """A record cannot be used; the message names it and the remedy."""

    def __init__(self, record: str, problem: str, remedy: str) -> None:
        super().__init__(f"record {short_repr(record)}: {problem} {remedy}")
        self.record = record


class Malformed(ValueError):
    """A row, message or chat that is not in its format or cannot be rendered.

    Attributes:
        problem: a sentence about the row, as "its prompt is 3, neither text nor messages."
        remedy: the next step, as a sentence.
        reason: one or two words, under which `realign.pairs` counts the row.
    """

    def __init__(self, problem: str, remedy: str = "", reason: str = "malformed") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem, self.remedy, self.reason = problem, remedy, reason

    def of(self, record: str) -> RecordError:
        """The same error of a named record."""
        return RecordError(record, self.problem, self.remedy)


class _Shortened(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"{len(value)} bytes"


_SHORTENED = _Shortened()
_SHORTENED.maxstring = _SHORTENED.maxother = _LONGEST
_SHORTENED.maxlist = _SHORTENED.maxtuple = _SHORTENED.maxdict = _SHORTENED.maxlevel = 3


def short_repr(value: Any) -> str:
    """`repr` of a value for a message, shortened, on one line; bytes are counted."""
    return shorten(_SHORTENED.repr(value))


def short_error(error: Exception) -> str:
    """An exception of another library for a message: its type and text, shortened, on one line."""
    return shorten(f"{type(error).__name__}: {error}")


def shorten(text: str) -> str:
    """Text for a message, on one line: its beginning and end where it is long, valid as UTF-8."""
    text = " ".join(text.split())
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]}...{text[-_LONGEST:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def one_of(errors: Sequence[RecordError]) -> RecordError:
    """The first of several errors; its message counts and names the later ones."""
    first, *later = errors
    if later:
        names = ", ".join(short_repr(error.record) for error in later[:_NAMED])
        more = ", ..." if len(later) > _NAMED else ""
        first.args = (f"{first} {len(later)} more record(s) have errors: {names}{more}.",)
    return first
