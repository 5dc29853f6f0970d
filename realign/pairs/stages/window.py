"""Window stage: tries settings of the neighbours and masks on a sample, for `--keep-target`.

A window is the range of similarity in which neighbours are searched, and the share of a response
that is hidden. `choose` first tries the given settings. If they keep too few records, it tries
windows further out. A `Trial` runs the later stages on a sample of at most `SAMPLE` records with
the vectors of all. So the choice depends only on the data and the settings, and a stopped run makes
the same choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from realign.pairs.config import PairsConfig
from realign.pairs.filters.margin import visual_margins
from realign.pairs.infill.refill import load_vlm
from realign.pairs.io.rows import FilteredRecord, Row, by_id
from realign.pairs.io.shards import Shards, digest_of, parquet_file, read_table
from realign.pairs.stages.assemble import Assembler
from realign.pairs.stages.base import ChatStage, Result, Stage
from realign.pairs.stages.filter import Filter
from realign.pairs.stages.mask import Mask
from realign.pairs.stages.refill import Refill
from realign.pairs.stages.retrieve import Retrieve
from realign.progress import counted

SAMPLE = 200
"""Maximum number of records in the sample. The standard error of a share of 0.8 is 0.028."""
_NOISE = 0.03
"""Difference of two shares that counts as none: one standard error with `SAMPLE` records."""
_SPREAD = 20
"""Reach of the windows further out, in multiples of `k`."""
_RINGS = (2, 5)
"""Multiples of `k`: a window further out leaves out as many images of a typical record."""
_CANDIDATES = 3
"""Completions that filters may try in the windows further out, as in docs/pairs.md."""

Moves = dict[str, Any]
"""Settings of a window that differ from the given ones."""


class Trial(ChatStage):
    """The stages after embed, on a sample of the records. Its only shard has a row per record.

    Args:
        config: settings to try.
        given: settings of the run. The trial uses the vectors of their retrieve stage.
    """

    name = "window"
    schema = pa.schema(
        {
            "id": pa.string(),
            "reason": pa.string(),  # reason for dropping the record, or "" for a pair
            "margin": pa.float64(),  # reference's visual margin of a pair
        }
    )

    def __init__(self, config: PairsConfig, given: PairsConfig) -> None:
        if config.negative == "random":  # the sample has no random records
            config = replace(config, negative="retrieved")
        super().__init__(config)
        self._given = given
        self._measures = config.refill == "infill" or config.margin  # the model is in this process
        self._retrieve, self._mask = Retrieve(config), Mask(config)
        self._refill, self._filter = Refill(config), Filter(config)
        self.needs = tuple(dict.fromkeys(("read", "embed", config.response_stage)))
        self.columns = {name: ["id"] for name in self.needs}

    @property
    def uses_gpu(self) -> bool:
        """Whether any model runs in this process."""
        return any(stage.uses_gpu for stage in (self._mask, self._refill, self._filter))

    def settings(self) -> Row:
        """The settings of the stages that the trial runs, and the target."""
        stages = (self._retrieve, self._mask, self._refill, self._filter)
        settings: Row = {stage.name: stage.settings() for stage in stages}
        measured_from = self.config.keep_target if self._measures else None
        return settings | {"measured from": measured_from, "seed": self.config.seed}

    def prepare(self) -> None:
        """Writes the vectors of all images, in the folder of the given retrieve stage."""
        digests = {n: folder.name.rpartition("-")[2] for n, folder in self.folders.items()}
        for stage in (Mask(self._given), Retrieve(self._given)):
            digests[stage.name] = stage.digest(digests)
        retrieve = self._retrieve
        retrieve.folders = self.folders
        retrieve.folder = self.folder.with_name(f"retrieve-{digests['retrieve']}")
        retrieve.folder.mkdir(parents=True, exist_ok=True)
        retrieve.prepare()
        rows = [Shards(self.folders[name]) for name in self.needs]
        self.shared = digest_of(*(part.rows_digest(n) for part in rows for n in part.done()))
        self.sampled = len(self._places)

    @cached_property
    def _places(self) -> np.ndarray:
        """Indices of the sampled records among all embedded ones, ascending."""
        count = len(read_table(self._retrieve.folder / "rows.parquet", ["shard"]))
        rng = np.random.default_rng(self.config.seed)
        return np.sort(rng.choice(count, min(SAMPLE, count), replace=False))

    def open(self) -> None:
        """Loads nothing: `run` opens one stage after the other."""

    def close(self) -> None:
        """Releases nothing."""

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Makes pairs of the sample."""
        response = self.config.response_stage
        sample = {name: self._rows_of(name) for name in dict.fromkeys(("read", response))}
        left_out = []
        for stage in (self._mask, self._retrieve, self._refill, self._filter):
            stage.folders = {**self.folders, "retrieve": self._retrieve.folder}
            stage.tick = self.tick if stage is self._refill else Stage.tick
            if isinstance(stage, ChatStage):
                stage.report, stage.records = self.report, self.sampled
            stage.open()
            try:
                if stage is self._retrieve:
                    sample["retrieve"] = self._near(sample)
                else:
                    sample[stage.name], entries = stage.run(sample, 0)
                    left_out += entries
            finally:
                stage.close()
        reasons = {e.record: e.reason for e in left_out if isinstance(e, FilteredRecord)}
        reasons |= {row["id"]: "" for row in sample["filter"]}
        margins: dict[str, float | None] = {}
        target = self.config.keep_target
        if self._measures and len(sample["filter"]) >= target * len(reasons):
            margins = self._margins(sample)
        rows = [{"id": n, "reason": r, "margin": margins.get(n)} for n, r in reasons.items()]
        return rows, []

    def _rows_of(self, name: str) -> list[Row]:
        """The rows of the sample in an earlier stage. Only their row groups are read."""
        table = read_table(self._retrieve.folder / "rows.parquet", ["id", "shard"])
        wanted: dict[int, set[str]] = {}
        for row in table.take(pa.array(self._places)).to_pylist():
            wanted.setdefault(row["shard"], set()).add(row["id"])
        shards = Shards(self.folders[name])
        return [row for n, ids in wanted.items() for row in _select(shards.file(n), ids)]

    def _near(self, sample: dict[str, list[Row]]) -> list[Row]:
        """Rows of the retrieve stage for the sample."""
        hidden = {row["id"]: row["hidden"] for row in sample["mask"]}
        ids = [row["id"] for row in sample["read"]]
        near = self._retrieve.near(self._places, [hidden.get(name, ()) for name in ids])
        return [{"id": i, "neighbours": rows} for i, rows in zip(ids, near, strict=True)]

    def _margins(self, sample: dict[str, list[Row]]) -> dict[str, float | None]:
        """Visual margins of the pairs. A model without a layout has none."""
        accepted = by_id(sample["filter"])
        if self.config.margin:
            return {name: row["visual_margin"] for name, row in accepted.items()}
        config = replace(self.config, negative="retrieved")  # whether the neighbour differs
        assembler = Assembler(config, self._filter.folders)
        records = assembler.records(sample, 0, accepted)
        model = load_vlm(self.config.base, self.config.dtype, **self.config.pixels)
        cache = str(self.folder / "references")
        try:
            margins = visual_margins(*model, records, cache=cache, on_bad=lambda *_: None)
        except ValueError:
            return {}
        return {r.name: m for r, m in zip(records, margins.tolist(), strict=True)}

    def result(self) -> TrialResult:
        """Result of a trial whose shard is made."""
        rows = Shards(self.folder).read(0)
        reasons = Counter(row["reason"] for row in rows)
        measured = [row["margin"] for row in rows if row["margin"] is not None]
        positive = sum(margin > 0 for margin in measured) if measured else None
        return TrialResult(len(rows), reasons.pop("", 0), reasons, positive)

    def rings(self) -> list[float]:
        """Ceilings that leave out the nearest images of a typical record of the sample."""
        config = self._given
        ranks = [rank for multiple in _RINGS if (rank := multiple * config.k) <= self._images() / 2]
        if not ranks:
            return []
        wide = Retrieve(replace(config, k=ranks[-1], reach=None, ceiling=1.0))
        wide.folder = self._retrieve.folder
        wide.open()
        near = wide.near(self._places, [()] * len(self._places))
        wide.close()
        ceilings = []
        for rank in ranks:
            values = [rows[rank - 1]["similarity"] for rows in near if len(rows) >= rank]
            distance = float(f"{1 - median(values):.2g}") if values else 0.0
            ceiling = round(1 - distance, 12)
            if config.floor < ceiling < 1 and ceiling not in ceilings:
                ceilings.append(ceiling)
        return ceilings

    def _images(self) -> int:
        return len(read_table(self._retrieve.folder / "rows.parquet", ["shard"]))


