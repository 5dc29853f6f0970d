"""Filter stage: selects the completion of each record that becomes its rejected response."""

from __future__ import annotations

import pyarrow as pa

from realign.data.records import PROVENANCE
from realign.pairs.config import PairsConfig
from realign.pairs.filters import FILTERS, Candidate, make_filters
from realign.pairs.io.rows import Row
from realign.pairs.stages.assemble import Assembler
from realign.pairs.stages.base import ChatStage, Script


class Filter(ChatStage):
    """The first completion of each record that passes all filters.

    Records without one are dropped.
    """

    name = "filter"
    schema = pa.schema(
        {
            "id": pa.string(),
            "rank": pa.int32(),
            "rejected": pa.string(),
        }
        | {column: PROVENANCE[column] for kind in FILTERS.values() for column in kind.columns}
    )

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        self._filters = make_filters(config)
        self._needs_records = any(f.needs_record for f in self._filters)
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
        """Whether a filter or the engine runs in this process."""
        return any(f.uses_gpu for f in self._filters) or super().uses_gpu

    def settings(self) -> Row:
        """The settings of all filters, and those of the visual negative if a filter uses it."""
        settings: Row = {}
        for pair_filter in self._filters:
            settings |= pair_filter.settings()
        if self._needs_records:
            settings |= {"negative": self.config.negative, "seed": self.config.seed}
        return settings

    def open(self) -> None:
        """Loads the models of the filters."""
        super().open()
        for pair_filter in self._filters:
            pair_filter.open()
        if self._needs_records:
            self._assembler = Assembler(self.config, self.folders)

    def close(self) -> None:
        """Releases the models of the filters."""
        super().close()
        for pair_filter in self._filters:
            pair_filter.close()

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Filters the completions that passed refill, in rounds with one of each record."""
        attempts = {row["id"]: row["attempts"] for row in inputs["refill"]}
        passed = {n: [a for a in tries if not a["reason"]] for n, tries in attempts.items()}
        chosen = {row["id"]: row["chosen"] for row in inputs[self.config.response_stage]}
        last: dict[str, Candidate] = {}  # the latest candidate of each record
        for place in range(max(map(len, passed.values()), default=0)):
            candidates = []
            for name, options in passed.items():
                needs_candidate = name not in last or last[name].reason
                if needs_candidate and place < len(options):
                    row = {"rank": options[place]["rank"], "rejected": options[place]["text"]}
                    last[name] = Candidate(name, chosen[name], row["rejected"], columns=row)
                    candidates.append(last[name])
            for pair_filter in self._filters:
                candidates = [candidate for candidate in candidates if candidate.passes]
                if pair_filter.needs_record and any(c.record is None for c in candidates):
                    rows = {candidate.name: candidate.columns for candidate in candidates}
                    records = self._assembler.records(inputs, number, rows)
                    for candidate, record in zip(candidates, records, strict=True):
                        candidate.record = record
                requests = pair_filter.requests(candidates)
                pair_filter.check(candidates, (yield requests) if requests else [])
        rows, left_out = [], []
        for name, record_attempts in attempts.items():
            candidate = last.get(name)
            if candidate is None:  # none passed refill
                reason = record_attempts[-1]["reason"] if record_attempts else "no neighbour"
                left_out.append(self.filtered(name, reason))
            elif candidate.invalid is not None:
                left_out.append(self.invalid(name, *candidate.invalid))
            elif candidate.reason:
                left_out.append(self.filtered(name, candidate.reason))
            else:
                unknown = candidate.columns.keys() - set(self.schema.names)
                assert not unknown, f"add {unknown} to the `columns` of their filter"
                rows.append({"id": name, **candidate.columns})
        return rows, left_out
