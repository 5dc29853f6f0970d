"""Refill: masked responses are completed on the neighbours, nearest first."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from realign.data.records import Record, RecordError
from realign.modeling.encode import check_prompt
from realign.modeling.loading import DTYPES, load_model, load_processor
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.filters import rules as filters
from realign.pairs.infill.refill import infill
from realign.pairs.io.pictures import PictureError
from realign.pairs.io.rows import (
    by_id,
    chat_images,
    engine_mark,
    in_threads,
    mark_of,
    name_of,
    pictures_of,
    record_of,
)
from realign.pairs.io.shards import Library
from realign.pairs.io.texts import problem_of
from realign.pairs.masking.mask import Masked
from realign.pairs.prompts import complete_chat, keeps_pieces, parse_completion
from realign.pairs.stages.base import NO_REPLY, Bad, ChatStage, Row, Script, rng_of

_SPARE_TOKENS = 32  # of a completion, beyond one for two characters of the chosen response


@dataclass
class _Task:
    """A record on its way through its neighbours."""

    record: Record
    masked: Masked
    neighbours: list[Row]
    attempts: list[Row] = field(default_factory=list)
    bad: Bad | None = None

    def wants(self, place: int, candidates: int) -> bool:
        """Whether the neighbour at `place` is tried."""
        passed = sum(not attempt["reason"] for attempt in self.attempts)
        return self.bad is None and place < len(self.neighbours) and passed < candidates


class Refill(ChatStage):
    """Completions of the masked responses on the neighbours, nearest first.

    By infill the unmasked tokens are forced; by prompt an engine is asked to complete the text.
    """

    name = "refill"
    uses_gpu = True
    schema = pa.schema(
        {
            "id": pa.string(),
            "attempts": pa.list_(
                pa.struct(
                    [
                        ("rank", pa.int32()),
                        ("text", pa.string()),
                        ("closed", pa.bool_()),
                        ("reason", pa.string()),
                    ]
                )
            ),
            "refill_model": pa.string(),
        }
    )

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        self.needs = tuple(dict.fromkeys(("read", config.response_stage, "retrieve", "mask")))
        self.engine_spec = config.refill_engine
        self.engine_options = config.engine_options
        self.rounds = config.k
        self._vlm: Any = None

    def settings(self) -> Row:
        """Who completes, and what passes."""
        config = self.config
        if self.engine_spec is None:
            who = [config.base, mark_of(config.base), config.dtype]
        else:
            who = engine_mark(self.engine_spec, config.dtype)
        return {
            "refill": config.refill,
            "model": who,
            "candidates": config.candidates,
            "tau": config.tau if config.similarity == "lexical" else None,
            "temperature": config.temperature,
            "seed": config.seed if config.temperature else None,
        }

    def open(self) -> None:
        """Load the model, or open the engine."""
        self._library = Library(self.folders["read"])
        super().open()
        if self.engine_spec is None:
            self._vlm, self._processor = load_vlm(self.config)

    def close(self) -> None:
        """Forget the model."""
        super().close()
        self._vlm = None

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Try the neighbours in turn until `candidates` completions passed or none is left."""
        tasks, config = self._tasks(inputs), self.config
        for place in range(max((len(task.neighbours) for task in tasks), default=0)):
            open_ = [task for task in tasks if task.wants(place, config.candidates)]
            keys = {id(t): (t.neighbours[place]["shard"], t.neighbours[place]["id"]) for t in open_}
            rows = self._library.rows(keys.values())
            # A prompt places as many images as its record has, so a neighbour must have as many.
            pairs = [
                (task, rows[keys[id(task)]])
                for task in open_
                if len(rows[keys[id(task)]]["images"]) == len(task.record.images)
            ]
            if self.engine_spec is None:
                size = config.batch_size
                for start in range(0, len(pairs), size):
                    self._infill(pairs[start : start + size], place)
            else:
                yield from self._ask_for(pairs, place)
        model = name_of(self.engine_spec) if self.engine_spec else config.model or "digits"
        rows = [
            {"id": task.record.name, "attempts": task.attempts, "refill_model": model}
            for task in tasks
            if task.bad is None
        ]
        return rows, [task.bad for task in tasks if task.bad is not None]

    def _tasks(self, inputs: dict[str, list[Row]]) -> list[_Task]:
        masks, near = by_id(inputs["mask"]), by_id(inputs["retrieve"])
        chosen = by_id(inputs[self.config.response_stage])
        tasks = []
        for row in inputs["read"]:
            name = row["id"]
            if name in masks and name in near:
                masked = Masked(tuple(masks[name]["pieces"]), tuple(masks[name]["hidden"]))
                record = record_of(row, chosen[name]["chosen"])
                tasks.append(_Task(record, masked, near[name]["neighbours"]))
                if self.engine_spec is None:
                    tasks[-1].bad = self._prompt_fault(record)
        return tasks

    def _prompt_fault(self, record: Record) -> Bad | None:
        try:
            check_prompt(self._processor, record, len(record.images))
        except RecordError as error:
            return Bad(record.name, self.name, "prompt and images differ", str(error))
        return None

    def _infill(self, pairs: Sequence[tuple[_Task, Row]], place: int) -> None:
        """Complete a batch in place; what fails as a whole is tried in halves."""
        loaded = in_threads(pictures_of, [row for _, row in pairs])
        # A neighbour was readable before; where it is not any more, the next one is tried.
        pairs = [p for p, found in zip(pairs, loaded, strict=True) if isinstance(found, list)]
        pictures = [found for found in loaded if isinstance(found, list)]
        if not pairs:
            return
        try:
            completions = infill(
                self._vlm,
                self._processor,
                [task.record.prompt for task, _ in pairs],
                pictures,
                [task.masked for task, _ in pairs],
                temperature=self.config.temperature,
                seeds=[self._seed(task, place) for task, _ in pairs],
            )
        except torch.OutOfMemoryError as error:
            if len(pairs) == 1:
                task = pairs[0][0]
                task.bad = Bad(task.record.name, self.name, "out of memory", str(error))
                return
        except ValueError as error:  # a processor refuses an image or a text
            if len(pairs) == 1:
                task = pairs[0][0]
                task.bad = Bad(task.record.name, self.name, "refused by the model", str(error))
                return
        else:
            for (task, _), completion in zip(pairs, completions, strict=True):
                reason = "" if completion.closed else "gap not closed"
                self._note(task, place, completion.text, completion.closed, reason)
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # outside `except`, which would hold the failed batch
        self._infill(pairs[: len(pairs) // 2], place)
        self._infill(pairs[len(pairs) // 2 :], place)

    def _ask_for(
        self, pairs: Sequence[tuple[_Task, Row]], place: int
    ) -> Generator[list, list[Reply], None]:
        """Have an engine complete the responses."""
        asked, requests = [], []
        pictures = in_threads(chat_images, [row for _, row in pairs])
        for (task, _), images in zip(pairs, pictures, strict=True):
            if isinstance(images, PictureError):  # see `_infill`
                continue
            asked.append(task)
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
        for task, reply in zip(asked, (yield requests), strict=True):
            if reply.error:
                task.bad = Bad(task.record.name, self.name, NO_REPLY, reply.error)
                continue
            text = parse_completion(reply, task.masked)
            reason = ""
            if reply.cut:
                reason = "cut off"
            elif text is None:
                reason = "not completed"
            elif not keeps_pieces(task.masked, text):
                reason = "other words changed"
            elif problem := problem_of(text):
                reason, _ = problem
            self._note(task, place, text or "", not reply.cut, reason)

    def _note(self, task: _Task, place: int, text: str, closed: bool, reason: str) -> None:
        """Keep an attempt; without another reason it passes if the text differs enough."""
        lexical = self.config.similarity == "lexical"
        tau = self.config.tau if lexical else float("inf")
        reason = reason or filters.reason_to_drop(task.record.chosen, text, tau) or ""
        task.attempts.append({"rank": place, "text": text, "closed": closed, "reason": reason})
        if not reason and not task.wants(place, self.config.candidates):
            self.tick(1)

    def _seed(self, task: _Task, place: int) -> int:
        rng = rng_of(self.config.seed, task.record.name, f"refill {place}")
        return int(rng.integers(2**31))


def load_vlm(config: PairsConfig) -> tuple[Any, Any]:
    """The model that refills and is the reference of margins, and its processor."""
    processor = load_processor(config.base)
    vlm = load_model(config.base, DTYPES[config.dtype]).eval()
    return vlm.to("cuda" if torch.cuda.is_available() else "cpu"), processor
