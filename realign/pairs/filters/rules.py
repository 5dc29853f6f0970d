"""Which completions may be a rejected response.

Similarity is a measure of words by default, built in and cheap; `SentenceSimilarity` compares what
sentences mean, with a model named by the user (the paper's is all-mpnet-base-v2, tau 0.95).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = "zero one two three four five six seven eight nine ten eleven twelve"
_SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # kana, Han
_SPELLED = {str(i): word for i, word in enumerate(_DIGITS.split())}


def words_of(text: str) -> list[str]:
    """Words in one case, composed as Unicode does (NFKC), without punctuation.

    Of Chinese and Japanese, which put no space between words, each character is one.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = _SPACELESS.sub(r" \g<0> ", folded)
    return "".join(c if c.isalnum() or _is_mark(c) else " " for c in spaced).split()


def same_response(a: str, b: str) -> bool:
    """Whether two responses are equal after normalisation.

    Case, punctuation and articles do not count, nor whether a number up to twelve is spelled: "The
    2 dogs." says what "two dogs" says.
    """
    return _normal(a) == _normal(b)


def text_similarity(a: str, b: str) -> float:
    """Share of matching words, 2 M / (A + B), in [0, 1]: a lexical measure, not a semantic one."""
    return difflib.SequenceMatcher(None, words_of(a), words_of(b), autojunk=False).ratio()


def reason_to_drop(
    chosen: str,
    completion: str,
    tau: float,
    similarity: Callable[[str, str], float] | float = text_similarity,
) -> str | None:
    """Why a completion is no rejected response, or None when it is one.

    Args:
        chosen: the true response.
        completion: the response with its masked words filled in on the retrieved image.
        tau: completions at least this similar are dropped (the paper: 0.95).
        similarity: the measure, or its value where it is known.

    Returns:
        "no text", "same as chosen", "too similar", or None.
    """
    if not words_of(completion):
        return "no text"
    if same_response(chosen, completion):
        return "same as chosen"
    value = similarity(chosen, completion) if callable(similarity) else similarity
    return "too similar" if value >= tau else None


def about_similarity(name: str | None = None) -> str:
    """Which measure compares texts, in a line for the user."""
    if name is None:
        return (
            "text similarity: share of matching words (built in, lexical; name a "
            "sentence-transformers model to compare meanings)"
        )
    return f"text similarity: cosine of sentence embeddings by {name}"


class SentenceSimilarity:
    """Cosine of sentence embeddings by a sentence-transformers model.

    Args:
        name: folder or hub name of the model.
        device: where it runs; the package's choice when absent.
        batch_size: texts in one forward.

    Raises:
        ValueError: when the package is missing or the model cannot be loaded.
    """

    def __init__(self, name: str, *, device: str | None = None, batch_size: int = 64) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"similarity by {name} needs the package sentence-transformers, which is not "
                "installed. Run pip install 'realign[sentences]', or leave the name out to compare "
                "words."
            ) from error
        self.name = name
        self.batch_size = batch_size
        try:  # weights from safetensors alone, and no code that comes with a model
            self._model = SentenceTransformer(
                name,
                device=device,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no sentence-transformers model could be loaded from {name} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Pass a "
                "folder or a hub name, such as sentence-transformers/all-mpnet-base-v2."
            ) from error

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Cosine of each pair's texts, (pairs,) fp32; each distinct text is embedded once."""
        if not len(pairs):
            return np.zeros(0, np.float32)
        places: dict[str, int] = {}
        for text in (text for pair in pairs for text in pair):
            places.setdefault(text, len(places))
        vectors = self._model.encode(
            list(places),
            batch_size=self.batch_size,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        vectors = np.asarray(vectors, np.float32)
        first, second = (vectors[[places[pair[i]] for pair in pairs]] for i in (0, 1))
        return np.einsum("ij,ij->i", first, second)


def _normal(text: str) -> list[str]:
    words = words_of(text)
    return [_SPELLED.get(word, word) for word in words if word not in _ARTICLES]


def _is_mark(c: str) -> bool:
    """Vowel signs and accents that stay apart from their letter (Devanagari, Thai) belong to it."""
    return unicodedata.category(c).startswith("M")
