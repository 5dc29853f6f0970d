"""Parser of preference rows: TRL's columns, and the corresponding keys of other projects.

`realign.train`, `RDPOTrainer` and `realign.pairs` read rows with `entry_of`. It accepts TRL's
vision preference columns, plain or conversational, with an explicit or implicit prompt. It also
accepts the corresponding keys of RLAIF-V, RLHF-V, MMPR, POVID, LLaMA-Factory and ms-swift. It reads
no files.

A response is one turn. TRL's DPOTrainer scores every message of `chosen` and `rejected`. Messages
that both share add the same log-probs to both. They are moved into the prompt, which leaves TRL's
margin unchanged. Responses that differ before their last message are an error.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from realign.data.columns import (
    COLUMNS,
    DIALOGUES,
    IMAGE_FILES,
    OTHER_DIALOGUES,
    UNREAD,
    VIDEOS,
    is_empty,
)
from realign.data.errors import Malformed, short_repr
from realign.data.images import ImageError, StoredImage
from realign.data.messages import split_at_tags, text_part

Message = dict[str, Any]  # "role" and "content"; content is text, or parts of type text and image
_NESTED = ("question", "prompt", "chosen", "rejected")
"""Keys of RLHF-V's JSON text."""
_BASE64 = ("data:", "iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR")  # starts of PNG, JPEG, GIF, WebP
_LONGEST_PATH = 4096  # bytes, the limit of Linux
_LONGEST_TEXT = 1 << 20  # characters; a context of 128,000 tokens has half as many
_NO_VIDEO = "Give frames of it as images, or remove the record."
_GIVE_IMAGE = "Give a PIL image, bytes or a path."
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system"}
_MESSAGE_KEYS = ("role", "from", "content", "value")
_GIVE_MESSAGE = "Give a role, and text or a list of parts of type text and image as content."
_JSON_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


@dataclass(frozen=True)
class Entry:
    """A record as parsed from a row, with image paths as written there."""

    name: str | None
    prompt: list[Message]
    chosen: str | None  # None if the row has no response yet
    rejected: str | None
    images: list[StoredImage]
    retrieved: list[StoredImage]
    retrieved_chosen: str = ""  # response preferred for the retrieved image, if any


def entry_of(row: Mapping[str, Any]) -> Entry:
    """Parse a row.

    Raises:
        Malformed: for a value of the wrong type, an unsupported key, or contradictory keys.
    """
    check_unread(row)
    has_system = not is_empty(row.get("system"))
    if has_system and all(is_empty(row.get(key)) for key in DIALOGUES):
        # The meaning is ambiguous: TRL ignores the column, and other projects read it.
        raise Malformed(
            f"its system {short_repr(row['system'])} would be lost.",
            "Put it into `prompt`, as a system message.",
        )
    row = _with_trls_keys(row)
    if row.get("prompt") is None and not isinstance(row.get("chosen"), list | tuple | Mapping):
        unknown = [key for key in row if key not in COLUMNS]
        keys = f" Its keys {short_repr(unknown)} are unknown." if unknown else ""
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
        images_of(row, "images", "image") or images_of(row, *IMAGE_FILES),
        images_of(row, "retrieved_images", "retrieved_image"),
        preferred or "",
    )


def name_of(row: Any) -> str | None:
    """The id of a row as text on one line and valid as UTF-8, or None if the row has no id.

    Raises:
        Malformed: for an id that is neither text nor a number.
    """
    name = row.get("id") if isinstance(row, Mapping) else None
    if name is None or (isinstance(name, float) and math.isnan(name)):
        return None
    if not isinstance(name, str | numbers.Number) or isinstance(name, bool):
        raise Malformed(f"its id is {short_repr(name)}.", "Give text or a number.")
    text = str(name).encode("utf-8", "replace").decode()
    return " ".join(text.split()) or None


