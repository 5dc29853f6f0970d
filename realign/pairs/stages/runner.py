"""The runner: makes the shards that are missing, stage after stage, and says how far it is."""

from __future__ import annotations

import fcntl
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import pyarrow as pa
import torch
from tqdm import tqdm

from realign.data.records import Record
from realign.pairs.io.shards import (
    LEFT_OUT,
    Shards,
    digest_of,
    is_full,
    write_bytes,
    write_table,
)
from realign.pairs.stages.base import NO_REPLY, Bad, ChatStage, Row, Stage
from realign.pairs.stages.read import Read


class RunError(ValueError):
    """Why a run stopped; what it wrote stays, and the same command goes on from there."""


@dataclass(frozen=True)
class Made:
    """What became of one shard.

    Attributes:
        number: of the shard.
        records: that it was made of.
        bad: how many of them cannot be used, which was not known before.
        error: why it was not written, "" when it was; "full" for a full disk, "bad" for more bad
            records than were allowed.
    """

    number: int
    records: int
    bad: int
    error: str = ""


@dataclass
class Limit:
    """How many records of a shard may be bad.

    Attributes:
        allowed: that many more.
        known: records that are listed as bad already, for another stage.
    """

    allowed: int
    known: set[str]


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
        self._bad: dict[str, tuple[int, int, Bad]] = {}  # record -> place of the stage, shard, it

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
                        total = self._read(stage)
                        check(self.outcome)
                    else:
                        self._make(stage, total)
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
        found, known = set(shards.done()) - stage.changed(), {}
        if facts.exists():
            with suppress(ValueError):  # cut off: counted again
                known = json.loads(facts.read_text())
        if known.get("shards") != len(found):
            began, records = time.perf_counter(), 0
            skip = next(number for number in count(0) if number not in found)
            parts = stage.shards(skip)
            first = next(parts, None)  # what is wrong with the data is told before a bar is drawn
            with tqdm(desc="read", unit="record", disable=not self.bars) as bar:
                for number, part in enumerate(chain([first] if first else [], parts), skip):
                    if number not in found:
                        rows = [stage.row(entry) for entry in part if isinstance(entry, Record)]
                        shards.write(number, rows, [e for e in part if isinstance(e, Bad)])
                        records += len(part)
                    bar.update(len(part))
            self._report(stage, len(shards.done()), records, began)
            known = _count(shards)
            write_bytes(facts, json.dumps(known).encode())
        else:
            self._report(stage, len(found), 0, 0)
        self.outcome.records = known["records"]
        self.outcome.unanswered = known["unanswered"]
        if not known["records"]:
            raise ValueError("the data holds no records; name a file or folder with some.")
        self._note_bad(stage, shards.done())
        return known["shards"]

    def _make(self, stage: Stage, total: int) -> None:
        """Make the shards of a stage that are missing, or not what would be made now."""
        shards = Shards(stage.folder, stage.schema)
        stage.folder.mkdir(parents=True, exist_ok=True)
        stage.prepare()
        found = {number for number in shards.done() if is_current(stage, number)}
        missing = [number for number in range(total) if number not in found]
        began, records = time.perf_counter(), 0
        self._note_bad(stage, sorted(found))
        if missing:
            if found:
                self.say(f"{stage.name}: {len(found)} of {total} shards found done")
            if isinstance(stage, ChatStage):
                stage.say = self.say
                stage.records = self.outcome.records * len(missing) // total
            with tqdm(
                desc=stage.name,
                unit="record",
                total=self.outcome.records,
                initial=self.outcome.records * len(found) // total,
                disable=not self.bars,
            ) as bar:
                shown = bar.n
                stage.tick = bar.update
                for made in self._shards(stage, missing):
                    records += made.records
                    shown += made.records
                    bar.update(max(0, shown - bar.n))  # less what the stage itself told
                    self._look_at(stage, made)
            shards.clear_partial()  # of a worker of Ray that died
        self._report(stage, total, records, began)

    def _shards(self, stage: Stage, missing: list[int]) -> Iterator[Made]:
        limit = Limit(self._most_bad() - len(self._bad), set(self._bad))
        if self.ray is not None:
            from realign.pairs.stages import on_ray

            yield from on_ray.make_shards(stage, missing, limit, self.ray)
            return
        stage.open()
        try:
            for number in missing:
                made = make_shard(stage, number, limit)
                limit.allowed -= made.bad
                yield made
        finally:
            stage.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _most_bad(self) -> int:
        return int(round(self.max_bad * self.outcome.records, 6))

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
            for bad in shards.left_out_of(number, "bad"):
                self._bad.setdefault(bad.record, (place, number, bad))
        if len(self._bad) <= self._most_bad():
            return
        found = [bad for *_, bad in self._bad.values()]
        reasons = Counter(f"{bad.stage}: {bad.reason}" for bad in found)
        commonest = reasons.most_common(5)
        shown = ", ".join(f"{count} {reason}" for reason, count in commonest)
        example = next(bad for bad in found if f"{bad.stage}: {bad.reason}" == commonest[0][0])
        detail = f" ({example.detail})" if example.detail else ""
        raise RunError(
            f"{len(self._bad)} of {self.outcome.records} records cannot be used, more than "
            f"--max-bad {self.max_bad:g} allows: {shown}; for one, record {example.record!r}"
            f"{detail}. {self.rejected} lists them. Mend the data or the engine, or raise "
            "--max-bad, and run again."
        )

    def _list_bad(self) -> None:
        """List every bad record beside the output, and count what was left out."""
        bad = [entry for *_, entry in sorted(self._bad.values(), key=lambda noted: noted[:2])]
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

    def _report(self, stage: Stage, total: int, records: int, began: float) -> None:
        if not records:
            self.say(f"{stage.name}: all {total} shards found done")
            return
        rate = records / max(time.perf_counter() - began, 1e-9)
        self.say(f"{stage.name}: {total}/{total} shards, {records} records, {rate:.0f} records/s")


