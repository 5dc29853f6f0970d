"""Runner: makes the missing shards of one stage after the other, and reports progress."""

from __future__ import annotations

import fcntl
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import pyarrow as pa
import torch

from realign.data.errors import short_repr, shorten
from realign.data.records import Record
from realign.files import open_lock, read_json
from realign.pairs.io.rows import InvalidRecord
from realign.pairs.io.shards import LEFT_OUT, Shards, digest_of, is_full, write_bytes, write_table
from realign.pairs.stages import on_ray
from realign.pairs.stages.base import ChatStage, Stage
from realign.pairs.stages.read import Read
from realign.pairs.stages.shard import InvalidLimit, ShardResult, is_current, make_shard
from realign.progress import Progress, counted, totals


class RunError(ValueError):
    """A stopped run. Its shards are kept, and the same command resumes from them."""


@dataclass
class Outcome:
    """Result of a run."""

    folders: dict[str, Path] = field(default_factory=dict)  # name of a stage -> its folder
    records: int = 0  # records read, including invalid ones
    unanswered: int = 0  # records without a response
    bad: Counter[str] = field(default_factory=Counter)  # reason -> number of invalid records
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> records without a pair


class Runner:
    """Runs stages in one work folder.

    Args:
        work: the work folder.
        max_bad: maximum share of invalid records.
        rejected: file that lists the invalid records, also when the run fails.
        quiet: print no lines and no progress bars.
        ray: address for Ray. None makes all shards in this process.
    """

    def __init__(
        self,
        work: Path,
        *,
        max_bad: float,
        rejected: Path,
        quiet: bool = False,
        ray: str | None = None,
    ) -> None:
        self.work = work
        self.stages: list[Stage] = []
        self.max_bad = max_bad
        self.rejected = rejected
        self.quiet = quiet
        self.report: Callable[[str], None] = (lambda line: None) if quiet else print
        self.ray = ray
        self.outcome = Outcome()
        # Record -> index of the first stage that found it invalid, shard, entry.
        self._invalid: dict[str, tuple[int, int, InvalidRecord]] = {}

    def run(self, stages: Iterable[Stage], check: Callable[[Outcome], None]) -> Outcome:
        """Make every missing shard.

        Args:
            stages: the stages in order, starting with `Read`. Each stage is made before the next is
                requested, so a generator can use its rows.
            check: called after the records are read. It may raise an error to stop the run.

        Raises:
            RunError: for a full disk, too many invalid records, or a failing engine or data set.
            ValueError: when a setting contradicts the data.
        """
        digests: dict[str, str] = {}
        total = 0
        try:
            try:
                for stage in stages:
                    digests[stage.name] = stage.digest(digests)
                    stage.folder = self.work / f"{stage.name}-{digests[stage.name]}"
                    stage.folders = dict(self.outcome.folders)
                    self.outcome.folders[stage.name] = stage.folder
                    self.stages.append(stage)
                    Shards(stage.folder).clear_partial()
                    if isinstance(stage, Read):
                        total = self._read(stage)
                        check(self.outcome)
                    else:
                        self._make(stage, total)
            finally:
                self._list_invalid()
        except OSError as error:
            if not is_full(error):
                raise
            raise RunError(self._full()) from error
        return self.outcome

    def _read(self, stage: Read) -> int:
        """Writes the missing shards of records. Returns the number of all shards."""
        shards, file = Shards(stage.folder, stage.schema), stage.folder / "read.json"
        current, counts = set(shards.done()) - stage.changed(), {}
        with suppress(FileNotFoundError, ValueError):  # ValueError: the file is incomplete
            counts = read_json(file)
        began, records = time.perf_counter(), 0
        if counts.get("shards") != len(current):
            skip = next(number for number in count() if number not in current)
            parts = stage.shards(skip)
            first = next(parts, None)  # an invalid data set raises before a bar is drawn
            with Progress("read", "records", quiet=self.quiet, summary=False) as bar:
                for number, part in enumerate(chain([first] if first else [], parts), skip):
                    if number not in current:
                        rows = [stage.row(entry) for entry in part if isinstance(entry, Record)]
                        shards.write(number, rows, [e for e in part if not isinstance(e, Record)])
                        records += len(part)
                    bar.update(len(part))
            counts = _count(shards)
            write_bytes(file, json.dumps(counts).encode())
        self._report(stage, counts["shards"], records, began)
        self.outcome.records = counts["records"]
        self.outcome.unanswered = counts["unanswered"]
        if not counts["records"]:
            raise ValueError("the data holds no records. Pass a file or folder with records.")
        self._note_invalid(stage, shards.done())
        return counts["shards"]

    def _make(self, stage: Stage, total: int) -> None:
        """Makes the shards of a stage that are missing or outdated."""
        shards = Shards(stage.folder, stage.schema)
        stage.folder.mkdir(parents=True, exist_ok=True)
        stage.prepare()
        total = 1 if stage.sampled else total
        all_records = stage.sampled or self.outcome.records
        current = {number for number in shards.done() if is_current(stage, number)}
        missing = [number for number in range(total) if number not in current]
        began, records_done = time.perf_counter(), 0
        self._note_invalid(stage, sorted(current))
        if missing:
            if current:
                self.report(f"{stage.name}: {len(current)} of {total} shards already done")
            if isinstance(stage, ChatStage):
                stage.report = self.report
                stage.records = all_records * len(missing) // total
            with Progress(
                stage.name,
                "records",
                all_records,
                done=all_records * len(current) // total,
                quiet=self.quiet,
                summary=False,
            ) as bar:
                start = bar.done
                stage.tick = bar.update
                for result in self._results(stage, missing):
                    records_done += stage.sampled or result.records
                    bar.update(max(0, start + records_done - bar.done))  # minus the stage's ticks
                    self._check(stage, result)
            shards.clear_partial()  # left by Ray workers that died
        self._report(stage, total, records_done, began)

    def _results(self, stage: Stage, missing: list[int]) -> Iterator[ShardResult]:
        limit = InvalidLimit(self._most_invalid() - len(self._invalid), set(self._invalid))
        # A sample for an endpoint needs no worker, and the estimate of its cost is shown here.
        if self.ray is not None and (stage.uses_gpu or not stage.sampled):
            yield from on_ray.make_shards(stage, missing, limit, self.ray)
            return
        stage.open()
        try:
            for number in missing:
                result = make_shard(stage, number, limit)
                limit.allowed -= result.invalid
                yield result
        finally:
            stage.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _most_invalid(self) -> int:
        return int(round(self.max_bad * self.outcome.records, 6))

    def _check(self, stage: Stage, result: ShardResult) -> None:
        """Raises the error of a shard, if it has one.

        Raises:
            RunError: for a full disk, a failing engine or too many invalid records.
        """
        if result.error == "full":
            raise RunError(self._full())
        if result.error not in ("", "invalid"):
            raise RunError(f"{stage.name} stopped at shard {result.number}: {result.error}")
        if result.invalid:
            self._note_invalid(stage, [result.number])

    def _note_invalid(self, stage: Stage, numbers: Sequence[int]) -> None:
        """Collects the invalid records of shards.

        Raises:
            RunError: when there are more than `max_bad` allows. It names the most common reasons.
        """
        place, shards = self.stages.index(stage), Shards(stage.folder)
        for number in numbers:
            for entry in shards.left_out_of(number, "bad"):
                self._invalid.setdefault(entry.record, (place, number, entry))
        if len(self._invalid) <= self._most_invalid():
            return
        entries = [entry for *_, entry in self._invalid.values()]
        reasons = Counter((entry.stage, entry.reason) for entry in entries).most_common(5)
        shown = ", ".join(f"{name}: {number} {reason}" for (name, reason), number in reasons)
        example = next(e for e in entries if (e.stage, e.reason) == reasons[0][0])
        detail = f": {shorten(example.detail).rstrip('.')}" if example.detail else ""
        raise RunError(
            f"{len(entries)} of {counted(self.outcome.records, 'records')} cannot be used, more "
            f"than --max-bad {self.max_bad:g} allows ({shown}). For example, record "
            f"{short_repr(example.record)}{detail}. The full list is in {self.rejected}. Fix the "
            "data or the engine, or raise --max-bad, and run again."
        )

    def _list_invalid(self) -> None:
        """Lists every invalid record in `rejected`, and counts all records left out."""
        entries = [e for *_, e in sorted(self._invalid.values(), key=lambda item: item[:2])]
        if entries:
            rows = [vars(entry) for entry in entries]
            write_table(self.rejected, pa.Table.from_pylist(rows, schema=LEFT_OUT))
        else:
            self.rejected.unlink(missing_ok=True)
        self.outcome.bad = Counter(entry.reason for entry in entries)
        dropped = (Shards(stage.folder).left_out("dropped") for stage in self.stages)
        self.outcome.dropped = Counter(entry.reason for entry in chain.from_iterable(dropped))

    def _full(self) -> str:
        shard_count = sum(len(Shards(stage.folder).done()) for stage in self.stages)
        return (
            f"the disk of {self.work} or {self.rejected.parent} is full. The {shard_count} "
            "finished shards are kept. Free some space and run the same command again, which "
            "resumes from them."
        )

    def _report(self, stage: Stage, total: int, records: int, began: float) -> None:
        if not records:
            every = f"all {total} shards" if total > 1 else counted(total, "shards")
            self.report(f"{stage.name}: {every} already done")
            return
        summary = totals(records, "records", time.perf_counter() - began)
        self.report(f"{stage.name + ':':10}{total}/{counted(total, 'shards')}, {summary}")


