"""Rules that find the segments of an English text that describe an image.

The rules use the word lists of `words.py` and the context of a word. A noun phrase is an optional
determiner, then numbers, attributes and positions, then nouns. Adjacent words in it that may be
hidden form one segment. Outside a noun phrase, each word or phrase that may be hidden is a segment:
a number, an attribute, "to the left of".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from realign.pairs.masking import words as lists

CATEGORIES = ("numbers", "attributes", "relations", "objects")
"""Kinds of segments."""

Span = tuple[int, int]
"""Start and stop of a segment in its text."""

_WORD = re.compile(
    r"\d++(?:[.,:]\d++){0,9}+(?:st|nd|rd|th)?+(?!-?[^\W\d_])"  # a number, 3.5, 10:30, 2nd
    r"|[^\W_]+(?:['’-][^\W_]+)*"  # a word, man's, two-story
)
_ING_ED = ("ing", "ed")

# Kinds of words. The keys of `_KINDS` may be hidden.
_NUMBER, _ATTRIBUTE, _RELATION, _POSITION = "number", "attribute", "relation", "position"
_NOUN, _DETERMINER, _VERB, _OTHER = "noun", "determiner", "verb", "other"
_KINDS = {
    _NUMBER: "numbers",
    _ATTRIBUTE: "attributes",
    _RELATION: "relations",
    _POSITION: "relations",
    _NOUN: "objects",
}
_MODIFIERS = (_NUMBER, _ATTRIBUTE, _POSITION)


def find_segments(text: str, categories: Sequence[str] = CATEGORIES) -> list[Span]:
    """Finds the segments of those kinds. Returns the (start, stop) of each, in order."""
    words = _words_of(text)
    segments: list[Span] = []
    at = searched = 0  # no noun phrase begins between them
    while at < len(words):
        stop = at
        if at >= searched:
            stop, searched = _phrase_end(words, at)
        if stop > at:
            segments += _segments_of(words[at:stop], categories)
            at = stop
            continue
        word = words[at]
        if _KINDS.get(word.kind) in categories:
            # Consecutive words of one kind are one segment: "top left".
            same = segments and words[at - 1].kind == word.kind and word.near
            if same and segments[-1][1] == words[at - 1].stop:
                segments[-1] = (segments[-1][0], word.stop)
            else:
                segments.append((word.start, word.stop))
        at += 1
    return segments


@dataclass
class _Word:
    text: str  # in lower case; a phrase that counts as one word contains spaces
    start: int
    stop: int
    near: bool  # whether only white space is between it and the previous word
    kind: str = ""
    written: str = ""
    modified: bool = False  # whether a determiner precedes it, with only modifiers between
    in_phrase: bool = False  # the same, with modifiers and nouns between


def _phrase_end(words: list[_Word], at: int) -> tuple[int, int]:
    """The index after the noun phrase that begins at `at`, and the end of the search.

    Without a noun phrase, the first index is `at`. None begins before the end of the search either.
    """
    end = at + (words[at].kind == _DETERMINER)
    last_noun = None
    while end < len(words) and (end == at or words[end].near):
        if words[end].kind == _NOUN:
            last_noun = end
        elif words[end].kind not in _MODIFIERS or last_noun is not None:
            break
        end += 1
    return at if last_noun is None else last_noun + 1, end


def _segments_of(phrase: list[_Word], categories: Sequence[str]) -> list[Span]:
    """The segments of a noun phrase, which are runs of words that may be hidden.

    A determiner is hidden if all following words of the phrase are. Then "a dog" may become "an
    apple" or "two cats".
    """
    hidden = [_KINDS.get(word.kind) in categories for word in phrase]
    if phrase[0].kind == _DETERMINER:
        hidden[0] = all(hidden[1:]) and "objects" in categories
    segments: list[Span] = []
    for i, word in enumerate(phrase):
        if hidden[i] and i and hidden[i - 1]:
            segments[-1] = (segments[-1][0], word.stop)
        elif hidden[i]:
            segments.append((word.start, word.stop))
    return segments


def _words_of(text: str) -> list[_Word]:
    """The words of a text with their kinds. A listed phrase counts as one word."""
    raw = [
        _Word(m[0].lower().replace("’", "'"), *m.span(), False, written=m[0])
        for m in _WORD.finditer(text)
    ]
    for before, word in zip(raw, raw[1:], strict=False):
        word.near = text[before.stop : word.start].isspace()
    words: list[_Word] = []
    at = 0
    while at < len(raw):
        length, kind = _listed_phrase(raw, at)
        first, last = raw[at], raw[at + length - 1]
        if length == 1:
            first.kind = _kind_of_word(first)
        else:
            first.kind, first.stop = kind, last.stop
            first.text = " ".join(word.text for word in raw[at : at + length])
        words.append(first)
        at += length
    words = _paired(words)
    for i, word in enumerate(words):
        if i and word.near:
            before = words[i - 1]
            begins, modifies = before.kind == _DETERMINER, before.kind in _MODIFIERS
            word.modified = begins or (modifies and before.modified)
            word.in_phrase = begins or ((modifies or before.kind == _NOUN) and before.in_phrase)
        word.kind = _kind_in_context(words, i)
    return words


def _paired(words: list[_Word]) -> list[_Word]:
    """Joins phrases such as "black and white" into one attribute."""
    paired: list[_Word] = []
    for word in words:
        is_pair = [before.kind for before in paired[-2:]] == [_ATTRIBUTE, _OTHER]
        is_pair = is_pair and word.kind == _ATTRIBUTE and word.near and paired[-1].near
        if is_pair and paired[-1].text in ("and", "or"):
            paired.pop()
            paired[-1].stop = word.stop
            continue
        paired.append(word)
    return paired


def _listed_phrase(raw: list[_Word], at: int) -> tuple[int, str]:
    """Length in words and kind of the longest listed phrase at `at`. Length 1 means none."""
    for length in range(min(_LONGEST, len(raw) - at), 1, -1):
        part = raw[at : at + length]
        if all(word.near for word in part[1:]):
            kind = _PHRASES.get(" ".join(word.text for word in part))
            if kind is not None:
                return length, kind
    return 1, ""


_PHRASES = {
    **dict.fromkeys(lists.NUMBER_PHRASES, _NUMBER),
    **dict.fromkeys(lists.RELATION_PHRASES, _RELATION),
    **dict.fromkeys(lists.IMAGE_PHRASES, _OTHER),
}
_LONGEST = max(phrase.count(" ") + 1 for phrase in _PHRASES)


def _kind_of_word(word: _Word) -> str:
    """Kind of a word, without context."""
    text = word.text
    for kind, listed in _BY_LIST.items():
        if text in listed:
            return kind
    if text[0].isdigit():
        return _NUMBER
    if len(text) == 1:
        return _OTHER
    if "-" in text:
        parts = {_kind_of_word(_Word(part, 0, 0, False, written=part)) for part in text.split("-")}
        if parts == {_NUMBER}:
            return _NUMBER
        return _ATTRIBUTE if parts & {_NUMBER, _ATTRIBUTE, _VERB} else _NOUN
    if word.written.isupper():  # TV, STOP
        return _NOUN
    if text.endswith("ly") and len(text) > 4 and text not in lists.NO_ADVERBS:
        return _OTHER
    if text in lists.VERBS:
        return _VERB
    if text.endswith(_ING_ED) and len(text) > 4 and text not in lists.NO_VERBS:
        return _VERB
    return _NOUN


_BY_LIST = {
    _DETERMINER: lists.DETERMINERS,
    _NUMBER: lists.NUMBERS,
    _ATTRIBUTE: lists.ATTRIBUTES,
    _POSITION: lists.POSITIONS,
    _RELATION: lists.PREPOSITIONS,
    _OTHER: lists.OTHER_WORDS,
    _NOUN: lists.NO_VERBS,
}


def _kind_in_context(words: list[_Word], at: int) -> str:
    """Kind of a word in its context. The kinds of the words before it are final."""
    word, before = words[at], words[at - 1]
    if at == 0 or not word.near:
        return word.kind
    behind = [w for w in words[at + 1 : at + 3] if w.near]
    after = behind[0].kind if behind and words[at + 1].near else ""
    if word.kind == _ATTRIBUTE:
        modifies = after in (*_MODIFIERS, _NOUN)
        if after == _VERB and behind[0].text.endswith(_ING_ED):  # "the old parked car"
            modifies = [w.kind for w in behind[1:]] == [_NOUN]
        listed = word.text in lists.ATTRIBUTES_OR_NOUNS
        is_noun = word.modified or (listed and before.kind in (_NUMBER, _ATTRIBUTE, _NOUN))
        return _NOUN if is_noun and not modifies else _ATTRIBUTE
    if word.kind == _NOUN and before.kind == _NOUN:
        # Two nouns before a determiner: the second is a verb, as in "the woman scolds the dog".
        acts = word.text.endswith("s") and after == _DETERMINER
        return _VERB if acts and word.written.islower() else _NOUN
    return _verb_in_context(words, at, after) if word.kind == _VERB else word.kind


def _verb_in_context(words: list[_Word], at: int, after: str) -> str:
    """Kind of a word with a verb's form: a verb, a noun, or a participle that modifies a noun."""
    word, before = words[at], words[at - 1]
    after_prep = before.kind == _RELATION or before.text in ("of", "with", "for", "from", "by")
    if word.text.endswith(_ING_ED):
        modifies = word.modified or before.kind in (_NUMBER, _ATTRIBUTE)
        modifies |= word.text.endswith("ed") and (after_prep or before.text == "and")
        if modifies and after in (_NOUN, _ATTRIBUTE):  # "a smiling woman", "near parked cars"
            return _ATTRIBUTE
        return _NOUN if before.kind == _DETERMINER else _VERB
    if before.kind == _NOUN:  # "a coffee shop", but "the people stand" and "a man holds"
        plural = before.text.endswith("s") or before.text in ("people", "men", "women", "children")
        compound = not plural and word.in_phrase
        return _NOUN if compound and not word.text.endswith("s") else _VERB
    return _NOUN if word.modified or after_prep else _VERB