def made_of(stage: Stage, number: int) -> str:
    """Digest of what a shard is made of."""
    rows = (Shards(stage.folders[name]).rows_digest(number) for name in stage.needs)
    return digest_of(stage.shared, *rows)


def is_current(stage: Stage, number: int) -> bool:
    """Whether a shard that is there is what would be made now: of these rows, all replies had."""
    shards = Shards(stage.folder)
    unanswered = any(bad.reason == NO_REPLY for bad in shards.left_out_of(number, "bad"))
    return not unanswered and shards.made_of(number) == made_of(stage, number)


def read_inputs(stage: Stage, number: int) -> dict[str, list[Row]]:
    """The rows that a shard is made of."""
    return {
        name: Shards(stage.folders[name]).read(number, stage.columns.get(name))
        for name in stage.needs
    }


def make_shard(stage: Stage, number: int, limit: Limit) -> Made:
    """Make and write one shard of an open stage.

    With more bad records than the limit allows it is not written, so that it is made again once
    they are mended, but its list of them is.
    """
    shards = Shards(stage.folder, stage.schema)
    try:
        of = made_of(stage, number)
        inputs = read_inputs(stage, number)
        records = max(map(len, inputs.values()))
        rows, left_out = stage.run(inputs, number)
        bad = sum(type(e) is Bad and e.record not in limit.known for e in left_out)
        if bad > limit.allowed:
            shards.file(number).unlink(missing_ok=True)  # of an earlier run, whose list goes
            shards.write_left_out(number, left_out)
            return Made(number, records, bad, "bad")
        shards.write(number, rows, left_out, of)
    except OSError as error:
        return Made(number, 0, 0, "full" if is_full(error) else _said(error))
    except ValueError as error:  # an engine or a model that cannot be used at all
        return Made(number, 0, 0, _said(error))
    return Made(number, records, bad)


def _said(error: Exception) -> str:
    """What an error says, never "": that would be a success."""
    return str(error) or type(error).__name__


def note_run(work: Path, output: str, outcome: Outcome) -> None:
    """Note in the work folder which records an output was not made of."""
    noted = {"dropped": outcome.dropped, "bad": outcome.bad}
    write_bytes(run_note(work, output), json.dumps(noted, indent=1).encode())


def run_note(work: Path, output: str) -> Path:
    """Where that is noted; outputs may share the work folder, and their name."""
    place = Path(output).resolve()
    return work / f"{place.name}.{digest_of(str(place))[:8]}.json"


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
