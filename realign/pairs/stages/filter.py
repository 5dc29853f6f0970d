"""The last stage: which attempt of a record, if any, becomes its rejected response."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from realign.data.records import Record, RecordError
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.filters import rules as filters
from realign.pairs.filters.margin import visual_margins
from realign.pairs.io.pictures import PictureError
from realign.pairs.io.rows import chat_images, engine_mark, in_threads, mark_of
from realign.pairs.prompts import judge_chat, parse_verdict
from realign.pairs.stages.assemble import Assembler
from realign.pairs.stages.base import NO_REPLY, Bad, ChatStage, Dropped, Row, Script
from realign.pairs.stages.infill import load_vlm


class Filter(ChatStage):
    """The first attempt of each record that passes; records without one are dropped.

    Beside what refill filtered: a semantic similarity, the reference model's own visual margin,
    and a judge that says whether the rejected response is true of the image, or the chosen one of
    the visual negative.
    """

    name = "filter"
    schema = pa.schema(
        {
            "id": pa.string(),
            "rank": pa.int32(),
            "rejected": pa.string(),
            "text_similarity": pa.float64(),
            "visual_margin": pa.float64(),
            "judge": pa.string(),
        }
    )

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        stages = ("read", config.response_stage, "retrieve", "mask", "refill")
        self.needs = tuple(dict.fromkeys(stages))
        self.engine_spec = config.judge
        self.engine_options = config.engine_options
        self.rounds = config.candidates
        if not (config.margin or config.judge is not None):
            self.columns = {name: ["id"] for name in stages} | {
                config.response_stage: ["id", "chosen"],
                "refill": ["id", "attempts"],
            }
        self._similarity: Any = None
        self._vlm: Any = None

    @property
    def uses_gpu(self) -> bool:
        """Words are compared on the CPU."""
        own = self.config.margin or self.config.similarity != "lexical"
        return own or super().uses_gpu

    def settings(self) -> Row:
        """What is asked of a pair."""
        config = self.config
        found: Row = {"similarity": config.similarity}
        if config.similarity != "lexical":
            found |= {"tau": config.tau, "mark": mark_of(config.similarity)}
        if config.judge is not None:
            found["judge"] = engine_mark(config.judge, config.dtype)
        if config.margin:
            found["margin"] = [config.base, mark_of(config.base), config.dtype]
        if config.margin or config.judge is not None:
            found |= {"negative": config.negative, "seed": config.seed}
        return found

    def open(self) -> None:
        """Load what the settings ask for."""
        config = self.config
        super().open()
        if config.margin or config.judge is not None:
            self._assembler = Assembler(config, self.folders)
        if config.similarity != "lexical":
            self._similarity = filters.SentenceSimilarity(config.similarity)
        if config.margin:
            self._vlm, self._processor = load_vlm(config)

    def close(self) -> None:
        """Forget the models."""
        super().close()
        self._similarity = self._vlm = None

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Look at the attempts of each record in turn."""
        config = self.config
        refilled = inputs["refill"]
        passed = {row["id"]: [a for a in row["attempts"] if not a["reason"]] for row in refilled}
        last = {
            row["id"]: (row["attempts"] or [{"reason": "no neighbour"}])[-1] for row in refilled
        }
        reasons = {name: attempt["reason"] or "" for name, attempt in last.items()}
        chosen = {row["id"]: row["chosen"] for row in inputs[config.response_stage]}
        made: dict[str, Row] = {}
        bad: dict[str, Bad] = {}
        for place in range(max(map(len, passed.values()), default=0)):
            tried: dict[str, Row] = {}
            for name, attempts in passed.items():
                if name not in made and name not in bad and place < len(attempts):
                    attempt = attempts[place]
                    tried[name] = {"rank": attempt["rank"], "rejected": attempt["text"]}
            self._compare(tried, chosen, reasons)
            if tried and (config.margin or config.judge is not None):
                records = self._assembler.records(inputs, number, tried)
                if config.margin:
                    records = self._by_margin(tried, records, reasons, bad)
                if config.judge is not None:
                    yield from self._by_judge(tried, records, reasons, bad)
            made |= tried
        left_out: list[Bad] = list(bad.values())
        rows = []
        for row in refilled:
            name = row["id"]
            if name in made:
                rows.append({"id": name, **made[name]})
            elif name not in bad:
                left_out.append(Dropped(name, self.name, reasons[name]))
        return rows, left_out

    def _compare(self, tried: dict[str, Row], chosen: dict[str, str], reasons: dict) -> None:
        """Note the similarity of chosen and rejected; semantically too similar ones go."""
        names = list(tried)
        texts = [(chosen[name], tried[name]["rejected"]) for name in names]
        if self._similarity is None:
            values = [filters.text_similarity(*pair) for pair in texts]
        else:
            values = np.asarray(self._similarity(texts)).tolist() if texts else []
        for name, value in zip(names, values, strict=True):
            tried[name]["text_similarity"] = float(value)
            if self._similarity is not None and value >= self.config.tau:
                reasons[name] = "too similar"
                del tried[name]

    def _by_margin(
        self, tried: dict[str, Row], records: list[Record], reasons: dict, bad: dict[str, Bad]
    ) -> list[Record]:
        """Keep those whose chosen response the reference model finds likelier on their image."""

        def note(record: Record, error: RecordError) -> None:
            bad[record.name] = Bad(record.name, self.name, "no margin", str(error))
            del tried[record.name]

        margins = visual_margins(self._vlm, self._processor, records, on_bad=note)
        kept = []
        for record, margin in zip(records, margins.tolist(), strict=True):
            if record.name not in tried:
                continue
            tried[record.name]["visual_margin"] = margin
            if margin > 0:
                kept.append(record)
            else:
                reasons[record.name] = "visual margin not above 0"
                del tried[record.name]
        return kept

    def _by_judge(
        self, tried: dict[str, Row], records: list[Record], reasons: dict, bad: dict[str, Bad]
    ) -> Generator[list, list[Reply], None]:
        """Keep those with a rejected response false of the image, a chosen one of the negative."""
        asked, requests = [], []
        own = in_threads(chat_images, [{"images": _stored(r.images)} for r in records])
        other = in_threads(chat_images, [{"images": _stored(r.retrieved_images)} for r in records])
        for record, *shown in zip(records, own, other, strict=True):
            if fault := next((s for s in shown if isinstance(s, PictureError)), None):
                bad[record.name] = Bad(record.name, self.name, fault.reason, fault.detail)
                del tried[record.name]
                continue
            asked.append(record)
            requests.append(judge_chat(record.prompt, record.rejected, shown[0]))
            requests.append(judge_chat(record.prompt, record.chosen, shown[1]))
        replies = yield requests
        for record, *pair in zip(asked, replies[::2], replies[1::2], strict=True):
            name = record.name
            if error := pair[0].error or pair[1].error:
                bad[name] = Bad(name, self.name, NO_REPLY, error)
                del tried[name]
                continue
            verdicts = [parse_verdict(reply) for reply in pair]
            tried[name]["judge"] = json.dumps(
                dict(zip(("rejected", "chosen on the negative"), verdicts, strict=True))
            )
            if None in verdicts:
                reasons[name] = "no verdict"
            elif verdicts[0]:
                reasons[name] = "rejected is true of the image"
            elif verdicts[1]:
                reasons[name] = "chosen is true of the negative"
            if any(verdict is not False for verdict in verdicts):
                del tried[name]


def _stored(images: Sequence[Any]) -> list[Row]:
    return [{"bytes": image.data, "path": image.path} for image in images]