@dataclass(frozen=True)
class TrialResult:
    """Numbers of records of a trial."""

    records: int  # without invalid ones
    kept: int
    reasons: Counter[str]  # reason -> dropped records
    positive: int | None  # pairs with a visual margin above 0; None if not measured

    @property
    def share(self) -> float:
        """Share of the records that gave a pair."""
        return self.kept / max(1, self.records)

    @property
    def measure(self) -> float:
        """Share of the records with a pair whose visual margin, if measured, is above 0."""
        return (self.kept if self.positive is None else self.positive) / max(1, self.records)

    @property
    def movable(self) -> float:
        """Share of the records that another window may keep."""
        return 1 - self.share - self.reasons["nothing to mask"] / max(1, self.records)

    def __str__(self) -> str:
        parts = [f"{self.share:.0%}"]
        if self.positive is not None:
            parts.append(f"{self.measure:.0%} with a visual margin above 0")
        parts += [f"{count:,} {reason}" for reason, count in self.reasons.most_common(1)]
        return f"{parts[0]} ({', '.join(parts[1:])})" if parts[1:] else parts[0]


@dataclass(frozen=True)
class Choice:
    """A chosen window.

    Attributes:
        target: `--keep-target`.
        moves: settings that differ from the given ones.
        given: result of the given settings. None if nothing could be moved.
        chosen: result of the window. None if nothing could be moved.
        tried: number of windows tried, including the given one.
        reached: number of these windows that keep the target share.
    """

    target: float
    moves: Moves = field(default_factory=dict)
    given: TrialResult | None = None
    chosen: TrialResult | None = None
    tried: int = 0
    reached: int = 0

    def line(self, pairs: int, dropped: Counter[str], remedy: str) -> str:
        """Sentences for the end of a run: the pairs kept, the window chosen, and the reason.

        Args:
            pairs: number of pairs.
            dropped: reason -> number of dropped records.
            remedy: advice if the target is not reached.
        """
        records = pairs + dropped.total()
        below = pairs < self.target * records
        kept = f"kept {pairs:,} of {records:,} records ({pairs / records:.0%})"
        target = f"--keep-target {self.target:g}"
        if self.given is None or self.chosen is None:
            given = f"{target} moved nothing, because the settings that it can move are given."
            return f"{kept}. {given}" + f" {remedy}" * below
        flags = [f"--{name} {value}" for name, value in self.moves.items()]
        window = " ".join(flags) or "the given settings"
        sample = f"On a sample of {self.given.records:,}, the given settings keep {self.given}"
        if flags:
            sample += f", and this window keeps {self.chosen}"
        if not self.reached:
            reason = f"{counted(self.tried, 'windows')} tried, and none reaches {target}"
            return f"{kept} with {window}. {sample}. {reason}. {remedy}"
        if self.chosen.measure >= self.target:
            reason = f"It is the nearest window that reaches {target}"
        else:
            reason = (
                f"It has the most pairs with such a margin, within {100 * _NOISE:.0f} points, of "
                f"{counted(self.reached, 'windows')} that reach {target}"
            )
        short = " The sample kept more than the other records." * below
        return f"{kept} with {window}. {sample}. {reason}.{short}"


