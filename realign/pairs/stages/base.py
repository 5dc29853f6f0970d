"""Stage: a pure step of the pipeline that computes one shard of rows from earlier stages' shards.

A stage computes the rows of a shard from the rows of the same shard in the stages that it needs. It
keeps no state between shards, and the random numbers of a record depend only on the record. So
shards can be made in any order, repeatedly, and on any machine. A record that cannot be used is
listed as an `InvalidRecord`. A record that gives no pair is listed as a `FilteredRecord`. Later
stages see neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from realign.pairs import engines
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Chat, Engine, Reply, is_endpoint
from realign.pairs.io.rows import FilteredRecord, InvalidRecord, Row

Result = tuple[list[Row], list[InvalidRecord]]
"""The rows of a shard in the order of the input, and the records left out."""
Script = Generator[list[Chat], list[Reply], Result]
"""A stage's work on one shard. It yields requests to a model and receives the replies."""
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
"""Arrow type of a column of stored images."""


class Stage:
    """One step of the pipeline. Subclasses set the attributes and define `settings` and `run`.

    Args:
        config: settings of the run.

    Attributes:
        name: name of the stage, also used for its folder.
        needs: names of the stages whose rows `run` receives.
        columns: stage in `needs` -> columns that `run` receives. A stage that is not listed gives
            all columns.
        version: version of the code. Increase it when the same settings give different rows.
        schema: schema of the rows. Every stage has a column `id`.
        folder: folder of the shards. The runner sets `folder` and `folders` before `prepare`.
        folders: name of an earlier stage -> its folder.
        shared: digest of the inputs that all shards share. `prepare` sets it.
        sampled: number of sampled records if the stage has one shard of a sample, or 0. `prepare`
            sets it.
        tick: callback for the progress bar, called with a number of finished records.
    """

    name: str = ""
    needs: tuple[str, ...] = ()
    columns: Mapping[str, list[str]] = {}
    version: int = 1
    schema: pa.Schema
    folder: Path
    folders: Mapping[str, Path] = {}
    shared: str = ""
    sampled: int = 0
    tick: Callable[[int], Any] = staticmethod(lambda records: None)

    def __init__(self, config: PairsConfig) -> None:
        self.config = config

    @property
    def uses_gpu(self) -> bool:
        """Whether the stage uses a GPU. If so, a Ray worker reserves one if the cluster has any."""
        return False

    def settings(self) -> Row:
        """The settings that the rows depend on, in addition to the `needs`, as JSON values."""
        return {}

    def prepare(self) -> None:
        """Makes files in the stage's folder that all shards share. Every run calls it."""

    def open(self) -> None:
        """Loads models. Each process calls it once, before its first shard."""

    def close(self) -> None:
        """Releases the models after the last shard."""

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Makes one shard.

        Args:
            inputs: name of a stage in `needs` -> its rows of the same shard.
            number: number of the shard.
        """
        raise NotImplementedError

    def invalid(self, record: str, reason: str, detail: str = "") -> InvalidRecord:
        """Returns an entry for a record that cannot be used."""
        return InvalidRecord(record, self.name, reason, detail)

    def filtered(self, record: str, reason: str) -> FilteredRecord:
        """Returns an entry for a record that gives no pair."""
        return FilteredRecord(record, self.name, reason)

    def digest(self, needed: Mapping[str, str]) -> str:
        """Digest of settings, version and needed stages' digests: the suffix of the folder name."""
        facts = [self.name, self.version, self.settings(), {n: needed[n] for n in self.needs}]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


class ChatStage(Stage):
    """A stage that may use a chat model. Subclasses define `script` in place of `run`.

    Attributes:
        engine_spec: spec of the engine for `make_engine`, or None.
        report: prints the estimated cost before the first request is sent. None prints nothing.
        records: number of records in all shards to make, for the estimate.
        rounds: maximum number of rounds of requests. Each round uses other images.
    """

    engine_spec: str | None = None
    engine: Engine | None = None
    report: Callable[[str], None] | None = None
    records: int = 0
    rounds: int = 1

    @property
    def uses_gpu(self) -> bool:
        """Whether the engine runs in this process; an endpoint runs on a server."""
        return self.engine_spec is not None and not is_endpoint(self.engine_spec)

    def open(self) -> None:
        """Opens the engine."""
        if self.engine_spec is not None:
            self.engine = engines.make_engine(self.engine_spec, **self.config.engine_options)
            self.engine.open()

    def close(self) -> None:
        """Closes the engine and frees its model."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Makes one shard like `run`. Each `yield` of requests returns their replies."""
        raise NotImplementedError

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Makes one shard with the engine of this process."""
        script = self.script(inputs, number)
        try:
            requests = next(script)
            while True:
                self.report_cost(requests, inputs)
                requests = script.send(self.ask(requests))
        except StopIteration as end:
            return end.value

    def ask(self, requests: list[Chat]) -> list[Reply]:
        """Returns the engine's replies."""
        assert self.engine is not None
        return self.engine.chat(requests) if requests else []

    def report_cost(self, requests: list[Chat], inputs: dict[str, list[Row]]) -> None:
        """Reports the estimated cost of all requests once, from the first requests of a shard."""
        if self.report is None or not requests:
            return
        assert self.engine is not None
        shard_records = max(map(len, inputs.values()))
        total = max(1, round(len(requests) * self.records / shard_records))
        if cost := self.engine.estimate(requests, total):
            repeated = f"; up to {self.rounds} times that, because a record may take several tries"
            self.report(f"{self.name}: {cost}{repeated if self.rounds > 1 else ''}")
        self.report = None

    @property
    def engine_name(self) -> str | None:
        """Name of the engine for the provenance. For an endpoint, the model without the URL."""
        spec = self.engine_spec
        return spec.partition("#")[2] if spec is not None and is_endpoint(spec) else spec


def rng_of(seed: int, record: str, purpose: str) -> np.random.Generator:
    """Random number generator of one record for one purpose, independent of all others."""
    digest = hashlib.blake2b(json.dumps([seed, record, purpose]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
