"""Chat messages as typed parts, with images placed by image parts or by image tags in the text.

Data sets mark the place of an image with tags of many model families. LLaVA, RLHF-V, ms-swift and
LLaMA-Factory data use `<image>` with every model. Exports of rendered prompts contain the image
token of the model that they were rendered for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from realign.data.errors import Malformed, short_repr

_FAMILY_TAGS = (
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
TAGS = re.compile(_FAMILY_TAGS)
"""The image tags of all known families."""
VIDEO_TAGS = re.compile(
    r"(?i:<video ?/?>|<\|?video\|?>|<\|?(?:\w+_)?video[_-](?:pad|(?:soft_)?token|placeholder)\|?>"
    r"|<\|begin_of_video\|>)"
)
"""The video tags of all known families. Videos are not supported."""


def tags_with(image: str, start: str | None = None, end: str | None = None) -> re.Pattern[str]:
    """A pattern of all families' tags and a processor's own image token.

    Args:
        image: the image token.
        start: text before a run of image tokens.
        end: text after it. A frame counts only if no run of image tokens contains its start:
            a search from every place in a run takes quadratic time.
    """
    token, framed_tag = re.escape(image), ""
    if start and end and start not in image * (len(start) // len(image) + 2):
        framed_tag = f"{re.escape(start)}(?:{token})+{re.escape(end)}|"
    return re.compile(f"{framed_tag}{_FAMILY_TAGS}|{token}")


def split_at_tags(text: str, tags: re.Pattern[str] = TAGS) -> list[dict[str, str]]:
    """Split a text at its image tags.

    Returns:
        Typed parts in order, `{"type": "text", "text": ...}` and `{"type": "image"}`. White space
        next to a tag is removed. Empty text gives no part.
    """
    pieces: list[str] = []
    end = 0
    for tag in tags.finditer(text):
        pieces.append(text[end : tag.start()])
        end = tag.end()
    last = len(pieces)
    parts: list[dict[str, str]] = []
    for place, piece in enumerate([*pieces, text[end:]]):
        piece = piece.lstrip() if place > 0 else piece
        piece = piece.rstrip() if place < last else piece
        parts += [text_part(piece)] if piece else []
        parts += [{"type": "image"}] if place < last else []
    return parts


def place_images(
    messages: Iterable[Any], images: int, tags: re.Pattern[str] = TAGS
) -> list[dict[str, Any]]:
    """Messages with their content as typed parts, and every image in its place.

    Image parts define the places. Without image parts, the image tags in user messages do. Without
    either, all images are placed before the first user message, as in TRL.

    Args:
        messages: messages with a role, and content as text or as parts of type text and image.
        images: number of images in the prompt.
        tags: regular expression for an image tag.

    Raises:
        Malformed: when a message is malformed, or the numbers of places and images differ.
    """
    typed = [_typed(message) for message in messages]
    users = [message for message in typed if message["role"] == "user"]
    if not users:
        raise Malformed("it has no user message.", "Add one.")
    parts = sum(part["type"] == "image" for message in typed for part in message["content"])
    for message in typed:
        tag = next(filter(None, map(tags.search, texts_of(message))), None)
        if tag and (parts or message["role"] != "user"):
            where = "beside image parts" if parts else f"in a message of the {message['role']}"
            raise Malformed(
                f"its prompt holds the image tag {tag[0]!r} {where}.",
                "Place images by parts of type image, or by tags in user messages.",
            )
    in_text = [tag for m in users for text in texts_of(m) for tag in tags.finditer(text)]
    places = parts or len(in_text)
    if places and places != images:
        form = f"image tags such as {in_text[0][0]!r}" if in_text else "image parts"
        raise Malformed(
            f"its messages place {places} image(s), by {form}, and {images} are given.",
            "Give as many images as the prompt has places.",
        )
    for number, tag in enumerate(in_text, 1):
        if int(tag["number"] or number) != number:
            raise Malformed(
                f"its image tag {tag[0]!r} is number {number} of the prompt.",
                "Number the image tags from 1, in the order of the text.",
            )
    for message in users if in_text else ():
        message["content"] = [
            piece for part in message["content"] for piece in split_at_tags(part["text"], tags)
        ]
    if not places:
        users[0]["content"] = [{"type": "image"} for _ in range(images)] + users[0]["content"]
    return typed


def text_part(text: str) -> dict[str, str]:
    """A typed part with text."""
    return {"type": "text", "text": text}


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message in typed parts."""
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def _typed(message: Any) -> dict[str, Any]:
    """A copy of a message with its content as typed parts."""
    try:
        content = message["content"]
        parts = [text_part(content)] if isinstance(content, str) else content
        if any(part["type"] not in ("text", "image") for part in parts):
            raise TypeError("another part")
        clean = [text_part(p["text"]) if p["type"] == "text" else {"type": "image"} for p in parts]
        return {"role": message.get("role", "user"), "content": clean}
    except (KeyError, TypeError) as error:
        raise Malformed(
            f"it has the message {short_repr(message)}.",
            "Give a role, and text or parts of type text and image as content. Videos are not "
            "supported.",
        ) from error
