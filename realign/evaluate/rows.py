"""Rows of a benchmark's file: Parquet, TSV, CSV, JSON or JSON lines, with their images.

The images inside a Parquet or TSV file are written to the image folder. Their names are digests of
their bytes, so a second run finds them. A row then names its image file, as a row of JSON does.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.errors import short_repr, shorten
from realign.data.images import ImageError, StoredImage
from realign.evaluate.files import Field, check_row, read_rows, read_text
from realign.files import check_folder, write_whole

IMAGE = "image"
"""Name of the column with the image."""
_BATCH = 64  # rows of a Parquet file in memory, with their images
_STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}
"""First bytes of an image -> suffix of its file, for people. Readers look at the bytes."""
_LONGEST_NAME = 64
"""An image column with text of at most this length names the row that has the image, as in the TSV
files of VLMEvalKit."""


def read_table(
    paths: Sequence[str],
    images: str | Path,
    fields: Mapping[str, Field],
    remedy: str,
    limit: int = 0,
    *,
    needs_image: bool = True,
) -> list[dict[str, Any]]:
    """Read the rows of one table, and write its images to a folder.

    Args:
        paths: files of one kind, such as the shards of a Parquet table.
        images: folder of the images. A column `image` with bytes is replaced by a file name in it.
        fields: name of a required column, in lower case with underscores -> `Field`.
        remedy: end of each error message, with the file to give.
        limit: number of rows to return from all files together; 0 returns all.
        needs_image: whether a row without an image is an error.

    Returns:
        Rows by the names of their columns, in lower case. Empty cells and NaN are None.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file without rows, a row with an invalid field, or an invalid image.
    """
    rows: list[dict[str, Any]] = []
    if twice := [
        path for path, times in Counter(map(os.path.realpath, paths)).items() if times > 1
    ]:
        raise ValueError(f"{twice[0]} is given twice. Name each file once.")
    for path in paths:
        kind = Path(path).suffix.lower()
        read = _READERS.get(kind, _json)
        for number, row in enumerate(read(path, remedy), 1):
            place = f"row {number} of {path}"
            named = {_name(column): _cell(value) for column, value in row.items()}
            present = {column: value for column, value in named.items() if value is not None}
            check_row(present, fields, place, remedy)
            named = _with_file(named, Path(images), place, inside=kind in _READERS)
            if needs_image and named[IMAGE] is None:
                raise ValueError(f"{place} has no image. Name the column of the images `{IMAGE}`.")
            rows.append(named)
            if len(rows) == limit:
                return rows
    if not rows:
        raise ValueError(f"{', '.join(paths)} holds no rows. {remedy}")
    return rows


def _name(column: str) -> str:
    """Lower case with underscores: "L2-category" is `l2_category`. Option letters are kept."""
    return column if len(column) == 1 else re.sub(r"[-\s]", "_", column).lower()


def _cell(value: Any) -> Any:
    """None for an empty cell or NaN. A whole number in a column with gaps is a float."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return None if value in ("", "nan", "NaN") else value


def _json(path: str, remedy: str) -> Iterator[dict[str, Any]]:
    yield from read_rows(path, {}, remedy)


def _parquet(path: str, remedy: str) -> Iterator[dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}. Check the name.")
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        why = shorten(str(error))
        raise ValueError(f"{path} is not a readable Parquet file ({why}). {remedy}") from error


def _separated(path: str, remedy: str) -> Iterator[dict[str, Any]]:
    """Rows of a TSV or CSV file. An image may be the index of another row, which has the image."""
    text = read_text(path)
    mark = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    most = csv.field_size_limit(len(text))  # an image is longer than the default limit
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark))
    except csv.Error as error:
        raise ValueError(f"{path} is not a table ({shorten(str(error))}). {remedy}") from None
    finally:
        csv.field_size_limit(most)
    long = {r.get("index"): r[IMAGE] for r in rows if len(r.get(IMAGE) or "") > _LONGEST_NAME}
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} of {path} has too many or too few cells. {remedy}")
        if long and row.get(IMAGE) and len(row[IMAGE]) <= _LONGEST_NAME:
            if row[IMAGE] not in long:
                raise ValueError(
                    f"row {number} of {path} takes the image of row {short_repr(row[IMAGE])}, "
                    f"which this file does not have. {remedy}"
                )
            row[IMAGE] = long[row[IMAGE]]
        yield row


_READERS = {".parquet": _parquet, ".tsv": _separated, ".csv": _separated}
TABLES = tuple(_READERS)
"""Suffixes of tables. Other files are JSON."""


def _with_file(row: dict[str, Any], images: Path, place: str, inside: bool) -> dict[str, Any]:
    """The row with the name of its image file, which is written if it is `inside` the table."""
    image = row.get(IMAGE) or row.get("image_path")  # VLMEvalKit's name for a file
    if isinstance(image, dict):  # the Hub's feature: bytes, or a path
        image = image.get("bytes") or image.get("path")
    # Base64 has no period, and a file name has one.
    if inside and isinstance(image, str) and len(image) > _LONGEST_NAME and "." not in image:
        try:
            image = base64.b64decode(image, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{place}: its image is not base64 ({error}).") from None
    if isinstance(image, bytes):
        image = _write(image, images, place)
    if image is not None and not isinstance(image, str):
        raise ValueError(f"{place}: its image is {short_repr(image)}, not an image or a file name.")
    return row | {IMAGE: image}


def _write(data: bytes, images: Path, place: str) -> str:
    try:
        StoredImage(data=data).size()
    except ImageError as error:
        raise ValueError(f"{place}: its image cannot be read ({error}).") from None
    suffix = next((name for start, name in _STARTS.items() if data.startswith(start)), "image")
    name = f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.{suffix}"
    if not (images / name).is_file():
        check_folder("--image-folder", images)
        images.mkdir(parents=True, exist_ok=True)
        write_whole(images / name, data)
    return name
