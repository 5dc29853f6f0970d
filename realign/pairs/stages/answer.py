"""Answer stage: an engine writes the missing responses."""

from __future__ import annotations

import pyarrow as pa

from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.io.images import ImageError
from realign.pairs.io.rows import (
    NO_REPLY,
    TOO_LONG,
    Row,
    chat_images,
    engine_identity,
    images_of,
    load_in_threads,
    record_of,
)
from realign.pairs.io.texts import problem_of
from realign.pairs.io.words import LONGEST
from realign.pairs.prompts import answer_chat, parse_answer
from realign.pairs.stages.base import ChatStage, Script


class Answer(ChatStage):
    """Responses written by an engine for the records without one."""

    name = "answer"
    needs = ("read",)
    schema = pa.schema({"id": pa.string(), "chosen": pa.string(), "answer_model": pa.string()})

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        self.engine_spec = config.answer

    def settings(self) -> Row:
        """The engine."""
        assert self.config.answer is not None
        return {"engine": engine_identity(self.config.answer, self.config.computed)}

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Requests the missing responses."""
        left_out = []
        asked_ids, requests = [], []
        unanswered = [row for row in inputs["read"] if not row["chosen"]]
        workers = self.config.worker_threads
        images = load_in_threads(chat_images, map(images_of, unanswered), workers)
        for row, loaded in zip(unanswered, images, strict=True):
            if isinstance(loaded, ImageError):
                left_out.append(self.invalid(row["id"], loaded.reason, loaded.detail))
            else:
                asked_ids.append(row["id"])
                requests.append(answer_chat(record_of(row), loaded))
        replies = dict(zip(asked_ids, (yield requests), strict=True))
        rows = []
        for row in inputs["read"]:
            name, chosen, model = row["id"], row["chosen"], None
            if (reply := replies.get(name)) is not None:
                chosen, model = parse_answer(reply), self.engine_name
                if problem := _problem_of(reply, chosen):
                    left_out.append(self.invalid(name, *problem))
                    continue
            if chosen:
                rows.append({"id": name, "chosen": chosen, "answer_model": model})
        return rows, left_out


def _problem_of(reply: Reply, text: str | None) -> tuple[str, str] | None:
    """(reason, detail) for an invalid reply with the parsed text `text`, or None if it is valid."""
    if reply.error:
        return NO_REPLY, reply.error
    if reply.cut:
        return "reply cut off", ""
    if not (text and text.strip()):
        return (TOO_LONG, "") if len(reply.text) > LONGEST else ("empty reply", "")
    return problem_of(text)
