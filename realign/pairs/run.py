"""The runner: makes the shards that are missing, stage after stage, and says how far it is."""

from __future__ import annotations

import fcntl
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow as pa
import torch
from tqdm import tqdm

from realign.pairs.reading import Read
from realign.pairs.shards import LEFT_OUT, Shards, is_full, write_bytes, write_table
from realign.pairs.stage import Bad, ChatStage, Stage
from realign.records import Record


class RunError(ValueError):
    """Why a run stopped; what it wrote stays, and the same command goes on from there."""


@dataclass(frozen=True)
class Made:
    """What became of one shard.

    Attributes:
        number: of the shard.
        records: that it was made of.
        bad: how many of them cannot be used.
        error: why it was not written, "" when it was; "full" for a full disk, "bad" for more bad
            records than were allowed.
    """

    number: int
    records: int
    bad: int
    error: str = ""


@dataclass
class Outcome:
    """What a run leaves behind."""

    folders: dict[str, Path] = field(default_factory=dict)  # of the stages, by name
    records: int = 0  # of the data, bad ones included
    unanswered: int = 0  # records without a response
    bad: Counter = field(default_factory=Counter)  # reason -> records
    dropped: Counter = field(default_factory=Counter)


class Runner:
    """Runs stages in one work folder.

    Args:
        work: the folder.
        stages: in order; the first is `Read`.
        max_bad: share of the records that may be unusable.
        rejected: file that lists these records at the end, whatever the end is.
        quiet: no lines and no bars.
        ray: address for Ray; None runs in this process.
    """

    def __init__(
        self,
        work: Path,
        stages: Sequence[Stage],
        *,
        max_bad: float,
        rejected: Path,
        quiet: bool = False,
        ray: str | None = None,
    ) -> None:
        self.work = work
        self.stages = stages
        self.max_bad = max_bad
        self.rejected = rejected
        self.bars = not quiet
        self.say: Callable[[str], None] = (lambda line: None) if quiet else print
        self.ray = ray
        self.outcome = Outcome()
        self._bad: list[tuple[int, int, Bad]] = []  # place of the stage, shard, record

    def run(self, check: Callable[[Outcome], None]) -> Outcome:
        """Make every missing shard.

        Args:
            check: called when the records are read; raises what speaks against going on.

        Raises:
            RunError: for a full disk, too many bad records, or an engine or a data set at fault.
            ValueError: when another run works in the folder, or a setting does not fit the data.
        """
        digests: dict[str, str] = {}
        for stage in self.stages:
            digests[stage.name] = stage.digest(digests)
            stage.folder = self.work / f"{stage.name}-{digests[stage.name]}"
            stage.folders = dict(self.outcome.folders)
            self.outcome.folders[stage.name] = stage.folder
        try:
            try:
                for stage in self.stages:
                    Shards(stage.folder).clear_partial()
                    if isinstance(stage, Read):
                        count = self._read(stage)
                        check(self.outcome)
                    else:
                        self._make(stage, count)
            finally:
                self._list_bad()
        except OSError as error:
            if not is_full(error):
                raise
            raise RunError(self._full()) from error
        return self.outcome

    def _read(self, stage: Read) -> int:
        """Write the shards of records that are missing; returns how many there are."""
        shards, facts = Shards(stage.folder, stage.schema), stage.folder / "read.json"
        found = shards.done()
        if not facts.exists():
            began, records = time.perf_counter(), 0
            parts = stage.shards(len(found))
            first = next(parts, None)  # what is wrong with the data is told before a bar is drawn
            with tqdm(desc="read", unit="record", disable=not self.bars) as bar:
                for number, part in enumerate(chain([first] if first else [], parts), len(found)):
                    rows = [stage.row(entry) for entry in part if isinstance(entry, Record)]
                    shards.write(number, rows, [entry for entry in part if isinstance(entry, Bad)])
                    records += len(part)
                    bar.update(len(part))
            self._report(stage, len(found), len(shards.done()), records, began)
            write_bytes(facts, json.dumps(_count(shards)).encode())
        else:
            self._report(stage, len(found), len(found), 0, 0)
        known = json.loads(facts.read_text())
        self.outcome.records = known["records"]
        self.outcome.unanswered = known["unanswered"]
        if not known["records"]:
            raise ValueError("the data holds no records; name a file or folder with some.")
        self._note_bad(stage, shards.done())
        return known["shards"]

    def _make(self, stage: Stage, count: int) -> None:
        """Make the missing of `count` shards of a stage."""
        shards = Shards(stage.folder, stage.schema)
        found = set(shards.done())
        missing = [number for number in range(count) if number not in found]
        began, records = time.perf_counter(), 0
        self._note_bad(stage, sorted(found))
        if missing:
            if found:
                self.say(f"{stage.name}: {len(found)} of {count} shards found done")
            stage.folder.mkdir(parents=True, exist_ok=True)
            stage.prepare()
            if isinstance(stage, ChatStage):
                stage.say, stage.records = self.say, self.outcome.records
            with tqdm(
                desc=stage.name,
                unit="record",
                total=self.outcome.records,
                initial=self.outcome.records * len(found) // count,
                disable=not self.bars,
            ) as bar:
                for made in self._shards(stage, missing):
                    records += made.records
                    bar.update(made.records)
                    self._look_at(stage, made)
        self._report(stage, len(found), count, records, began)

    def _shards(self, stage: Stage, missing: list[int]) -> Iterator[Made]:
        allowed = int(self.max_bad * self.outcome.records) - len(self._bad)
        if self.ray is not None:
            from realign.pairs import on_ray

            yield from on_ray.make_shards(stage, missing, allowed, self.ray)
            return
        stage.open()
        try:
            for number in missing:
                made = make_shard(stage, number, allowed)
                allowed -= made.bad
                yield made
        finally:
            stage.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _look_at(self, stage: Stage, made: Made) -> None:
        """Raise what stopped a shard.

        Raises:
            RunError: for a full disk, an engine at fault or too many bad records.
        """
        if made.error == "full":
            raise RunError(self._full())
        if made.error not in ("", "bad"):
            raise RunError(f"{stage.name} stopped at shard {made.number}: {made.error}")
        if made.bad:
            self._note_bad(stage, [made.number])

    def _note_bad(self, stage: Stage, numbers: Sequence[int]) -> None:
        """Note the bad records of shards; stop when more records are bad than may be.

        Raises:
            RunError: with the commonest reasons.
        """
        place, shards = self.stages.index(stage), Shards(stage.folder)
        for number in numbers:
            self._bad += [(place, number, bad) for bad in shards.left_out_of(number, "bad")]
        if len(self._bad) <= self.max_bad * self.outcome.records:
            return
        reasons = Counter(f"{bad.stage}: {bad.reason}" for *_, bad in self._bad)
        commonest = reasons.most_common(5)
        shown = ", ".join(f"{count} {reason}" for reason, count in commonest)
        example = next(b for *_, b in self._bad if f"{b.stage}: {b.reason}" == commonest[0][0])
        detail = f" ({example.detail})" if example.detail else ""
        raise RunError(
            f"{len(self._bad)} of {self.outcome.records} records cannot be used, more than "
            f"--max-bad {self.max_bad:g} allows: {shown}; for one, record {example.record!r}"
            f"{detail}. {self.rejected} lists them. Mend the data or the engine, or raise "
            "--max-bad, and run again."
        )

    def _list_bad(self) -> None:
        """List every bad record beside the output, and count what was left out."""
        bad = [entry for *_, entry in sorted(self._bad, key=lambda noted: noted[:2])]
        if bad:
            rows = [vars(entry) for entry in bad]
            write_table(self.rejected, pa.Table.from_pylist(rows, schema=LEFT_OUT))
        else:
            self.rejected.unlink(missing_ok=True)
        self.outcome.bad = Counter(entry.reason for entry in bad)
        self.outcome.dropped = Counter(
            entry.reason
            for stage in self.stages
            for entry in Shards(stage.folder).left_out("dropped")
        )

    def _full(self) -> str:
        written = sum(len(Shards(stage.folder).done()) for stage in self.stages)
        return (
            f"no room is left on the disk of {self.work} or {self.rejected.parent}. The {written} "
            "shards written so far are whole and stay. Make room and run the same command again: "
            "it goes on from there."
        )

    def _report(self, stage: Stage, found: int, count: int, records: int, began: float) -> None:
        if not records:
            self.say(f"{stage.name}: all {count} shards found done")
            return
        rate = records / max(time.perf_counter() - began, 1e-9)
        self.say(f"{stage.name}: {count}/{count} shards, {records} records, {rate:.0f} records/s")


