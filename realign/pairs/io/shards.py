"""Shards on disk: a folder of Parquet files per stage, each file complete or absent.

A shard is written under a temporary name, synced and renamed. So a killed run loses only the shard
in progress. The records that a shard leaves out are listed in files next to it, which are written
first.

The footer of a shard holds a digest of its rows and a digest of its inputs. A shard is made again
if its inputs digest differs from that of the current input shards, similar to times in `make`. If
the new rows equal the old ones, the shards of later stages stay valid.
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.errors import shorten
from realign.files import open_regular, replacing
from realign.pairs.io.rows import FilteredRecord, InvalidRecord, Row

LEFT_OUT = pa.schema([(n, pa.string()) for n in ("record", "stage", "reason", "detail")])
ROWS_KEY, INPUTS_KEY = b"realign.rows", b"realign.made_of"
"""Keys of the digests in the footer."""
_GROUP_BYTES = 1 << 20
"""Size of a row group, which is the minimum to read for one row."""
_KINDS = {"bad": InvalidRecord, "dropped": FilteredRecord}
"""Suffix of a file of left-out records -> type of its entries."""


class Shards:
    """The shards of one stage.

    Args:
        folder: folder of the stage.
        schema: schema of the rows, required for writing.
    """

    def __init__(self, folder: Path, schema: pa.Schema | None = None) -> None:
        self.folder = folder
        self.schema = schema

    def file(self, number: int, kind: str = "") -> Path:
        """Path of a shard, or with `kind` "bad" or "dropped" of its list of left-out records."""
        return self.folder / f"{number:05d}{'.' * bool(kind)}{kind}.parquet"

    def done(self) -> list[int]:
        """Numbers of the existing shards."""
        if not self.folder.exists():
            return []
        names = (re.fullmatch(r"(\d+)\.parquet", file.name) for file in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def read(self, number: int, columns: list[str] | None = None) -> list[Row]:
        """The rows of a shard."""
        return self.table(number, columns).to_pylist()

    def table(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """A shard as an Arrow table.

        Raises:
            ValueError: when the shard is damaged.
        """
        return read_table(self.file(number), columns)

    def write(
        self, number: int, rows: list[Row], left_out: Iterable[InvalidRecord], inputs: str = ""
    ) -> None:
        """Write the list of left-out records, then the shard. `inputs` is the inputs digest."""
        self.file(number).unlink(missing_ok=True)  # an old shard must not get a new list
        self.write_left_out(number, left_out)
        table = pa.Table.from_pylist(rows, schema=self.schema)
        digests = {ROWS_KEY: _table_digest(table), INPUTS_KEY: inputs}
        write_table(self.file(number), table.replace_schema_metadata(digests))

    def rows_digest(self, number: int) -> str:
        """Digest of the rows of a shard, or "" if the shard is damaged or absent."""
        return footer(self.file(number)).get(ROWS_KEY, b"").decode()

    def inputs_digest(self, number: int) -> str:
        """Digest of the inputs of a shard, or "" if the shard is damaged or absent."""
        return footer(self.file(number)).get(INPUTS_KEY, b"").decode()

    def write_left_out(self, number: int, left_out: Iterable[InvalidRecord]) -> None:
        """Write the lists of left-out records of a shard, and remove lists of an earlier try."""
        left_out = list(left_out)
        for kind, cls in _KINDS.items():
            rows = [vars(entry) for entry in left_out if type(entry) is cls]
            if rows:
                write_table(self.file(number, kind), pa.Table.from_pylist(rows, schema=LEFT_OUT))
            else:
                self.file(number, kind).unlink(missing_ok=True)

    def left_out(self, kind: str) -> Iterator[InvalidRecord]:
        """Yields the left-out records of all shards, of kind "bad" or "dropped"."""
        for number in self.done():
            yield from self.left_out_of(number, kind)

    def left_out_of(self, number: int, kind: str) -> list[InvalidRecord]:
        """The left-out records of one shard, of kind "bad" or "dropped"."""
        if not (file := self.file(number, kind)).exists():
            return []
        return [_KINDS[kind](**row) for row in read_table(file).to_pylist()]

    def clear_partial(self) -> None:
        """Remove temporary files of a killed run."""
        for file in self.folder.glob(".*.partial"):
            file.unlink(missing_ok=True)


class RowLookup:
    """Lookup of rows of the read stage by shard and id. Reads row groups, not whole shards.

    Args:
        folder: folder of the read stage.
        max_groups: number of row groups kept in memory, each about 1 MiB at most.
    """

    def __init__(self, folder: Path, max_groups: int = 64) -> None:
        self._shards = Shards(folder)
        self._group = lru_cache(max_groups)(self._read_group)
        self._places = lru_cache(4096)(self._read_places)

    def rows(self, keys: Iterable[tuple[int, str]]) -> dict[tuple[int, str], Row]:
        """(shard, id) -> row, for the given keys."""
        rows = {}
        for shard, name in sorted(set(keys)):  # sorted by shard, to reuse cached groups
            starts, places = self._places(shard)
            group = bisect_right(starts, places[name]) - 1
            rows[shard, name] = self._group(shard, group)[places[name] - starts[group]]
        return rows

    def _read_places(self, shard: int) -> tuple[list[int], dict[str, int]]:
        """Index of the first row of each row group in a shard, and id -> row index."""
        with parquet_file(self._shards.file(shard)) as file:
            counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ids = file.read(columns=["id"])["id"].to_pylist()
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        return starts, {name: place for place, name in enumerate(ids)}

    def _read_group(self, shard: int, group: int) -> list[Row]:
        with parquet_file(self._shards.file(shard)) as file:
            return file.read_row_group(group, columns=["id", "images"]).to_pylist()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically. The same table gives the same bytes."""
    rows = max(1, len(table))
    group = max(1, rows * _GROUP_BYTES // max(_GROUP_BYTES, table.nbytes))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=group, compression="zstd", version="2.6")
    write_bytes(path, sink.getvalue())


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file of the work folder.

    Raises:
        ValueError: when the file is damaged.
    """
    try:
        with open_regular(file):  # Arrow would wait for a pipe
            return pq.read_table(file, columns=columns, pre_buffer=False)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file} is damaged ({shorten(str(error))}). Remove it and run the same command "
            "again, which writes a new file."
        ) from error


def parquet_file(file: Path) -> pq.ParquetFile:
    """Open a Parquet file of the work folder, which may not be a pipe or a device."""
    with open_regular(file):
        return pq.ParquetFile(file, pre_buffer=False)  # the buffer would keep the whole file


def read_array(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Read an array that `save_array` wrote.

    Raises:
        ValueError: when the file is damaged.
    """
    try:
        with open_regular(file):
            return np.load(file, mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged ({shorten(str(error))}). Remove it and run the same command again."
        ) from error


def footer(file: Path) -> dict[bytes, bytes]:
    """Metadata in the footer of a Parquet file, or {} if the file is damaged or absent."""
    try:
        with open_regular(file):
            return pq.read_metadata(file).metadata or {}
    except (pa.ArrowInvalid, FileNotFoundError):
        return {}


def digest_of(*parts: str) -> str:
    """Digest of several texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _table_digest(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest()


def save_array(path: Path, shape: tuple[int, ...], dtype: type, parts: Iterable[Any]) -> None:
    """Write concatenated arrays as one `.npy` file of `shape`, one part in memory at a time."""
    header = io.BytesIO()
    header_fields = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, header_fields)
    arrays = (np.ascontiguousarray(part, dtype) for part in parts)
    write_bytes(path, header.getvalue(), arrays)


def write_bytes(path: Path, data: bytes | pa.Buffer, more: Iterable[Any] = ()) -> None:
    """Write `data`, then `more`, to a file atomically, and sync it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=True) as file:
        for part in chain([data], more):
            file.write(part)


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
