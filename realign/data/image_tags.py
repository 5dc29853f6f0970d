"""Image tags in text: `<image>`, `<|image_pad|>` and others, which data sets write for an image.

LLaVA, RLHF-V, ms-swift and LLaMA-Factory data hold `<image>` whatever the model's own token is, and
exports of rendered prompts hold the token of another model.
"""

from __future__ import annotations

import re

_KNOWN = (
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>"  # Qwen
    r"|<img>(?:<IMG_CONTEXT>)+</img>"  # InternVL
    r"|<img>[^<>\n]{1,1024}</img>"  # Qwen-VL, around a path
    r"|\(?(?i:<image>)(?:\./)?(?i:</image>)\)?"  # MiniCPM-V, Mantis
    r"|<\|begin_of_image\|>(?:<\|(?:image|endoftext)\|>)+<\|end_of_image\|>"  # GLM
    r"|<begin_of_image>(?:<image_placeholder>)+<end_of_image>"  # Janus
    r"|<start_of_image>(?:(?:<image_soft_token>)*<end_of_image>)?"  # Gemma 3
    r"|<\|image>(?:<\|image\|>)+<image\|>"  # Gemma 4
    r"|<\|START_OF_IMG\|>(?:<\|IMG_PATCH\|>)+<\|END_OF_IMG\|>"  # Cohere
    r"|<\|IMAGE_START\|>(?:<\|(?:image@placeholder|IMAGE_PLACEHOLDER)\|>)+<\|IMAGE_END\|>"  # ERNIE
    r"|<\|media_begin\|>image<\|media_content\|>(?:<\|media_pad\|>)+<\|media_end\|>"  # Kimi
    r"|<\|img\|>(?:<\|imgpad\|>)+<\|endofimg\|>"  # dots
    r"|<fake_token_around_image><image><fake_token_around_image>"  # Idefics 2
    r"|<im_start>(?:<im_patch>|<image>)+<im_end>"  # LLaVA 1.0, Step
    r"|(?i:<image ?/?>|<img ?/?>|<imagehere>)"
    r"|(?i:<\|?image[ _-]?(?P<number>\d{1,4})\|?>)"  # Phi, MMMU
    r"|(?i:<\|image\|>|<\|imgpad\|>|<\|media_pad\|>|<\|?image[_-](?:pad|token|placeholder)\|?>)"
    r"|<IMG_CONTEXT>|<image_soft_token>"
    r"|<imgpad>|<im_patch>|\[IMG\]|<\|img\|>|<\|IMG_PATCH\|>|<\|patch\|>|<\|image@placeholder\|>"
)
TAGS = re.compile(_KNOWN)


def tags_with(image: str, start: str | None = None, end: str | None = None) -> re.Pattern[str]:
    """The tags of all families, and a processor's own image token.

    Args:
        image: the token.
        start: written in front of a run of them.
        end: written behind it.
    """
    own = re.escape(image)
    framed = f"{re.escape(start)}(?:{own})+{re.escape(end)}|" if start and end else ""
    return re.compile(f"{framed}{_KNOWN}|{own}")


def has_tag(text: str, tags: re.Pattern[str] = TAGS) -> bool:
    """Whether a text holds an image tag of any known family."""
    return tags.search(text) is not None


def split_at_tags(text: str, tags: re.Pattern[str] = TAGS) -> list[dict[str, str]]:
    """Split a text at its image tags.

    Args:
        text: of a message.
        tags: what counts as a tag.

    Returns:
        Typed parts in order, `{"type": "text", "text": ...}` and `{"type": "image"}`. Text beside a
        tag loses the white space there. Empty text gives no part.
    """
    parts: list[dict[str, str]] = []
    end = 0
    for tag in tags.finditer(text):
        _append(parts, text[end : tag.start()].strip() if end else text[: tag.start()].rstrip())
        parts.append({"type": "image"})
        end = tag.end()
    _append(parts, text[end:].lstrip() if end else text)
    return parts


def _append(parts: list[dict[str, str]], text: str) -> None:
    if text:
        parts.append({"type": "text", "text": text})
