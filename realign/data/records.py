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

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.entries import Names, entry_of, name_of
from realign.data.errors import Malformed, RecordError, one_of, shown
from realign.data.pictures import StoredImage
from realign.data.tables import rows_of

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


def write_pairs(
    path: str | Path,
    records: Iterable[Record],
    *,
    typed: bool | None = None,
    preferred: bool = False,
) -> int:
    """Write records to one Parquet file, whole or not at all; returns how many.

    The file carries `datasets` metadata, so image columns load as images there.

    Args:
        path: the file.
        records: what to write.
        typed: whether some prompt is in typed parts, where that is known: then `records` is
            written as it comes and never held as a whole.
        preferred: whether some record has `retrieved_chosen`; read only where `typed` is known.
    """
    path = Path(path)
    if typed is None:
        records = list(records)
        typed = any(has_parts(record.prompt) for record in records)
        preferred = any(record.retrieved_chosen for record in records)
    columns = _COLUMNS | (_OPTIONAL if preferred else {}) | _PROVENANCE
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
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is nothing at {shown(str(path))}. Name an existing Parquet file or a folder of "
            "them; `python -m realign.pairs` writes preference pairs."
        )
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent

    def placed(image: StoredImage) -> StoredImage:
        if image.data is not None:
            return image
        return StoredImage(path=str((folder / image.path).absolute()))  # good in a file elsewhere

    rows = rows_of(files, needed, tuple(_PROVENANCE))
    records = records_in(rows, placed, rejected="rejected" in needed)
    if not records:
        raise ValueError(
            f"{path} holds no records. Pass a Parquet file with records, or a folder of such files;"
            " if `python -m realign.pairs` wrote it, look at its counts of dropped records."
        )
    return records


def records_in(
    rows: Iterable[tuple[str, Mapping[str, Any] | Malformed]],
    placed: Callable[[StoredImage], StoredImage],
    *,
    rejected: bool = True,
) -> list[Record]:
    """Records of rows; a row without an id is named by its place, and names are made unique.

    Args:
        rows: (place, row).
        placed: finds the file of an image.
        rejected: whether a record needs a rejected response.

    Raises:
        RecordError: for a row that is no record; it counts the others.
    """
    names, found, errors = Names(), [], []
    for place, row in rows:
        name = place
        try:
            if isinstance(row, Malformed):
                raise row
            if not isinstance(row, Mapping):
                raise Malformed(f"it is {shown(row)}, no dictionary.", "Give columns and values.")
            name = names.unique(name_of(row) or place)
            found.append(_record(name, row, placed, rejected))
        except Malformed as error:
            errors.append(RecordError(name, error.problem, error.remedy))
    if errors:
        raise one_of(errors)
    return found


def _record(
    name: str,
    row: Mapping[str, Any],
    placed: Callable[[StoredImage], StoredImage],
    rejected: bool,
) -> Record:
    entry = entry_of(row)
    responses = {"chosen": entry.chosen}
    responses |= {"rejected": entry.rejected} if rejected else {}
    responses |= {"retrieved_chosen": text} if (text := entry.retrieved_chosen) else {}
    for column, text in responses.items():
        if not (text and text.strip()):
            raise Malformed(f"its {column} response is empty.", "Write one or remove the record.")
    if not entry.images:
        raise Malformed("it has no image.", "Add one to `images` or remove the record.")
    return Record(
        name,
        tuple(entry.prompt),
        entry.chosen,
        entry.rejected if rejected else "",
        tuple(map(placed, entry.images)),
        tuple(map(placed, entry.retrieved)),
        {key: row[key] for key in _PROVENANCE if row.get(key) is not None},
        entry.retrieved_chosen,
    )


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How `datasets` writes a column's type in Parquet metadata, so that images decode."""
    if kind == _IMAGES:
        return {"feature": {"_type": "Image"}, "_type": "List"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": str(kind).replace("double", "float64"), "_type": "Value"}
