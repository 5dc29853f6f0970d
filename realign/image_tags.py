"""Image tags in text: `<image>`, `<|image_pad|>` and others, which data sets write for an image.

LLaVA, RLHF-V, ms-swift and LLaMA-Factory data hold `<image>` whatever the model's own token is, and
exports of rendered prompts hold the token of another model.
"""

from __future__ import annotations

import re

_TAG = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>"  # Qwen
    r"|<img>(?:<IMG_CONTEXT>)+</img>"  # InternVL
    r"|<img>[^<>\n]{1,1024}</img>"  # Qwen-VL, around a path
    r"|\(?<image>\./</image>\)?"  # MiniCPM-V
    r"|<\|image_(?P<number>\d+)\|>"  # Phi
    r"|<image>|<Image>|<IMAGE>|<img>|<\|image\|>|<\|image_pad\|>|<\|IMAGE_PAD\|>|<IMG_CONTEXT>"
    r"|<image_soft_token>|<start_of_image>|<image_placeholder>|<image-placeholder>|<ImageHere>"
    r"|<\|imgpad\|>|<imgpad>|<\|media_pad\|>|<im_patch>|\[IMG\]"
)


def has_tag(text: str) -> bool:
    """Whether a text holds an image tag of any known family."""
    return _TAG.search(text) is not None


def split_at_tags(text: str) -> list[dict[str, str]]:
    """Split a text at its image tags.

    Args:
        text: of a message.

    Returns:
        Typed parts in order, `{"type": "text", "text": ...}` and `{"type": "image"}`. Text beside a
        tag loses the white space there. Empty text gives no part.
    """
    parts: list[dict[str, str]] = []
    end = 0
    for tag in _TAG.finditer(text):
        _append(parts, text[end : tag.start()].strip() if end else text[: tag.start()].rstrip())
        parts.append({"type": "image"})
        end = tag.end()
    _append(parts, text[end:].lstrip() if end else text)
    return parts


def _append(parts: list[dict[str, str]], text: str) -> None:
    if text:
        parts.append({"type": "text", "text": text})
