"""Infill: complete masked responses on another image, with everything unmasked forced.

The model reads the retrieved image and the prompt; the unmasked tokens of the response are forced
and only the gaps are generated, so a completion differs from the chosen response inside the gaps
alone, and no instruction-following is needed. A gap ends where the model would rather write the
next forced token than go on.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from realign.encode import chat_prompt
from realign.pairs.mask import Masked


class Completion(NamedTuple):
    """A filled-in response."""

    text: str
    closed: bool  # every gap led back to the forced text; False where one was cut off


@torch.inference_mode()
def infill(
    vlm,
    processor,
    prompts: Sequence[Sequence[dict]],
    images: Sequence[Sequence[Image.Image]],
    masked: Sequence[Masked],
    *,
    max_gap_tokens: int = 8,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Completion]:
    """Complete a batch of masked responses.

    Args:
        vlm: a Hugging Face vision-language model.
        processor: its processor, with a fast tokenizer.
        prompts: messages of each record.
        images: the images each response is completed on.
        masked: the responses.
        max_gap_tokens: most tokens generated for one gap.
        temperature: 0 is greedy; above it samples.
        generator: random numbers for sampling.

    Returns:
        The completed responses.
    """
    tokenizer = processor.tokenizer
    texts = [chat_prompt(processor, p, len(i))[0] for p, i in zip(prompts, images, strict=True)]
    encoded = processor(
        images=[list(group) for group in images],
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    ).to(vlm.device)
    mask = encoded["attention_mask"]
    out = vlm(
        **encoded,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    special = torch.zeros(out.logits.shape[-1], dtype=torch.bool, device=mask.device)
    special[tokenizer.all_special_ids] = True
    writers = [_writer(forced_pieces(tokenizer, m), max_gap_tokens) for m in masked]
    for writer in writers:
        next(writer)
    gaps: list[tuple[list[list[int]], bool]] = [([], True)] * len(writers)
    open_ = set(range(len(writers)))
    while True:
        scores = out.logits[:, -1].float()
        best = scores.argmax(-1).tolist()
        picks = _pick(scores.masked_fill(special, -torch.inf), temperature, generator)
        feed = [tokenizer.eos_token_id] * len(writers)
        for i in sorted(open_):
            try:
                feed[i] = writers[i].send((picks[i], best[i]))
            except StopIteration as finished:
                gaps[i] = finished.value
                open_.discard(i)
        if not open_:
            break
        mask = torch.cat([mask, mask.new_ones(len(writers), 1)], dim=1)
        out = vlm(
            input_ids=torch.tensor(feed, device=mask.device)[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    written = []
    for response, (ids, closed) in zip(masked, gaps, strict=True):
        texts = [tokenizer.decode(gap, skip_special_tokens=True).strip() for gap in ids]
        written.append(Completion(response.fill(tuple(texts)), closed))
    return written


def forced_pieces(tokenizer, masked: Masked) -> list[list[int]]:
    """Token ids around the gaps of a response; the last piece ends with the end token.

    The true response is tokenized whole and split at the hidden words, so that the forced tokens
    are those of the chosen response.
    """
    text = masked.fill(masked.hidden)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces: list[list[int]] = [[]]
    spans, end = [], 0
    for piece, hidden in zip(masked.pieces, masked.hidden, strict=False):
        spans.append((end + len(piece), end + len(piece) + len(hidden)))
        end = spans[-1][1]
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while len(pieces) <= len(spans) and start >= spans[len(pieces) - 1][1]:
            pieces.append([])  # past the gap
        inside = len(pieces) <= len(spans) and stop > spans[len(pieces) - 1][0]
        if not inside:
            pieces[-1].append(token)
    pieces += [[] for _ in range(len(spans) + 1 - len(pieces))]
    pieces[-1].append(tokenizer.eos_token_id)
    return pieces


def _writer(
    pieces: list[list[int]], max_gap_tokens: int
) -> Generator[int | None, tuple[int, int], tuple[list[list[int]], bool]]:
    """Write one response: is sent (the model's pick, its best token), yields the token to feed.

    Returns the ids of each gap as soon as the last one ends, and whether all closed by themselves.
    """
    pick, best = yield None
    gaps: list[list[int]] = []
    closed = True
    for piece, following in zip(pieces, pieces[1:], strict=False):
        for token in piece:
            pick, best = yield token
        gap: list[int] = []
        while not (gap and following[:1] == [best]):
            if len(gap) == max_gap_tokens:
                closed = False
                break
            gap.append(pick)
            pick, best = yield pick
        gaps.append(gap)
    return gaps, closed


def _pick(scores: torch.Tensor, temperature: float, generator: torch.Generator | None) -> list[int]:
    if temperature == 0:
        return scores.argmax(-1).tolist()
    weights = (scores / temperature).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0].tolist()
