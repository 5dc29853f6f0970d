"""Filters: the completions that may become rejected responses.

To add a filter, write a subclass of `PairFilter` in a module of this folder and add it to
`FILTERS`. Its flags are fields of `PairsConfig`. A value that it adds to the pairs is a column with
a type in `data.records.PROVENANCE`, named in `PairFilter.columns`.
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
"""Name -> filter, in the order of their use."""


def make_filters(config: PairsConfig) -> list[PairFilter]:
    """The filters that the settings ask for; no model is loaded."""
    return [kind(config) for kind in FILTERS.values() if kind.enabled(config)]
