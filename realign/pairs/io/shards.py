"""Shards on disk: a stage's folder of Parquet files, each there whole or not at all.

A shard is written to a temporary name, brought to the disk and renamed, so a run that is killed
loses the shard in progress and nothing else. What a shard left out lies beside it and is written
first: a shard that is there has its list of bad records.

A shard's footer holds a digest of its rows, and one of the rows that it was made of. A shard is
made again where the latter is not that of the shards before it any more, as `make` does with times;
where new rows equal the old ones, the shards behind stay.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from realign.pairs.stages.base import Bad, Dropped, Row

LEFT_OUT = pa.schema([(n, pa.string()) for n in ("record", "stage", "reason", "detail")])
_ROWS, MADE_OF = b"realign.rows", b"realign.made_of"  # in the footer
_GROUP_BYTES = 1 << 20  # about what is read to get at one row, as a neighbour's image
_KINDS = {"bad": Bad, "dropped": Dropped}


class Shards:
    """The shards of one stage.

    Args:
        folder: where they lie.
        schema: of their rows; needed for writing.
    """

    def __init__(self, folder: Path, schema: pa.Schema | None = None) -> None:
        self.folder = folder
        self.schema = schema

    def file(self, number: int, kind: str = "") -> Path:
        """Where a shard lies; `kind` "bad" or "dropped": where what it left out does."""
        return self.folder / f"{number:05d}{'.' * bool(kind)}{kind}.parquet"

    def done(self) -> list[int]:
        """The numbers of the shards that are there."""
        if not self.folder.exists():
            return []
        names = (re.fullmatch(r"(\d+)\.parquet", file.name) for file in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def read(self, number: int, columns: list[str] | None = None) -> list[Row]:
        """The rows of a shard."""
        return self.table(number, columns).to_pylist()

    def table(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """A shard as Arrow holds it.

        Raises:
            ValueError: when it is damaged.
        """
        return read_table(self.file(number), columns)

    def write(
        self, number: int, rows: list[Row], left_out: Iterable[Bad], made_of: str = ""
    ) -> None:
        """Write a shard, and first what it left out; `made_of` is the digest of its inputs."""
        self.file(number).unlink(missing_ok=True)  # never an old shard beside a new list
        self.write_left_out(number, left_out)
        table = pa.Table.from_pylist(rows, schema=self.schema)
        marks = {_ROWS: _digest_of(table), MADE_OF: made_of}
        write_table(self.file(number), table.replace_schema_metadata(marks))

    def rows_digest(self, number: int) -> str:
        """Digest of the rows of a shard."""
        return self._mark(number, _ROWS)

    def made_of(self, number: int) -> str:
        """Digest of what a shard was made of."""
        return self._mark(number, MADE_OF)

    def _mark(self, number: int, name: bytes) -> str:
        return marks_in(self.file(number)).get(name, b"").decode()

    def write_left_out(self, number: int, left_out: Iterable[Bad]) -> None:
        """Write what a shard left out; a list of an earlier try goes."""
        left_out = list(left_out)
        for kind, cls in _KINDS.items():
            rows = [vars(entry) for entry in left_out if type(entry) is cls]
            if rows:
                write_table(self.file(number, kind), pa.Table.from_pylist(rows, schema=LEFT_OUT))
            else:
                self.file(number, kind).unlink(missing_ok=True)

    def left_out(self, kind: str) -> Iterator[Bad]:
        """What all shards left out, of kind "bad" or "dropped"."""
        for number in self.done():
            yield from self.left_out_of(number, kind)

    def left_out_of(self, number: int, kind: str) -> list[Bad]:
        """What one shard left out."""
        if not (file := self.file(number, kind)).exists():
            return []
        return [_KINDS[kind](**row) for row in read_table(file).to_pylist()]

    def clear_partial(self) -> None:
        """Remove what a killed run was writing."""
        for file in self.folder.glob(".*.partial"):
            file.unlink(missing_ok=True)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all; the same table gives the same bytes."""
    rows = max(1, len(table))
    group = max(1, rows * _GROUP_BYTES // max(_GROUP_BYTES, table.nbytes))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=group, compression="zstd", version="2.6")
    write_bytes(path, sink.getvalue())


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of the work folder.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        return pq.read_table(file, columns=columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file} is damaged ({error}). Remove it and run the same again, which makes it anew."
        ) from error


def marks_in(file: Path) -> dict[bytes, bytes]:
    """What the footer of a Parquet file says; {} where there is none, or a damaged one."""
    try:
        return pq.read_metadata(file).metadata or {}
    except (pa.ArrowInvalid, FileNotFoundError):
        return {}


def digest_of(*parts: str) -> str:
    """Digest of texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _digest_of(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest()


def save_array(path: Path, shape: tuple[int, ...], dtype: type, parts: Iterable[Any]) -> None:
    """Write arrays one below the other as one `.npy` file of `shape`, which can be mapped."""
    header = io.BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    arrays = (np.ascontiguousarray(part, dtype) for part in parts)
    write_bytes(path, header.getvalue(), arrays)


def write_bytes(path: Path, data: bytes | pa.Buffer, rest: Iterable[Any] = ()) -> None:
    """Write a file whole or not at all, `rest` behind `data`, and bring it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # others may write it, too
    try:
        with partial.open("wb") as file:
            file.write(data)
            for part in rest:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left on a disk."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Library:
    """Rows of the read stage by shard and id, at random: one row group is read, not the shard.

    Args:
        folder: of the read stage.
        kept: row groups kept in memory, about a MiB each at most.
    """

    def __init__(self, folder: Path, kept: int = 64) -> None:
        self._shards = Shards(folder)
        self._kept = kept
        self._places: OrderedDict[int, tuple[list[int], dict[str, int]]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], list[Row]] = OrderedDict()

    def rows(self, wanted: Iterable[tuple[int, str]]) -> dict[tuple[int, str], Row]:
        """The rows of (shard, id) pairs, by the pair. Each shard is opened once."""
        found: dict[tuple[int, str], Row] = {}
        by_shard: dict[int, list[str]] = {}
        for shard, name in sorted(set(wanted)):
            by_shard.setdefault(shard, []).append(name)
        for shard, names in by_shard.items():
            with pq.ParquetFile(self._shards.file(shard)) as file:
                starts, places = self._places_of(shard, file)
                for name in names:
                    place = places[name]
                    group = max(g for g, start in enumerate(starts) if start <= place)
                    rows = self._group(shard, group, file)
                    found[shard, name] = rows[place - starts[group]]
        return found

    def _places_of(self, shard: int, file: pq.ParquetFile) -> tuple[list[int], dict[str, int]]:
        """Where each row group of a shard begins, and the place of each id."""
        if shard not in self._places:
            counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            starts = [sum(counts[:g]) for g in range(len(counts))]
            ids = file.read(columns=["id"])["id"].to_pylist()
            self._places[shard] = starts, {name: place for place, name in enumerate(ids)}
            if len(self._places) > 4096:
                self._places.popitem(last=False)
        return self._places[shard]

    def _group(self, shard: int, group: int, file: pq.ParquetFile) -> list[Row]:
        key = shard, group
        if key not in self._groups:
            self._groups[key] = file.read_row_group(group, columns=["id", "images"]).to_pylist()
            if len(self._groups) > self._kept:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]
