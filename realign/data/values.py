"""Values of other projects' columns: outputs, prompts that were rendered, and images in base64."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from realign.data.errors import Malformed, short_repr, shorten

_VICUNA = re.compile(
    r"(?:<s>\s*)?(?P<system>.*?)\s*\bUSER:(?P<question>.*)ASSISTANT:\s*", re.DOTALL
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
"""System message of LLaVA's template. A prompt that was rendered with it repeats the template."""


def text_of(value: Any, name: str) -> Any:
    """The text of an output, which may be a message of any role.

    Raises:
        Malformed: if it is no text.
    """
    if isinstance(value, Mapping):
        value = value.get("value") if value.get("value") is not None else value.get("content")
    if not isinstance(value, str):
        raise Malformed(f"its {name} is {short_repr(value)}, not text.", "Give text.")
    return value


def unrendered(prompt: Any) -> Any:
    """The question of a prompt that was rendered with Vicuna's template, or the prompt itself.

    Raises:
        Malformed: for a rendered prompt of several turns.
    """
    if not isinstance(prompt, str) or not (found := _VICUNA.fullmatch(prompt)):
        return prompt
    question, system = found["question"].strip(), " ".join(found["system"].split())
    if "ASSISTANT:" in question or "USER:" in question:
        raise Malformed("its prompt holds several rendered turns.", "Give the prompt as messages.")
    if system in ("", _VICUNA_SYSTEM):
        return question
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def decoded(encoded: Any) -> bytes:
    """The bytes of an image in base64.

    Raises:
        Malformed: for other content.
    """
    try:
        return encoded if isinstance(encoded, bytes) else base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise Malformed(
            f"its image_bytes are not base64 ({shorten(str(error))}).", "Give the bytes of a file."
        ) from None
