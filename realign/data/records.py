"""Preference records: fields, Parquet format, reader and writer.

A record has a prompt about an image, a chosen response and a rejected response. Objectives with a
visual term also need the retrieved image. Other objectives take records without an image too. On
disk, a record is a Parquet row with TRL's vision preference columns (`prompt`, `chosen`, `rejected`
as messages, `images`) and `retrieved_images`. Further columns hold the provenance.
`datasets.load_dataset("parquet", data_files=...)` reads it.

Some objectives read optional fields. `retrieved_images` may hold several visual negatives, nearest
first, each with as many images as the record. `retrieved_chosen` is the response preferred for the
retrieved image.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.entries import Entry, Names, name_of
from realign.data.errors import Malformed, RecordErrors, Skipped, short_repr
from realign.data.errors import RecordError as RecordError
from realign.data.formats import entries_of
from realign.data.images import DataFolder, ImageError, StoredImage
from realign.data.sources import open_source
from realign.files import replacing
from realign.terminal import show

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


def read_pairs(
    path: str | Path,
    image_folder: str | Path | None = None,
    *,
    split: str | None = None,
    format: str = "auto",
) -> list[Record]:
    """Read the preference records of a file, a folder or a Hub data set. See `stream_pairs`.

    Returns:
        The records, in file order. Their images are not decoded.

    Raises:
        FileNotFoundError: like `stream_pairs`.
        ValueError: like `stream_pairs`.
        RecordError: like `stream_pairs`.
    """
    return list(stream_pairs(path, image_folder, split=split, format=format))


def stream_pairs(
    source: str | Path,
    image_folder: str | Path | None = None,
    *,
    split: str | None = None,
    format: str = "auto",
    skipped: Counter[str] | None = None,
) -> Iterator[Record]:
    """Yields the preference records of a source one by one. Only the current ones are in memory.

    Args:
        source: a file, a folder that is read in the order of file names, or the name of a data set
            on the Hub. docs/data.md lists the formats.
        image_folder: folder that contains the images and that relative image paths start at. None
            means the folder of the file. Files of strangers may name any image of this machine.
        split: see `open_source`.
        format: a key of `FORMATS`, or "auto".
        skipped: counts valid rows that give no record, by reason. None prints the counts.

    Raises:
        FileNotFoundError: when there is nothing at `source`.
        ValueError: for an empty data set, a missing column, data without rejected responses, or a
            file that decodes to much more than its size.
        RecordError: after the last record, for a record without a response or with an image
            outside the folder. Also for unknown columns that may change its meaning.
    """
    opened = open_source(
        source, image_folder, split=split, format=format, pairs=True, more=tuple(PROVENANCE)
    )
    count = 0
    for record in iterate_records(
        opened.items, opened.folder, opened.format, skipped, default=opened.first
    ):
        count += 1
        yield record
    if not count:
        raise ValueError(
            f"{source} holds no records. Pass a Parquet file with records, or a folder of such "
            "files. If `python -m realign.pairs` wrote the file, check the counts of dropped "
            "records."
        )


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
    """Records of rows as a list. See `iterate_records`.

    Raises:
        RecordError: like `iterate_records`.
    """
    return list(iterate_records(rows, folder))


def iterate_records(
    items: Iterable[tuple[str, Any]],
    folder: DataFolder | None = None,
    format: str = "auto",
    skipped: Counter[str] | None = None,
    *,
    default: str = "parquet",
) -> Iterator[Record]:
    """Yields the records of items. One without an id is named by its place. Names are made unique.

    A record may have no image. Encoding skips it if the objective compares images.

    Args:
        items: (place, item) pairs.
        folder: the folder of the images. None, for rows of the user's own program, accepts any
            path, and relative paths start at the current directory.
        format: a key of `FORMATS`, or "auto".
        skipped: counts valid items that give no record, by reason. None prints the counts.
        default: see `entries_of`.

    Raises:
        RecordError: after the last item, for the first invalid one. The message also counts the
            later ones. Also if all items were skipped.
    """
    names = Names()
    errors = RecordErrors()
    counts: Counter[str] = Counter()
    first, count = None, 0
    for place, item in items:
        name = place
        try:
            if isinstance(item, Malformed):
                raise item
            if not isinstance(item, Mapping):
                raise Malformed(
                    f"it is {short_repr(item)}, not a dictionary.", "Give columns and values."
                )
            name = name_of(item) or place
            entries = entries_of(item, format, default, text_only=True)
        except Skipped as reason:
            first = first or reason.of(name)
            counts[reason.reason] += 1
            continue
        except Malformed as error:
            errors.add(error.of(names.unique(name) if name != place else name))
            continue
        for number, entry in enumerate(entries, 1):
            numbered = f"{place}#{number}" if len(entries) > 1 else place
            name = names.unique(entry.name or numbered)
            try:
                record = _record(name, entry, item, folder)
            except Malformed as error:
                errors.add(error.of(name))
                continue
            count += 1
            yield record
    errors.check()
    if first is not None and not count:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.items())
        raise RecordError(first.record, f"no record is left ({reasons}).", str(first))
    if skipped is not None:
        skipped.update(counts)
    elif counts and os.environ.get("RANK", "0") == "0":
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
        show(f"skipped {counts.total()} of {count + counts.total()} records: {reasons}")


def _record(name: str, entry: Entry, row: Mapping[str, Any], folder: DataFolder | None) -> Record:
    chosen, rejected, preferred = entry.chosen or "", entry.rejected or "", entry.retrieved_chosen
    responses = {"chosen": chosen, "rejected": rejected}
    responses |= {"retrieved_chosen": preferred} if preferred else {}
    if blank := [column for column, text in responses.items() if not text.strip()]:
        raise Malformed(
            f"its {blank[0]} response is empty.",
            "Write one or remove the record. `python -m realign.pairs` makes rejected responses.",
        )
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
        file = folder.file(image.path)
        given = os.path.abspath(os.path.join(folder.given, image.path))
        linked = given != file and os.path.realpath(given) == file
        return StoredImage(path=file, given=given if linked else None)
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
