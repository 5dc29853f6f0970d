"""Filter: decides whether a completion may become the rejected response of its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from realign.data.records import Record
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Chat, Reply


@dataclass
class Candidate:
    """A completion that the filters check.

    Attributes:
        name: of its record.
        chosen: the record's chosen response.
        rejected: the completion.
        record: the pair with its visual negative, where a filter `needs_record`.
        columns: values from the filters, by column of the filter stage.
        reason: of the filter that dropped it, "" while it passes.
        invalid: (reason, detail) where the record cannot be used at all.
    """

    name: str
    chosen: str
    rejected: str
    record: Record | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    invalid: tuple[str, str] | None = None

    @property
    def passes(self) -> bool:
        """Whether no filter has dropped it."""
        return not self.reason and self.invalid is None

    @property
    def pair(self) -> Record:
        """The record, for a filter that `needs_record`."""
        assert self.record is not None
        return self.record


class PairFilter:
    """One filter. `check` sets `reason`, `invalid` and `columns` of candidates.

    Attributes:
        columns: columns of the pairs that it computes, each a key of `data.records.PROVENANCE`.
        needs_record: whether it reads `Candidate.pair`.
        uses_gpu: whether it computes on a GPU where there is one.
    """

    columns: tuple[str, ...] = ()
    needs_record: bool = False
    uses_gpu: bool = False

    def __init__(self, config: PairsConfig) -> None:
        self.config = config

    @classmethod
    def enabled(cls, config: PairsConfig) -> bool:
        """Whether the settings ask for it."""
        return True

    def settings(self) -> dict[str, Any]:
        """The settings that its verdicts depend on, as JSON values."""
        return {}

    def open(self) -> None:
        """Load models."""

    def close(self) -> None:
        """Release the models."""

    def requests(self, candidates: Sequence[Candidate]) -> list[Chat]:
        """Requests about the candidates to the engine of `--judge`."""
        return []

    def check(self, candidates: Sequence[Candidate], replies: Sequence[Reply]) -> None:
        """Set the results of candidates.

        Args:
            candidates: one for each record, those of `requests`.
            replies: to `requests`.
        """
        raise NotImplementedError
