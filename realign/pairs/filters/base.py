"""Base class of filters, which decide whether a completion becomes a rejected response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from realign.data.records import Record
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Chat, Reply


@dataclass
class Candidate:
    """A completion to be filtered.

    Attributes:
        name: name of its record.
        chosen: the record's chosen response.
        rejected: the completion.
        record: the pair with its visual negative, if a filter has `needs_record`.
        columns: column of the filter stage -> value from a filter.
        reason: reason of the filter that dropped the completion, or "".
        invalid: (reason, detail) if the record cannot be used at all.
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
        """Whether no filter has dropped the completion."""
        return not self.reason and self.invalid is None

    @property
    def pair(self) -> Record:
        """The record, for a filter with `needs_record`."""
        assert self.record is not None
        return self.record


class PairFilter:
    """Base class of filters. `check` sets `reason`, `invalid` and `columns` of candidates.

    Attributes:
        columns: columns of the pairs that the filter computes, keys of `data.records.PROVENANCE`.
        needs_record: whether the filter reads `Candidate.pair`.
        uses_gpu: whether the filter computes on a GPU if there is one.
    """

    columns: tuple[str, ...] = ()
    needs_record: bool = False
    uses_gpu: bool = False

    def __init__(self, config: PairsConfig) -> None:
        self.config = config

    @classmethod
    def enabled(cls, config: PairsConfig) -> bool:
        """Whether the settings enable the filter."""
        return True

    def settings(self) -> dict[str, Any]:
        """The settings that the verdicts depend on, as JSON values."""
        return {}

    def open(self) -> None:
        """Loads models."""

    def close(self) -> None:
        """Releases the models."""

    def requests(self, candidates: Sequence[Candidate]) -> list[Chat]:
        """Requests about the candidates, for the engine of `--judge`."""
        return []

    def check(self, candidates: Sequence[Candidate], replies: Sequence[Reply]) -> None:
        """Sets the results of candidates.

        Args:
            candidates: one candidate per record, the same as for `requests`.
            replies: replies to the requests that `requests` returned.
        """
        raise NotImplementedError
