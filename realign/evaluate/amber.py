"""AMBER (arXiv 2311.07397): hallucination in captions by word lists, and in yes/no questions.

The benchmark lists the objects of each image, and objects that models often imagine in it. Both are
compared with the nouns of a caption that are names of objects:

- CHAIR is the share of these nouns that the image does not show,
- Cover is the share of the shown objects that are mentioned,
- Hal is the share of captions with at least one noun that the image does not show,
- Cog is the share of the often imagined objects that are mentioned.

A list of the benchmark relates objects, such as "person" to "man". The authors also accept words
with similar vectors, and find nouns with a tagger. `authors_words` does this with their packages.
Without them, a word is a noun by the short rules of `nouns`, and only the list relates objects.
These figures compare two models with each other. They are not comparable with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from realign.evaluate.chair import singular
from realign.evaluate.files import read_rows, read_text

SIMILARITY = 0.8
"""The authors' limit on the cosine of two word vectors, above which words are similar."""
_ARTICLES = {
    "a", "an", "the", "this", "that", "these", "those", "its", "his", "her", "their", "some",
    "several", "many", "few", "two", "three", "four", "five", "six", "another", "each", "no",
}  # fmt: skip
_OFTEN_OTHER = {
    "can", "hot", "leave", "watch", "support", "note", "sound", "range", "pack", "file", "tie",
    "ring", "sign", "signal", "switch", "drink", "drain", "paddle", "plug", "spray", "lock",
    "track", "board", "bill", "ski", "skate", "scoop", "rock", "tape", "tap", "warp", "fence",
    "grill", "fish", "individual", "ice", "sailing", "drawing", "painting", "park", "train",
}  # fmt: skip
"""Words of the list that are often verbs or adjectives: nouns only after an article or a number, or
in the plural."""


@dataclass(frozen=True)
class Words:
    """How words of captions are read.

    Attributes:
        nouns: text -> its nouns in the singular, in order.
        similar: whether two words mean the same.
        name: for the table.
    """

    nouns: Callable[[str], list[str]]
    similar: Callable[[str, str], bool]
    name: str


def nouns(text: str) -> list[str]:
    """Words in the singular. A word that is often a verb is left out without an article."""
    words = [word.strip(".,;:!?\"'()[]*") for word in text.split()]
    words = [word if word == "TV" else word.lower() for word in words if word]
    found = []
    for before, word in zip(["", *words], words, strict=False):
        one = singular(word)
        if one not in _OFTEN_OTHER or one != word or before in _ARTICLES:
            found.append(one)
    return found


OWN_WORDS = Words(nouns, lambda first, second: first == second, "the word lists only")


def authors_words() -> Words:
    """The authors' tagger, lemmatizer and word vectors.

    Raises:
        ValueError: if one of the packages or their data is not installed.
    """
    try:
        import nltk  # pyright: ignore[reportMissingImports]
        import spacy  # pyright: ignore[reportMissingImports]
        from nltk.stem import WordNetLemmatizer  # pyright: ignore[reportMissingImports]

        language = spacy.load("en_core_web_lg")
        lemma = WordNetLemmatizer().lemmatize
        nltk.pos_tag(nltk.word_tokenize(lemma("words")))
    except (ImportError, OSError, LookupError) as error:
        raise ValueError(
            f"the words of AMBER's authors need nltk, spaCy and their data ({_first_line(error)}). "
            "Run pip install nltk spacy; python -m spacy download en_core_web_lg; "
            "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet."
        ) from None
    vector = lru_cache(None)(language)

    def tagged(text: str) -> list[str]:
        tags = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemma(word) for word, tag in tags if tag.startswith("NN")]

    def similar(first: str, second: str) -> bool:
        return vector(first).similarity(vector(second)) > SIMILARITY

    return Words(tagged, lru_cache(None)(similar), "the authors' tagger and word vectors")


class Lists:
    """The word lists of AMBER.

    Args:
        relation: relation.json: object -> related words.
        safe: safe_words.txt: words that are never hallucinated.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """

    def __init__(self, relation: str | Path, safe: str | Path) -> None:
        try:
            self.related: dict[str, list[str]] = json.loads(read_text(relation))
            words = [word for pair in self.related.items() for word in (pair[0], *pair[1])]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{relation} is not AMBER's relation.json ({_first_line(error)}). Give the folder "
                "`data` of AMBER's repository."
            ) from None
        self.objects = set(words)
        self.safe = set(read_text(safe).splitlines())


@dataclass(frozen=True)
class Caption:
    """Counts for one caption.

    Attributes:
        mentions: number of nouns in the list of objects.
        hallucinated: those that the image does not show.
        covered, shown: mentioned objects of the image, and all of them.
        imagined, imaginable: mentioned objects of those often imagined, and all of them.
    """

    mentions: int
    hallucinated: list[str]
    covered: int
    shown: int
    imagined: int
    imaginable: int


