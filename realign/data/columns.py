"""Column names of preference data: columns that are read, and names that may change the meaning.

A file may have any number of further columns. Most of them are facts about a row, such as `idx` or
`chosen_score`, and are ignored. A name such as `reject` or `image_2` may hold a side of the
preference or an image. A reader that ignored it would train on something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

DIALOGUES = ("conversations", "messages")
OTHER_DIALOGUES = ("rejected_conversations", "rejected_messages")
UNREAD = ("tools", "chat_template_kwargs", "history", "rejected_image", "rejected_images")
VIDEOS = ("video", "videos")
UNREAD += (*VIDEOS, "audio", "audios", "objects")
"""Columns that are errors unless they are empty, or a format reads them."""
IMAGE_FILES = ("image_path", "img_path")
"""Columns that name the image if neither `images` nor `image` has one."""
SOURCES = {  # field of a row -> the columns that can hold it
    "prompt": ("prompt", "question", *DIALOGUES, "text", "chosen", "instruction", "query"),
    "chosen": ("chosen", *DIALOGUES, "text", "response", "output"),
    "rejected": ("rejected", "rejected_response", *OTHER_DIALOGUES, "text", "rejected_images"),
    "images": ("images", "image", *IMAGE_FILES),
}
COLUMNS = frozenset(name for names in SOURCES.values() for name in names) | {
    "id",
    "system",
    "retrieved_images",
    "retrieved_image",
    "retrieved_chosen",
    *UNREAD,
}
"""Every column that `entry_of` looks at."""
_SIDES = "chosen reject rejected win winner winning lose loser losing preferred dispreferred "
_SIDES += "retrieved preference preferences worse worst better negative negatives y"
_OTHERS = (
    "prompt prompts query queries instruction instructions conversation conversations message "
)
_OTHERS += "messages dialogue dialog history system context tools response responses completion "
_OTHERS += "completions output outputs video videos audio audios"
_FACTS = "id ids idx index name source src type model models score scores rating ratings reward "
_FACTS += (
    "rewards rationale rationales reason logp logps logprob logprobs len length lengths token "
)
_FACTS += "tokens count cnt num rank width height size hash sha sha256 md5 category class split "
_FACTS += "dataset lang language time date version license domain tag tags url path file filename"
_IMAGES = {
    *("image", "images", "img", "imgs", "photo", "photos", "pic", "pics"),
    "picture",  # codespell:ignore
    "pictures",  # codespell:ignore
}
_MEDIA = _IMAGES | {"video", "videos", "frame", "frames", "audio", "audios"}
_SIDE_WORDS = frozenset(_SIDES.split())
_WORDS = _SIDE_WORDS | frozenset(_OTHERS.split()) | _IMAGES
_FACT_WORDS = frozenset(_FACTS.split())
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def is_empty(value: Any) -> bool:
    """Whether a value is empty. Arrow fills absent keys with null, and some writers with ""."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


@lru_cache(4096)
def may_change(name: str) -> bool:
    """Whether a column of this name may change the meaning of a row.

    A word such as "rejected" or "image" makes it so, unless the last word names a fact, as in
    `chosen_score` and `image_id`. The path of a rejected image is an image.
    """
    words = [word.lower() for word in _WORD.findall(str(name)[:200])]
    found = _WORDS.intersection(words)
    if not found or (words[-1] in _FACT_WORDS and not (found & _SIDE_WORDS and found & _IMAGES)):
        return False
    return found != {"y"} or len(words) > 1


@lru_cache(4096)
def names_media(name: str) -> bool:
    """Whether a column's name has a word for an image, a video or sound, as in `image_url`."""
    return bool(_MEDIA.intersection(word.lower() for word in _WORD.findall(str(name)[:200])))
