"""Computation of one shard in this process, and checks whether a shard on disk is current."""

from __future__ import annotations

from dataclasses import dataclass

from realign.pairs.io.rows import NO_REPLY, InvalidRecord, Row
from realign.pairs.io.shards import Shards, digest_of, is_full
from realign.pairs.stages.base import Stage


@dataclass(frozen=True)
class ShardResult:
    """Result of one shard.

    Attributes:
        number: number of the shard.
        records: number of records in its inputs.
        invalid: number of invalid records that no earlier stage has listed.
        error: reason why the shard was not written, or "". "full" means a full disk, "invalid"
            means more invalid records than the limit.
    """

    number: int
    records: int = 0
    invalid: int = 0
    error: str = ""


@dataclass
class InvalidLimit:
    """Limit on the invalid records of a shard.

    Attributes:
        allowed: number of additional invalid records that are allowed.
        listed: names of invalid records that an earlier stage has listed.
    """

    allowed: int
    listed: set[str]


def inputs_digest(stage: Stage, number: int) -> str:
    """Digest of the inputs of a shard."""
    rows = (Shards(stage.folders[name]).rows_digest(number) for name in stage.needs)
    return digest_of(stage.shared, *rows)


def is_current(stage: Stage, number: int) -> bool:
    """Whether an existing shard was made from the current inputs, with a reply for every record."""
    shards = Shards(stage.folder)
    unanswered = any(entry.reason == NO_REPLY for entry in shards.left_out_of(number, "bad"))
    return not unanswered and shards.inputs_digest(number) == inputs_digest(stage, number)


def read_inputs(stage: Stage, number: int) -> dict[str, list[Row]]:
    """Name of each needed stage -> its rows of a shard."""
    return {
        name: Shards(stage.folders[name]).read(number, stage.columns.get(name))
        for name in stage.needs
    }


def make_shard(stage: Stage, number: int, limit: InvalidLimit) -> ShardResult:
    """Make and write one shard of an open stage.

    With more invalid records than the limit allows, only the list of these records is written. The
    next run makes the shard again.
    """
    shards = Shards(stage.folder, stage.schema)
    try:
        digest = inputs_digest(stage, number)
        inputs = read_inputs(stage, number)
        records = max(map(len, inputs.values()))
        rows, left_out = stage.run(inputs, number)
        invalid = sum(type(e) is InvalidRecord and e.record not in limit.listed for e in left_out)
        if invalid > limit.allowed:
            shards.file(number).unlink(missing_ok=True)  # an old shard must not get a new list
            shards.write_left_out(number, left_out)
            return ShardResult(number, records, invalid, "invalid")
        shards.write(number, rows, left_out, digest)
    except (OSError, ValueError) as error:  # ValueError: an engine or a model is unusable
        return failed(number, error)
    return ShardResult(number, records, invalid)


def failed(number: int, error: Exception) -> ShardResult:
    """Result of a shard that raised an error. `error` is never "", which would mean success."""
    return ShardResult(
        number, error="full" if is_full(error) else str(error) or type(error).__name__
    )
