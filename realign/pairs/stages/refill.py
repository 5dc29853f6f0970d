"""Refill stage: completes the masked responses on the neighbours, nearest first."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from realign.data.records import Record, RecordError
from realign.modeling.encode import check_prompt
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Chat, Reply
from realign.pairs.filters.text import reason_to_drop
from realign.pairs.infill.refill import infill, load_vlm
from realign.pairs.io.images import ImageError
from realign.pairs.io.rows import (
    NO_REPLY,
    TOO_LONG,
    InvalidRecord,
    Row,
    by_id,
    chat_images,
    decode_images,
    engine_identity,
    images_of,
    load_in_threads,
    model_digest,
    record_of,
)
from realign.pairs.io.shards import RowLookup
from realign.pairs.io.texts import problem_of
from realign.pairs.io.words import LONGEST
from realign.pairs.masking.mask import Masked
from realign.pairs.prompts import complete_chat, keeps_pieces, parse_completion
from realign.pairs.stages.base import ChatStage, Script, rng_of

_ATTEMPT = pa.struct(
    {"rank": pa.int32(), "text": pa.string(), "closed": pa.bool_(), "reason": pa.string()}
)
_SPARE_TOKENS = 32  # allowed in addition to one token per two characters of the chosen response


@dataclass
class _Task:
    """A record and its completions on the neighbours."""

    record: Record
    masked: Masked
    neighbours: list[Row]
    attempts: list[Row] = field(default_factory=list)
    invalid: InvalidRecord | None = None

    def needs_attempt(self, place: int, candidates: int) -> bool:
        """Whether to try the neighbour at `place`."""
        passed = sum(not attempt["reason"] for attempt in self.attempts)
        return self.invalid is None and place < len(self.neighbours) and passed < candidates


class Refill(ChatStage):
    """Completions of the masked responses on the neighbours, nearest first.

    With `infill`, the unmasked tokens are forced. With `prompt`, an engine completes the text.
    """

    name = "refill"
    schema = pa.schema(
        {"id": pa.string(), "attempts": pa.list_(_ATTEMPT), "refill_model": pa.string()}
    )

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        self.needs = tuple(dict.fromkeys(("read", config.response_stage, "retrieve", "mask")))
        self.engine_spec = config.refill_engine
        self.rounds = config.k
        self._vlm: Any = None

    @property
    def uses_gpu(self) -> bool:
        """Whether the model runs in this process."""
        return self.engine_spec is None or super().uses_gpu

    def settings(self) -> Row:
        """The model, and the settings that decide which completions pass."""
        config = self.config
        if self.engine_spec is None:
            model = [config.base, model_digest(config.base), config.computed]
        else:
            model = engine_identity(self.engine_spec, config.computed)
        return {
            "refill": config.refill,
            "model": model,
            "candidates": config.candidates,
            "tau": config.tau if config.similarity == "lexical" else None,
            "temperature": config.temperature,
            "seed": config.seed if config.temperature else None,
        }

    def open(self) -> None:
        """Loads the model, or opens the engine."""
        self._lookup = RowLookup(self.folders["read"])
        super().open()
        if self.engine_spec is None:
            self._vlm, self._processor = load_vlm(
                self.config.base, self.config.dtype, **self.config.pixels
            )

    def close(self) -> None:
        """Releases the model."""
        super().close()
        self._vlm = None

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Tries the neighbours in order, until `candidates` completions pass or none is left."""
        tasks, config = self._tasks(inputs), self.config
        for place in range(max((len(task.neighbours) for task in tasks), default=0)):
            active = [task for task in tasks if task.needs_attempt(place, config.candidates)]
            neighbours = [task.neighbours[place] for task in active]
            keys = [(neighbour["shard"], neighbour["id"]) for neighbour in neighbours]
            rows = self._lookup.rows(keys)
            # The prompt has a place for each image of its record, so the numbers must be equal.
            pairs = [
                (task, rows[key])
                for task, key in zip(active, keys, strict=True)
                if len(rows[key]["images"]) == len(task.record.images)
            ]
            if self.engine_spec is None:
                size = config.batch_size
                for start in range(0, len(pairs), size):
                    self._infill(pairs[start : start + size], place)
            else:
                yield from self._ask_for(pairs, place)
        model = self.engine_name or config.model or "digits"
        completed = [
            {"id": task.record.name, "attempts": task.attempts, "refill_model": model}
            for task in tasks
            if task.invalid is None
        ]
        return completed, [task.invalid for task in tasks if task.invalid is not None]

    def _tasks(self, inputs: dict[str, list[Row]]) -> list[_Task]:
        masks, near = by_id(inputs["mask"]), by_id(inputs["retrieve"])
        chosen = by_id(inputs[self.config.response_stage])
        tasks = []
        for row in inputs["read"]:
            name = row["id"]
            if name in masks and name in near:
                masked = Masked(tuple(masks[name]["pieces"]), tuple(masks[name]["hidden"]))
                record = record_of(row, chosen[name]["chosen"])
                task = _Task(record, masked, near[name]["neighbours"])
                tasks.append(task)
                if self.engine_spec is None:
                    try:
                        check_prompt(self._processor, record, len(record.images))
                    except RecordError as error:
                        task.invalid = self.invalid(name, "prompt and images differ", str(error))
        return tasks

    def _infill(self, pairs: Sequence[tuple[_Task, Row]], place: int) -> None:
        """Completes a batch and stores the completions in its tasks.

        A batch that fails is tried again in halves.
        """
        loaded = load_in_threads(
            decode_images, [images_of(row) for _, row in pairs], self.config.worker_threads
        )
        # If a neighbour has become unreadable since the embed stage, the next one is tried.
        readable = [
            (pair, images)
            for pair, images in zip(pairs, loaded, strict=True)
            if not isinstance(images, ImageError)
        ]
        if not readable:
            return
        tasks = [task for (task, _), _ in readable]
        try:
            completions = infill(
                self._vlm,
                self._processor,
                [task.record.prompt for task in tasks],
                [images for _, images in readable],
                [task.masked for task in tasks],
                temperature=self.config.temperature,
                seeds=[self._seed(task, place) for task in tasks],
            )
        except (torch.OutOfMemoryError, ValueError) as error:  # ValueError: from a processor
            if len(tasks) == 1:
                no_memory = isinstance(error, torch.OutOfMemoryError)
                reason = "out of memory" if no_memory else "refused by the model"
                tasks[0].invalid = self.invalid(tasks[0].record.name, reason, str(error))
                return
        else:
            for task, completion in zip(tasks, completions, strict=True):
                reason = "" if completion.closed else "gap not closed"
                self._note(task, place, completion.text, completion.closed, reason)
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # not in `except`, which keeps the failed batch alive
        half = len(readable) // 2
        for part in (readable[:half], readable[half:]):
            self._infill([pair for pair, _ in part], place)

    def _ask_for(
        self, pairs: Sequence[tuple[_Task, Row]], place: int
    ) -> Generator[list[Chat], list[Reply], None]:
        """Requests completions from the engine."""
        asked_tasks, requests = [], []
        loaded = load_in_threads(
            chat_images, [images_of(row) for _, row in pairs], self.config.worker_threads
        )
        for (task, _), images in zip(pairs, loaded, strict=True):
            if isinstance(images, ImageError):  # see `_infill`
                continue
            asked_tasks.append(task)
            requests.append(
                complete_chat(
                    task.record.prompt,
                    task.masked,
                    images,
                    max_tokens=_SPARE_TOKENS + len(task.record.chosen) // 2,
                    temperature=self.config.temperature,
                    seed=self._seed(task, place) if self.config.temperature else 0,
                )
            )
        for task, reply in zip(asked_tasks, (yield requests), strict=True):
            if reply.error:
                task.invalid = self.invalid(task.record.name, NO_REPLY, reply.error)
                continue
            text = parse_completion(reply, task.masked)
            reason = ""
            if reply.cut:
                reason = "cut off"
            elif text is None:
                reason = TOO_LONG if len(reply.text) > LONGEST else "not completed"
            elif not keeps_pieces(task.masked, text):
                reason = "other words changed"
            self._note(task, place, text or "", not reply.cut, reason)

    def _note(self, task: _Task, place: int, text: str, closed: bool, reason: str) -> None:
        """Stores a completion. Without a `reason` to drop it, the text filters decide."""
        lexical = self.config.similarity == "lexical"
        tau = self.config.tau if lexical else float("inf")
        if not reason and (problem := problem_of(text)):
            reason, _ = problem
        reason = reason or reason_to_drop(task.record.chosen, text, tau) or ""
        task.attempts.append({"rank": place, "text": text, "closed": closed, "reason": reason})
        if not reason and not task.needs_attempt(place, self.config.candidates):
            self.tick(1)

    def _seed(self, task: _Task, place: int) -> int:
        rng = rng_of(self.config.seed, task.record.name, f"refill {place}")
        return int(rng.integers(2**31))