def choose(config: PairsConfig) -> Generator[Stage, None, tuple[PairsConfig, Choice | None]]:
    """Choose a window. Yields trials, which the caller makes before it continues.

    The first window is chosen that keeps the target share, also of pairs with a visual margin above
    0. If no window has as many such pairs, the margins decide among windows that keep the target
    share. If there is none, the share decides. There are at most eight trials. Each completes at
    most `SAMPLE` records on `k` neighbours.

    Returns:
        The settings with the chosen window, and the choice. It is None without a target.
    """
    target = config.keep_target
    if not target:
        return config, None
    if not config.movable:
        return config, Choice(target)
    tried: list[tuple[Moves, TrialResult]] = []

    def chosen(moves: Moves, result: TrialResult) -> tuple[PairsConfig, Choice]:
        reached = sum(result.share >= target for _, result in tried)
        choice = Choice(target, moves, tried[0][1], result, len(tried), reached)
        return replace(config, **moves), choice

    given = Trial(config, config)
    reached: list[tuple[Moves, TrialResult]] = []
    for number, level in enumerate(_levels(config, given)):
        for moves in level:
            trial = Trial(replace(config, **moves), config) if moves else given
            yield trial
            tried.append((moves, trial.result()))
            if min(tried[-1][1].share, tried[-1][1].measure) >= target:
                return chosen(*tried[-1])
        reached = [entry for entry in tried if entry[1].share >= target]
        if number and reached or not reached and tried[0][1].movable <= _NOISE:
            break
    if reached:
        return chosen(*_first_of_best(reached, lambda result: result.measure))
    return chosen(*_first_of_best(tried, lambda result: result.share))


def _levels(config: PairsConfig, given: Trial) -> Iterator[list[Moves]]:
    """Yields windows in order, the nearest first. In the last level, all segments are hidden.

    The given settings are the first window. `given` is their trial, which the caller makes then.
    """
    yield [{}]
    movable = config.movable
    ceilings = given.rings() if "ceiling" in movable else []
    more = {"candidates": min(_CANDIDATES, config.k)} if "candidates" in movable else {}
    near = more | ({"reach": _SPREAD * config.k} if "reach" in movable else {})
    windows = [near, *(near | {"ceiling": ceiling} for ceiling in ceilings)]
    yield [window for window in windows if window]
    if "segments" in movable:
        same = [more] if near != more else []
        yield [window | {"segments": 0} for window in (*same, *windows)]


def _first_of_best(
    tried: Sequence[tuple[Moves, TrialResult]], measure: Callable[[TrialResult], float]
) -> tuple[Moves, TrialResult]:
    """The first window whose measure differs from the best only by noise."""
    best = max(measure(result) for _, result in tried)
    return next(entry for entry in tried if measure(entry[1]) >= best - _NOISE)


def _select(file: Path, ids: set[str]) -> Iterator[Row]:
    """Yields the rows with these ids. Row groups without one are not read."""
    with parquet_file(file) as parquet:
        for group in range(parquet.num_row_groups):
            names = parquet.read_row_group(group, ["id"])["id"].to_pylist()
            if found := [i for i, name in enumerate(names) if name in ids]:
                yield from parquet.read_row_group(group).take(pa.array(found)).to_pylist()
