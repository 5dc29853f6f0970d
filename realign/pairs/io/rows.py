"""Rows of the read stage as records and pictures, and what tells models and data sets apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from realign.data.records import Record, StoredImage
from realign.digits.scenes import CAPTION_PROMPT, make_scenes
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply, is_endpoint
from realign.pairs.io.pictures import PictureError, load_picture
from realign.pairs.stages.base import NO_REPLY, Row

_Loaded = TypeVar("_Loaded")
_CHAT_SIDE = 1536  # pixels of the longer side of an image in a chat


def digit_sources(config: PairsConfig) -> list[Record]:
    """Biased digit scenes with their true captions: the embedded default."""
    scenes = make_scenes(config.scenes, biased=True, split="train", seed=config.seed)
    prompt = ({"role": "user", "content": CAPTION_PROMPT},)
    return [
        Record(f"scene-{i:05d}", prompt, s.caption, "", (StoredImage.from_pil(s.image),))
        for i, s in enumerate(scenes)
    ]


def record_of(row: Row, chosen: str | None = None) -> Record:
    """A row of the read stage as a record; `chosen` in place of its own response."""
    prompt = tuple(json.loads(row["prompt"]))
    return Record(row["id"], prompt, chosen or row["chosen"], "", images_of(row))


def by_id(rows: list[Row]) -> dict[str, Row]:
    """Rows by their id."""
    return {row["id"]: row for row in rows}


def images_of(row: Row) -> tuple[StoredImage, ...]:
    """The images of a row as they are stored."""
    return tuple(StoredImage(image["bytes"], image["path"]) for image in row["images"])


def pictures_of(row: Row) -> list[Image.Image]:
    """A row's images, decoded.

    Raises:
        PictureError: when one cannot be read.
    """
    return [load_picture(stored) for stored in images_of(row)]


def chat_images(row: Row) -> list[Image.Image]:
    """A row's images for a chat, made smaller where they are large.

    Raises:
        PictureError: when one cannot be read, or there is none.
    """
    images = pictures_of(row)
    if not images:
        raise PictureError("no image")
    for image in images:
        image.thumbnail((_CHAT_SIDE, _CHAT_SIDE))  # keeps smaller ones as they are
    return images


def in_threads(load: Callable[[Row], _Loaded], rows: Sequence[Row]) -> list[_Loaded | PictureError]:
    """What `load` makes of the pictures of rows, or why it could not; decoding lets threads run."""

    def tried(row: Row) -> _Loaded | PictureError:
        try:
            return load(row)
        except PictureError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(tried, rows))


def reply_fault(reply: Reply, text: str | None) -> str:
    """Why a reply, from which `text` was read, is of no use; "" when it is."""
    if reply.error:
        return NO_REPLY
    if reply.cut:
        return "reply cut off"
    return "" if text and text.strip() else "empty reply"


def mark_of(path: str | None) -> str | None:
    """Digest of the names, sizes and times of a file or of a folder's; None for a name on a hub.

    It tells a changed data set or model under the same name, without reading it.
    """
    if path is None or not Path(path).exists():
        return None
    root, digest = Path(path), hashlib.blake2b(digest_size=16)
    files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    for file in files:
        found = file.stat()
        digest.update(f"{file.relative_to(root)}\0{found.st_size} {found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def name_of(spec: str) -> str:
    """An engine as provenance names it: of an endpoint the model alone, wherever it is served."""
    return spec.partition("#")[2] if is_endpoint(spec) else spec


def engine_mark(spec: str, dtype: str) -> list:
    """What tells an engine from others: its name, the files of a model in a folder, its dtype."""
    kind, _, model = spec.partition(":")
    return [spec, mark_of(model), dtype if kind == "transformers" else None]
