"""Read: the records of a data set, or digit scenes, as shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from realign.pairs.config import PairsConfig
from realign.pairs.rows import digit_sources, mark_of
from realign.pairs.shards import Shards
from realign.pairs.stage import Bad, Row, Stage
from realign.records import Record

_PATHS = "images.list.element.path"  # as Parquet names it
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


class Read(Stage):
    """Records and where their images are. Sequential: a shard is the next `shard` records."""

    name = "read"
    version = 2
    schema = pa.schema(
        {
            "id": pa.string(),
            "prompt": pa.string(),
            "chosen": pa.string(),
            "images": IMAGES,
            "stamps": pa.list_(pa.string()),  # of pictures that are files, see `_stamp`
        }
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
            "images": config.image_folder and str(Path(config.image_folder).absolute()),
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
            "stamps": [None if i.data else _stamp(i.path) for i in record.images],
        }

    def look_again(self) -> None:
        """Note pictures that were mended or replaced since: stages behind make their shards new."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._look_again, Shards(self.folder).done()):
                pass

    def _look_again(self, number: int) -> None:
        shards = Shards(self.folder, self.schema)
        if not shards.rows_digest(number):
            return
        with pq.ParquetFile(shards.file(number)) as file:
            columns = file.read([_PATHS, "stamps"])
        before = columns["stamps"].to_pylist()
        if not any(stamp is not None for stamps in before for stamp in stamps):
            return
        now = [
            [stamp and _stamp(image["path"]) for image, stamp in zip(images, stamps, strict=True)]
            for images, stamps in zip(columns["images"].to_pylist(), before, strict=True)
        ]
        if now != before:
            rows = [
                row | {"stamps": stamps}
                for row, stamps in zip(shards.read(number), now, strict=True)
            ]
            shards.write(number, rows, shards.left_out_of(number, "bad"))

    def misses(self, number: int) -> bool:
        """Whether a shard is damaged, or lacks records whose pictures were not in their place."""
        shards = Shards(self.folder)
        reasons = {bad.reason for bad in shards.left_out_of(number, "bad")}
        return not shards.rows_digest(number) or bool(reasons & {"missing", "outside the folder"})


def _stamp(path: str) -> str:
    """Size and time of a picture, which tell another one under its name."""
    try:
        found = os.stat(path)
    except OSError:
        return "gone"
    return f"{found.st_size} {found.st_mtime_ns}"
