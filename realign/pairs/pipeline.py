"""Pairs pipeline: read, answer, embed, mask, retrieve, refill on the neighbour, filter, write.

The pipeline follows the paper. It tries the k nearest neighbours of an image, nearest first. The
first neighbour with a completion that passes the filters is the visual negative, and the completion
is the rejected response. A record without such a neighbour is dropped and counted by reason.
If a sample of the records gives too few pairs, a window of neighbours further out is chosen on it.
An interrupted run resumes in every stage.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from realign.data.images import DataFolder
from realign.data.records import write_pairs
from realign.files import check_file, check_folder
from realign.modeling.loading import load_processor
from realign.pairs.config import PairsConfig
from realign.pairs.io.images import ImagePaths
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
from realign.pairs.stages.window import Choice, choose

__all__ = ["STAGES", "PairsConfig", "PairsReport", "build_pairs", "digit_sources", "run_stages"]

_ORDER: tuple[type[Stage], ...] = (Read, Answer, Embed, Mask, Retrieve, Refill, Filter, Derive)
STAGES = tuple(stage.name for stage in _ORDER)
"""Names of the stages, in order."""


_REMEDIES = {
    "nothing to mask": "Name other kinds of word with --mask, or a model with --masker.",
    "gap not closed": "Hide other kinds of word with --mask. The model does not end these gaps.",
    "no neighbour": "Add images, or lower --floor or --hash-distance.",
    "same as chosen": "Hide more words with --segments 0, raise --k, or add images.",
    "too similar": "Raise --tau, or hide more words with --segments 0.",
    "other words changed": "Use --refill infill, or an --engine that follows instructions.",
    "not completed": "Use --refill infill, or an --engine that follows instructions.",
    "visual margin not above 0": "Use a better --model, or omit --margin.",
    "no verdict": "Use a --judge that answers yes or no.",
}
"""Reason for dropping a record -> remedy if too many records are dropped."""

_DIGITS = "the shipped digits model fills the gaps, and it was trained only on digits"


@dataclass
class PairsReport:
    """Result of `build_pairs`."""

    path: Path
    written: int
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> records without a pair
    seconds: float = 0.0
    bad: Counter[str] = field(default_factory=Counter)  # reason -> invalid records
    note: str = ""  # `ImagePaths.note`
    window: str = ""  # `Choice.line`

    def __str__(self) -> str:
        return (
            f"wrote {self.path}: {self.written} pairs in {self.seconds:.0f} s; "
            f"dropped {_counted(self.dropped)}"
            + (f"; invalid {_counted(self.bad)}" if self.bad else "")
            + self.note
            + (f"\n{self.window}" if self.window else "")
        )


def build_pairs(config: PairsConfig) -> PairsReport:
    """Make preference pairs and write them. The same configuration gives the same file.

    Shards of an earlier run in the same work folder are reused.

    Raises:
        ValueError: for an empty data set, invalid settings, too many invalid records, or when no
            pair is left to write.
        RunError: a ValueError, when the disk is full. Finished shards are kept.
    """
    began = time.perf_counter()
    check_file("--output", config.output, device=False)
    check_folder("--work", config.work_folder)
    with sole_run(config.work_folder):
        outcome, choice = _run(config, _ORDER)
        assembler, paths, note = Assembler(config, outcome.folders), ImagePaths(), ""
        pairs = assembler.pairs()
        first = next(pairs, None)
        if first is None:
            digits_only = config.data is not None and config.model is None
            raise ValueError(_no_pair(outcome) + f" Without --model, {_DIGITS}." * digits_only)
        try:
            noted = paths.of(chain([first], pairs))
            written = write_pairs(config.output, noted, typed=assembler.typed())
        except OSError as error:
            if not is_full(error):
                raise
            raise RunError(
                f"the disk of {config.output} is full. The finished shards in {config.work_folder} "
                "are kept. Free some space and run the same command again."
            ) from error
        window = choice.line(written, outcome.dropped, _remedy(outcome)) if choice else ""
        note_run(config.work_folder, config.output, outcome, window)
        if config.data is not None:
            folder = DataFolder.of_images(Path(config.data), config.image_folder)
            note = paths.note(config.output, folder)
    seconds = time.perf_counter() - began
    path, dropped = Path(config.output), outcome.dropped
    return PairsReport(path, written, dropped, seconds, outcome.bad, note, window)


def run_stages(config: PairsConfig, last: str) -> Outcome:
    """Run a stage and the stages that it needs.

    Args:
        config: the settings.
        last: one of `STAGES`.

    Returns:
        The folders of the shards, and the numbers of dropped and invalid records.

    Raises:
        ValueError: like `build_pairs`, and when `last` is not a stage of this configuration.
    """
    if last == "answer" and config.answer is None:
        raise ValueError("the stage answer needs an engine. Add --answer.")
    if last == Derive.name and config.negative not in DERIVED:
        raise ValueError(
            f"{config.negative} negatives have no stage. Add --negative crop, noise or blank."
        )
    by_name = {stage.name: stage for stage in _ORDER}
    selected, pending = set(), [last]
    while pending:
        name = pending.pop()
        selected.add(name)
        pending += by_name[name](config).needs
    check_folder("--work", config.work_folder)
    with sole_run(config.work_folder):
        outcome, _ = _run(config, [stage for stage in _ORDER if stage.name in selected])
    return outcome


def _run(config: PairsConfig, kinds: Sequence[type[Stage]]) -> tuple[Outcome, Choice | None]:
    if config.model is not None:
        load_processor(
            config.model, **config.pixels
        )  # an unknown model raises before any record is read
    absent = {Answer: config.answer is None, Derive: config.negative not in DERIVED}
    enabled = [kind for kind in kinds if not absent.get(kind)]
    choice: Choice | None = None

    def stages() -> Generator[Stage]:
        nonlocal choice
        chosen = config
        for kind in enabled:
            if kind is Mask and Refill in enabled:
                chosen, choice = yield from choose(config)
            yield kind(chosen)

    runner = Runner(
        config.work_folder,
        max_bad=config.max_bad,
        rejected=config.work_folder / "rejected_records.parquet",
        quiet=config.quiet,
        ray=config.ray,
    )
    if config.data is not None and config.model is None:
        runner.report(f"without --model, {_DIGITS}")

    def check(outcome: Outcome) -> None:
        missing, records = outcome.unanswered, outcome.records
        if config.answer is not None and not missing:
            raise ValueError(
                "--answer would have no effect: every record has a response. Remove it."
            )
        if config.answer is None and missing > config.max_bad * records:
            raise ValueError(
                f"{missing} of {records} records have no response. Let an engine write them with "
                "--answer transformers:MODEL or --answer URL#MODEL."
            )

    return runner.run(stages(), check), choice


def _no_pair(outcome: Outcome) -> str:
    """The error for a run without a pair, with a remedy for the most common reason."""
    if not outcome.dropped:
        return "all records are invalid. rejected_records.parquet lists them with their reasons."
    return f"no record gave a pair; dropped {_counted(outcome.dropped)}. {_remedy(outcome)}"


def _remedy(outcome: Outcome) -> str:
    """The remedy for the most common reason."""
    ((reason, _),) = outcome.dropped.most_common(1) or [("", 0)]
    return _REMEDIES.get(reason, "Raise --k, or add images.")


def _counted(reasons: Counter[str]) -> str:
    """The total number of records, and the number for each reason."""
    shown = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return str(reasons.total()) + (f" ({shown})" if shown else "")
