"""English word lists of the rule-based masker, for captions and answers about images.

`segments.py` uses them. The words are in `words.txt`. Words are lower case, and the words of a
phrase are separated by spaces.
"""

from __future__ import annotations

import re
from pathlib import Path


def _read() -> dict[str, frozenset[str]]:
    """The sections of `words.txt`: title -> words."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    _, *parts = re.split(r"^\[(.+)\]$", re.sub(r"(?m)^#.*", "", text), flags=re.MULTILINE)
    return {
        title: frozenset(words.split())
        for title, words in zip(parts[::2], parts[1::2], strict=True)
    }


_LISTS = _read()

NUMBERS = _LISTS["numbers"]
NUMBER_PHRASES = (
    "a couple of",
    "a pair of",
    "couple of",
    "pair of",
    "a dozen",
    "a few",
    "a lot of",
    "a number of",
    "a single",
    "dozens of",
    "hundreds of",
    "lots of",
    "pairs of",
)

ATTRIBUTES = _LISTS["attributes"]
ATTRIBUTES_OR_NOUNS = _LISTS["attributes or nouns"]
"""Attributes that are nouns if no noun follows: "an orange on a plate"."""

PREPOSITIONS = _LISTS["prepositions"]
POSITIONS = _LISTS["positions"]
"""Positions in the image or on an object. Part of a noun phrase before a noun: "the top shelf"."""

RELATION_PHRASES = (
    *(f"{how} the {side} side{of}" for how in ("on", "to", "at") for side in _LISTS["sides"]
      for of in (" of", "")),
    *(f"{how} the {part} of" for how in ("on", "to", "at", "in", "near", "along")
      for part in _LISTS["parts"]),
    *(f"{how} the {part}" for how in ("on", "to", "at", "in") for part in (
        "left", "right", "top", "bottom", "front", "back", "middle", "center", "centre", "side",
        "rear", "far left", "far right", "background", "foreground", "distance")),
    *(f"{how} the {a} {b}{c}" for how in ("in", "on", "at", "to")
      for a in ("top", "bottom", "upper", "lower", "far", "near")
      for b in ("left", "right", "center", "middle") for c in (" corner of", " corner", "")),
    "across from", "adjacent to", "ahead of", "apart from", "attached to", "away from", "back to",
    "close to", "closer to", "connected to", "covered by", "covered in", "covered with",
    "face to face", "far from", "full of", "in back of", "in between", "in front", "in front of",
    "in line with", "inside of", "leaning against", "leaning on", "left of", "next to", "off of",
    "on either side of", "on both sides of", "on each side of", "on board", "on top", "on top of",
    "out of", "outside of", "right of", "side by side", "surrounded by", "to the side of",
    "together with", "upside down", "up against",
)  # fmt: skip

DETERMINERS = _LISTS["determiners"]

IMAGE_PHRASES = tuple(
    f"{how} {the} {image}"
    for how in ("in", "of", "within", "throughout")
    for the in ("the", "this", "an", "each", "that")
    for image in sorted(_LISTS["images"])
)
"""Phrases about the image itself. They are not masked."""

OTHER_WORDS = _LISTS["other words"]
"""Words that are never masked."""

NO_VERBS = _LISTS["places in -ing"] | _LISTS["things in -ed"] | _LISTS["things in -ing"]
NO_VERBS |= {f"{word}s" for word in _LISTS["things in -ing"]}
"""Nouns in -ing or -ed, and words in -ing before a noun: "dining table"."""
NO_ADVERBS = _LISTS["not adverbs"]
"""Words in -ly that are not adverbs."""


def _forms(verb: str) -> list[str]:
    """The regular forms of a verb."""
    if verb.endswith("e"):
        return [verb, verb + "s", verb + "d", verb[:-1] + "ing"]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return [verb, verb[:-1] + "ies", verb[:-1] + "ied", verb + "ing"]
    third = verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "o")) else "s")
    twice = verb + verb[-1]
    return [verb, third, verb + "ed", verb + "ing", twice + "ed", twice + "ing"]


VERBS = _LISTS["irregular forms"].union(*map(_forms, _LISTS["verbs"]))
