"""Stage: a pure step of the pipeline, from shards of rows to a shard of rows.

A stage turns the rows of one shard of the stages it needs into its own rows of that shard. It keeps
no state between shards and draws random numbers by record, so shards may be made in any order, on
any machine, and again. A record that cannot be used is listed as `InvalidRecord`, a record that
gives no pair as `FilteredRecord`; later stages do not see either.
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
"""The rows of a shard, in the order of the input, and the records it left out."""
Script = Generator[list[Chat], list[Reply], Result]
"""A stage's work on one shard: yields requests to a model, is sent their replies."""
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
"""Type of a column of stored images."""


class Stage:
    """One step. Subclasses set the names and define `settings` and `run`.

    Args:
        config: of the run.

    Attributes:
        name: of the stage, and of its folder.
        needs: the stages whose rows `run` receives.
        columns: stage in `needs` -> the columns that `run` receives; all without an entry.
        version: of the code; raise it when the same settings give other rows.
        schema: of the rows; every stage has a column `id`.
        folder: of its shards; the runner sets it and `folders` before `prepare`.
        folders: of the stages before it, by name.
        shared: set by `prepare`: digest of the inputs that all shards have in common.
        tick: called with a number of finished records, for the progress bar.
    """

    name: str = ""
    needs: tuple[str, ...] = ()
    columns: Mapping[str, list[str]] = {}
    version: int = 1
    schema: pa.Schema
    folder: Path
    folders: Mapping[str, Path] = {}
    shared: str = ""
    tick: Callable[[int], Any] = staticmethod(lambda records: None)

    def __init__(self, config: PairsConfig) -> None:
        self.config = config

    @property
    def uses_gpu(self) -> bool:
        """Whether a worker of Ray needs a GPU for it, if the cluster has any."""
        return False

    def settings(self) -> Row:
        """The settings that the rows depend on, besides the stages in `needs`, as JSON values."""
        return {}

    def prepare(self) -> None:
        """Make absent files that all shards share, in the stage's folder; every run calls it."""

    def open(self) -> None:
        """Load models; once in a process, before the first shard."""

    def close(self) -> None:
        """Release the models, after the last shard."""

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Make one shard.

        Args:
            inputs: the rows of the same shard of each stage in `needs`, by its name.
            number: of the shard.
        """
        raise NotImplementedError

    def invalid(self, record: str, reason: str, detail: str = "") -> InvalidRecord:
        """An entry for a record that cannot be used."""
        return InvalidRecord(record, self.name, reason, detail)

    def filtered(self, record: str, reason: str) -> FilteredRecord:
        """An entry for a record that gives no pair."""
        return FilteredRecord(record, self.name, reason)

    def digest(self, needed: Mapping[str, str]) -> str:
        """Suffix of the folder's name: digest of settings, version and the digests of its needs."""
        facts = [self.name, self.version, self.settings(), {n: needed[n] for n in self.needs}]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


class ChatStage(Stage):
    """A stage that may ask a chat model: subclasses define `script`, not `run`.

    Attributes:
        engine_spec: name of the engine, for `make_engine`; None for no engine.
        report: prints the estimated cost before the first requests are sent; None prints nothing.
        records: number of records of all shards to make, for the estimate.
        rounds: maximum number of rounds of requests, each with other images.
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
        """Open the engine."""
        if self.engine_spec is not None:
            self.engine = engines.make_engine(self.engine_spec, **self.config.engine_options)
            self.engine.open()

    def close(self) -> None:
        """Close the engine, which frees its model."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Make one shard as `run` does; every `yield` of requests returns their replies."""
        raise NotImplementedError

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Make one shard with this process's engine."""
        script = self.script(inputs, number)
        try:
            requests = next(script)
            while True:
                self.report_cost(requests, inputs)
                requests = script.send(self.ask(requests))
        except StopIteration as end:
            return end.value

    def ask(self, requests: list[Chat]) -> list[Reply]:
        """The engine's replies."""
        assert self.engine is not None
        return self.engine.chat(requests) if requests else []

    def report_cost(self, requests: list[Chat], inputs: dict[str, list[Row]]) -> None:
        """Report once the estimated cost of all requests, from the first ones of a shard."""
        if self.report is None or not requests:
            return
        assert self.engine is not None
        shard_records = max(map(len, inputs.values()))
        total = max(1, round(len(requests) * self.records / shard_records))
        if cost := self.engine.estimate(requests, total):
            repeated = f"; up to {self.rounds} times that, as a record may take as many tries"
            self.report(f"{self.name}: {cost}{repeated if self.rounds > 1 else ''}")
        self.report = None

    @property
    def engine_name(self) -> str | None:
        """The engine for provenance; of an endpoint only the model, without the address."""
        spec = self.engine_spec
        return spec.partition("#")[2] if spec is not None and is_endpoint(spec) else spec


def rng_of(seed: int, record: str, purpose: str) -> np.random.Generator:
    """Random numbers of one record for one purpose, independent of all other draws."""
    digest = hashlib.blake2b(json.dumps([seed, record, purpose]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
