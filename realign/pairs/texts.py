"""What is wrong with a text, before a model sees it."""

from __future__ import annotations

import re

_PLACEHOLDER = "<image>"
_TAGS = re.compile(r"</?[a-zA-Z!][^<>]*>")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def problem_of(text: str) -> tuple[str, str] | None:
    """(reason, detail) why a text cannot be used."""
    if printable(text) != text:
        return "not Unicode", "the text holds half of a surrogate pair"
    shown = repr(text[:80])
    if _CONTROL.search(text):
        return "control characters", shown
    if _PLACEHOLDER in text:
        return "image token", f"{shown} places an image inside the text"
    bare = _TAGS.sub("", text)
    if not any(c.isalnum() for c in text):
        return "empty text", f"{shown} has no letter or digit"
    if len(bare.strip()) < len(text.strip()) / 2:
        return "mostly markup", shown
    return None


def printable(text: str) -> str:
    """Text that can be stored as UTF-8: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()


def without_placeholder(message: dict) -> str | list[dict]:
    """Content without LLaVA's <image> at its beginning or end: pictures come first anyway."""
    content = message["content"]
    if message["role"] != "user" or not isinstance(content, str):
        return content
    # By hand: a pattern that takes white space on both sides is slow on much of it.
    text = content
    while text.lstrip().startswith(_PLACEHOLDER):
        text = text.lstrip().removeprefix(_PLACEHOLDER).lstrip()
    while text.rstrip().endswith(_PLACEHOLDER):
        text = text.rstrip().removesuffix(_PLACEHOLDER).rstrip()
    return text
