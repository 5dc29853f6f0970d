"""Infill: completes masked responses on another image, with all unmasked tokens forced.

The model reads the retrieved image and the prompt. Only the gaps are generated, and the unmasked
tokens of the response are forced. So a completion differs from the chosen response only inside the
gaps, and the model need not follow instructions. A gap ends when the model's best token is the next
forced token.

`infill_plain` is the specification and processes one token at a time. `infill` computes the same in
batches. It reads the text before the first gap at once, and forced text between gaps in one block.
The keys and values of a row are at the positions of its own sequence (`reader.py`). Finished rows
leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache, PreTrainedModel

from realign.data.errors import short_error
from realign.modeling import tree_attention
from realign.modeling.chat import text_inputs
from realign.modeling.layouts import FULL, SLIDING, layout_of
from realign.modeling.loading import DTYPES, load_model, load_processor
from realign.pairs.infill.forced import Forced, ResponseFramer
from realign.pairs.infill.reader import RowReader
from realign.pairs.masking.mask import Masked

_FORWARD = 128
"""Number of tokens that take as much time as the fixed part of a forward pass.

It determines how much of a forced piece is read while other rows generate a token. 128 is between
the values for a small model on a CPU and for a large one on a GPU. Results do not depend on it."""

_DROP = 0.75
"""Share of unfinished rows up to which finished rows are removed.

With a higher share, copying the remaining rows costs more than it saves."""


def load_vlm(name: str, dtype: str, **pixels: int | None) -> tuple[PreTrainedModel, Any]:
    """Loads the model for infill and reference margins, and its processor.

    `pixels` are arguments of `load_processor`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm = load_model(name, DTYPES[dtype]).eval()
    vlm.to(device=device)  # pyright: ignore[reportCallIssue]
    return vlm, load_processor(name, **pixels)


class Completion(NamedTuple):
    """A completed response."""

    text: str
    closed: bool  # whether every gap has text and was ended by the model


