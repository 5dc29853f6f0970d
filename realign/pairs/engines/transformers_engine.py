"""Transformers engine: answers chats with `generate` in this process.

Greedy answers are generated in batches. In bf16, the padding of shorter prompts may change a close
decision. Sampled answers are generated one by one, each from its own seed, so they do not depend on
the batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from realign.data.errors import Malformed, short_error
from realign.distributed import disable_cudnn_attention
from realign.modeling.chat import ChatTemplate, text_inputs
from realign.modeling.loading import (
    DTYPES,
    adapter_base,
    from_pretrained,
    load_processor,
    load_trained,
)
from realign.modeling.prefetch import Copies, ahead, default_workers
from realign.pairs.engines.chat import NO_TEXT, Chat, Engine, Reply

_AHEAD = 3
"""Batches that workers load or that wait. Their images are in memory, in full size."""


@dataclass
class _Plan:
    """A group of requests, in batches.

    Attributes:
        requests: the requests.
        texts: index of a request -> its rendered text.
        replies: index of a request -> its reply.
        batches: indices of the requests in each batch.
    """

    requests: Sequence[Chat]
    texts: dict[int, str] = field(default_factory=dict)
    replies: dict[int, Reply] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)

    def batch(self, places: list[int]) -> tuple[list[Chat], list[str]]:
        """The requests of a batch and their texts."""
        return [self.requests[i] for i in places], [self.texts[i] for i in places]


class TransformersEngine(Engine):
    """A vision-language model, or a language model for requests without images."""

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 8,
        dtype: str | None = None,
        workers: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """Set the model. `open` loads it.

        Args:
            model: folder or Hub name of the model, or of an adapter, which names its base model.
            batch_size: batch size of greedy answers.
            dtype: "fp32" or "bf16". None means bf16 on a GPU and fp32 on a CPU.
            workers: number of threads that load and preprocess images ahead of the model. 0 means
                none, None `default_workers`.
            min_pixels: see `loading.set_pixels`. Text models read no images.
            max_pixels: see `loading.set_pixels`.

        Raises:
            ValueError: for another dtype.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; use {' or '.join(DTYPES)}.")
        self.name = f"transformers:{model}"
        self._path, self._batch_size, self._dtype = model, batch_size, dtype
        self._workers = default_workers() if workers is None else workers
        self._pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self._model: Any = None

    def open(self) -> None:
        """Load the model, on the GPU if there is one.

        Raises:
            ValueError: when there is no such model, or it has no chat template.
        """
        if self._model is not None:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = DTYPES[self._dtype or ("bf16" if device == "cuda" else "fp32")]
        disable_cudnn_attention()
        model: Any  # transformers annotates `to` as a function, not as a method
        self._is_multimodal = _has_vision(self._path)
        if self._is_multimodal:
            self._processor = load_processor(self._path, **self._pixels)
            self._tokenizer = self._processor.tokenizer
            model = load_trained(self._path, dtype)
        else:
            self._processor = self._tokenizer = _load_tokenizer(self._path)
            model = load_trained(self._path, dtype, AutoModelForCausalLM)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._processors = Copies(self._processor)
        self._template = ChatTemplate(self._processor)
        self._max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        end = model.generation_config.eos_token_id
        self._ends = {end} if isinstance(end, int) else set(end or ())
        self._model = model.to(device)

    def close(self) -> None:
        """Free the model."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests. See `Engine.chat`.

        A request has an error if its text contains one of the model's special tokens, because the
        model would interpret it. It also has an error if prompt and answer exceed the model's
        maximum length.
        """
        (replies,) = self.chats([requests])
        return replies

    def chats(self, groups: Iterable[Sequence[Chat]]) -> Generator[list[Reply], None, None]:
        """Yields the replies to each group. Workers preprocess the next batches of all groups."""
        self.open()
        plans, following = tee(map(self._plan, groups))
        tasks = (
            partial(self._encode, *plan.batch(places))
            for plan in following
            for places in plan.batches
        )
        device, workers = self._model.device, self._workers
        with ahead(tasks, device, workers=workers, depth=_AHEAD) as encoded:
            for plan in plans:
                for places in plan.batches:
                    replies = self._write(*plan.batch(places), next(encoded))
                    plan.replies |= zip(places, replies, strict=True)
                yield [plan.replies[i] for i in range(len(plan.requests))]

    def _plan(self, requests: Sequence[Chat]) -> _Plan:
        plan = _Plan(requests)
        for i, request in enumerate(requests):
            try:
                plan.texts[i] = self._render(request)
            except Malformed as error:
                plan.replies[i] = Reply("", str(error))
        plan.batches = self._batches(requests, list(plan.texts))
        return plan

    def _batches(self, requests: Sequence[Chat], places: list[int]) -> list[list[int]]:
        """Indices of the requests in each batch.

        The requests of a batch are greedy and have one `max_tokens`. All have images, or none.
        """
        batches: list[list[int]] = []
        open_: dict[tuple[bool, int], list[int]] = {}
        for i in places:
            if requests[i].temperature > 0:
                batches.append([i])
                continue
            # Processors accept images for all texts of a batch, or for none.
            kind = (bool(requests[i].images), requests[i].max_tokens)
            batch = open_.get(kind, [])
            if not batch or len(batch) == self._batch_size:
                open_[kind] = batch = []
                batches.append(batch)
            batch.append(i)
        return batches

    def _render(self, request: Chat) -> str:
        if request.images and not self._is_multimodal:
            raise Malformed(f"it has images, and {self._path} is a text-only model.")
        return self._template.prompt(request.messages, len(request.images)).text

    @torch.inference_mode()
    def _write(self, requests: list[Chat], texts: list[str], encoded: Any) -> list[Reply]:
        """Answers to one batch, the result of `_encode`. A batch that fails is tried in halves."""
        if isinstance(encoded, Exception):
            if len(requests) == 1:
                return [Reply("", f"the model's processor rejects it: {short_error(encoded)}")]
            return self._halves(requests, texts)
        length, max_tokens = encoded["input_ids"].shape[1], requests[0].max_tokens
        if self._max_length is not None and length + max_tokens > self._max_length:
            if len(requests) == 1:
                return [
                    Reply(
                        "",
                        f"its prompt takes {length} tokens and its answer up to {max_tokens}, but "
                        f"the model's maximum length is {self._max_length}. Shorten the text.",
                    )
                ]
            return self._halves(requests, texts)
        try:
            out = self._generate(encoded, requests[0])
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
        else:
            return [self._reply(ids) for ids in out[:, length:]]
        torch.cuda.empty_cache()  # not in `except`, which keeps the failed batch alive
        return self._halves(requests, texts)

    def _halves(self, requests: list[Chat], texts: list[str]) -> list[Reply]:
        middle = len(requests) // 2
        replies: list[Reply] = []
        for half in (slice(middle), slice(middle, None)):
            part = requests[half], texts[half]
            replies += self._write(*part, self._encode(*part))
        return replies

    def _encode(self, requests: list[Chat], texts: list[str]) -> Any:
        """Inputs of the model for a batch, on the CPU, or the error of the processor. Thread-safe.

        Raises:
            Exception: the error of a function that loads an image.
        """
        images = [request.load() for request in requests]
        options = text_inputs(self._processor, texts) | {
            "return_tensors": "pt",
            "padding": True,
            "padding_side": "left",
        }
        if self._is_multimodal:
            options["images"] = images if requests[0].images else None
        try:
            with self._processors.borrow() as processor:
                return processor(**options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the types of errors differ between processors
            return error

    def _generate(self, encoded: Any, request: Chat) -> torch.Tensor:
        if self._is_multimodal:
            encoded = encoded.to(self._model.device, self._model.dtype)  # only pixels get the dtype
        else:
            encoded = encoded.to(self._model.device)
        options = {
            "max_new_tokens": request.max_tokens,
            "pad_token_id": self._tokenizer.pad_token_id,
            # A model's own settings may ask for a million beams.
            "num_beams": 1,
            "num_return_sequences": 1,
        }
        if request.temperature == 0:
            return self._model.generate(**encoded, **options, do_sample=False)
        device = self._model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(request.seed)
            # Sample from the full distribution, which the model's own settings may truncate.
            return self._model.generate(
                **encoded,
                **options,
                do_sample=True,
                temperature=request.temperature,
                top_p=1.0,
                top_k=0,
            )

    def _reply(self, ids: torch.Tensor) -> Reply:
        text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not text:
            return Reply("", NO_TEXT)
        return Reply(text, cut=not self._ends.intersection(ids.tolist()))


def _has_vision(path: str) -> bool:
    """Whether a model has a vision tower. True if its config cannot be read."""
    try:
        config = from_pretrained(AutoConfig, adapter_base(path) or path)
    except ValueError:
        return True
    return hasattr(config, "vision_config")


def _load_tokenizer(path: str | Path):
    try:
        tokenizer = from_pretrained(AutoTokenizer, path)
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"no tokenizer could be loaded from {path} ({reason}).") from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path} has no chat template, so it cannot answer chats. Name an "
            "instruction-tuned model."
        )
    return tokenizer
