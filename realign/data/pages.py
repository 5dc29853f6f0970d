"""Headers of Parquet pages: the true sizes of a column chunk, which the footer may understate.

Arrow reads the sizes of pages from these headers, and believes the footer in all else. The headers
are structs of Thrift's compact protocol (PageHeader in parquet.thrift).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_HEADER = 1 << 20
"""Limit on a header in bytes. It may hold the least and the greatest value of the page."""
_SIZE, _COMPRESSED, _DATA, _DICTIONARY, _DATA_2 = 2, 3, 5, 7, 8
"""Numbers of fields of PageHeader."""
_DELTA_BYTE_ARRAY = 7


@dataclass
class Pages:
    """Totals of the pages of a column chunk.

    Attributes:
        size: bytes of the decompressed pages.
        values: number of values, including nulls.
        dictionary: whether a page holds a dictionary, whose values other pages repeat.
        delta: whether values repeat the beginnings of earlier ones.
    """

    size: int = 0
    values: int = 0
    dictionary: bool = False
    delta: bool = False


def pages_of(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> Pages:
    """Read the headers of a column chunk's pages.

    Raises:
        pa.ArrowInvalid: for headers that are damaged, or too long.
    """
    pages = Pages()
    starts = (chunk.dictionary_page_offset, chunk.data_page_offset)
    place = min((start for start in starts if start), default=0)  # 0: there is no such page
    end = place + chunk.total_compressed_size
    while place < end:
        header, length = _header(file, place)
        data = header.get(_DATA) or header.get(_DATA_2) or {1: 0}
        try:
            sizes = [int(header[_SIZE]), int(header[_COMPRESSED]), int(data[1])]
        except (TypeError, LookupError):
            sizes = [-1]
        if min(sizes) < 0:
            raise pa.ArrowInvalid("the header of a page has no sizes")
        pages.size += sizes[0]
        pages.values += sizes[2]
        pages.dictionary |= _DICTIONARY in header
        pages.delta |= data.get(4 if _DATA_2 in header else 2) == _DELTA_BYTE_ARRAY
        place += length + sizes[1]
    return pages


def _header(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """Fields of the header at a place, and its length."""
    for size in (512, _HEADER):
        try:
            file.seek(place)
            return _struct(file.read(size), 0)
        except (IndexError, RecursionError, OSError, ValueError):  # it is longer, or damaged
            continue
    raise pa.ArrowInvalid("the header of a page is damaged")


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Number of each field -> value, and the place behind the struct. Texts are left out."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        number, at = (number + (head >> 4), at + 1) if head >> 4 else _integer(data, at + 1)
        fields[number], at = _value(data, at, head & 15)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12:
        return _struct(data, at)
    raise pa.ArrowInvalid(f"the header of a page has a field of type {kind}")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise pa.ArrowInvalid("the header of a page has a number of more than 64 bits")