def infill(
    vlm: PreTrainedModel,
    processor: Any,
    prompts: Sequence[Sequence[dict]],
    images: Sequence[Sequence[Image.Image]],
    masked: Sequence[Masked],
    *,
    max_gap_tokens: int = 8,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Complete masked responses in one batch.

    A completion depends only on its own record, not on its batch, except for rounding.

    Args:
        vlm: a Hugging Face vision-language model.
        processor: its processor, with a fast tokenizer.
        prompts: the messages of each record.
        images: the images of each record, on which the response is completed.
        masked: the masked responses.
        max_gap_tokens: maximum number of tokens in a gap. A gap that hides more than half as many
            tokens may have twice the number of hidden tokens.
        temperature: sampling temperature; 0 is greedy.
        seeds: a seed for each record, required for sampling.

    Returns:
        The completed responses.

    Raises:
        ValueError: when sampling lacks seeds, a number is out of range, or the processor rejects an
            image or a text.
    """
    rows = _begin(vlm, processor, prompts, images, masked, max_gap_tokens, temperature, seeds)
    choose = _chooser(processor, temperature)
    with torch.inference_mode():
        if reason_for_single(vlm, processor):
            for row in rows:
                _complete_single(vlm, processor, row, choose)
        elif rows:
            _complete_batch(vlm, processor, rows, choose)
    return [row.completion(processor) for row in rows]


def infill_plain(
    vlm: PreTrainedModel,
    processor: Any,
    prompts: Sequence[Sequence[dict]],
    images: Sequence[Sequence[Image.Image]],
    masked: Sequence[Masked],
    *,
    max_gap_tokens: int = 8,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Specification of `infill`, with the same arguments but without a batch or a cache.

    Every token is selected after a forward pass over all earlier tokens, with the model's own
    positions and masks.
    """
    rows = _begin(vlm, processor, prompts, images, masked, max_gap_tokens, temperature, seeds)
    choose = _chooser(processor, temperature)
    with torch.inference_mode():
        for row in rows:
            inputs = _encode(vlm, processor, [row])
            while not row.done:
                inputs = _longer(vlm, inputs, row.next_block())
                choose([row], vlm(**inputs, use_cache=False).logits[:, -1])
    return [row.completion(processor) for row in rows]


def reason_for_single(vlm: Any, processor: Any) -> str | None:
    """Reason why this model must complete records one by one, or None if it supports batches."""
    try:
        layout = layout_of(vlm)
    except ValueError as error:
        return str(error)
    if layout.one_by_one:
        return "images pass its vision tower one by one"
    if unsupported := sorted(set(layout.kinds) - {FULL, SLIDING}):
        return f"its {', '.join(unsupported)} layers keep a state that cannot be padded"
    attention = vlm.model.get_decoder().config._attn_implementation
    if attention not in (*tree_attention.NAMES, "sdpa", "eager"):
        return f"{attention} supports no mask for rows of unequal length"
    if processor.tokenizer.pad_token is None:
        return "its tokenizer has no padding token"
    return None


class _Row:
    """State of a record: tokens to read next, and tokens generated so far."""

    def __init__(self, prompt: str, images: list, forced: Forced, most: int, seed: int) -> None:
        self.prompt, self.images, self.forced = prompt, images, forced
        self.rng = np.random.default_rng(seed)
        self.gaps: list[list[int]] = []
        self.closed = True  # whether the model ended every gap so far
        self.done = False
        self.max_tokens = [max(most, 2 * count) for count in forced.hidden]  # for each gap
        self._writer = self._write()
        self.feed = next(self._writer)  # tokens to read before the next one is selected

    def next_block(self, size: int | None = None) -> list[int]:
        """Removes and returns the next tokens to read, at most `size` of them."""
        part = self.feed[:size]
        self.feed = self.feed[len(part) :]
        return part

    def choose(self, pick: int, best: int) -> None:
        """Advances by one token. `pick` is the choice for a gap, `best` the best of all tokens."""
        try:
            self.feed = self._writer.send((pick, best))
        except StopIteration:
            self.feed, self.done = [], True

    def _write(self) -> Generator[list[int], tuple[int, int], None]:
        """Fills the gaps. Yields tokens to read, and receives (pick, best) as in `choose`."""
        pieces, stops = self.forced.pieces, self.forced.stops
        pick, best = yield pieces[0]
        for i, most in enumerate(self.max_tokens):
            gap: list[int] = []
            self.gaps.append(gap)
            while not (gap and best in stops[i]):
                if len(gap) >= most:
                    self.closed = False
                    break
                gap.append(pick)
                pick, best = yield [pick]
            if pieces[i + 1] and i + 1 < len(self.max_tokens):
                pick, best = yield pieces[i + 1]

    def completion(self, processor: Any) -> Completion:
        """The response with its gaps filled."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = [processor.tokenizer.decode(gap, **options).strip() for gap in self.gaps]
        complete = all(text and "\ufffd" not in text for text in texts)
        return Completion(self.forced.masked.fill(tuple(texts)), self.closed and complete)


_Choose = Callable[[Sequence[_Row], torch.Tensor], None]


def _begin(
    vlm: PreTrainedModel,
    processor: Any,
    prompts: Sequence[Sequence[dict]],
    images: Sequence[Sequence[Image.Image]],
    masked: Sequence[Masked],
    most: int,
    temperature: float,
    seeds: Sequence[int] | None,
) -> list[_Row]:
    if most < 1:
        raise ValueError(f"max_gap_tokens is {most}; it must be 1 or more.")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more.")
    if temperature and seeds is None:
        raise ValueError("seeds is None; sampling (temperature above 0) needs a seed per record.")
    framer = ResponseFramer(processor, vlm)
    records = zip(prompts, images, masked, seeds or [0] * len(masked), strict=True)
    rows = []
    for prompt, own_images, response, seed in records:
        text = framer.prompt(prompt, len(own_images))
        rows.append(_Row(text, list(own_images), framer.force(text, response), most, seed))
    return rows


def _chooser(processor: Any, temperature: float) -> _Choose:
    """A function that advances rows by one token, given their logits (rows, V).

    Sampling draws one number per token from the row's own generator and inverts the cumulative
    distribution. So the result does not depend on other rows of the batch.
    """
    banned: torch.Tensor | None = None

    def choose(rows: Sequence[_Row], scores: torch.Tensor) -> None:
        nonlocal banned
        scores = scores.float()
        if banned is None:
            banned = _banned(processor.tokenizer, scores.shape[-1]).to(scores.device)
        best = scores.argmax(-1).tolist()
        allowed = scores.masked_fill(banned, -torch.inf)
        if temperature == 0:
            picks = allowed.argmax(-1).tolist()
        else:
            drawn = torch.tensor([row.rng.random() for row in rows], dtype=torch.float64)
            mass = (allowed.double() / temperature).softmax(-1).cumsum(-1)
            level = drawn.to(mass.device)[:, None] * mass[:, -1:]
            picks = torch.searchsorted(mass, level, right=True)[:, 0].tolist()
        for row, pick, top in zip(rows, picks, best, strict=True):
            row.choose(pick, top)

    return choose


def _banned(tokenizer: Any, size: int) -> torch.Tensor:
    """(V,) bool mask of special tokens, and of ids that the tokenizer does not have."""
    banned = torch.zeros(size, dtype=torch.bool)
    banned[len(tokenizer) :] = True
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    banned[[i for i in special if i < size]] = True
    return banned


def _encode(vlm: Any, processor: Any, rows: Sequence[_Row]) -> dict[str, torch.Tensor]:
    """Output of the processor for prompts and images, padded on the right."""
    padding = {"padding": True, "padding_side": "right"} if len(rows) > 1 else {}
    inputs = text_inputs(processor, [row.prompt for row in rows]) | padding
    try:
        encoded = processor(images=[row.images for row in rows], return_tensors="pt", **inputs)
    except Exception as error:  # the types of errors differ between processors
        raise ValueError(f"the processor rejects it ({short_error(error)}).") from error
    tensors = {n: t for n, t in encoded.items() if isinstance(t, torch.Tensor) and n != "labels"}
    moved = {n: t.to(vlm.device) for n, t in tensors.items()}
    return {n: t.to(vlm.dtype) if t.is_floating_point() else t for n, t in moved.items()}


_OF_RESPONSE = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


def _longer(vlm: Any, inputs: dict[str, torch.Tensor], ids: list[int]) -> dict[str, torch.Tensor]:
    """The inputs of one record with response tokens appended to all per-token tensors."""
    filler = _OF_RESPONSE | {"input_ids": 0}
    if vlm.config.model_type == "paligemma":
        filler["token_type_ids"] = 1  # type of the suffix, which has causal attention
    longer = dict(inputs)
    for name in filler.keys() & inputs.keys():
        value = torch.tensor(ids if name == "input_ids" else [filler[name]] * len(ids))
        value = value.to(inputs[name].device, inputs[name].dtype)[None]
        longer[name] = torch.cat([inputs[name], value], 1)
    return longer


def _complete_batch(vlm: Any, processor: Any, rows: Sequence[_Row], choose: _Choose) -> None:
    """Completes a batch of records."""
    reader, active = RowReader(vlm, layout_of(vlm)), list(rows)
    counts = [len(row.images) for row in rows]
    inputs = _encode(vlm, processor, rows)
    room = max(row.forced.tokens + sum(row.max_tokens) for row in rows)
    choose(active, reader.first(inputs, counts, [row.next_block() for row in rows], room))
    while unfinished := [i for i, row in enumerate(active) if not row.done]:
        if len(unfinished) <= _DROP * len(active):
            reader.keep(unfinished)
            active = [active[i] for i in unfinished]
        width = _width([len(row.feed) for row in active])
        blocks = [row.next_block(width) for row in active]
        scores = reader.more(blocks)
        ready = [i for i, row in enumerate(active) if blocks[i] and not row.feed]
        choose([active[i] for i in ready], scores[ready])


def _width(waiting: Sequence[int]) -> int:
    """Width of a forward pass, given the number of waiting tokens in each row.

    A row in a gap has one waiting token, and a row after a gap has a complete piece. All rows are
    padded to the widest, so the best width reads the most tokens per cost.
    """
    widths = sorted(set(waiting) - {0})
    gain = {w: sum(min(w, n) for n in waiting) / (_FORWARD + w * len(waiting)) for w in widths}
    return max(widths, key=gain.__getitem__)


def _complete_single(vlm: Any, processor: Any, row: _Row, choose: _Choose) -> None:
    """Completes one record with the model's own cache and positions."""
    inputs = _longer(vlm, _encode(vlm, processor, [row]), row.next_block())
    cache = DynamicCache(config=vlm.config.get_text_config(decoder=True))
    while True:
        out = vlm(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        choose([row], out.logits[:, -1])
        if row.done:
            return
        inputs = {"input_ids": torch.tensor([row.next_block()], device=vlm.device)}
