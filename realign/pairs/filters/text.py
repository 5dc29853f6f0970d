"""Text filters: drop completions that are equal or too similar to the chosen response.

By default the similarity is the share of matching words. `SentenceSimilarity` compares meanings
with a sentence-transformers model (in the paper all-mpnet-base-v2 with tau 0.95).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from realign.modeling.sentence_models import load_sentence_model
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.filters.base import Candidate, PairFilter
from realign.pairs.io.rows import files_digest
from realign.pairs.io.words import Matcher, words_of

_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = "zero one two three four five six seven eight nine ten eleven twelve"
_SPELLED = {str(i): word for i, word in enumerate(_DIGITS.split())}


def same_response(a: str, b: str) -> bool:
    """Whether two responses are equal after normalisation.

    Normalisation ignores case, punctuation, articles and the spelling of numbers up to twelve. For
    example, "The 2 dogs." equals "two dogs".
    """
    return normal_words(a) == normal_words(b)


def normal_words(text: str) -> list[str]:
    """The words of a text after the normalisation of `same_response`."""
    words = words_of(text)
    return [_SPELLED.get(word, word) for word in words if word not in _ARTICLES]


def text_similarity(a: str, b: str) -> float:
    """Lexical similarity in [0, 1]: 2 M / (A + B) for M matching of A and B words.

    The time is bounded. For long texts of repeated words, M counts fewer words (`Matcher`).
    """
    return Matcher(words_of(a), words_of(b)).ratio()


def reason_to_drop(chosen: str, completion: str, tau: float) -> str | None:
    """Reason why a completion cannot be a rejected response, or None if it can.

    Args:
        chosen: the true response.
        completion: the response with its masked words filled in on the retrieved image.
        tau: completions with at least this `text_similarity` are dropped (0.95 in the paper).

    Returns:
        "no text", "same as chosen", "too similar", or None.
    """
    if not words_of(completion):
        return "no text"
    if same_response(chosen, completion):
        return "same as chosen"
    return "too similar" if text_similarity(chosen, completion) >= tau else None


class Similarity(PairFilter):
    """Measures the text similarity of chosen and rejected.

    With a sentence model, it also drops completions by the limit `tau`. The limit on the lexical
    similarity is applied in the refill stage (`reason_to_drop`), which then tries the next
    neighbour.
    """

    columns = ("text_similarity",)

    _measure: Callable[[Sequence[tuple[str, str]]], Any] | None = None

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        self.uses_gpu = config.similarity != "lexical"  # words are compared on the CPU

    def settings(self) -> dict[str, Any]:
        """The measure and its limit."""
        name, tau = self.config.similarity, self.config.tau
        if name == "lexical":
            return {"similarity": name}
        return {"similarity": name, "tau": tau, "mark": files_digest(name)}

    def open(self) -> None:
        """Loads the sentence model."""
        if self.config.similarity != "lexical":
            self._measure = SentenceSimilarity(self.config.similarity)

    def close(self) -> None:
        """Releases the sentence model."""
        self._measure = None

    def check(self, candidates: Sequence[Candidate], replies: Sequence[Reply]) -> None:
        """Measures the similarities. With a sentence model, drops those that are too similar."""
        texts = [(candidate.chosen, candidate.rejected) for candidate in candidates]
        if self._measure is None:
            values = [text_similarity(*pair) for pair in texts]
        else:
            values = self._measure(texts)
        for candidate, value in zip(candidates, values, strict=True):
            candidate.columns["text_similarity"] = float(value)
            if self._measure is not None and value >= self.config.tau:
                candidate.reason = "too similar"


class SentenceSimilarity:
    """Cosine of sentence embeddings by a sentence-transformers model.

    Args:
        name: folder or Hub name of the model.

    Raises:
        ValueError: when the package is missing or the model cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        self._model = load_sentence_model(name)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Cosines of the texts of each pair, (pairs,) fp32. Each distinct text is embedded once."""
        if not len(pairs):
            return np.zeros(0, np.float32)
        indices: dict[str, int] = {}
        for text in (text for pair in pairs for text in pair):
            indices.setdefault(text, len(indices))
        vectors = self._model.encode(
            list(indices),
            batch_size=64,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        vectors = np.asarray(vectors, np.float32)
        first, second = (vectors[[indices[pair[i]] for pair in pairs]] for i in (0, 1))
        return np.einsum("ij,ij->i", first, second)
