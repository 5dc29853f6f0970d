"""Preference records: fields, Parquet format, reader and writer.

A record has a prompt about an image, a chosen response and a rejected response. Objectives with a
visual term also need the retrieved image. On disk, a record is a Parquet row with TRL's vision
preference columns (`prompt`, `chosen`, `rejected` as messages, `images`) and `retrieved_images`.
Further columns hold the provenance. `datasets.load_dataset("parquet", data_files=...)` reads it.

Some objectives read optional fields. `retrieved_images` may hold several visual negatives, nearest
first, each with as many images as the record. `retrieved_chosen` is the response preferred for the
retrieved image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.entries import Names, entry_of, name_of
from realign.data.errors import Malformed, RecordErrors, short_repr
from realign.data.errors import RecordError as RecordError
from realign.data.images import DataFolder, ImageError, StoredImage
from realign.data.tables import rows_of
from realign.files import replacing

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
PROVENANCE = {
    "masked": pa.string(),  # The chosen response, with [MASK] for its masked segments.
    "masker": pa.string(),  # "rules", or the engine that listed the segments.
    "neighbour": pa.string(),  # Id of the record whose image the completion was written for.
    "neighbour_rank": pa.int64(),  # Rank of that image; 0 is the nearest.
    "similarity": pa.float64(),  # Cosine of the embeddings of the two images.
    "text_similarity": pa.float64(),  # Similarity of chosen and rejected, as set by --similarity.
    "visual_margin": pa.float64(),  # Log-prob of chosen on its image minus that on the negative.
    "judge": pa.string(),  # Verdicts: is rejected true of the image, and chosen of the negative?
    "negative": pa.string(),  # Visual negative: retrieved, random, crop, noise or blank.
    "negative_record": pa.string(),  # Id of the record of a retrieved or random negative.
    "answer_model": pa.string(),  # Engine that wrote the chosen response, if any.
    "embed_model": pa.string(),
    "refill_model": pa.string(),
    "seed": pa.int64(),
}
_ROW_GROUP = 256  # records; Arrow limits the embedded images of a row group to 2 GiB


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
    retrieved_chosen: str = ""  # response preferred for the retrieved image, if any


IMAGE_FOLDER = "--image-folder FOLDER, or image_folder of `read_pairs`"
"""The settings that name the folder of the images, for errors."""
_IMPORT = "Convert its pairs with `python -m realign.pairs import {} --output pairs.parquet`."
_CONVERSIONS = {
    ".json": _IMPORT,
    ".jsonl": _IMPORT,
    ".csv": "Write JSON lines, and convert them with `python -m realign.pairs import`.",
}


def read_pairs(path: str | Path, image_folder: str | Path | None = None) -> list[Record]:
    """Read the preference records of a Parquet file, or of every Parquet file in a folder.

    Args:
        path: a `.parquet` file, or a folder of them that is read in the order of file names.
        image_folder: folder that contains the images and that relative image paths start at. None
            means the folder of the file. Files of strangers may name any image of this machine.

    Returns:
        The records, in file order. Their images are not decoded.

    Raises:
        FileNotFoundError: when `path` does not exist.
        ValueError: for an empty data set, a missing column, or a file that decodes to much more
            than its size.
        RecordError: for a record without a response or an image, or with an image outside the
            folder.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is nothing at {short_repr(str(path))}. Pass an existing Parquet file, or a "
            "folder of them. `python -m realign.pairs` writes preference pairs."
        )
    if path.is_file() and (remedy := _CONVERSIONS.get(path.suffix)):
        raise ValueError(f"{path} is not a Parquet file. {remedy.format(path)}")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    folder = DataFolder.of_images(path, image_folder)
    needed = ("prompt", "chosen", "rejected", "images")
    records = records_in(rows_of(files, needed, tuple(PROVENANCE)), folder)
    if not records:
        raise ValueError(
            f"{path} holds no records. Pass a Parquet file with records, or a folder of such files."
            " If `python -m realign.pairs` wrote the file, check the counts of dropped records."
        )
    return records


