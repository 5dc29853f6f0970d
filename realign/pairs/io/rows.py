"""Rows of the stages' tables: records and images of a row, and records that were left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from realign.data.records import Record, StoredImage
from realign.modeling.merging import adapter_base
from realign.pairs.io.images import ImageError, load_image

Row = dict[str, Any]
TOO_LONG = "reply too long"
"""Reason for records without an answer of at most `words.LONGEST` characters."""
NO_REPLY = "no reply"
"""Reason for a record without a reply from a model. The next run repeats the request."""

_Item = TypeVar("_Item")
_Loaded = TypeVar("_Loaded")
_CHAT_SIDE = 1536  # pixels of the longer side of an image in a chat


@dataclass(frozen=True)
class InvalidRecord:
    """A record that cannot be used. The run lists it with its reason and continues."""

    record: str
    stage: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class FilteredRecord(InvalidRecord):
    """A valid record that gives no pair. The run counts it by reason."""


def record_of(row: Row, chosen: str | None = None) -> Record:
    """A row of the read stage as a record. `chosen`, if given, replaces its response."""
    prompt = tuple(json.loads(row["prompt"]))
    return Record(row["id"], prompt, chosen or row["chosen"], "", images_of(row))


def by_id(rows: Iterable[Row]) -> dict[str, Row]:
    """Id -> row."""
    return {row["id"]: row for row in rows}


def images_of(row: Row) -> tuple[StoredImage, ...]:
    """The images of a row, not decoded."""
    return tuple(StoredImage(image["bytes"], image["path"]) for image in row["images"])


def decode_images(images: Iterable[StoredImage]) -> list[Image.Image]:
    """Decodes stored images to RGB.

    Raises:
        ImageError: when an image cannot be read.
    """
    return [load_image(stored) for stored in images]


def chat_images(images: Iterable[StoredImage]) -> list[Image.Image]:
    """Decodes images for a chat, and reduces them to at most 1536 pixels.

    Raises:
        ImageError: when an image cannot be read, or there are no images.
    """
    decoded = decode_images(images)
    if not decoded:
        raise ImageError("no image")
    for image in decoded:
        image.thumbnail((_CHAT_SIDE, _CHAT_SIDE))  # never enlarges
    return decoded


def load_in_threads(
    load: Callable[[_Item], _Loaded], items: Iterable[_Item], workers: int | None = None
) -> list[_Loaded | ImageError]:
    """Applies `load` to each item in worker threads. Returns its result or its `ImageError`.

    Threads help because Pillow releases the GIL while it decodes.

    Args:
        load: the function.
        items: its arguments, one a call.
        workers: number of threads. 0 means the caller's thread, None `default_workers`.
    """

    def load_or_error(item: _Item) -> _Loaded | ImageError:
        try:
            return load(item)
        except ImageError as error:
            return error

    if workers is None:  # imported here, since torch takes 3 s, which `import` does not need
        from realign.modeling.prefetch import default_workers

        workers = default_workers()
    if workers == 0:
        return list(map(load_or_error, items))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(load_or_error, items))


def files_digest(path: str | None) -> str | None:
    """Digest of names, sizes and times of a file, or of the files in a folder.

    It detects a changed data set or model of the same name without reading it. It is None for the
    name of a model on the Hub.
    """
    if path is None or not Path(path).exists():
        return None
    root, digest = Path(path), hashlib.blake2b(digest_size=16)
    files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)}\0{stat.st_size} {stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def model_digest(path: str | None) -> str | None:
    """`files_digest` of a model, and of the files in the base's folder for an adapter."""
    digest = files_digest(path)
    if path is None or digest is None or not Path(path, "adapter_config.json").exists():
        return digest
    base = Path(str(adapter_base(path)))
    files = sorted(file for file in base.glob("*") if file.is_file())
    marks = [(file.name, files_digest(str(file))) for file in files]
    return hashlib.blake2b(f"{digest} {marks}".encode(), digest_size=16).hexdigest()


def engine_identity(spec: str, computed: str) -> list[str | None]:
    """Identity of an engine for digests: spec, local model files, and `PairsConfig.computed`."""
    kind, _, model = spec.partition(":")
    return [spec, model_digest(model), computed if kind == "transformers" else None]
