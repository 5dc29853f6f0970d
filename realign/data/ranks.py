"""Work of several ranks on one data set: who does it first, and errors of any rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from realign import distributed
from realign.data.errors import RecordError, RecordErrors

T = TypeVar("T")


def raise_anywhere(errors: Sequence[Exception]) -> None:
    """Raise an error of any rank on all ranks: first those that do not belong to a record.

    Every rank must call it.

    Raises:
        OSError, ValueError: the first of the errors. That of a record counts the others.
    """
    records = RecordErrors()
    for error in distributed.gather(errors):
        if not isinstance(error, RecordError):
            raise error
        records.add(error)
    records.check()


def first_on_machine(action: Callable[[], T]) -> T:
    """The result of an action, done by one rank of each machine before the others.

    Raises:
        OSError, ValueError: on all ranks, if any rank raises it.
    """
    outcome: list[T] = []
    errors: list[Exception] = []
    for turn in (True, False):
        if turn == (distributed.local_share()[0] == 0) and not errors:
            try:
                outcome.append(action())
            except (ValueError, OSError) as error:
                errors.append(error)
        raise_anywhere(errors)
    return outcome[0]