def read_annotations(file: str | Path) -> dict[int, dict[str, Any]]:
    """Read annotations.json: id of a question -> its type and truth.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give the folder `data` of AMBER's repository."
    fields = {
        "id": (lambda value: type(value) is int, "a number"),
        "type": (lambda value: isinstance(value, str), "text"),
        "truth": (lambda value: value in ("yes", "no") or _is_words(value), "yes, no or a list"),
    }
    notes = {note["id"]: note for note in read_rows(file, fields, remedy)}
    for note in notes.values():
        listed = note["type"] == "generative"
        if isinstance(note["truth"], list) != listed or listed and not _is_words(note.get("hallu")):
            raise ValueError(f"{file}: annotation {note['id']} does not fit its type. {remedy}")
    return notes


def caption(text: str, note: Mapping[str, Any], lists: Lists, words: Words = OWN_WORDS) -> Caption:
    """Count the objects that a caption mentions, in the order of the authors' code.

    Args:
        text: the caption.
        note: annotation of its image, with the lists `truth` and `hallu`.
        lists: word lists of the benchmark.
        words: how words are read.

    Raises:
        ValueError: for an object that is not in the lists.
    """
    named = [noun for noun in words.nouns(text) if noun in lists.objects]
    shown, imaginable = (_Objects(note[key], lists) for key in ("truth", "hallu"))
    hallucinated = []
    for noun in named:
        if noun in lists.safe:
            continue
        if noun in shown.words:
            shown.mention(noun)
            continue
        if noun in imaginable.words:
            imaginable.mention(noun)
        imaginable.mention_similar(noun, words.similar)
        if not shown.mention_similar(noun, words.similar):
            hallucinated.append(noun)
    return Caption(
        mentions=len(named),
        hallucinated=hallucinated,
        covered=len(shown.mentioned),
        shown=len(note["truth"]),
        imagined=len(imaginable.mentioned),
        imaginable=len(note["hallu"]),
    )


class _Objects:
    """Objects of an image with their related words, and which of them a caption mentions."""

    def __init__(self, objects: Sequence[str], lists: Lists) -> None:
        for name in objects:
            if name not in lists.related:
                raise ValueError(f"{name!r} is annotated, but relation.json does not have it.")
        # Related words come before the objects, so a word that is both counts for the other object.
        related = [(word, at) for at, name in enumerate(objects) for word in lists.related[name]]
        pairs = [*related, *((name, at) for at, name in enumerate(objects))]
        self.words = [word for word, _ in pairs]
        self._places = [at for _, at in pairs]
        self.mentioned: set[int] = set()

    def mention(self, noun: str) -> None:
        self.mentioned.add(self._places[self.words.index(noun)])

    def mention_similar(self, noun: str, similar: Callable[[str, str], bool]) -> bool:
        """Note the first object with a similar word. Returns whether there is one."""
        place = next(
            (at for word, at in zip(self.words, self._places, strict=True) if similar(noun, word)),
            None,
        )
        if place is not None:
            self.mentioned.add(place)
        return place is not None


@dataclass(frozen=True)
class Generative:
    """Figures of captions, shares in [0, 1], each 0 where there is nothing to count.

    Attributes:
        captions: number of captions.
        chair: share of nouns that the image does not show.
        cover: share of shown objects that are mentioned.
        hal: share of captions with a noun that the image does not show.
        cog: share of often imagined objects that are mentioned.
    """

    captions: int
    chair: float
    cover: float
    hal: float
    cog: float


def generative(captions: Sequence[Caption]) -> Generative:
    """Figures of captions.

    Raises:
        ValueError: without captions.
    """
    if not captions:
        raise ValueError("there are no captions.")

    def share(counted: int, all_: int) -> float:
        return counted / all_ if all_ else 0.0

    return Generative(
        captions=len(captions),
        chair=share(sum(len(c.hallucinated) for c in captions), sum(c.mentions for c in captions)),
        cover=share(sum(c.covered for c in captions), sum(c.shown for c in captions)),
        hal=share(sum(bool(c.hallucinated) for c in captions), len(captions)),
        cog=share(sum(c.imagined for c in captions), sum(c.imaginable for c in captions)),
    )


def verdict(answer: str) -> str | None:
    """Yes or no as AMBER's authors read it: the answer must be exactly "Yes" or "No"."""
    return {"Yes": "yes", "No": "no"}.get(answer)


def discriminative(labels: Sequence[str], verdicts: Sequence[str | None]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of the answer no, as AMBER counts them.

    Args:
        labels: "yes" or "no" for each question.
        verdicts: the answers as "yes", "no" or None.

    Raises:
        ValueError: without questions, or for different numbers of them.
    """
    if not labels or len(labels) != len(verdicts):
        raise ValueError(f"there are {len(verdicts)} answers to {len(labels)} questions.")
    both = sum(a == b == "no" for a, b in zip(labels, verdicts, strict=True))
    precision = both / max(1, sum(verdict == "no" for verdict in verdicts))
    recall = both / max(1, sum(label == "no" for label in labels))
    total = precision + recall
    return {
        "accuracy": sum(a == b for a, b in zip(labels, verdicts, strict=True)) / len(labels),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / total if total else 0.0,
    }


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
