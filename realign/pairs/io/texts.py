"""Checks of a record's texts, and image tags in prompts."""

from __future__ import annotations

import re

from realign.data.errors import short_repr
from realign.data.messages import TAGS, place_images, texts_of
from realign.data.records import has_parts

_TAGS = re.compile(r"</?[a-zA-Z!][^<>]*>")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def problem_of(text: str) -> tuple[str, str] | None:
    """(reason, detail) for an invalid text; None for a valid one."""
    quoted = short_repr(text)
    if _CONTROL.search(text):
        return "control characters", quoted
    if TAGS.search(text):
        return "image token", f"{quoted} places an image inside the text"
    if not any(c.isalnum() for c in text):
        return "empty text", f"{quoted} has no letter or digit"
    if len(_TAGS.sub("", text).strip()) < len(text.strip()) / 2:
        return "mostly markup", quoted
    return None


def printable(text: str) -> str:
    """Text that can be stored as UTF-8: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()


def placed(prompt: list[dict], count: int) -> list[dict]:
    """A prompt with typed parts for the image tags of its user messages.

    A prompt in text stays in text if all images are before it, their default place.

    Args:
        prompt: messages.
        count: images of the record.

    Raises:
        Malformed: if the number of tags and image parts is not `count`.
    """
    typed = place_images(prompt, count)
    first = next(message for message in typed if message["role"] == "user")
    leading = [part["type"] for part in first["content"][:count]] == ["image"] * count
    if has_parts(prompt) or not leading:
        return typed
    return [message | {"content": "".join(texts_of(message))} for message in typed]
