"""Batched reader for rows of Parquet files and of the Arrow files that `datasets` saves.

The files may come from strangers. A file of 100 kB can hold gigabytes of zeros, since Parquet
compresses and repeats values. So the sizes of decoded values are limited before Python objects are
made (`weight`), by the size of the files (`MAX_RATIO`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from realign.data.columns import COLUMNS, SOURCES, may_change, names_media
from realign.data.errors import Malformed, shorten
from realign.data.pages import pages_of
from realign.files import open_regular

MAX_RATIO = 16
"""Limit on the decoded size of files, as a multiple of their size. Images barely compress. So a
file may still repeat each image in 16 rows."""
SMALL = 256 << 20
"""Decoded size that files of any size may have, in bytes."""
_BATCH = 1024
"""Rows decoded at once. For each batch Arrow builds its dictionaries again, which takes longer than
the decoding for batches of 32 short rows."""
_BATCH_BYTES = 64 << 20
"""Decoded bytes in memory at once. A single row may have more."""
_OBJECT = 32
"""Least size of a Python object in bytes. 400,000 rows of short texts are `SMALL`."""
_DICTIONARY = 2
"""Type of a message that holds a dictionary (Arrow's Message.fbs)."""


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
        ValueError: for a file that cannot be read, lacks a column, or decodes to much more than
            its size.
    """
    most = used = 0
    for file in files:
        place = 0
        with _readable(file):
            with open_regular(file) as opened:  # Arrow would wait for a pipe
                most += opened.seek(0, 2) * MAX_RATIO
            for batch in _batches(file, needed, {*COLUMNS, *more}, max(most, SMALL)):
                for piece, size in pieces(batch):
                    used += size
                    if used > max(most, SMALL):
                        raise _too_large(file)
                    for row in python_rows(piece):
                        yield f"{file.name}:{place}", row
                        place += 1


def columns_of(file: Path) -> list[str]:
    """The names of a file's columns, except those of type null.

    Raises:
        ValueError: for a file that cannot be read.
    """
    with _readable(file):
        with open_regular(file):
            pass
        if _kind(file) == "Arrow":
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                schema = stream.schema
        else:
            schema = pq.read_schema(file)
    return [field.name for field in schema if not pa.types.is_null(field.type)]


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is not a readable {_kind(file)} file ({shorten(str(error))}). Pass "
            "Parquet files, as `python -m realign.pairs` writes them, or a folder that "
            "`datasets` saved with save_to_disk."
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


def weight(array: pa.Array) -> int:
    """Size of the Python objects of an array in bytes, from below. It is computed without them.

    Raises:
        pa.ArrowInvalid: for a type that needs no bytes for its repetitions, such as run-end
            encoding.
    """
    kind = array.type
    size = _OBJECT * len(array)
    if isinstance(array, pa.ExtensionArray):
        return weight(array.storage)
    if pa.types.is_struct(kind):
        return size + sum(map(weight, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return size + weight(array.flatten())
    if pa.types.is_dictionary(kind):
        if not pa.types.is_nested(kind.value_type):
            lengths = _lengths(array.dictionary)
            return size + (lengths.take(array.indices).sum().as_py() or 0)
    elif not pa.types.is_nested(kind) and not pa.types.is_run_end_encoded(kind):
        return size + (_lengths(array).sum().as_py() or 0)
    raise pa.ArrowInvalid(f"values of type {kind} are not supported")


def _lengths(array: pa.Array) -> pa.Array:
    """The length in bytes of each text or binary value; 0 for the values of other types."""
    kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32)  # 4 per value, the first is the length
        return pa.array(views[::4][array.offset : array.offset + len(array)], pa.int64())
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    if any(is_kind(kind) for is_kind in (*texts, pa.types.is_large_binary)):
        return pc.call_function("binary_length", [array]).cast(pa.int64())
    if pa.types.is_fixed_size_binary(kind):
        valid = array.is_valid().cast(pa.int64())
        return pc.call_function("multiply", [valid, pa.scalar(kind.byte_width)])
    return pa.nulls(len(array), pa.int64())


def pieces(batch: pa.RecordBatch) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Slices of a batch with their weights: at most `_BATCH_BYTES`, or a single row."""
    size = sum(map(weight, batch.columns))
    if size <= _BATCH_BYTES or batch.num_rows == 1:
        yield batch, size
        return
    half = batch.num_rows // 2
    yield from pieces(batch.slice(0, half))
    yield from pieces(batch.slice(half))


def _too_large(file: Path) -> ValueError:
    return ValueError(
        f"{file} decodes to more than {MAX_RATIO} times its size and {SMALL >> 20} MiB, like a "
        "file made to exhaust the memory. If its source is trusted, write it again without "
        "compression (pyarrow.parquet.write_table(table, file, compression='none', "
        "use_dictionary=False)), or keep its images as files."
    )


def _kind(file: Path) -> str:
    return "Arrow" if file.suffix == ".arrow" else "Parquet"


def _batches(
    file: Path, needed: Sequence[str], readable: set[str], most: int
) -> Iterator[pa.RecordBatch]:
    if _kind(file) == "Arrow":
        _check_plain(file)
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            columns = _columns(stream.schema.names, file, needed, readable)
            for batch in stream:
                batch.validate(full=True)  # offsets may point out of the file
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.select(columns).slice(start, _BATCH)
        return
    with pq.ParquetFile(file) as parquet:
        columns = _columns(parquet.schema_arrow.names, file, needed, readable)
        sizes, repeating = _decoded_sizes(parquet.metadata, columns, most, file)
    # With pre_buffer, Arrow keeps every column chunk that it has read: the whole file.
    with pq.ParquetFile(file, read_dictionary=repeating, pre_buffer=False) as parquet:
        for group, size in enumerate(sizes):
            rows = max(1, parquet.metadata.row_group(group).num_rows)
            count = max(1, min(_BATCH, _BATCH_BYTES * rows // max(1, size)))
            yield from parquet.iter_batches(count, row_groups=[group], columns=columns)


def _decoded_sizes(
    metadata: pq.FileMetaData, columns: Sequence[str], most: int, file: Path
) -> tuple[list[int], list[str]]:
    """Size of each row group without repetitions, and columns that may repeat long values.

    A value that Parquet's dictionary holds once may be repeated in every row. For these columns,
    Arrow is asked to keep the dictionary, so that `weight` counts before values are copied.

    Raises:
        ValueError: for sizes above `most`.
    """
    sizes, repeating = [], set()
    with open_regular(file) as opened:
        for number in range(metadata.num_row_groups):
            group, size = metadata.row_group(number), 0
            for place, chunk in enumerate(map(group.column, range(group.num_columns))):
                if chunk.path_in_schema.partition(".")[0] not in columns:
                    continue
                pages = pages_of(opened, chunk)
                size += pages.size + _OBJECT * pages.values
                if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY":  # also of a dictionary
                    size += metadata.schema.column(place).length * pages.values
                if pages.size * pages.values <= SMALL:
                    continue
                if pages.delta:
                    raise _too_large(file)
                if pages.dictionary and chunk.physical_type == "BYTE_ARRAY":
                    repeating.add(chunk.path_in_schema)
            sizes.append(size)
            if sum(sizes) > most:
                raise _too_large(file)
    return sizes, sorted(repeating)


def _check_plain(file: Path) -> None:
    """Refuse an Arrow file with compressed buffers, which `datasets` does not write.

    Arrow allocates the size that a buffer names, before anything can be checked.

    Raises:
        ValueError: for compressed buffers.
    """
    with pa.memory_map(str(file)) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type != "schema" and _is_compressed(message.metadata.to_pybytes()):
                raise ValueError(
                    f"{file} has compressed buffers, and only plain ones are read. Save it with "
                    "`datasets`, or as Parquet."
                )


def _is_compressed(message: bytes) -> bool:
    """Whether the message of a batch or dictionary names a compression (Arrow's Message.fbs)."""

    def field(table: int, number: int) -> int:
        """Place of a field of a FlatBuffers table, or 0 if the table omits the field."""
        vtable = table - struct.unpack_from("<i", message, table)[0]
        if vtable < 0 or 4 + 2 * number >= struct.unpack_from("<H", message, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", message, vtable + 4 + 2 * number)[0]
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + struct.unpack_from("<I", message, place)[0]

    try:
        root = follow(0)
        header = follow(field(root, 2))
        if message[field(root, 1)] == _DICTIONARY:
            header = follow(field(header, 1))
        return bool(field(header, 3))
    except (struct.error, IndexError):
        raise pa.ArrowInvalid("a message is damaged") from None


def _columns(names: list[str], file: Path, needed: Sequence[str], readable: set[str]) -> list[str]:
    if missing := [column for column in needed if not set(SOURCES[column]) & set(names)]:
        remedy = f" `python -m realign.pairs --data {file}` makes rejected responses."
        raise ValueError(
            f"{file} lacks the column(s) {', '.join(missing)}. The format is TRL's vision "
            "preference format (prompt, chosen, rejected, images), with retrieved_images for "
            f"objectives with a visual term. The file has {shorten(', '.join(names))}."
            + remedy
            * (missing == ["rejected"])
        )
    columns = [n for n in names if n in readable or may_change(n) or names_media(n)]
    if duplicates := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{file} has {duplicates[0]!r} as two columns. Keep one of them.")
    return columns
