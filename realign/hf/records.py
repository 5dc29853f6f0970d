"""Preference records from the forms of data sets that trainers accept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.data.errors import Malformed, short_repr
from realign.data.records import Record, iterate_records, read_pairs, records_in
from realign.data.tables import python_rows

_SLICE = 64
"""Rows of a data set in memory at once: 14 MB of images of 110 kB, two in a row."""
Records = str | Path | Sequence[Record] | Iterable[Mapping[str, Any]]
"""Preference records: a file or folder, `Record`s, a `datasets.Dataset`, or rows of one.
A path may be the name of a data set on the Hub."""
_GIVE = "Give a datasets.Dataset, a list of rows (dictionaries), or the path of a Parquet file"


def records_of(rows: Records) -> list[Record]:
    """Preference records from one of the forms of `Records`.

    Images of rows are PIL images, bytes, paths, or `{"bytes", "path"}` as in `datasets`. Encoded
    images are not decoded here.

    Raises:
        RecordError: for an invalid row, with its id or number.
        FileNotFoundError: if a path does not exist.
        ValueError: for an empty or streaming data set, several splits, or another type.
    """
    if isinstance(rows, str | Path):
        return read_pairs(rows)
    if isinstance(rows, Mapping):
        raise ValueError(
            f"the data set is a dictionary of {short_repr(list(rows))}. Give one of its data sets, "
            "datasets.Dataset.from_dict of its columns, or a list of rows."
        )
    if hasattr(rows, "with_format") and not hasattr(rows, "__len__"):
        raise ValueError("a streaming data set has no length. Load it without streaming=True.")
    dataset: Any = rows if hasattr(rows, "with_format") else None
    if dataset is not None and len(dataset) and dataset.format["type"] != "custom":
        return list(stream_rows(dataset))
    listed = list(_listed(rows))
    if not listed:
        raise ValueError(f"the data set holds no records. {_GIVE}.")
    if all(isinstance(row, Record) for row in listed):
        return listed
    if not any(isinstance(row, Mapping | Malformed) for row in listed):
        raise ValueError(
            f"the data set is of type {_kind(rows)}, row 0 of type {_kind(listed[0])}. {_GIVE}: "
            "datasets.Dataset.from_pandas(frame) or frame.to_dict('records') of a data frame, "
            "table.to_pylist() of an Arrow table."
        )
    return records_in(((f"row {place}", row) for place, row in enumerate(listed)))


def stream_rows(dataset: Any, *, skipped: Counter[str] | None = None) -> Iterator[Record]:
    """Yields the preference records of a `datasets.Dataset` without a transform, one by one.

    Rows are read as stored, in slices, also of a shuffled set. Images are not decoded.

    Args:
        dataset: the data set.
        skipped: see `iterate_records`.

    Raises:
        RecordError: after the last record, for an invalid row. See `iterate_records`.
    """
    return iterate_records(_rows(dataset), skipped=skipped)


def _rows(dataset: Any) -> Iterator[tuple[str, Any]]:
    place = 0
    for table in dataset.with_format("arrow").iter(_SLICE):
        for row in python_rows(table):
            yield f"row {place}", row
            place += 1


def _listed(rows: Any) -> Iterator[Any]:
    try:
        return iter(rows)
    except TypeError:
        raise ValueError(f"the data set is of type {_kind(rows)}. {_GIVE}.") from None


def _kind(rows: Any) -> str:
    return f"{type(rows).__module__}.{type(rows).__qualname__}"
