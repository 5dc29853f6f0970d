"""Normalised words of a text, and the matching of two lists of words, in bounded time."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

LONGEST = 20_000
"""Limit on a reply and on a text that a model masks, in characters. Responses have up to 10,000."""

_SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # kana, Han
_MARKS = 30
"""Accents in a row, the limit of Unicode's stream-safe texts (UAX 15)."""
_JOINER = "\u034f"
"""The mark with which UAX 15 splits longer rows."""
_STEPS = 1_000_000
"""Steps of a comparison, which take about 0.1 s."""


def words_of(text: str) -> list[str]:
    """The words of a text, with case folded, in Unicode's NFKC form, and without punctuation.

    Chinese and Japanese have no spaces between words, so each character counts as a word.
    """
    folded = unicodedata.normalize("NFKC", _stream_safe(text)).casefold()
    spaced = _SPACELESS.sub(r" \g<0> ", folded)
    return "".join(c if c.isalnum() or _is_mark(c) else " " for c in spaced).split()


def _is_mark(c: str) -> bool:
    """Whether a character is a vowel sign or accent. It is part of the preceding letter."""
    return unicodedata.category(c).startswith("M")


def _stream_safe(text: str) -> str:
    """The text with long rows of accents split, because Unicode sorts a row in quadratic time."""
    if text.isascii():
        return text
    parts, row = [], 0
    for c in text:
        for part in c if c.isascii() else unicodedata.normalize("NFKD", c):
            row = row + 1 if unicodedata.combining(part) else 0
            parts.append(_JOINER + part if row and row % _MARKS == 0 else part)
    return "".join(parts)


class Matcher(difflib.SequenceMatcher):
    """`difflib.SequenceMatcher` of two lists of words in bounded time.

    `difflib` takes cubic time for lists of repeated words. After about 0.1 s, this matcher compares
    only the beginnings and ends of the remaining parts, so it finds fewer matches.
    """

    def __init__(self, a: Sequence[str], b: Sequence[str]) -> None:
        super().__init__(None, a, b, autojunk=False)
        self._a, self._b = a, b
        count = Counter(b)
        self._costs = [0, *accumulate(1 + count[word] for word in a)]
        self._steps = _STEPS

    def find_longest_match(
        self,
        alo: int = 0,  # codespell:ignore
        ahi: int | None = None,
        blo: int = 0,
        bhi: int | None = None,
    ) -> difflib.Match:
        """The longest match in both ranges, or a match at an end of the ranges."""
        a = alo, len(self._a) if ahi is None else ahi  # codespell:ignore
        b = blo, len(self._b) if bhi is None else bhi
        self._steps -= self._costs[a[1]] - self._costs[a[0]]
        if self._steps >= 0:
            return super().find_longest_match(*a, *b)
        longest = min(a[1] - a[0], b[1] - b[0])
        starts, ends = range(longest), range(1, longest + 1)
        size = next((i for i in starts if self._a[a[0] + i] != self._b[b[0] + i]), longest)
        if size:
            return difflib.Match(a[0], b[0], size)
        size = next((i - 1 for i in ends if self._a[a[1] - i] != self._b[b[1] - i]), longest)
        return difflib.Match(a[1] - size, b[1] - size, size)
