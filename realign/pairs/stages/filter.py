"""Filter: the attempt of each record, if any, that becomes its rejected response."""

from __future__ import annotations

import pyarrow as pa

from realign.pairs.config import PairsConfig
from realign.pairs.filters import Candidate, make_filters
from realign.pairs.io.rows import Row
from realign.pairs.stages.assemble import Assembler
from realign.pairs.stages.base import ChatStage, Script


class Filter(ChatStage):
    """The first attempt of each record that passes all filters; records without one are dropped."""

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
        super().__init__(config)
        self._filters = make_filters(config)
        self._needs_records = any(one.needs_record for one in self._filters)
        stages = ("read", config.response_stage, "retrieve", "mask", "refill")
        self.needs = tuple(dict.fromkeys(stages))
        self.engine_spec = config.judge
        self.rounds = config.candidates
        if not self._needs_records:
            self.columns = {name: ["id"] for name in self.needs} | {
                config.response_stage: ["id", "chosen"],
                "refill": ["id", "attempts"],
            }

    @property
    def uses_gpu(self) -> bool:
        """Whether a filter or the engine computes here."""
        return any(one.uses_gpu for one in self._filters) or super().uses_gpu

    def settings(self) -> Row:
        """The settings of all filters, and of the visual negative where one looks at it."""
        settings: Row = {}
        for one in self._filters:
            settings |= one.settings()
        if self._needs_records:
            settings |= {"negative": self.config.negative, "seed": self.config.seed}
        return settings

    def open(self) -> None:
        """Load the models of the filters."""
        super().open()
        for one in self._filters:
            one.open()
        if self._needs_records:
            self._assembler = Assembler(self.config, self.folders)

    def close(self) -> None:
        """Release them."""
        super().close()
        for one in self._filters:
            one.close()

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Filter the attempts that passed refill, one of each record at a time."""
        attempts = {row["id"]: row["attempts"] for row in inputs["refill"]}
        passed = {name: [a for a in tried if not a["reason"]] for name, tried in attempts.items()}
        chosen = {row["id"]: row["chosen"] for row in inputs[self.config.response_stage]}
        last: dict[str, Candidate] = {}  # the latest candidate of each record
        for place in range(max(map(len, passed.values()), default=0)):
            tried = []
            for name, texts in passed.items():
                filtered = name not in last or last[name].reason
                if filtered and place < len(texts):
                    row = {"rank": texts[place]["rank"], "rejected": texts[place]["text"]}
                    last[name] = Candidate(name, chosen[name], row["rejected"], columns=row)
                    tried.append(last[name])
            for one in self._filters:
                tried = [candidate for candidate in tried if candidate.passes]
                if one.needs_record and any(candidate.record is None for candidate in tried):
                    rows = {candidate.name: candidate.columns for candidate in tried}
                    records = self._assembler.records(inputs, number, rows)
                    for candidate, record in zip(tried, records, strict=True):
                        candidate.record = record
                requests = one.requests(tried)
                one.check(tried, (yield requests) if requests else [])
        rows, left_out = [], []
        for name, tries in attempts.items():
            candidate = last.get(name)
            if candidate is None:  # none passed refill
                reason = tries[-1]["reason"] if tries else "no neighbour"
                left_out.append(self.filtered(name, reason))
            elif candidate.invalid is not None:
                left_out.append(self.invalid(name, *candidate.invalid))
            elif candidate.reason:
                left_out.append(self.filtered(name, candidate.reason))
            else:
                rows.append({"id": name, **candidate.columns})
        return rows, left_out
