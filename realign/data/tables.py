"""Batched reader for rows of Parquet files and of the Arrow files that `datasets` saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.entries import COLUMNS, SOURCES
from realign.data.errors import Malformed

_BATCH = 32  # rows in memory at once, few because images may be large


def rows_of(
    files: Sequence[Path], needed: Sequence[str], more: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
    """Yields (place, row) for every row, with the columns that `entry_of` reads.

    Args:
        files: files to read. `.arrow` files are Arrow, all others are Parquet.
        needed: keys of `SOURCES`. Each file must have a column for every one.
        more: further columns, read from the files that have them.

    Returns:
        The place, as file name and row number, and the row as an object. A row with values that
        Python cannot represent is a `Malformed`.

    Raises:
        ValueError: for a file that cannot be read or lacks a column.
    """
    for file in files:
        place = 0
        try:
            for batch in _batches(file, needed, {*COLUMNS, *more}):
                for row in python_rows(batch):
                    yield f"{file.name}:{place}", row
                    place += 1
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is not a readable {_kind(file)} file ({error}). Pass Parquet files, as "
                "`python -m realign.pairs` writes them, or a folder that `datasets` saved with "
                "save_to_disk."
            ) from error


def python_rows(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | Malformed]:
    """The rows of a batch as objects. A row that Python cannot represent is a `Malformed`."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
        if batch.num_rows > 1:
            for row in range(batch.num_rows):
                yield from python_rows(batch.slice(row, 1))
        else:
            yield Malformed(f"it cannot be decoded ({error}).", "Write its text as UTF-8.")


def _kind(file: Path) -> str:
    return "Arrow" if file.suffix == ".arrow" else "Parquet"


def _batches(file: Path, needed: Sequence[str], readable: set[str]) -> Iterator[pa.RecordBatch]:
    if _kind(file) == "Arrow":
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            columns = _columns(stream.schema.names, file, needed, readable)
            for batch in stream:
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.select(columns).slice(start, _BATCH)
    else:
        with pq.ParquetFile(file) as parquet:
            columns = _columns(parquet.schema_arrow.names, file, needed, readable)
            yield from parquet.iter_batches(_BATCH, columns=columns)


def _columns(names: list[str], file: Path, needed: Sequence[str], readable: set[str]) -> list[str]:
    if missing := [column for column in needed if not set(SOURCES[column]) & set(names)]:
        raise ValueError(
            f"{file} lacks the column(s) {', '.join(missing)}. The format is TRL's vision "
            "preference format (prompt, chosen, rejected, images), with retrieved_images for "
            f"objectives with a visual term. The file has {', '.join(names)}."
        )
    columns = [name for name in names if name in readable]
    if duplicates := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{file} has {duplicates[0]!r} as two columns. Keep one of them.")
    return columns
