"""Which words of a response to hide: a rule-based masker over small word lists.

The paper masks objects, attributes and relations. Here numbers, colours, sizes and spatial words
are found by lists, and objects are the remaining content words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

MASK = "[MASK]"
_LISTS = {
    "numbers": "zero one two three four five six seven eight nine ten eleven twelve dozen",
    "attributes": "red orange yellow green blue purple pink brown black white gray grey golden "
    "silver big small large tiny tall short long round square old young wooden striped",
    "relations": "left right top bottom above below under over behind beside between near inside "
    "outside front back next on in",
}
_FUNCTION_WORDS = (
    "a an the this that these those there here it its he she they them his her their is are was "
    "were be been being has have had do does did can could will would and or but not no yes of to "
    "at by for from with as into onto up down out off so very also some any each both all which "
    "who what where when how name"
)
CATEGORIES = (*_LISTS, "objects")
_WORDS = {name: frozenset(words.split()) for name, words in _LISTS.items()}
_NO_OBJECTS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Masked:
    """A response with hidden segments: text pieces around gaps.

    `pieces` has one element more than there are gaps: piece, gap, piece, ..., gap, piece.
    """

    pieces: tuple[str, ...]
    hidden: tuple[str, ...]

    def __str__(self) -> str:
        return MASK.join(self.pieces)

    def fill(self, texts: tuple[str, ...]) -> str:
        """The response with `texts` in the gaps."""
        parts = [self.pieces[0]]
        for text, piece in zip(texts, self.pieces[1:], strict=True):
            parts += [text, piece]
        return "".join(parts)


def mask_response(
    text: str, categories: tuple[str, ...], segments: int, rng: np.random.Generator
) -> Masked | None:
    """Hide words of a response.

    Args:
        text: the response.
        categories: kinds of word to hide, out of CATEGORIES.
        segments: how many to hide, drawn at random; 0 hides all of them.
        rng: draws which.

    Returns:
        The masked response, or None when no word is of those kinds.
    """
    spans = [m.span() for m in re.finditer(r"[^\W_]+", text) if _category(m[0]) in categories]
    if not spans:
        return None
    if segments and segments < len(spans):
        picked = rng.choice(len(spans), size=segments, replace=False)
        spans = [spans[i] for i in sorted(picked.tolist())]
    spans = _join_neighbours(text, spans)
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return Masked(tuple(parts[0::2]), tuple(parts[1::2]))


def _join_neighbours(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Make one span of hidden words with only white space between them."""
    joined = spans[:1]
    for start, stop in spans[1:]:
        if text[joined[-1][1] : start].isspace():
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _category(word: str) -> str | None:
    word = word.lower()
    if word.isdigit():
        return "numbers"
    for name, words in _WORDS.items():
        if word in words:
            return name
    return "objects" if len(word) > 2 and word not in _NO_OBJECTS else None
