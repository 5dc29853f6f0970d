"""Masked responses, with segments found by rules or listed by a language model.

Like the paper, this masks objects, attributes and relations. `segments.py` holds the rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from realign.pairs.io.words import LONGEST
from realign.pairs.masking.segments import CATEGORIES, Span, find_segments

MASK = "[MASK]"
_EDGES = " \t\r\n\"'“”‘’`.,;:!?"  # characters that a language model may add around a segment
_EDGE = "\1"
_NOT_INSIDE_A_WORD = re.compile(r"(?<![^\W_])|(?![^\W_])")


@dataclass(frozen=True)
class Masked:
    """A response with hidden segments, stored as pieces of text around gaps.

    `pieces` has one more element than there are gaps: piece, gap, piece, ..., gap, piece.
    """

    pieces: tuple[str, ...]
    hidden: tuple[str, ...]

    def __str__(self) -> str:
        return MASK.join(self.pieces)

    def fill(self, texts: tuple[str, ...]) -> str:
        """The response with `texts` in the gaps."""
        gaps = zip(texts, self.pieces[1:], strict=True)
        return self.pieces[0] + "".join(text + piece for text, piece in gaps)


def mask_response(
    text: str,
    categories: Sequence[str],
    segments: int,
    rng: np.random.Generator,
    *,
    share: float | None = None,
) -> Masked | None:
    """Hide segments of a response that the rules find.

    Args:
        text: the response, in English.
        categories: kinds of word to hide, from `CATEGORIES`.
        segments: number of segments to hide, drawn at random. 0 hides all of them.
        rng: draws the segments.
        share: share of the segments to hide, in (0, 1]. The number is rounded, and is at least 1
            and at least `segments`. None hides `segments` segments.

    Returns:
        The masked response, or None if no word is of those kinds. Segments with only white space
        between them are joined.

    Raises:
        ValueError: for an unknown category, or numbers out of range.
    """
    if unknown := [name for name in categories if name not in CATEGORIES]:
        raise ValueError(
            f"categories contains {', '.join(unknown)}; the kinds are {', '.join(CATEGORIES)}."
        )
    if segments < 0:
        raise ValueError(f"segments is {segments}; it must be 0 (all segments) or more.")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1.")
    spans = find_segments(text, categories)
    count = segments or len(spans)
    if share is not None:
        count = max(segments, 1, math.floor(share * len(spans) + 0.5))
    if count < len(spans):
        indices = rng.choice(len(spans), size=count, replace=False)
        spans = [spans[i] for i in sorted(indices.tolist())]
    return _hide(text, spans)


def masked_from(text: str, spans: Iterable[str]) -> Masked | None:
    """Hide the segments that a language model lists.

    Each segment is searched after the previous one, then from the start of the text. It must match
    complete words, first in the same case and then in any case. Quotes and punctuation around it
    are ignored. A segment that is not found, or that overlaps an earlier one, is skipped.

    Args:
        text: the response.
        spans: texts of the segments.

    Returns:
        The masked response. None if the text contains no segment, or has more than 20,000
        characters.
    """
    if len(text) > LONGEST:
        return None
    # White space becomes one space, so a segment is a literal.
    places = [i for i, c in enumerate(text) if not (c.isspace() and text[i - 1 : i].isspace())]
    line = "".join(" " if text[i].isspace() else text[i] for i in places)
    # The accepted segments become null characters.
    free = [_with_edges(part.replace(_EDGE, "\0")) for part in (line, _lower(line))]
    rest = iter(places)
    places = [-1 if c == _EDGE else next(rest) for c in free[0]]
    absent: set[tuple[int, str]] = set()
    accepted: list[Span] = []
    after = 0
    for segment in spans:
        words = " ".join(segment.strip(_EDGES).split())
        for case, wanted in enumerate((words, _lower(words))):
            if not wanted or "\0" in wanted or _EDGE in wanted or (case, wanted) in absent:
                continue
            literal = _with_edges(wanted)
            start = free[case].find(literal, after)
            if start < 0 < after:
                start = free[case].find(literal)
            if start < 0:
                absent.add((case, wanted))
                continue
            after = start + len(literal) - 1  # the next segment may start at this edge
            nulls = "\0" * (len(literal) - 2)
            free = [part[: start + 1] + nulls + part[after:] for part in free]
            accepted.append((places[start + 1], places[after - 1] + 1))
            break
    return _hide(text, sorted(accepted))


def _with_edges(text: str) -> str:
    """The text with an edge at each place that is not inside a word, so `find` finds whole words.

    `find` takes linear time. A regular expression takes quadratic time for a text that repeats.
    """
    return _NOT_INSIDE_A_WORD.sub(_EDGE, text)


def _lower(text: str) -> str:
    """The text in lower case, with the same length."""
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)


def _hide(text: str, spans: Sequence[Span]) -> Masked | None:
    """Hides spans. Spans with only white space between them are joined."""
    if not spans:
        return None
    joined: list[Span] = []
    for start, stop in spans:
        if joined and not text[joined[-1][1] : start].strip():
            start = joined.pop()[0]
        joined.append((start, stop))
    edges = [0, *(edge for span in joined for edge in span), len(text)]
    parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return Masked(tuple(parts[0::2]), tuple(parts[1::2]))