class Names:
    """Makes names unique by adding a number to a name that is in use."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """Returns the name, or the name with the first free number."""
        numbered, count = name, self._counts.get(name, 0)
        while numbered in self._counts:
            count += 1
            numbered = f"{name}-{count}"
        self._counts[name] = max(count, 1)
        self._counts.setdefault(numbered, 1)
        return numbered


def images_of(row: Mapping[str, Any], *columns: str) -> list[StoredImage]:
    """The images of the one non-empty column among several, or [] if all are empty.

    Raises:
        Malformed: for a value that is not an image, or when two columns have images.
    """
    filled = [name for name in columns if not is_empty(row.get(name))]
    if len(filled) > 1:
        raise Malformed(f"it has {' and '.join(filled)}.", "Keep one of them.")
    value = row[filled[0]] if filled else []
    listed = value if isinstance(value, list | tuple) else [value]
    return [_stored(image, filled[0]) for image in listed]


def _stored(image: Any, column: str) -> StoredImage:
    def malformed(why: str, remedy: str = _GIVE_IMAGE, reason: str = "malformed") -> Malformed:
        return Malformed(f"its {column} has the image {short_repr(image)}{why}.", remedy, reason)

    if image is None:
        raise Malformed("one of its images is null.", "Add the image or remove it.", "no image")
    if isinstance(image, Image.Image):
        try:
            return StoredImage.from_pil(image)
        except ImageError as error:
            why = f" of mode {image.mode} ({error.detail})"
            raise malformed(why, "Give an open image of mode RGB.", error.reason) from error
    data, path = image, None
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path")
        # In Arrow, every image of a column has every key, so keys with null are ignored.
        extra = [key for key in image if key not in ("bytes", "path") and image[key] is not None]
        if extra:
            raise malformed(f", with the unsupported key {short_repr(extra[0])}")
    elif isinstance(image, str | Path):
        data, path = None, str(image)
    if path is not None and not isinstance(path, str):
        raise malformed(", with a path that is not text")
    if data is not None:
        if isinstance(data, bytes) and data:
            return StoredImage(data, path)
        reason = "corrupt" if isinstance(data, bytes) else "malformed"
        raise malformed(", which does not hold the bytes of an image file", reason=reason)
    if not path:
        raise malformed(", with neither bytes nor a path", reason="no image")
    if path.startswith(_BASE64) or len(path) > _LONGEST_PATH:
        raise malformed(", which looks like base64", "Decode it to bytes (base64.b64decode).")
    if path.startswith(("http://", "https://")):
        raise malformed(", but web addresses are not fetched", "Download it.", "missing")
    return StoredImage(path=path)


def check_unread(row: Mapping[str, Any], read: Sequence[str] = ()) -> None:
    """Refuse the columns `UNREAD` unless they are empty, or in `read`.

    Raises:
        Malformed: for a column that would be lost, such as a video.
    """
    for key in UNREAD:
        if key not in read and not is_empty(row.get(key)):
            lost = f"its {key} {short_repr(row[key])} would be lost"
            if key in VIDEOS:
                raise Malformed(f"{lost}, since videos are not supported.", _NO_VIDEO, "video")
            raise Malformed(
                f"{lost}.", "Remove the key, or write the record with the columns of docs/data.md."
            )


def _with_trls_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with other projects' keys converted to `prompt`, `chosen` and `rejected`."""
    row = {key: value for key, value in row.items() if not is_empty(value)}
    if isinstance(text := row.get("text"), str) and not {"chosen", "prompt"} & row.keys():
        row |= _nested(text)  # RLHF-V: question, chosen and rejected
    for one, other in (("prompt", "question"), ("rejected", "rejected_response")):
        if one in row and other in row and row[one] != row[other]:
            raise Malformed(f"it has {one} and {other}.", "Keep one of them.")
    if not is_empty(question := row.get("question")) and "prompt" not in row:
        row["prompt"] = question if isinstance(question, str) else messages_of(question, "question")
    dialogues = [key for key in DIALOGUES if key in row]
    if not dialogues:
        return row
    dialogue = messages_of(row[dialogues[0]], dialogues[0])
    rejected_keys = [key for key in ("rejected_response", *OTHER_DIALOGUES) if key in row]
    if "prompt" in row or dialogues[1:] or rejected_keys[1:] or (rejected_keys and "chosen" in row):
        raise Malformed(
            f"it has {', '.join(k for k in (*dialogues, *rejected_keys, 'prompt') if k in row)}.",
            "Keep one form of prompt, chosen and rejected (docs/data.md).",
        )
    if not rejected_keys:  # LLaMA-Factory, or a dialogue that ends with the only response
        answered = dialogue[-1]["role"] == "assistant" and not {"chosen", "rejected"} & row.keys()
        return row | {"chosen" if answered else "prompt": dialogue}
    rejected = row[rejected_keys[0]]
    if rejected_keys == ["rejected_response"]:  # ms-swift
        if isinstance(rejected, str):
            rejected = [{"role": "assistant", "content": rejected}]
        rejected = [*dialogue[:-1], *messages_of(rejected, "rejected_response")]
    return row | {"chosen": dialogue, "rejected": rejected}


def _nested(text: str) -> dict[str, Any]:
    """The JSON object in a text. It may have only the keys of a prompt and its responses."""
    try:
        value = json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, Malformed):
        raise value
    if not isinstance(value, dict):
        raise Malformed(
            f"its text {short_repr(text)} is not a JSON object.",
            "Give prompt, chosen and rejected.",
        )
    if unknown := [key for key in value if key not in _NESTED and not is_empty(value[key])]:
        raise Malformed(
            f"its text has the unknown keys {short_repr(unknown)}.",
            f"Give {', '.join(_NESTED)}.",
        )
    return value


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Malformed:
    """A JSON object, or a `Malformed` if a key is repeated, because Python keeps only one."""
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return Malformed(f"it has the key {short_repr(repeated)} twice.", "Keep one of them.")


