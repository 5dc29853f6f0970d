"""Forced tokens of a masked response, and the tokens that end a gap.

The true response is tokenized after its prompt, as in training, and split at the hidden segments.
So the forced tokens are those of the chosen response. A token with both hidden and visible text,
such as "-white", is replaced by the tokens of its visible part. White space before a segment is
part of the gap, because it is usually part of the token that fills the gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from realign.modeling.chat import ChatTemplate, tokens_behind
from realign.pairs.masking.mask import Masked


@dataclass(frozen=True)
class Forced:
    """The tokens around the gaps of a response."""

    masked: Masked
    pieces: tuple[list[int], ...]
    """Forced tokens around the gaps, one more element than gaps. The last one is never read."""
    hidden: tuple[int, ...]
    """Number of tokens of the hidden text, for each gap."""
    stops: tuple[frozenset[int], ...]
    """Tokens that end the gap, for each gap."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the complete response."""
        return sum(map(len, self.pieces)) + sum(self.hidden)


class ResponseFramer:
    """The part of the chat template around a response: text before it and tokens after it.

    Args:
        processor: a processor with a chat template.
        vlm: the model. Its generation settings name tokens that end a response.

    Attributes:
        lead: text between the prompt and a response.
        ends: tokens that may end a response.
    """

    def __init__(self, processor: Any, vlm: PreTrainedModel | None = None) -> None:
        self.tokenizer = processor.tokenizer
        self._template = ChatTemplate(processor)
        frame = self._template.prompt([{"role": "user", "content": "word"}], 0)
        self.lead = frame.lead
        eos = getattr(getattr(vlm, "generation_config", None), "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, Sequence) else [eos])}
        first = self._ids(frame.close.strip())[:1]
        special = self.tokenizer.added_tokens_decoder
        ends |= {token for token in first if token in special and special[token].special}
        self.ends: frozenset[int] = frozenset(ends - {None})

    def prompt(self, messages: Sequence[Mapping[str, Any]], images: int) -> str:
        """Renders a prompt with the chat template."""
        return self._template.prompt(messages, images).text

    def force(self, prompt: str, masked: Masked) -> Forced:
        """Computes the tokens around the gaps of a response.

        Args:
            prompt: the prompt, rendered by `prompt`.
            masked: the response.

        Raises:
            Malformed: when the response contains an image tag or a special token.
        """
        response = masked.fill(masked.hidden)
        self._template.check_answer(response)
        text = self.lead + response
        encoded, first, shift = tokens_behind(
            self.tokenizer, prompt, text, return_offsets_mapping=True
        )
        ids = encoded["input_ids"][first:]
        offsets = [(max(0, a - shift), b - shift) for a, b in encoded["offset_mapping"][first:]]
        spans, end = [], len(self.lead)
        for piece, hidden in zip(masked.pieces, masked.hidden, strict=False):
            spans.append((end + len(piece), end + len(piece) + len(hidden)))
            end = spans[-1][1]
        pieces: list[list[int]] = [[]]
        counts = [0] * len(spans)
        for tokens, start, stop in _clusters(ids, offsets):
            while len(pieces) <= len(spans) and start >= spans[len(pieces) - 1][1]:
                pieces.append([])  # the token is after the gap
            first = last = len(pieces) - 1
            while last < len(spans) and spans[last][0] < stop:
                last += 1
            crossed = spans[first:last]
            if not crossed:
                pieces[-1] += tokens
                continue
            counts[len(pieces) - 1] += len(tokens)
            for a, b in crossed:
                pieces[-1] += self._fragment_ids(text[start:a].rstrip())
                if stop > b:
                    pieces.append([])
                start = b
            pieces[-1] += self._fragment_ids(text[start:stop])
        pieces += [[] for _ in range(len(spans) + 1 - len(pieces))]
        stops = [frozenset(piece[:1]) for piece in pieces[1:]]
        if spans and not masked.pieces[-1].strip():
            stops[-1] |= self.ends
        return Forced(masked, tuple(pieces), tuple(counts), tuple(stops))

    def _fragment_ids(self, fragment: str) -> list[int]:
        """Tokens of part of a word."""
        if not fragment:
            return []
        # A line break comes first, because some tokenizers add a space at the start of a text.
        encoded = self.tokenizer(
            "\n" + fragment, add_special_tokens=False, return_offsets_mapping=True
        )
        tokens_at = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        if any(start < 1 < stop for _, (start, stop) in tokens_at):
            return self._ids(fragment)
        return [token for token, (start, _) in tokens_at if start >= 1]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _clusters(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[int], int, int]]:
    """Yields (tokens, start, stop) of tokens that share characters, such as bytes of one letter."""
    tokens: list[int] = []
    first = last = 0
    for token, (start, stop) in zip(ids, offsets, strict=True):
        if tokens and start < last:
            tokens.append(token)
            last = max(last, stop)
            continue
        if tokens:
            yield tokens, first, last
        tokens, first, last = [token], start, stop
    if tokens:
        yield tokens, first, last
