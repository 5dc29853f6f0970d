"""Validation of a record's texts, and placement of image tags in prompts."""

from __future__ import annotations

import re

from realign.data.errors import short_repr
from realign.data.messages import TAGS, VIDEO_TAGS, place_images, texts_of
from realign.data.records import has_parts

_TAGS = re.compile(r"</?[a-zA-Z!][^<>]*>")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def problem_of(text: str) -> tuple[str, str] | None:
    """(reason, detail) for an invalid text, or None for a valid one."""
    quoted = short_repr(text)
    if _CONTROL.search(text):
        return "control characters", quoted
    if TAGS.search(text):
        return "image token", f"{quoted} contains an image tag"
    if VIDEO_TAGS.search(text):
        return "video", f"{quoted} contains a video tag, and videos are not supported"
    if not any(c.isalnum() for c in text):
        return "empty text", f"{quoted} has no letter or digit"
    if len(_TAGS.sub("", text).strip()) < len(text.strip()) / 2:
        return "mostly markup", quoted
    return None


def printable(text: str) -> str:
    """The text with lone surrogates replaced by question marks, so that it is valid UTF-8."""
    return text.encode("utf-8", "replace").decode()


def placed(prompt: list[dict], count: int) -> list[dict]:
    """Converts the image tags of a prompt's user messages to typed parts.

    If all images are at the beginning, which is the default, a plain-text prompt stays plain text.

    Args:
        prompt: messages of the prompt.
        count: number of images of the record.

    Raises:
        Malformed: if the number of tags and image parts is not `count`.
    """
    typed = place_images(prompt, count)
    first = next(message for message in typed if message["role"] == "user")
    leading = [part["type"] for part in first["content"][:count]] == ["image"] * count
    if has_parts(prompt) or not leading:
        return typed
    return [message | {"content": "".join(texts_of(message))} for message in typed]
