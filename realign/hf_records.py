"""Preference records from data sets as other trainers take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from realign.pairs.formats import Malformed, Options, of_row
from realign.records import Record, RecordError, StoredImage, read_pairs

Records = str | Path | Sequence[Record] | Iterable[Mapping[str, Any]]
"""Preference records: a Parquet file or folder, `Record`s, a `datasets.Dataset`, or rows of one."""


def records_of(rows: Records) -> list[Record]:
    """Preference records from any of the forms that `Records` names.

    Images of rows are PIL images, bytes, paths, or `{"bytes", "path"}` as `datasets` stores them,
    which are not decoded here.

    Raises:
        RecordError: for a row that is none, with its place.
        FileNotFoundError: when there is nothing at a path.
        ValueError: for an empty set, a streaming one, or several splits.
    """
    if isinstance(rows, str | Path):
        return read_pairs(rows)
    if isinstance(rows, Mapping):
        raise ValueError(f"this is a dictionary of {', '.join(rows)}; give one of its data sets.")
    if hasattr(rows, "with_format") and not hasattr(rows, "__len__"):
        raise ValueError("a streaming data set has no length; load it without streaming=True.")
    if hasattr(rows, "with_format") and rows.format["type"] != "custom":
        # Of `datasets`, without a transform: as it is stored, images not decoded.
        rows = rows.with_format("arrow")[:].to_pylist()
    found = [
        row if isinstance(row, Record) else _record(row, f"row {i}") for i, row in enumerate(rows)
    ]
    if not found:
        raise ValueError("the data set holds no records.")
    return found


def _record(row: Mapping[str, Any], place: str) -> Record:
    try:
        (entry,) = of_row(dict(row), Options())
    except Malformed as error:
        raise RecordError(place, f"it is malformed ({error}).", "Give TRL's columns.") from error
    name = entry.name or place
    for column, text in (("chosen", entry.chosen), ("rejected", entry.rejected)):
        if not (text and text.strip()):
            raise RecordError(name, f"its {column} response is empty.", "Write one or remove it.")
    if not entry.images:
        raise RecordError(name, "it has no image.", "Add one to `images` or remove the record.")
    images, retrieved = (
        tuple(_stored(image, name) for image in group) for group in (entry.images, entry.retrieved)
    )
    prompt = tuple(entry.prompt)
    preferred = entry.retrieved_chosen
    return Record(
        name, prompt, entry.chosen, entry.rejected, images, retrieved, retrieved_chosen=preferred
    )


def _stored(image: Any, name: str) -> StoredImage:
    if isinstance(image, Image.Image):
        return StoredImage.from_pil(ImageOps.exif_transpose(image))
    if isinstance(image, bytes):
        return StoredImage(image)
    if isinstance(image, str | Path):
        return StoredImage(path=str(Path(image).absolute()))
    if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
        return StoredImage(image.get("bytes"), image.get("path"))
    raise RecordError(name, f"it has the image {image!r}.", "Give a PIL image, bytes or a path.")
