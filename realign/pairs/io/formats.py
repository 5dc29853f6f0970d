"""Record formats: registry `FORMATS`, and detection of a file's format.

To add a format, write a function from an item to entries, and add it to `FORMATS`. An item is a
JSON object, a JSON line or a row. The entries hold the messages, responses and images of the item.
The function raises `Malformed` for an invalid item, and reads no other file. Extend `format_of` to
recognize the items.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from realign.data.entries import Entry, entry_of, images_of, messages_of, name_of
from realign.data.errors import Malformed, short_repr, shorten
from realign.files import MOST_JSON, open_regular

CAPTION_PROMPT = "Describe the image in one sentence."
_PREFERENCES = ("chosen", "rejected", "rejected_response")
_PREFERENCES += ("rejected_conversations", "rejected_messages")


def of_llava(item: Mapping[str, Any], every: bool = False) -> list[Entry]:
    """LLaVA's instruction format: an image and a dialogue about it.

    The first answer of the dialogue is the response. With `every`, each answer gives an entry.

    Raises:
        Malformed: for a dialogue without text, roles that do not alternate, or a preference.
    """
    if unsupported := [key for key in (*_PREFERENCES, "system") if item.get(key)]:
        raise Malformed(
            f"it has {', '.join(unsupported)}, which LLaVA's format does not have.",
            "Pass --format parquet.",
        )
    dialogue = messages_of(item.get("conversations"), "conversations")
    opening = dialogue[: dialogue[0]["role"] == "system"]
    turns = dialogue[len(opening) :]
    if not turns or not all(isinstance(m["content"], str) for m in dialogue):
        raise Malformed(
            "its conversations are not a dialogue in text.", "Add a question from the human."
        )
    for turn, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[turn % 2]:
            raise Malformed(
                "its conversations do not alternate between human and gpt.", "Fix their order."
            )
    name, images = name_of(item), images_of(item, "image", "images")
    if not every or len(turns) < 3:
        answer = turns[1]["content"] if len(turns) > 1 else None
        return [Entry(name, opening + turns[:1], answer, None, images, [])]
    return [
        Entry(
            name and f"{name}#{turn // 2 + 1}",
            opening + turns[:turn],
            turns[turn]["content"],
            None,
            images,
            [],
        )
        for turn in range(1, len(turns), 2)
    ]


def of_realign(item: Mapping[str, Any]) -> list[Entry]:
    """Format of Re-Align's authors: chosen and rejected dialogues, an image and a retrieved image.

    Raises:
        Malformed: for an item without a rejected dialogue or a retrieved image.
    """
    entry = entry_of(item)
    if entry.rejected is None:
        raise Malformed("its rejected is missing.", "Add the rejected dialogue.")
    if entry.images and not entry.retrieved:
        raise Malformed("its retrieved_image is missing.", "Add one, or pass --format parquet.")
    return [entry]


def of_folder(item: Mapping[str, Any]) -> list[Entry]:
    """A line of the JSON-lines file in a folder of images.

    It has an image, a question or prompt, and optionally an answer or chosen response.

    Raises:
        Malformed: for a line without a question.
    """
    chosen = item.get("chosen")
    return [_answered(item, item.get("answer") if chosen is None else chosen)]


def of_parquet(item: Mapping[str, Any]) -> list[Entry]:
    """A preference row. See `entry_of`.

    An empty response counts as absent, because `write_pairs` writes absent responses as "".

    Raises:
        Malformed: like `entry_of`.
    """
    return [entry_of(item)]


def of_coco(item: Mapping[str, Any], every: bool = False) -> list[Entry]:
    """A COCO image with its captions, as joined by `coco_items`.

    The caption with the lowest id is the response. With `every`, each caption gives an entry.

    Raises:
        Malformed: for an image without a file name, or a caption that is not text.
    """
    image, captions = item["image"], item["captions"]
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        raise Malformed(f"its image {short_repr(image)} has no file_name.", "Add it.")
    if not all(isinstance(c["caption"], str) and isinstance(c.get("id"), int) for c in captions):
        raise Malformed("one of its captions is not text, or has no id.", "Fix the caption.")
    texts = [c["caption"] for c in sorted(captions, key=lambda c: c["id"])]
    row = {"id": image.get("id"), "prompt": CAPTION_PROMPT, "image": image["file_name"]}
    if not every or not texts:
        return [_answered(row, texts[0] if texts else None)]
    entries = [_answered(row, text) for text in texts]
    return [
        replace(entry, name=entry.name and f"{entry.name}#{number}")
        for number, entry in enumerate(entries, 1)
    ]


def _answered(row: Mapping[str, Any], answer: Any) -> Entry:
    """An entry with an answer. Unlike in a table, an empty answer is invalid here."""
    if answer == []:
        raise Malformed("its answer is an empty list.", "Give text, or omit the key.")
    entry = entry_of({**row, "chosen": answer})
    return replace(entry, chosen="") if answer == "" else entry


FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Entry]]] = {
    "llava": of_llava,
    "llava:all": partial(of_llava, every=True),
    "realign": of_realign,
    "folder": of_folder,
    "parquet": of_parquet,
    "coco": of_coco,
    "coco:all": partial(of_coco, every=True),
}
"""Name for `--format` -> function from an item to its entries."""


def format_of(item: Any) -> str | None:
    """The format of a JSON object, or None if it is not recognized."""
    if not isinstance(item, dict):
        return None
    if any(item.get(key) is not None for key in _PREFERENCES):
        if "retrieved_image" in item:
            return "realign"
        # A line of a folder may have `chosen`, but only preferences have a rejected response.
        if any(item.get(key) is not None for key in _PREFERENCES[1:]):
            return "parquet"
    if "conversations" in item:
        return "llava"
    return "folder" if "image" in item or "images" in item else None


def coco_items(content: Any, file: Path) -> list[dict]:
    """The images of a COCO captions file, each with its captions.

    Raises:
        ValueError: for a file without COCO captions.
    """
    captions = defaultdict(list)
    annotations = content.get("annotations") or []
    if not isinstance(annotations, list):
        raise ValueError(f"{file}: `annotations` is {short_repr(annotations)}, not a list.")
    for annotation in annotations:
        if not isinstance(annotation, dict) or not {"caption", "image_id"} <= set(annotation):
            raise ValueError(
                f"{file} has the annotation {short_repr(annotation)}, which is not a caption of an "
                "image. COCO's captions are in files such as captions_train2014.json."
            )
        captions[str(annotation["image_id"])].append(annotation)
    return [
        {"image": i, "captions": captions[str(i.get("id"))] if isinstance(i, dict) else []}
        for i in content["images"]
    ]


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Malformed:
    """A JSON object, or a `Malformed` if a key is repeated, because Python keeps only one."""
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return Malformed(f"it has the key {short_repr(repeated)} twice.", "Keep one of them.")


def json_lines(file: Path) -> Iterator[Any]:
    """Yields the objects of a JSON-lines file, and a `Malformed` for an invalid line.

    Raises:
        OSError: for a file that cannot be read, such as a pipe.
    """
    with open_regular(file) as lines:
        while line := lines.readline(MOST_JSON):
            if len(line) == MOST_JSON and not line.endswith(b"\n"):
                while (rest := lines.readline(MOST_JSON)) and not rest.endswith(b"\n"):
                    pass
                yield Malformed(f"it is longer than {MOST_JSON:,} bytes.", "", "too long")
                continue
            if not line.strip():
                continue
            try:
                yield json.loads(line, object_pairs_hook=json_object)
            except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or too deep
                why = shorten(str(error))
                yield Malformed(f"it is not JSON ({why}).", "Write one object per line.")
