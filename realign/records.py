"""Preference records: what one is, how they are stored, and the errors they can hold.

A record is a prompt about an image, a chosen and a rejected response, and for objectives with a
visual term the retrieved image. On disk it is a row of Parquet with TRL's vision preference columns
(`prompt`, `chosen`, `rejected` as messages, `images`) plus `retrieved_images`; further columns hold
where the record came from. `datasets.load_dataset("parquet", data_files=...)` reads it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_COLUMNS = {
    "id": pa.string(),
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
    "images": _IMAGES,
    "retrieved_images": _IMAGES,
}
_PROVENANCE = {
    "masked": pa.string(),  # the chosen response with its masked segments as [MASK]
    "neighbour_rank": pa.int64(),  # 0 is the nearest image that passed the filters
    "similarity": pa.float64(),  # cosine of the two images' embeddings
    "text_similarity": pa.float64(),  # of chosen and rejected, in [0, 1]
    "embed_model": pa.string(),
    "refill_model": pa.string(),
    "seed": pa.int64(),
}


class RecordError(ValueError):
    """A record cannot be used; the message names it and says what to do."""

    def __init__(self, record: str, problem: str, remedy: str) -> None:
        super().__init__(f"record {record!r}: {problem} {remedy}")
        self.record = record


@dataclass(frozen=True)
class StoredImage:
    """An image as a record holds it: encoded bytes, or a path on this machine."""

    data: bytes | None = None
    path: str | None = None

    @classmethod
    def from_pil(cls, image: Image.Image, path: str | None = None) -> StoredImage:
        """Encode an image as PNG, which loses nothing."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return cls(buffer.getvalue(), path)

    def open(self, record: str) -> Image.Image:
        """Decode to RGB.

        Raises:
            RecordError: when the file is missing or is no readable image; names `record`.
        """
        shown = self.path or f"{len(self.data or b'')} embedded bytes"
        try:
            source = io.BytesIO(self.data) if self.data is not None else self.path
            with Image.open(source) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise RecordError(
                record,
                f"its image {shown} does not exist.",
                "Restore the file or remove the record.",
            ) from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise RecordError(
                record,
                f"its image {shown} cannot be read ({error}).",
                "Replace the image or remove the record.",
            ) from error


@dataclass(frozen=True)
class Record:
    """One preference record."""

    name: str
    prompt: tuple[dict[str, Any], ...]  # messages; content is text or typed parts
    chosen: str
    rejected: str
    images: tuple[StoredImage, ...]
    retrieved_images: tuple[StoredImage, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


def read_pairs(path: str | Path) -> list[Record]:
    """Read the preference records of a Parquet file, or of every Parquet file in a folder.

    Args:
        path: a `.parquet` file or a folder of them, read in the order of their names. Image paths
            inside are relative to that folder.

    Returns:
        The records, in file order. Images are not decoded yet.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
        ValueError: for an empty set or a missing column.
        RecordError: for a record without a response or an image.
    """
    return _read(Path(path), ("prompt", "chosen", "rejected", "images"))


def read_sources(path: str | Path) -> list[Record]:
    """Read records without a rejected response, for the pairs pipeline to make one.

    The same format and errors as `read_pairs`; `rejected` is empty.
    """
    return _read(Path(path), ("prompt", "chosen", "images"))


def write_pairs(path: str | Path, records: Iterable[Record]) -> int:
    """Write records to one Parquet file, whole or not at all; returns how many.

    The file carries `datasets` metadata, so image columns load as images there.
    """
    path = Path(path)
    rows = []
    for record in records:
        row: dict[str, Any] = {
            "id": record.name,
            "prompt": list(record.prompt),
            "chosen": [{"role": "assistant", "content": record.chosen}],
            "rejected": [{"role": "assistant", "content": record.rejected}],
            "images": [{"bytes": i.data, "path": i.path} for i in record.images],
            "retrieved_images": [
                {"bytes": i.data, "path": i.path} for i in record.retrieved_images
            ],
        }
        row.update({name: record.provenance.get(name) for name in _PROVENANCE})
        rows.append(row)
    schema = pa.schema(_COLUMNS | _PROVENANCE, metadata={"huggingface": _datasets_metadata()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)
    partial.replace(path)
    return len(rows)


def _read(path: Path, needed: tuple[str, ...]) -> list[Record]:
    if not path.exists():
        raise FileNotFoundError(
            f"there is nothing at {path}. Name an existing Parquet file or a folder of them; "
            "`python -m realign.pairs` writes preference pairs."
        )
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    records = [record for file in files for record in _read_file(file, needed)]
    if not records:
        raise ValueError(
            f"{path} holds no records. Pass a Parquet file with records, or a folder of such files;"
            " if `python -m realign.pairs` wrote it, look at its counts of dropped records."
        )
    return records


def _read_file(file: Path, needed: tuple[str, ...]) -> list[Record]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file} is not a readable Parquet file ({error}). Pass a file written by "
            "`python -m realign.pairs` or one with TRL's vision preference columns."
        ) from error
    missing = [column for column in needed if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{file} lacks the column(s) {', '.join(missing)}. Columns are those of TRL's vision "
            "preference format (prompt, chosen, rejected, images), and retrieved_images for "
            "objectives with a visual term."
        )
    rejected = "rejected" in needed
    return [_to_record(row, i, file.parent, rejected) for i, row in enumerate(table.to_pylist())]


def _to_record(row: dict[str, Any], index: int, folder: Path, rejected: bool) -> Record:
    name = str(row.get("id") or index)
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise RecordError(name, "it has no prompt.", "Add one or remove the record.")
    provenance = {key: row[key] for key in _PROVENANCE if row.get(key) is not None}
    images = _to_images(row["images"], folder)
    if not images:
        raise RecordError(name, "it has no image.", "Add one to `images` or remove the record.")
    return Record(
        name,
        tuple(prompt),
        _to_response(row["chosen"], "chosen", name),
        _to_response(row["rejected"], "rejected", name) if rejected else "",
        images,
        _to_images(row.get("retrieved_images"), folder),
        provenance,
    )


def _to_response(value: Any, column: str, name: str) -> str:
    """The text of a response column: a string, or messages of which the last is the response."""
    message = value if isinstance(value, str) or not value else value[-1]["content"]
    if isinstance(message, list):
        message = "".join(part.get("text") or "" for part in message)
    if not message or not message.strip():
        raise RecordError(
            name, f"its {column} response is empty.", "Write one or remove the record."
        )
    return message


def _to_images(value: Any, folder: Path) -> tuple[StoredImage, ...]:
    images = []
    for item in value or ():
        item = {"path": item} if isinstance(item, str) else item
        data, path = item.get("bytes"), item.get("path")
        if data is None and path is not None:
            path = str(folder / path)
        images.append(StoredImage(data, path))
    return tuple(images)


def _datasets_metadata() -> str:
    """The feature description `datasets` keeps in Parquet files, so that images decode."""
    message = {
        "feature": {
            "role": {"dtype": "string", "_type": "Value"},
            "content": {"dtype": "string", "_type": "Value"},
        },
        "_type": "List",
    }
    images = {"feature": {"_type": "Image"}, "_type": "List"}
    names = {"string": "string", "int64": "int64", "double": "float64"}
    features: dict[str, Any] = {"id": {"dtype": "string", "_type": "Value"}}
    features |= dict.fromkeys(("prompt", "chosen", "rejected"), message)
    features |= dict.fromkeys(("images", "retrieved_images"), images)
    features |= {k: {"dtype": names[str(t)], "_type": "Value"} for k, t in _PROVENANCE.items()}
    return json.dumps({"info": {"features": features}})
