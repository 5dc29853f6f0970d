"""Words of a text, normalised, for comparisons of responses."""

from __future__ import annotations

import re
import unicodedata

_SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # kana, Han


def words_of(text: str) -> list[str]:
    """Words in one case, composed by Unicode's NFKC, without punctuation.

    Chinese and Japanese put no space between words, so each of their characters is a word.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = _SPACELESS.sub(r" \g<0> ", folded)
    return "".join(c if c.isalnum() or _is_mark(c) else " " for c in spaced).split()


def _is_mark(c: str) -> bool:
    """Whether a character is a vowel sign or accent, which belongs to the letter before it."""
    return unicodedata.category(c).startswith("M")