def note_run(work: Path, output: str, outcome: Outcome, window: str) -> None:
    """Write the numbers of left-out records and the window of an output into the work folder."""
    note = {"dropped": outcome.dropped, "bad": outcome.bad, "window": window}
    write_bytes(run_note(work, output), json.dumps(note, indent=1).encode())


def run_note(work: Path, output: str) -> Path:
    """File of these numbers. A digest distinguishes outputs of the same name in other folders."""
    path = Path(output).resolve()
    return work / f"{path.name}.{digest_of(str(path))[:8]}.json"


@contextmanager
def sole_run(work: Path) -> Iterator[None]:
    """Locks the work folder. The system releases the lock when the process ends for any reason.

    Raises:
        ValueError: when another run holds the lock.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open_lock(work / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run uses {work}. Wait until it ends, or pass another --work."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _count(shards: Shards) -> dict[str, int]:
    """Numbers of shards, of records (including invalid ones) and of records without a response."""
    numbers, records, unanswered = shards.done(), 0, 0
    for number in numbers:
        chosen = shards.table(number, ["chosen"])["chosen"].to_pylist()
        records += len(chosen) + len(shards.left_out_of(number, "bad"))
        unanswered += sum(not text for text in chosen)
    return {"shards": len(numbers), "records": records, "unanswered": unanswered}
