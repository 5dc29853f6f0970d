"""Read: the records of a data set, or digit scenes, as shards."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.records import Record
from realign.pairs.config import PairsConfig
from realign.pairs.io.rows import digit_sources, mark_of
from realign.pairs.io.shards import Shards
from realign.pairs.stages.base import Bad, Row, Stage

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
            from realign.pairs.io.importers import read_any

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

    def changed(self) -> set[int]:
        """Shards to be read again: damaged ones, and those whose pictures are not what they were,
        or in no place that is allowed."""
        numbers = Shards(self.folder).done()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(self._has_changed, numbers)
            return {number for number, changed in zip(numbers, found, strict=True) if changed}

    def _has_changed(self, number: int) -> bool:
        shards = Shards(self.folder, self.schema)
        reasons = {bad.reason for bad in shards.left_out_of(number, "bad")}
        if not shards.rows_digest(number) or reasons & {"missing", "outside the folder"}:
            return True
        with pq.ParquetFile(shards.file(number)) as file:
            columns = file.read([_PATHS, "stamps"])
        return any(
            stamp is not None and stamp != _stamp(image["path"])
            for images, stamps in zip(
                columns["images"].to_pylist(), columns["stamps"].to_pylist(), strict=True
            )
            for image, stamp in zip(images, stamps, strict=True)
        )


def _stamp(path: str) -> str:
    """Size, time and readability of a picture, which tell another one under its name.

    The path is that of the file itself (`inside`), so a link there has come since.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return "gone"
    if stat.S_ISLNK(found.st_mode):
        return "a link"
    return f"{found.st_size} {found.st_mtime_ns} {int(os.access(path, os.R_OK))}"
