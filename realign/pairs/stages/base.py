"""What a stage of the pipeline is: a pure step from shards of records to a shard of records.

A stage turns the rows of one shard of the stages it needs into its own rows of that shard. It keeps
no state between shards and draws its random numbers by record, so shards may be made in any order,
on any machine, and again. A record that cannot be used is listed as `Bad`, one of which no pair can
be made as `Dropped`; later stages do not see it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from realign.pairs.engines import is_endpoint

if TYPE_CHECKING:
    from realign.pairs.engines import Chat, Engine, Reply

Row = dict[str, Any]
NO_REPLY = "no reply"
"""Why a record is bad that a model did not answer; it is asked again in the next run."""
Script = Generator["list[Chat]", "list[Reply]", "tuple[list[Row], list[Bad]]"]
"""A stage's work on one shard that asks a model: yields requests, is sent their replies."""


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used: it is listed with its reason, and the run goes on."""

    record: str
    stage: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Dropped(Bad):
    """A sound record of which no pair could be made; it is counted by reason."""


class Stage:
    """One step. Subclasses set the names and write `settings` and `run`.

    Attributes:
        name: of the stage, and of its folder.
        needs: the stages whose rows `run` is given.
        columns: of a stage in `needs`, the columns it is given; all of those that are not here.
        version: of the code; raise it when the same settings give other rows.
        schema: of the rows; every stage has a column `id`.
        uses_gpu: whether a worker of Ray needs a GPU for it, where there are any.
        folder: where its shards lie; set before `prepare`, as the next one.
        folders: where those of the stages before it lie, by name.
        shared: set by `prepare`: digest of what all shards are made of besides their own inputs.
        tick: may be told of records that are through, for the bar.
    """

    name: str = ""
    needs: tuple[str, ...] = ()
    columns: Mapping[str, list[str]] = {}
    version: int = 1
    schema: pa.Schema
    uses_gpu: bool = False
    folder: Path
    folders: Mapping[str, Path] = {}
    shared: str = ""
    tick: Callable[[int], Any] = staticmethod(lambda records: None)

    def settings(self) -> Row:
        """What the rows depend on besides the stages needed, as JSON takes it."""
        return {}

    def prepare(self) -> None:
        """Make what all shards share, in the stage's folder, if it is not there; in every run."""

    def open(self) -> None:
        """Load models and the like; once in a process, before the first shard."""

    def close(self) -> None:
        """Let go of them, after the last shard."""

    def run(self, inputs: dict[str, list[Row]], number: int) -> tuple[list[Row], list[Bad]]:
        """Make one shard.

        Args:
            inputs: the rows of the same shard of each stage in `needs`, by its name.
            number: of the shard.

        Returns:
            The rows, in the order of the input, and the records left out.
        """
        raise NotImplementedError

    def digest(self, needed: Mapping[str, str]) -> str:
        """What the folder's name ends with: of settings, version and the digests of its needs."""
        facts = [self.name, self.version, self.settings(), {n: needed[n] for n in self.needs}]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


class ChatStage(Stage):
    """A stage that may ask a chat model: `script` in place of `run`.

    Attributes:
        engine_spec: which engine is asked, as `make_engine` takes it; None asks none.
        engine_options: further arguments of `make_engine`.
        say: told what the requests are estimated to cost, before the first are sent.
        records: how many records are to be gone through, for the estimate.
        rounds: how often the first requests may be repeated with other images at most.
        asks_elsewhere: whether the requests of `script` are answered outside of this process.
    """

    engine_spec: str | None = None
    engine_options: Mapping[str, Any] = {}
    engine: Engine | None = None
    say: Callable[[str], None] | None = None
    records: int = 0
    rounds: int = 1
    asks_elsewhere: bool = False

    @property
    def uses_gpu(self) -> bool:
        """An engine behind a URL computes elsewhere."""
        return self.engine_spec is not None and not is_endpoint(self.engine_spec)

    def open(self) -> None:
        """Open the engine."""
        if self.engine_spec is not None and not self.asks_elsewhere:
            from realign.pairs.engines import make_engine

            self.engine = make_engine(self.engine_spec, **self.engine_options)
            self.engine.open()

    def close(self) -> None:
        """Close the engine, which frees its model."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Make one shard as `run` does; every `yield` of requests gives their replies."""
        raise NotImplementedError

    def run(self, inputs: dict[str, list[Row]], number: int) -> tuple[list[Row], list[Bad]]:
        """Make one shard with this process's engine."""
        script = self.script(inputs, number)
        records = max(map(len, inputs.values()))
        try:
            requests = next(script)
            while True:
                if requests:
                    self.tell_cost(self.engine, requests, records)
                requests = script.send(self.engine.chat(requests) if requests else [])
        except StopIteration as made:
            return made.value

    def tell_cost(self, engine: Engine, requests: list[Chat], records: int) -> None:
        """Say once what all requests will cost, to judge by the first, those of `records`."""
        if self.say is None:
            return
        total = max(1, round(len(requests) * self.records / records))
        if cost := engine.estimate(requests, total):
            further = f"; up to {self.rounds} times that, as a record may take as many tries"
            self.say(f"{self.name}: {cost}{further if self.rounds > 1 else ''}")
        self.say = None


def rng_of(seed: int, record: str, what: str) -> np.random.Generator:
    """Random numbers of one record for one purpose, whatever is drawn elsewhere before."""
    digest = hashlib.blake2b(json.dumps([seed, record, what]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
