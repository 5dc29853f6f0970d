"""Normalised words of a text, for the comparison of responses."""

from __future__ import annotations

import re
import unicodedata

_SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # kana, Han


def words_of(text: str) -> list[str]:
    """The words of a text, with case folded, in Unicode's NFKC form, and without punctuation.

    Chinese and Japanese have no spaces between words, so each character counts as a word.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = _SPACELESS.sub(r" \g<0> ", folded)
    return "".join(c if c.isalnum() or _is_mark(c) else " " for c in spaced).split()


def _is_mark(c: str) -> bool:
    """Whether a character is a vowel sign or accent. It is part of the preceding letter."""
    return unicodedata.category(c).startswith("M")
