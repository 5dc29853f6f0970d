"""Filters of completions: registry `FILTERS`.

To add a filter, write a subclass of `PairFilter` in a module of this folder, and add it to
`FILTERS`. Its flags are fields of `PairsConfig`. If it adds values to the pairs, name their columns
in `PairFilter.columns` and give them a type in `data.records.PROVENANCE`.
"""

from __future__ import annotations

from realign.pairs.config import PairsConfig
from realign.pairs.filters.base import Candidate, PairFilter
from realign.pairs.filters.judge import Judge
from realign.pairs.filters.margin import VisualMargin
from realign.pairs.filters.text import Similarity

__all__ = ["FILTERS", "Candidate", "PairFilter", "make_filters"]

FILTERS: dict[str, type[PairFilter]] = {
    "similarity": Similarity,
    "margin": VisualMargin,
    "judge": Judge,
}
"""Name -> filter, in the order of application."""


def make_filters(config: PairsConfig) -> list[PairFilter]:
    """The filters that the settings enable. No model is loaded."""
    return [kind(config) for kind in FILTERS.values() if kind.enabled(config)]
