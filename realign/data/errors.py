"""Errors of records: `RecordError` and `Malformed`, and `shown`, which shortens their values."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

_LONGEST = 80  # characters of a value in a message
_NAMED = 3  # further records that a message names


class RecordError(ValueError):
    """A record cannot be used; the message names it and the remedy."""

    def __init__(self, record: str, problem: str, remedy: str) -> None:
        super().__init__(f"record {shown(record)}: {problem} {remedy}")
        self.record = record


class Malformed(ValueError):
    """A row is not of its format, or holds what no reader takes.

    Attributes:
        problem: a sentence about the row, as "its prompt is 3, no text or messages."
        remedy: the next step, as a sentence.
        reason: a word or two, by which `realign.pairs` counts.
    """

    def __init__(self, problem: str, remedy: str, reason: str = "malformed") -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem, self.remedy, self.reason = problem, remedy, reason


class _Shortened(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"{len(value)} bytes"


_SHORTENED = _Shortened()
_SHORTENED.maxstring = _SHORTENED.maxother = _LONGEST
_SHORTENED.maxlist = _SHORTENED.maxtuple = _SHORTENED.maxdict = _SHORTENED.maxlevel = 3


def shown(value: Any) -> str:
    """`repr` of a value for a message, shortened, on one line; bytes are counted."""
    return shortened(" ".join(_SHORTENED.repr(value).split()))


def shortened(text: str) -> str:
    """A text for a message: its beginning and end where it is long, in characters of UTF-8."""
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]}...{text[-_LONGEST:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def one_of(errors: Sequence[RecordError]) -> RecordError:
    """The first of several errors, which also counts and names the others."""
    first, *others = errors
    if others:
        names = ", ".join(shown(error.record) for error in others[:_NAMED])
        more = ", ..." if len(others) > _NAMED else ""
        first.args = (f"{first} {len(others)} more record(s) have errors: {names}{more}.",)
    return first