def stream_pairs(source, image_folder=None, *, split=None, format="auto", skipped=None):
    yield from read_pairs(source, image_folder)


def write_pairs(
    path: str | Path,
    records: Iterable[Record],
    *,
    typed: bool | None = None,
    preferred: bool = False,
) -> int:
    """Write records to one Parquet file atomically, and return their number.

    The file has `datasets` metadata, so that `datasets` loads image columns as images.

    Args:
        path: the file to write.
        records: preference records.
        typed: whether any prompt has typed parts. If given, `records` is streamed to the file. If
            None, all records are read into memory first.
        preferred: whether any record has `retrieved_chosen`. Used only if `typed` is given.
    """
    path = Path(path)
    if typed is None:
        records = list(records)
        typed = any(has_parts(record.prompt) for record in records)
        preferred = any(record.retrieved_chosen for record in records)
    columns = _COLUMNS | (_OPTIONAL if preferred else {}) | PROVENANCE
    columns |= {"prompt": _TYPED_MESSAGES if typed else _MESSAGES}
    features = {name: _feature(kind) for name, kind in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(columns, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, remaining = 0, iter(records)
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(remaining, _ROW_GROUP)):
            rows = [_to_row(record, typed) for record in group]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(group)
    return count


def has_parts(prompt: Iterable[dict[str, Any]]) -> bool:
    """Whether any message has its content as typed parts."""
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
    return row | {name: record.provenance.get(name) for name in PROVENANCE}


def records_in(
    rows: Iterable[tuple[str, Mapping[str, Any] | Malformed]], folder: DataFolder | None = None
) -> list[Record]:
    """Records of rows. A row without an id is named by its place, and names are made unique.

    Args:
        rows: (place, row) pairs.
        folder: the folder of the images. None, for rows of the user's own program, accepts any
            path, and relative paths start at the current directory.

    Raises:
        RecordError: for the first invalid row. The message also counts the later ones.
    """
    names = Names()
    records: list[Record] = []
    errors = RecordErrors()
    for place, row in rows:
        name = place
        try:
            if isinstance(row, Malformed):
                raise row
            if not isinstance(row, Mapping):
                raise Malformed(
                    f"it is {short_repr(row)}, not a dictionary.", "Give columns and values."
                )
            name = names.unique(name_of(row) or place)
            records.append(_record(name, row, folder))
        except Malformed as error:
            errors.add(error.of(name))
    errors.check()
    return records


def _record(name: str, row: Mapping[str, Any], folder: DataFolder | None) -> Record:
    entry = entry_of(row)
    chosen, rejected, preferred = entry.chosen or "", entry.rejected or "", entry.retrieved_chosen
    responses = {"chosen": chosen, "rejected": rejected}
    responses |= {"retrieved_chosen": preferred} if preferred else {}
    if blank := [column for column, text in responses.items() if not text.strip()]:
        raise Malformed(f"its {blank[0]} response is empty.", "Write one or remove the record.")
    if not entry.images:
        raise Malformed("it has no image.", "Add one to `images` or remove the record.")
    return Record(
        name,
        tuple(entry.prompt),
        chosen,
        rejected,
        tuple(_located(image, folder) for image in entry.images),
        tuple(_located(image, folder) for image in entry.retrieved),
        {key: row[key] for key in PROVENANCE if row.get(key) is not None},
        preferred,
    )


def _located(image: StoredImage, folder: DataFolder | None) -> StoredImage:
    if image.data is not None or image.path is None:
        return image
    if folder is None:
        return StoredImage(path=os.path.abspath(image.path))
    try:
        return StoredImage(path=folder.file(image.path))
    except ImageError as error:
        raise Malformed(
            f"its image is {error}.",
            f"If its source is trusted, name a folder that contains it ({IMAGE_FOLDER}).",
            error.reason,
        ) from error


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A column's type in the form of `datasets` metadata, which makes `datasets` decode images."""
    if kind == _IMAGES:
        return {"feature": {"_type": "Image"}, "_type": "List"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": str(kind).replace("double", "float64"), "_type": "Value"}
