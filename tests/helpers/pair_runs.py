"""Small runs of the pairs pipeline on digits, and views of their work folders."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from realign.pairs.engines import Reply
from realign.pairs.pipeline import PairsConfig

ORDER = ("read", "embed", "retrieve", "mask", "refill", "filter")
SHARDS = 5
SETTINGS = {"scenes": 40, "k": 4, "shard": 8, "keep_target": 0.0, "quiet": True}
FLAGS = ["--scenes", "40", "--k", "4", "--shard", "8", "--keep-target", "0", "--quiet"]


def config_in(folder: Path, **settings) -> PairsConfig:
    """Settings of a run with forty scenes in five shards and the output in `folder`."""
    return PairsConfig(output=str(folder / "pairs.parquet"), **(SETTINGS | settings))


def copy_run(run, folder: Path, stages=ORDER, **settings) -> PairsConfig:
    """Settings of a run in `folder`, with the `stages` of another run in its work folder."""
    config = config_in(folder, **settings)
    for stage in stages:
        there = stage_folder(run.work, stage)
        shutil.copytree(there, config.work_folder / there.name)
    return config


def stage_folder(work: Path, stage: str) -> Path:
    """The one folder of a stage."""
    (found,) = work.glob(f"{stage}-*")
    return found


def shard_times(folder: Path) -> dict[str, int]:
    """Shard -> modification time of its file."""
    files = [file for file in sorted(folder.glob("*.parquet")) if file.stem.isdigit()]
    return {file.name: file.stat().st_mtime_ns for file in files}


def stage_rows(folder: Path) -> list[dict]:
    """The rows of all shards of a stage."""
    return [row for name in shard_times(folder) for row in pq.read_table(folder / name).to_pylist()]


def rejected_in(folder: Path) -> list[tuple[str, str, str]]:
    """(record, stage, reason) of the invalid records that a run listed."""
    rows = pq.read_table(folder / "pairs.work" / "rejected_records.parquet").to_pylist()
    return [(row["record"], row["stage"], row["reason"]) for row in rows]


class FakeEngine:
    """An engine whose replies are a function of a request's text."""

    def __init__(self, reply_to):
        self.reply_to, self.name, self.asked = reply_to, "fake", []

    def open(self):
        pass

    def close(self):
        pass

    def estimate(self, requests, total=None):
        return f"{len(requests)} of {total} requests cost nothing"

    def chat(self, requests):
        self.asked += requests
        replies = [self.reply_to(request.messages[-1]["content"]) for request in requests]
        return [reply if isinstance(reply, Reply) else Reply(reply) for reply in replies]
