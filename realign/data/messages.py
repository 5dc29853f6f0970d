"""Chat messages in typed parts, with images placed by image parts or by image tags in text."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from realign.data.image_tags import TAGS, split_at_tags


class ChatError(ValueError):
    """Messages that cannot be rendered: the problem and the remedy."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem, self.remedy = problem, remedy


def place_images(
    messages: Iterable[Any], images: int, tags: re.Pattern[str] = TAGS
) -> list[dict[str, Any]]:
    """Messages with content as typed parts, every image in its place.

    Image parts place images. Without any, image tags in user messages do. Without these, all images
    go in front of the first user message, as TRL puts them.

    Args:
        messages: role, and content as text or parts of type text and image.
        images: how many.
        tags: what counts as an image tag.

    Raises:
        ChatError: when a message is malformed, or places and images disagree.
    """
    typed = [_typed(message) for message in messages]
    users = [message for message in typed if message["role"] == "user"]
    if not users:
        raise ChatError("it has no user message.", "Give one.")
    placed = sum(part["type"] == "image" for message in typed for part in message["content"])
    for message in typed:
        tag = next(filter(None, map(tags.search, texts_of(message))), None)
        if tag and (placed or message["role"] != "user"):
            beside = "beside image parts" if placed else f"in a message of the {message['role']}"
            raise ChatError(
                f"its prompt holds the image tag {tag[0]!r} {beside}.",
                "Place images by parts of type image, or by tags in user messages.",
            )
    found = [tag for m in users for text in texts_of(m) for tag in tags.finditer(text)]
    places = placed or len(found)
    if places and places != images:
        how = f"image tags such as {found[0][0]!r}" if found else "parts"
        raise ChatError(
            f"its messages place {places} image(s), by {how}, and {images} are given.",
            "Give as many images as the prompt has places.",
        )
    for number, tag in enumerate(found, 1):
        if int(tag["number"] or number) != number:
            raise ChatError(
                f"its image tag {tag[0]!r} is number {number} of the prompt.",
                "Number image tags from 1 in the order of the text.",
            )
    for message in users if found else ():
        message["content"] = [
            part for given in message["content"] for part in split_at_tags(given["text"], tags)
        ]
    if not places:
        users[0]["content"] = [{"type": "image"} for _ in range(images)] + users[0]["content"]
    return typed


def text_part(text: str) -> dict[str, str]:
    """A typed part."""
    return {"type": "text", "text": text}


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message in typed parts."""
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def _typed(message: Any) -> dict[str, Any]:
    role, content = (
        (message.get("role", "user"), message.get("content"))
        if isinstance(message, Mapping)
        else (None, None)
    )
    parts = [text_part(content)] if isinstance(content, str) else content
    if not isinstance(role, str) or not isinstance(parts, list) or not all(map(_is_part, parts)):
        raise ChatError(
            f"it has the message {reprlib.repr(message)}.",
            "Give a role and, as content, text or parts of type text and image.",
        )
    clean = [text_part(p["text"]) if p["type"] == "text" else {"type": "image"} for p in parts]
    return {"role": role, "content": clean}


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    text = part.get("type") == "text" and isinstance(part.get("text"), str)
    return text or part.get("type") == "image"
