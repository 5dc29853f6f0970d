"""Which completions may be a rejected response."""

from __future__ import annotations

import difflib


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation: what counts as the same response."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def text_similarity(a: str, b: str) -> float:
    """Share of matching words, 2 M / (A + B), in [0, 1]: a lexical measure, not a semantic one."""
    return difflib.SequenceMatcher(None, words_of(a), words_of(b), autojunk=False).ratio()


def reason_to_drop(chosen: str, completion: str, tau: float) -> str | None:
    """Why a completion is no rejected response, or None when it is one.

    Args:
        chosen: the true response.
        completion: the response with its masked words filled in on the retrieved image.
        tau: completions at least this similar are dropped (the paper: 0.95).
    """
    if words_of(chosen) == words_of(completion):
        return "same as chosen"
    if text_similarity(chosen, completion) >= tau:
        return "too similar"
    return None
