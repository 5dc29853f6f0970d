"""The formats that records come in, each turned into the same raw entries.

A format is a function from one item (an object of a JSON file, a line, a row) to entries: messages,
responses and pictures as the file has them. What is wrong with an item is a `Malformed`; nothing is
looked up on disk here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CAPTION_PROMPT = "Describe the image in one sentence."
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system"}
_COLUMNS = ("id", "prompt", "chosen", "rejected", "images", "image", "retrieved_images")
_COLUMNS += ("retrieved_image",)
_BATCH = 32  # rows in memory at once; their images may be large


class Malformed(ValueError):
    """An item that is not of its format; the message says how."""


@dataclass(frozen=True)
class Options:
    """What a format leaves open."""

    turns: str = "first"
    """LLaVA: "first" takes the first answer of a dialogue, "all" makes a record of each."""
    captions: str = "first"
    """COCO: "first" takes the caption with the lowest id, "all" makes a record of each."""
    caption_prompt: str = CAPTION_PROMPT
    """COCO: the question to which a caption is the answer."""


@dataclass(frozen=True)
class Entry:
    """A record as a file has it."""

    name: str | None
    prompt: list[dict]  # messages
    chosen: str | None  # None where there is none yet
    rejected: str | None
    images: list[Any]  # a path, bytes or {"bytes", "path"} each
    retrieved: list[Any]
    retrieved_chosen: str = ""  # preferred for the retrieved image; "" where there is none


def of_llava(item: dict, options: Options) -> list[Entry]:
    """LLaVA's instruction format: a picture and a dialogue about it.

    Raises:
        Malformed: for a dialogue without text, or whose sides do not alternate.
    """
    dialogue = _messages(item.get("conversations"), "from", "value", "conversations")
    opening = dialogue[: dialogue[0]["role"] == "system"]
    turns = dialogue[len(opening) :]
    if not turns or not all(isinstance(m["content"], str) for m in dialogue):
        raise Malformed("conversations are no dialogue in text")
    for turn, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[turn % 2]:
            raise Malformed("conversations do not alternate between human and gpt")
    name, images = name_of(item), _listed(item.get("image"))
    if options.turns == "first" or len(turns) < 3:
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


def of_realign(item: dict, options: Options) -> list[Entry]:
    """The authors' format: chosen and rejected dialogues, a picture and a retrieved one.

    Raises:
        Malformed: without a rejected dialogue or a retrieved picture.
    """
    prompt, chosen, rejected = _preferences(item)
    if rejected is None:
        raise Malformed("rejected is missing")
    images, retrieved = _listed(item.get("image")), _listed(item.get("retrieved_image"))
    if images and not retrieved:
        raise Malformed("retrieved_image is missing")
    return [Entry(name_of(item), prompt, chosen, rejected, images, retrieved)]


def of_folder(item: dict, options: Options) -> list[Entry]:
    """A line beside a folder of pictures: image, question or prompt, answer or chosen if any.

    Raises:
        Malformed: without a question.
    """
    question = _first(item, "prompt", "question")
    if question is None:
        raise Malformed("question is missing")
    answer = _first(item, "chosen", "answer")
    return [
        Entry(
            name_of(item),
            _prompt(question),
            None if answer is None else _response(answer, "answer"),
            None,
            _listed(_first(item, "images", "image")),
            [],
        )
    ]


def of_row(item: dict, options: Options) -> list[Entry]:
    """A row with TRL's vision preference columns, conversational or plain; the prompt may be
    implicit, as the common beginning of chosen and rejected."""
    prompt, chosen, rejected = _preferences(item)
    images = _listed(_first(item, "images", "image"))
    retrieved = _listed(_first(item, "retrieved_images", "retrieved_image"))
    preferred = item.get("retrieved_chosen") or ""
    preferred = _response(preferred, "retrieved_chosen") if preferred else ""
    # `write_pairs` writes a response that there is not as an empty one.
    both = (chosen or None, rejected or None)
    return [Entry(name_of(item), prompt, *both, images, retrieved, preferred)]


def of_coco(item: dict, options: Options) -> list[Entry]:
    """A picture of COCO with its captions, as `coco_items` joins them.

    Raises:
        Malformed: without a file name, or with a caption that is no text.
    """
    image, captions = item["image"], item["captions"]
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        raise Malformed("file_name is missing")
    if not all(isinstance(c["caption"], str) and isinstance(c.get("id"), int) for c in captions):
        raise Malformed("a caption is no text, or has no id")
    captions = sorted(captions, key=lambda c: c["id"])
    name, images = name_of(image), [image["file_name"]]
    prompt = [{"role": "user", "content": options.caption_prompt}]
    if not captions:
        return [Entry(name, prompt, None, None, images, [])]
    if options.captions == "first":
        return [Entry(name, prompt, captions[0]["caption"], None, images, [])]
    return [
        Entry(f"{name}#{i + 1}", prompt, c["caption"], None, images, [])
        for i, c in enumerate(captions)
    ]


PARSERS = {
    "llava": of_llava,
    "realign": of_realign,
    "folder": of_folder,
    "parquet": of_row,
    "coco": of_coco,
}


def format_of(item: Any) -> str | None:
    """The format that an object of a JSON file looks like."""
    if not isinstance(item, dict):
        return None
    if "conversations" in item:
        return "llava"
    if "chosen" in item and "rejected" in item:
        return "realign" if "image" in item else "parquet"
    return "folder" if "image" in item or "images" in item else None


def name_of(item: Any) -> str | None:
    """The id of an item as text that can be stored, on one line; None where it has none."""
    if not isinstance(item, dict) or item.get("id") is None:
        return None
    text = str(item["id"]).encode("utf-8", "replace").decode()
    return " ".join(text.split()) or None


def coco_items(content: Any, file: Path) -> list[dict]:
    """The pictures of a COCO captions file, each with its captions.

    Raises:
        ValueError: for a file that is none of COCO's captions.
    """
    captions = defaultdict(list)
    notes = content.get("annotations") or []
    if not isinstance(notes, list):
        raise ValueError(f"{file} has `annotations` that are no list: {str(notes)[:80]}.")
    for note in notes:
        if not isinstance(note, dict) or not {"caption", "image_id"} <= set(note):
            raise ValueError(
                f"{file} has the annotation {str(note)[:80]}, no caption of an image. COCO's "
                "captions are in captions_train2014.json and the like."
            )
        captions[str(note["image_id"])].append(note)
    return [
        {"image": i, "captions": captions[str(i.get("id"))] if isinstance(i, dict) else []}
        for i in content["images"]
    ]


def json_lines(file: Path) -> Iterator[Any]:
    """The objects of a JSON-lines file, or a `Malformed` where a line is none."""
    with file.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of its depth
                yield Malformed(f"not JSON: {error}")


def rows_of(files: list[Path]) -> Iterator[tuple[str, dict]]:
    """(place, row) of Parquet files, and of the Arrow files that `datasets` saves.

    Raises:
        ValueError: for a file that cannot be read.
    """
    for file in files:
        place = 0
        try:
            for batch in _batches(file):
                for row in batch.to_pylist():
                    yield f"{file.name}:{place}", row
                    place += 1
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}). Pass Parquet files, or a folder that "
                "`datasets` saved with save_to_disk."
            ) from error


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".arrow":
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            columns = _known(stream.schema.names, file)
            for batch in stream:
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.select(columns).slice(start, _BATCH)
    else:
        with pq.ParquetFile(file) as parquet:
            columns = _known(parquet.schema_arrow.names, file)
            yield from parquet.iter_batches(_BATCH, columns=columns)


def _known(names: list[str], file: Path) -> list[str]:
    known = [name for name in _COLUMNS if name in names]
    if not {"prompt", "chosen"} & set(known) or not {"images", "image"} & set(known):
        raise ValueError(
            f"{file} has the columns {', '.join(names)}. TRL's vision preference format has "
            "prompt, chosen, rejected and images; retrieved_images are the visual negatives."
        )
    return known


def _preferences(item: dict) -> tuple[list[dict], str | None, str | None]:
    """Prompt, chosen and rejected response; without `prompt` it is what both dialogues share."""
    chosen, rejected = item.get("chosen"), item.get("rejected")
    if item.get("prompt"):
        prompt = _prompt(item["prompt"])
    elif isinstance(chosen, list) and chosen:
        prompt = _prompt(chosen[:-1])
        if isinstance(rejected, list) and rejected[:-1] != chosen[:-1]:
            raise Malformed("chosen and rejected differ before their last message")
    else:
        raise Malformed("prompt is missing")
    answers = (
        None if a is None else _response(a, n)
        for a, n in ((chosen, "chosen"), (rejected, "rejected"))
    )
    return (prompt, *answers)


def _prompt(value: Any) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return _messages(value, "role", "content", "prompt")


def _messages(value: Any, role: str, content: str, what: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise Malformed(f"{what} holds no messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or str(message.get(role)) not in _ROLES:
            raise Malformed(f"{what} has the message {str(message)[:80]!r}")
        messages.append({"role": _ROLES[message[role]], "content": _content(message.get(content))})
    return messages


def _content(value: Any) -> str | list[dict]:
    """Text, or parts of type text and image without what else Arrow gives every part."""
    if isinstance(value, str):
        return value
    parts = []
    for part in value if isinstance(value, list) else [value]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise Malformed(f"a message holds {str(value)[:80]!r}, not text or parts")
    return parts


def _response(value: Any, what: str) -> str:
    """The text of a response: a string, or messages of which the last is the response."""
    if isinstance(value, list):
        messages = _messages(value, "role", "content", what)
        if messages[-1]["role"] != "assistant":
            raise Malformed(f"{what} does not end with the assistant")
        value = messages[-1]["content"]
        if isinstance(value, list):
            value = "".join(part.get("text", "") for part in value)
    if not isinstance(value, str):
        raise Malformed(f"{what} is {str(value)[:80]!r}, not text")
    return value


def _listed(value: Any) -> list[Any]:
    return [v for v in (value if isinstance(value, list) else [value]) if v is not None]


def _first(item: dict, *names: str) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)