def dialogue_of(
    prompt: Any, responses: Mapping[str, Any]
) -> tuple[list[Message], dict[str, str | None]]:
    """Parse a prompt and the responses to it.

    Args:
        prompt: text, messages, or None if the prompt is the part that the responses share.
        responses: column -> text, messages that end with the response, or None.

    Returns:
        The messages of the prompt, and for each column the text of the response or None.

    Raises:
        Malformed: for values that are not messages. Also for responses that differ before their
            last message, or whose earlier messages neither repeat nor continue the prompt.
    """
    opening: list[Message] = []
    if isinstance(prompt, str) and prompt:
        opening = [{"role": "user", "content": _readable(prompt, "prompt")}]
    elif not is_empty(prompt):
        opening = messages_of(prompt, "prompt")
    texts: dict[str, str | None] = dict.fromkeys(responses)
    turns_of: dict[str, list[Message]] = {}  # response -> messages between the prompt and its text
    for name, value in responses.items():
        if not is_empty(value):
            texts[name], before = _response(value, name)
            opening, turns_of[name] = _without_prompt(opening, before)
    (first, shared), *further = turns_of.items() or [("", [])]
    for name, turns_before in further:
        if list(map(_role_and_parts, turns_before)) != list(map(_role_and_parts, shared)):
            raise Malformed(
                f"its {first} and {name} differ before their last message, and TRL scores all of "
                "them.",
                "Give responses of one message each, and put earlier messages into `prompt`.",
            )
    if not (messages := [*opening, *shared]):
        raise Malformed("it has no prompt.", "Add one or remove the record.")
    _check_order(messages, first, len(messages) - len(shared))
    if not any(_text(message).strip() for message in messages):
        raise Malformed("its prompt is empty.", "Write one or remove the record.", "empty text")
    return messages, texts


def messages_of(value: Any, column: str) -> list[Message]:
    """Parse the messages of a column, with keys `role` and `content`, or `from` and `value`.

    A single message needs no list. Several messages may be a struct of lists.

    Raises:
        Malformed: for an unknown type, role, key or part.
    """
    value = _listed(value) if isinstance(value, Mapping) else value
    if not isinstance(value, list | tuple) or not value:
        raise Malformed(
            f"its {column} is {short_repr(value)}, neither text nor messages.",
            "Give text, or messages with a role and content.",
        )
    return [_message(message, column) for message in value]


def _listed(value: Mapping[str, Any]) -> list[Any]:
    """A list with the message, or with the messages of a struct of lists.

    `datasets` stores a Sequence of objects as a struct of lists.
    """
    columns = {key: column for key, column in value.items() if column is not None}
    roles = _either(columns, "role", "from")
    if not isinstance(roles, list) or any(
        not isinstance(column, list) or len(column) != len(roles) for column in columns.values()
    ):
        return [value]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def with_system(prompt: list[Message], system: Any) -> list[Message]:
    """The prompt with a system message added at the beginning.

    Raises:
        Malformed: when the prompt already has a system message, or `system` is not text.
    """
    if not isinstance(system, str):
        raise Malformed(f"its system is {short_repr(system)}.", "Give text.")
    if prompt[0]["role"] == "system":
        raise Malformed("it has `system` and a system message in its prompt.", "Keep one of them.")
    return [{"role": "system", "content": _readable(system, "system")}, *prompt]


def _response(value: Any, column: str) -> tuple[str, list[Message]]:
    """The text of a response, and the messages before it."""
    if isinstance(value, str):
        return _readable(value, column), []
    *turns, last = messages_of(value, column)
    if last["role"] != "assistant":
        raise Malformed(
            f"its {column} does not end with the assistant.", "Put the assistant's response last."
        )
    parts = last["content"]
    if isinstance(parts, str):
        return parts, turns
    if any(part["type"] == "image" for part in parts):
        raise Malformed(f"its {column} holds an image.", "A response is text.")
    return "".join(part["text"] for part in parts), turns


