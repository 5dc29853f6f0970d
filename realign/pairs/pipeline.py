"""Pairs pipeline: read, answer, embed, retrieve, mask, refill on the neighbour, filter, write.

It follows the paper. Neighbours are tried from the nearest on; the first with a completion that
passes the filters gives the rejected response and is the visual negative. A record without one
among k neighbours is dropped, and counted by reason. Every stage resumes after an interruption.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from realign.data.records import write_pairs
from realign.files import check_file, check_folder
from realign.modeling.loading import load_processor
from realign.pairs.config import PairsConfig
from realign.pairs.io.shards import is_full
from realign.pairs.negatives import DERIVED
from realign.pairs.stages.answer import Answer
from realign.pairs.stages.assemble import Assembler, Derive
from realign.pairs.stages.base import Stage
from realign.pairs.stages.embed import Embed
from realign.pairs.stages.filter import Filter
from realign.pairs.stages.mask import Mask
from realign.pairs.stages.read import Read, digit_sources
from realign.pairs.stages.refill import Refill
from realign.pairs.stages.retrieve import Retrieve
from realign.pairs.stages.runner import Outcome, RunError, Runner, note_run, sole_run

__all__ = ["STAGES", "PairsConfig", "PairsReport", "build_pairs", "digit_sources", "run_stages"]

_ORDER: tuple[type[Stage], ...] = (Read, Answer, Embed, Retrieve, Mask, Refill, Filter, Derive)
STAGES = tuple(stage.name for stage in _ORDER)
"""Names of the stages, in their order."""


_REMEDIES = {
    "nothing to mask": "Name other kinds of word with --mask, or a model with --masker.",
    "gap not closed": "Hide other kinds of word with --mask; the model finds no end to these.",
    "no neighbour": "Give more images, or lower --floor or --hash-distance.",
    "same as chosen": "Hide more with --segments 0, raise --k, or give more images.",
    "too similar": "Raise --tau, or hide more with --segments 0.",
    "other words changed": "Take --refill infill, or an --engine that follows instructions.",
    "not completed": "Take --refill infill, or an --engine that follows instructions.",
    "visual margin not above 0": "Take a better --model, or leave out --margin.",
    "no verdict": "Take a --judge that answers yes or no.",
}
"""Reason of dropped records -> remedy when all are."""

_DIGITS = "the shipped digits model fills the gaps, which knows no other images"


@dataclass
class PairsReport:
    """Result of `build_pairs`."""

    path: Path
    written: int
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> records without a pair
    seconds: float = 0.0
    bad: Counter[str] = field(default_factory=Counter)  # reason -> invalid records

    def __str__(self) -> str:
        return (
            f"wrote {self.path}: {self.written} pairs in {self.seconds:.0f} s; "
            f"dropped {_counted(self.dropped)}"
            + (f"; unusable {_counted(self.bad)}" if self.bad else "")
        )


def build_pairs(config: PairsConfig) -> PairsReport:
    """Make preference pairs and write them; the same configuration gives the same file.

    Shards of an earlier run with the same work folder are used again.

    Raises:
        ValueError: for an empty data set, bad settings, too many invalid records, or when no pair
            is left to write.
        RunError: a ValueError, when the disk is full; the shards stay.
    """
    began = time.perf_counter()
    check_file("--output", config.output, device=False)
    check_folder("--work", config.work_folder)
    with sole_run(config.work_folder):
        outcome = _run(config, _ORDER)
        assembler = Assembler(config, outcome.folders)
        pairs = assembler.pairs()
        first = next(pairs, None)
        if first is None:
            small = config.data is not None and config.model is None
            raise ValueError(_no_pair(outcome) + f" There is no --model: {_DIGITS}." * small)
        try:
            written = write_pairs(config.output, chain([first], pairs), typed=assembler.typed())
        except OSError as error:
            if not is_full(error):
                raise
            raise RunError(
                f"no room is left for {config.output}. The shards in {config.work_folder} are "
                "complete and stay. Make room and run the same command again."
            ) from error
        note_run(config.work_folder, config.output, outcome)
    seconds = time.perf_counter() - began
    return PairsReport(Path(config.output), written, outcome.dropped, seconds, outcome.bad)


def run_stages(config: PairsConfig, last: str) -> Outcome:
    """Run a stage and the stages that it needs.

    Args:
        config: the settings.
        last: one of STAGES.

    Returns:
        The folders of the shards, and the counts of records left out.

    Raises:
        ValueError: as `build_pairs`, and when `last` is no stage of this configuration.
    """
    if last == "answer" and config.answer is None:
        raise ValueError("there is no stage answer without an engine; add --answer.")
    if last == Derive.name and config.negative not in DERIVED:
        raise ValueError(f"{config.negative} negatives are not made; add --negative crop, noise...")
    by_name = {stage.name: stage for stage in _ORDER}
    wanted, pending = set(), [last]
    while pending:
        name = pending.pop()
        wanted.add(name)
        pending += by_name[name](config).needs
    check_folder("--work", config.work_folder)
    with sole_run(config.work_folder):
        return _run(config, [stage for stage in _ORDER if stage.name in wanted])


def _run(config: PairsConfig, stages: Sequence[type[Stage]]) -> Outcome:
    if config.model is not None:
        load_processor(config.model)  # a wrong name raises before anything is read
    absent = {Answer: config.answer is None, Derive: config.negative not in DERIVED}
    made = [stage(config) for stage in stages if not absent.get(stage)]
    runner = Runner(
        config.work_folder,
        made,
        max_bad=config.max_bad,
        rejected=config.work_folder / "rejected_records.parquet",
        quiet=config.quiet,
        ray=config.ray,
    )
    if config.data is not None and config.model is None:
        runner.report(f"no --model: {_DIGITS}")

    def check(outcome: Outcome) -> None:
        missing, records = outcome.unanswered, outcome.records
        if config.answer is not None and not missing:
            raise ValueError("--answer would have no effect: every record has a response. Drop it.")
        if config.answer is None and missing > config.max_bad * records:
            raise ValueError(
                f"{missing} of {records} records have no response. Have them written by an engine: "
                "--answer transformers:MODEL or a URL."
            )

    return runner.run(check)


def _no_pair(outcome: Outcome) -> str:
    """The error where no record gave a pair, with a remedy for the commonest reason."""
    if not outcome.dropped:
        return "no record is left: all are unusable; rejected_records.parquet lists them."
    (reason, _), *_ = outcome.dropped.most_common(1)
    remedy = _REMEDIES.get(reason, "Raise --k, or give more images.")
    return f"no record gave a pair; dropped {_counted(outcome.dropped)}. {remedy}"


def _counted(reasons: Counter[str]) -> str:
    """The number of records, in all and by reason."""
    shown = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return str(reasons.total()) + (f" ({shown})" if shown else "")