def make_shard(stage: Stage, number: int, allowed: int) -> Made:
    """Make and write one shard of an open stage.

    Args:
        stage: with its folders set.
        number: of the shard.
        allowed: bad records that it may have; with more of them it is not written, so that it is
            made again once they are mended, but its list of them is.
    """
    shards = Shards(stage.folder, stage.schema)
    try:
        inputs = {name: Shards(stage.folders[name]).read(number) for name in stage.needs}
        records = max(map(len, inputs.values()))
        rows, left_out = stage.run(inputs, number)
        bad = sum(type(entry) is Bad for entry in left_out)
        if bad > allowed:
            shards.write_left_out(number, left_out)
            return Made(number, records, bad, "bad")
        shards.write(number, rows, left_out)
    except OSError as error:
        return Made(number, 0, 0, "full" if is_full(error) else str(error))
    except ValueError as error:  # an engine or a model that cannot be used at all
        return Made(number, 0, 0, str(error))
    return Made(number, records, bad)


@contextmanager
def sole_run(work: Path) -> Iterator[None]:
    """Hold the work folder; the system lets go of it when the process ends, however that happens.

    Raises:
        ValueError: when another run holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run works in {work}. Wait for its end, or name another --work."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _count(shards: Shards) -> dict[str, int]:
    """What was read: shards, records with bad ones, records without a response."""
    numbers, records, unanswered = shards.done(), 0, 0
    for number in numbers:
        chosen = shards.table(number, ["chosen"])["chosen"].to_pylist()
        records += len(chosen) + len(list(shards.left_out_of(number, "bad")))
        unanswered += sum(not text for text in chosen)
    return {"shards": len(numbers), "records": records, "unanswered": unanswered}
