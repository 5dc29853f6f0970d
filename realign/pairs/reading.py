"""Read: the records of a data set, or digit scenes, as shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from realign.pairs.config import PairsConfig
from realign.pairs.rows import digit_sources, mark_of
from realign.pairs.stage import Bad, Row, Stage
from realign.records import Record

_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


class Read(Stage):
    """Records and where their images are. Sequential: a shard is the next `shard` records."""

    name = "read"
    schema = pa.schema(
        {"id": pa.string(), "prompt": pa.string(), "chosen": pa.string(), "images": _IMAGES}
    )

    def __init__(self, config: PairsConfig) -> None:
        self.config = config

    def settings(self) -> Row:
        """Which records: those of a file as it is now, or drawn scenes."""
        config = self.config
        if config.data is None:
            return {"scenes": config.scenes, "seed": config.seed, "shard": config.shard}
        return {
            "data": str(Path(config.data).absolute()),
            "mark": mark_of(config.data),
            "format": config.format,
            "images": config.image_folder,
            "shard": config.shard,
        }

    def shards(self, skip: int) -> Iterator[list[Record | Bad]]:
        """The records of each shard, from shard `skip` on."""
        if self.config.data is None:
            records: Iterator[Record | Bad] = iter(digit_sources(self.config))
        else:
            from realign.pairs.importers import read_any

            config = self.config
            records = iter(read_any(config.data, format=config.format, images=config.image_folder))
        records = islice(records, skip * self.config.shard, None)
        while part := list(islice(records, self.config.shard)):
            yield part

    @staticmethod
    def row(record: Record) -> Row:
        """A record as a row of this stage."""
        return {
            "id": record.name,
            "prompt": json.dumps(list(record.prompt), ensure_ascii=False),
            "chosen": record.chosen,
            "images": [{"bytes": i.data, "path": i.path} for i in record.images],
        }
