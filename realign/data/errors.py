"""Record errors, `RecordError` and `Malformed`, and shortened values for their messages."""

from __future__ import annotations

import reprlib
from typing import Any

from realign.terminal import printable

_LONGEST = 80  # characters of a value in a message
_NAMED = 3  # further invalid records named in a message


class RecordError(ValueError):
    """An invalid record. The message names the record, the problem and the remedy."""

    def __init__(self, record: str, problem: str, remedy: str) -> None:
        super().__init__(f"record {short_repr(record)}: {problem} {remedy}")
        self.record = record

    def __reduce__(self) -> tuple[Any, ...]:
        """Ranks exchange errors, with messages that were completed later."""
        return _record_error, (self.record, self.args)


def _record_error(record: str, args: tuple[Any, ...]) -> RecordError:
    error = RecordError(record, "", "")
    error.args = args
    return error


class Malformed(ValueError):
    """A row, message or chat that does not follow its format or cannot be rendered.

    Attributes:
        problem: a sentence about the row, such as "its prompt is 3, neither text nor messages."
        remedy: a sentence with the next step for the user.
        reason: one or two words. `realign.pairs` counts invalid rows by reason.
    """

    def __init__(self, problem: str, remedy: str = "", reason: str = "malformed") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem, self.remedy, self.reason = problem, remedy, reason

    def of(self, record: str) -> RecordError:
        """Returns the same error with the name of its record."""
        return RecordError(record, self.problem, self.remedy)


class Skipped(Malformed):
    """A valid row that gives no record, such as one with equal ratings. Readers count it."""


class _Shortened(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"{len(value)} bytes"


_SHORTENED = _Shortened()
_SHORTENED.maxstring = _SHORTENED.maxother = _LONGEST
_SHORTENED.maxlist = _SHORTENED.maxtuple = _SHORTENED.maxdict = _SHORTENED.maxlevel = 3


def short_repr(value: Any) -> str:
    """The `repr` of a value, shortened to one line. Bytes are shown as their number."""
    return shorten(_SHORTENED.repr(value))


def short_error(error: Exception) -> str:
    """Type and text of another library's exception, shortened to one line."""
    return shorten(f"{type(error).__name__}: {error}")


def shorten(text: str) -> str:
    """Printable text on one line. Only the beginning and end of a long text are kept."""
    ends = [text] if len(text) <= 8 * _LONGEST else [text[: 4 * _LONGEST], text[-4 * _LONGEST :]]
    ends = [" ".join(end.split()) for end in ends]  # cut before, since a text may have megabytes
    if len(ends) == 2 or len(ends[0]) > 2 * _LONGEST:
        ends = [f"{ends[0][:_LONGEST]}...{ends[-1][-_LONGEST:]}"]
    return printable(ends[0])


class RecordErrors:
    """Collects errors of records: the first one, and the number and first names of the others."""

    def __init__(self) -> None:
        self._first: RecordError | None = None
        self._names: list[str] = []
        self._later = 0

    def add(self, error: RecordError) -> None:
        if self._first is None:
            self._first = error
            return
        self._later += 1
        if self._later <= _NAMED:
            self._names.append(short_repr(error.record))

    def check(self) -> None:
        """Raise the first error, if there is one. Its message counts the others."""
        if self._first is None:
            return
        if self._later:
            names = ", ".join(self._names) + (", ..." if self._later > _NAMED else "")
            self._first.args = (
                f"{self._first} {self._later} more record(s) have errors: {names}.",
            )
        raise self._first
