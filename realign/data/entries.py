"""Rows of preference data, one parser for all readers: TRL's columns, and others' keys for them.

`realign.train`, `RDPOTrainer` and `realign.pairs` read a row with `entry_of`. It accepts TRL's
vision preference columns, plain or conversational, with an implicit prompt too, and the keys of
RLAIF-V, RLHF-V, MMPR, POVID, LLaMA-Factory and ms-swift for the same. Nothing is looked up on disk.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from realign.data.dialogues import Message, dialogue_of, messages_of, with_system
from realign.data.errors import Malformed, shown
from realign.data.pictures import PictureError, StoredImage

_DIALOGUES = ("conversations", "messages")
_OTHER_DIALOGUES = ("rejected_conversations", "rejected_messages")
_UNREAD = ("tools", "chat_template_kwargs", "history", "rejected_image", "rejected_images")
_UNREAD += ("video", "videos", "audio", "audios")
SOURCES = {  # what a row needs -> the columns that can hold it
    "prompt": ("prompt", "question", *_DIALOGUES, "text", "chosen"),
    "chosen": ("chosen", *_DIALOGUES, "text"),
    "rejected": ("rejected", "rejected_response", *_OTHER_DIALOGUES, "text"),
    "images": ("images", "image"),
}
COLUMNS = frozenset(name for names in SOURCES.values() for name in names) | {
    "id",
    "system",
    "retrieved_images",
    "retrieved_image",
    "retrieved_chosen",
    *_UNREAD,
}
"""Every column that `entry_of` looks at."""
_ENCODED = ("data:", "iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF, WebP
_LONGEST_PATH = 4096  # bytes, of Linux
_GIVE_IMAGE = "Give a PIL image, bytes or a path."


@dataclass(frozen=True)
class Entry:
    """A record as a file has it."""

    name: str | None
    prompt: list[Message]
    chosen: str | None  # None where there is none yet
    rejected: str | None
    images: list[StoredImage]  # paths as they are written
    retrieved: list[StoredImage]
    retrieved_chosen: str = ""  # preferred for the retrieved image; "" where there is none


def entry_of(row: Mapping[str, Any]) -> Entry:
    """Read a row.

    Raises:
        Malformed: for a value of another type, or keys that are not read or contradict each other.
    """
    for key in _UNREAD:
        if not _is_none(row.get(key)):
            raise Malformed(
                f"its {key} {shown(row[key])} would be lost.",
                "Remove the key, or write the record in the columns of docs/data.md.",
            )
    has_system = not _is_none(row.get("system"))
    if has_system and all(_is_none(row.get(key)) for key in _DIALOGUES):
        # TRL ignores the column; others read it. Neither is what every user means.
        raise Malformed(
            f"its system {shown(row['system'])} would be lost.",
            "Put it into `prompt`, as a message of the system.",
        )
    row = _with_trls_keys(row)
    if row.get("prompt") is None and not isinstance(row.get("chosen"), list | tuple | Mapping):
        unknown = [key for key in row if key not in COLUMNS]
        keys = f" Its keys {shown(unknown)} are not known." if unknown else ""
        raise Malformed(f"it has no prompt.{keys}", "Add one or remove the record.")
    names = ("chosen", "rejected", "retrieved_chosen")
    prompt, texts = dialogue_of(row.get("prompt"), {name: row.get(name) for name in names})
    if has_system:
        prompt = with_system(prompt, row["system"])
    chosen, rejected, preferred = (texts[name] or None for name in names)
    return Entry(
        name_of(row),
        prompt,
        chosen,
        rejected,
        images_of(row, "images", "image"),
        images_of(row, "retrieved_images", "retrieved_image"),
        preferred or "",
    )


def name_of(row: Any) -> str | None:
    """The id of a row as text that can be stored, on one line; None where it has none.

    Raises:
        Malformed: for an id that is neither text nor a number.
    """
    name = row.get("id") if isinstance(row, Mapping) else None
    if name is None or (isinstance(name, float) and math.isnan(name)):
        return None
    if not isinstance(name, str | numbers.Number) or isinstance(name, bool):
        raise Malformed(f"its id is {shown(name)}.", "Give text or a number.")
    text = str(name).encode("utf-8", "replace").decode()
    return " ".join(text.split()) or None


class Names:
    """Names that are given once: a number stands behind one that is taken."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """The name, or the name with the first free number."""
        found, count = name, self._counts.get(name, 0)
        while found in self._counts:
            count += 1
            found = f"{name}-{count}"
        self._counts[name] = max(count, 1)
        self._counts.setdefault(found, 1)
        return found


def images_of(row: Mapping[str, Any], *columns: str) -> list[StoredImage]:
    """The images of the one of some columns that is not empty; none where all are.

    Raises:
        Malformed: for a value that is no image, or two columns with images.
    """
    filled = [name for name in columns if not _is_none(row.get(name))]
    if len(filled) > 1:
        raise Malformed(f"it has {' and '.join(filled)}.", "Keep one of them.")
    value = row[filled[0]] if filled else []
    listed = value if isinstance(value, list | tuple) else [value]
    return [_stored(image, filled[0]) for image in listed]


def _stored(image: Any, column: str) -> StoredImage:
    def malformed(why: str, remedy: str = _GIVE_IMAGE, reason: str = "malformed") -> Malformed:
        return Malformed(f"its {column} has the image {shown(image)}{why}.", remedy, reason)

    if image is None:
        raise Malformed("one of its images is null.", "Give it or take it out.", "no image")
    if isinstance(image, Image.Image):
        try:
            return StoredImage.from_pil(image)
        except PictureError as error:
            why = f" of mode {image.mode} ({error.detail})"
            raise malformed(why, "Give an open image of mode RGB.", error.reason) from error
    data, path = image, None
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path")
        # Arrow gives every image of a column every key.
        extra = [key for key in image if key not in ("bytes", "path") and image[key] is not None]
        if extra:
            raise malformed(f", whose {shown(extra[0])} is not read")
    elif isinstance(image, str | Path):
        data, path = None, str(image)
    if path is not None and not isinstance(path, str):
        raise malformed(", whose path is no text")
    if data is not None:
        if isinstance(data, bytes) and data:
            return StoredImage(data, path)
        reason = "corrupt" if isinstance(data, bytes) else "malformed"
        raise malformed(", which has no bytes of an image file", reason=reason)
    if not path:
        raise malformed(", with neither bytes nor a path", reason="no image")
    if path.startswith(_ENCODED) or len(path) > _LONGEST_PATH:
        raise malformed(", which looks like base64", "Decode it to bytes (base64.b64decode).")
    if path.startswith(("http://", "https://")):
        raise malformed(", which is not fetched", "Download it.", "missing")
    return StoredImage(path=path)


def _with_trls_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with `prompt`, `chosen` and `rejected` for other projects' keys."""
    row = {key: value for key, value in row.items() if not _is_none(value)}
    if isinstance(text := row.get("text"), str) and not {"chosen", "prompt"} & row.keys():
        row |= _object_in(text)  # RLHF-V: question, chosen and rejected
    if "question" in row:
        row.setdefault("prompt", row["question"])
    held = [key for key in _DIALOGUES if key in row]
    if not held:
        return row
    dialogue = messages_of(row[held[0]], held[0])
    others = [key for key in ("rejected_response", *_OTHER_DIALOGUES) if key in row]
    if "prompt" in row or len(held) > 1 or len(others) > 1 or (others and "chosen" in row):
        raise Malformed(
            f"it has {', '.join(key for key in (*held, *others, 'prompt') if key in row)}.",
            "Keep one form of prompt, chosen and rejected (docs/data.md).",
        )
    if not others:  # LLaMA-Factory, or a dialogue that ends with the only response
        answered = dialogue[-1]["role"] == "assistant" and not {"chosen", "rejected"} & row.keys()
        return row | {"chosen" if answered else "prompt": dialogue}
    rejected = row[others[0]]
    if others == ["rejected_response"]:  # ms-swift
        if isinstance(rejected, str):
            rejected = [{"role": "assistant", "content": rejected}]
        rejected = [*dialogue[:-1], *messages_of(rejected, "rejected_response")]
    return row | {"chosen": dialogue, "rejected": rejected}


def _object_in(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Malformed(
            f"its text {shown(text)} is no JSON object.", "Give prompt, chosen and rejected."
        )
    return found


def _is_none(value: Any) -> bool:
    """Whether a column is absent: null, or an empty list, which Arrow gives for absent lists."""
    return value is None or (isinstance(value, list | str) and not value)