def _message(message: Any, column: str) -> Message:
    def malformed(why: str) -> Malformed:
        return Malformed(
            f"its {column} has the message {short_repr(message)}: {why}.", _GIVE_MESSAGE
        )

    if not isinstance(message, Mapping):
        raise malformed("it is not an object")
    role = _either(message, "role", "from")
    if not isinstance(role, str) or role not in _ROLES:
        raise malformed(f"the role {short_repr(role)} is not one of {', '.join(_ROLES)}")
    if foreign := _foreign(message, _MESSAGE_KEYS):
        raise malformed(f"{foreign} would be lost")
    content = _either(message, "content", "value")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": _readable(content, column)}
    content = [content] if isinstance(content, Mapping) else content
    if not isinstance(content, list | tuple):
        raise malformed(f"its content is {short_repr(content)}")
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and "video" in kind:
            raise malformed(f"the part {short_repr(part)} is a video, and videos are not supported")
        if not isinstance(kind, str) or kind not in ("text", "image"):
            raise malformed(f"the part {short_repr(part)} is not of type text or image")
        # In Arrow, every part has all fields. An image part has no text.
        if foreign := _foreign(part, ("type", "text") if kind == "text" else ("type",)):
            raise malformed(f"{foreign} of a part would be lost")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise malformed(f"the part {short_repr(part)} has no text")
        parts.append(
            text_part(_readable(part["text"], column)) if kind == "text" else {"type": "image"}
        )
    return {"role": _ROLES[role], "content": parts}


def _readable(text: str, column: str) -> str:
    """Returns the text, or raises `Malformed` if a tokenizer cannot read it as intended."""
    if len(text) > _LONGEST_TEXT:
        raise Malformed(
            f"its {column} has {len(text):,} characters, more than {_LONGEST_TEXT:,}.",
            "Shorten it or remove the record.",
            "too long",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed(
            f"its {column} holds half of a surrogate pair.", "Write it as UTF-8.", "not Unicode"
        ) from None
    if "\0" in text:
        raise Malformed(f"its {column} holds a null character.", "Remove it.", "control characters")
    if _JSON_MESSAGES.match(text):
        raise Malformed(
            f"its {column} is the text {short_repr(text)}, which holds messages as JSON.",
            "Decode it with json.loads.",
        )
    return str(text)


def _without_prompt(
    prompt: list[Message], turns: list[Message]
) -> tuple[list[Message], list[Message]]:
    """Splits off the prompt from the messages of a response, which may repeat the prompt."""
    if not prompt or not turns:
        return prompt, turns
    (system, opening), (turns_system, later_turns) = _split(prompt), _split(turns)
    repeated = later_turns[: len(opening)]
    same = len(repeated) == len(opening) and all(map(_asks_the_same, opening, repeated))
    if not same or (system and turns_system and system != turns_system):
        return prompt, turns
    # The place of the image, or the system message, may be in only one of the two.
    merged = [max(pair, key=_image_count) for pair in zip(opening, repeated, strict=True)]
    return [*(system or turns_system), *merged], later_turns[len(opening) :]


def _check_order(messages: Sequence[Message], response: str, start: int) -> None:
    """Checks that the messages after `start`, moved from a response, continue the prompt."""
    for last, message in zip(
        messages[max(start - 1, 0) :], messages[max(start, 1) :], strict=False
    ):
        if {last["role"], message["role"]} != {"user", "assistant"} and last["role"] != "system":
            raise Malformed(
                f"its {response} has a message of the {message['role']} after one of the "
                f"{last['role']}, so it does not continue the prompt. TRL scores all messages.",
                "Put the dialogue into `prompt`, and only the response into chosen and rejected.",
            )
    if messages[-1]["role"] != "user":
        raise Malformed(
            f"its prompt ends with a message of the {messages[-1]['role']}.",
            "End it with the user message that chosen and rejected answer.",
        )


def _split(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Splits messages into the system message at the beginning, if any, and the rest."""
    count = int(messages[0]["role"] == "system")
    return messages[:count], messages[count:]


def _parts(message: Message) -> list[dict[str, str]]:
    content = message["content"]
    parts = [text_part(content)] if isinstance(content, str) else content
    pieces = ([part] if part["type"] == "image" else split_at_tags(part["text"]) for part in parts)
    return list(chain.from_iterable(pieces))


def _role_and_parts(message: Message) -> tuple[str, list[dict[str, str]]]:
    return message["role"], _parts(message)


def _text(message: Message) -> str:
    """The text of a message without image tags."""
    texts = (part["text"].strip() for part in _parts(message) if part["type"] == "text")
    return " ".join(text for text in texts if text)


def _image_count(message: Message) -> int:
    return sum(part["type"] == "image" for part in _parts(message))


def _asks_the_same(one: Message, other: Message) -> bool:
    """Whether two messages are equal, except that one of them may omit the image's place."""
    if one["role"] != other["role"] or _text(one) != _text(other):
        return False
    return 0 in (_image_count(one), _image_count(other)) or _parts(one) == _parts(other)


def _either(item: Mapping[str, Any], *names: str) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _foreign(item: Mapping[str, Any], allowed: Sequence[str]) -> str:
    """Non-empty keys that are not allowed, listed for an error message."""
    keys = [key for key, value in item.items() if key not in allowed and not is_empty(value)]
    return ", ".join(map(short_repr, keys))
