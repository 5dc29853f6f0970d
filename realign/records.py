"""Preference records: what one is, how they are stored, and the errors they can hold.

A record is a prompt about an image, a chosen and a rejected response, and for objectives with a
visual term the retrieved image. On disk it is a row of Parquet with TRL's vision preference columns
(`prompt`, `chosen`, `rejected` as messages, `images`) plus `retrieved_images`; further columns hold
where the record came from. `datasets.load_dataset("parquet", data_files=...)` reads it.

Optional, for objectives that ask for it: several visual negatives, nearest first, as further
entries of `retrieved_images` (each as many images as the record has), and `retrieved_chosen`, the
response preferred for the retrieved image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PARTS = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
_TYPED_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", _PARTS)]))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_COLUMNS = {
    "id": pa.string(),
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
    "images": _IMAGES,
    "retrieved_images": _IMAGES,
}
_OPTIONAL = {"retrieved_chosen": _MESSAGES}  # written if a record has it
_PROVENANCE = {
    "masked": pa.string(),  # the chosen response with its masked segments as [MASK]
    "masker": pa.string(),  # rules, or the engine that chose the segments
    "neighbour": pa.string(),  # id of the record on whose image the rejected response was completed
    "neighbour_rank": pa.int64(),  # 0 is the nearest image; that of the first that passed
    "similarity": pa.float64(),  # cosine of the two images' embeddings
    "text_similarity": pa.float64(),  # of chosen and rejected, as --similarity measures it
    "visual_margin": pa.float64(),  # log-prob of chosen on its image less that on the negative
    "judge": pa.string(),  # verdicts: whether rejected is true of the image, chosen of the negative
    "negative": pa.string(),  # kind of the visual negative: retrieved, random, crop, noise, blank
    "negative_record": pa.string(),  # id of the record whose image it is, if it is one's
    "answer_model": pa.string(),  # engine that wrote the chosen response, if one did
    "embed_model": pa.string(),
    "refill_model": pa.string(),
    "seed": pa.int64(),
}
_ROW_GROUP = 256  # records; Arrow holds at most 2 GiB of embedded images in one


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
        """Decode to RGB, upright as its EXIF orientation says; transparency is dropped.

        Raises:
            RecordError: when the file is missing or is no readable image; names `record`.
        """
        if self.data is None and self.path is None:
            raise RecordError(
                record,
                "an image has neither bytes nor a path.",
                "Add one of them or remove the record.",
            )
        shown = self.path or f"{len(self.data or b'')} embedded bytes"
        try:
            source = io.BytesIO(self.data) if self.data is not None else self.path
            with Image.open(source) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip it to white or black
                    raise ValueError("16 or 32 bits per pixel; save it with 8")
                return ImageOps.exif_transpose(image).convert("RGB")
        except FileNotFoundError:
            raise RecordError(
                record,
                f"its image {shown} does not exist.",
                "Restore the file or remove the record.",
            ) from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)
            why = "no image format that Pillow knows" if unknown else error
            raise RecordError(
                record,
                f"its image {shown} cannot be read ({why}).",
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
    retrieved_chosen: str = ""  # preferred for the retrieved image; "" where there is none


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
    if (remedy := _CONVERSIONS.get(Path(path).suffix)) and Path(path).is_file():
        raise ValueError(f"{path} is not a Parquet file. {remedy.format(path)}")
    return _read(Path(path), ("prompt", "chosen", "rejected", "images"))


_IMPORT = "Convert its pairs with `python -m realign.pairs import {} --output pairs.parquet`."
_CONVERSIONS = {
    ".json": _IMPORT,
    ".jsonl": _IMPORT,
    ".csv": "Write JSON lines, and convert them with `python -m realign.pairs import`.",
}


def read_sources(path: str | Path) -> list[Record]:
    """Read records without a rejected response, for the pairs pipeline to make one.

    The same format and errors as `read_pairs`; `rejected` is empty.
    """
    return _read(Path(path), ("prompt", "chosen", "images"))


def write_pairs(path: str | Path, records: Iterable[Record], *, typed: bool | None = None) -> int:
    """Write records to one Parquet file, whole or not at all; returns how many.

    The file carries `datasets` metadata, so image columns load as images there.

    Args:
        path: the file.
        records: what to write.
        typed: whether some prompt is in typed parts, where that is known: then `records` is
            written as it comes and never held as a whole, and has no `retrieved_chosen`.
    """
    path, optional = Path(path), {}
    if typed is None:
        records = list(records)
        typed = any(has_parts(record.prompt) for record in records)
        optional = {n: kind for n, kind in _OPTIONAL.items() if any(getattr(r, n) for r in records)}
    columns = _COLUMNS | optional | _PROVENANCE
    columns |= {"prompt": _TYPED_MESSAGES if typed else _MESSAGES}
    features = {name: _feature(kind) for name, kind in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(columns, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count, records = path.with_name(f".{path.name}.partial"), 0, iter(records)
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            while part := list(islice(records, _ROW_GROUP)):
                rows = [_to_row(record, typed) for record in part]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                count += len(part)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return count


def has_parts(prompt: Iterable[dict[str, Any]]) -> bool:
    """Whether the content of some message is in typed parts."""
    return any(not isinstance(message["content"], str) for message in prompt)


def _to_row(record: Record, typed: bool) -> dict[str, Any]:
    prompt = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
        if typed and isinstance(m["content"], str)
        else m
        for m in record.prompt
    ]
    row: dict[str, Any] = {
        "id": record.name,
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": record.chosen}],
        "rejected": [{"role": "assistant", "content": record.rejected}],
        "images": [{"bytes": i.data, "path": i.path} for i in record.images],
        "retrieved_images": [{"bytes": i.data, "path": i.path} for i in record.retrieved_images],
    }
    if record.retrieved_chosen:
        row["retrieved_chosen"] = [{"role": "assistant", "content": record.retrieved_chosen}]
    return row | {name: record.provenance.get(name) for name in _PROVENANCE}


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
    rows: list[dict[str, Any]] = []
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            missing = [column for column in needed if column not in names]
            known = [c for c in (*_COLUMNS, *_OPTIONAL, *_PROVENANCE) if c in names]
            if not missing:
                for batch in parquet.iter_batches(_ROW_GROUP, columns=known):
                    rows += batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file} is not a readable Parquet file ({error}). Pass a file written by "
            "`python -m realign.pairs` or one with TRL's vision preference columns."
        ) from error
    if missing:
        raise ValueError(
            f"{file} lacks the column(s) {', '.join(missing)}. Columns are those of TRL's vision "
            "preference format (prompt, chosen, rejected, images), and retrieved_images for "
            "objectives with a visual term."
        )
    rejected = "rejected" in needed
    return [
        _to_record(row, f"{file.name}:{i}", file.parent, rejected) for i, row in enumerate(rows)
    ]


def _to_record(row: dict[str, Any], place: str, folder: Path, rejected: bool) -> Record:
    name = place if row.get("id") is None else str(row["id"])
    provenance = {key: row[key] for key in _PROVENANCE if row.get(key) is not None}
    images, preferred = _to_images(row["images"], folder, name), row.get("retrieved_chosen")
    if not images:
        raise RecordError(name, "it has no image.", "Add one to `images` or remove the record.")
    return Record(
        name,
        _to_prompt(row["prompt"], name),
        _to_response(row["chosen"], "chosen", name),
        _to_response(row["rejected"], "rejected", name) if rejected else "",
        images,
        _to_images(row.get("retrieved_images"), folder, name),
        provenance,
        _to_response(preferred, "retrieved_chosen", name) if preferred else "",
    )


def _to_prompt(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """The messages of a prompt column: content is text, or text and image parts."""
    if not value:
        raise RecordError(name, "it has no prompt.", "Add one or remove the record.")
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    found = []
    for message in messages:
        content = message["content"] if isinstance(message, dict) else None
        if isinstance(content, list) and all(p["type"] in ("text", "image") for p in content):
            # Parquet gives every part every field; an image part has no text.
            content = [
                {"type": "image"} if p["type"] == "image" else {"type": "text", "text": p["text"]}
                for p in content
            ]
        elif not isinstance(content, str):
            raise RecordError(
                name,
                f"its prompt has the message {message!r}.",
                "Give a role and, as content, text or a list of parts of type text and image.",
            )
        found.append({"role": message["role"], "content": content})
    if not any(_text_of(message["content"]).strip() for message in found):
        raise RecordError(name, "its prompt is empty.", "Write one or remove the record.")
    return tuple(found)


def _text_of(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def _to_response(value: Any, column: str, name: str) -> str:
    """The text of a response column: a string, or messages of which the last is the response."""
    if value and not isinstance(value, str | list):
        raise RecordError(
            name, f"its {column} is {value!r}.", "Give text, or messages with a role and content."
        )
    message = value if isinstance(value, str) or not value else value[-1]["content"]
    if isinstance(value, list) and value and value[-1].get("role", "assistant") != "assistant":
        raise RecordError(
            name, f"its {column} does not end with the assistant.", "Put the response last."
        )
    if isinstance(message, list):
        if any(part.get("type") == "image" for part in message):
            raise RecordError(name, f"its {column} holds an image.", "A response is text.")
        message = _text_of(message)
    if not message or not message.strip():
        raise RecordError(
            name, f"its {column} response is empty.", "Write one or remove the record."
        )
    return message


def _to_images(value: Any, folder: Path, name: str) -> tuple[StoredImage, ...]:
    """The images of a column; none where it is null."""
    images = []
    if value is None:
        return ()
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            raise RecordError(name, "one of its images is null.", "Give it or take it out.")
        if isinstance(item, bytes):
            images.append(StoredImage(item))
        else:
            item = {"path": item} if isinstance(item, str) else item
            data, path = item.get("bytes"), item.get("path")
            if data is None and path is not None:
                path = str((folder / path).absolute())  # good in a file elsewhere, too
            images.append(StoredImage(data, path))
    return tuple(images)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How `datasets` writes a column's type in Parquet metadata, so that images decode."""
    if kind == _IMAGES:
        return {"feature": {"_type": "Image"}, "_type": "List"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": str(kind).replace("double", "float64"), "_type": "Value"}
