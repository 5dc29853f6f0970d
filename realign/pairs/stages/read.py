"""Read stage: the records of a data set or of digit scenes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow as pa

from realign.data.records import Record, StoredImage
from realign.data.sources import identity
from realign.digits.scenes import CAPTION_PROMPT, make_scenes
from realign.pairs.config import PairsConfig
from realign.pairs.io.importers import read_any
from realign.pairs.io.rows import InvalidRecord, Row, files_digest
from realign.pairs.io.shards import Shards, parquet_file
from realign.pairs.stages.base import IMAGES, Stage

_PATHS = "images.list.element.path"  # name of the nested column in Parquet


def digit_sources(config: PairsConfig) -> list[Record]:
    """The default records: biased digit scenes with their true captions."""
    scenes = make_scenes(config.scenes, biased=True, split="train", seed=config.seed)
    prompt = ({"role": "user", "content": CAPTION_PROMPT},)
    return [
        Record(f"scene-{i:05d}", prompt, s.caption, "", (StoredImage.from_pil(s.image),))
        for i, s in enumerate(scenes)
    ]


class Read(Stage):
    """Records and the paths of their images. A shard holds the next `config.shard` records."""

    name = "read"
    version = 2
    schema = pa.schema(
        {
            "id": pa.string(),
            "prompt": pa.string(),
            "chosen": pa.string(),
            "images": IMAGES,
            "stamps": pa.list_(pa.string()),  # for image files, see `_stamp`
        }
    )

    def settings(self) -> Row:
        """The current state of the data set, or the settings of the scenes."""
        config = self.config
        if config.data is None:
            return {"scenes": config.scenes, "seed": config.seed, "shard": config.shard}
        folder = Path(config.data).is_dir()  # its images are part of the data
        options = {"split": config.split, "format": config.format}
        return {
            "data": str(Path(config.data).absolute()),
            "mark": files_digest(config.data) if folder else identity(config.data, **options),
            "format": config.format,
            "split": config.split,
            "images": config.image_folder and str(Path(config.image_folder).absolute()),
            "shard": config.shard,
        }

    def shards(self, skip: int) -> Iterator[list[Record | InvalidRecord]]:
        """Yields the records of each shard, starting at shard `skip`."""
        config = self.config
        records: Iterator[Record | InvalidRecord]
        if config.data is None:
            records = iter(digit_sources(config))
        else:
            options = {"format": config.format, "images": config.image_folder}
            records = iter(read_any(config.data, split=config.split, **options))
        records = islice(records, skip * config.shard, None)
        while part := list(islice(records, config.shard)):
            yield part

    @staticmethod
    def row(record: Record) -> Row:
        """A record as a row of this stage."""
        return {
            "id": record.name,
            "prompt": json.dumps(list(record.prompt), ensure_ascii=False),
            "chosen": record.chosen,
            "images": [{"bytes": i.data, "path": i.path} for i in record.images],
            "stamps": [None if i.path is None or i.data else _stamp(i.path) for i in record.images],
        }

    def changed(self) -> set[int]:
        """Numbers of the shards to read again.

        These are damaged shards, and shards with changed, missing or misplaced image files.
        """
        numbers = Shards(self.folder).done()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            changed = pool.map(self._has_changed, numbers)
            return {n for n, has_changed in zip(numbers, changed, strict=True) if has_changed}

    def _has_changed(self, number: int) -> bool:
        shards = Shards(self.folder, self.schema)
        reasons = {entry.reason for entry in shards.left_out_of(number, "bad")}
        if not shards.rows_digest(number) or reasons & {"missing", "outside the folder"}:
            return True
        with parquet_file(shards.file(number)) as file:
            columns = file.read([_PATHS, "stamps"])
        return any(
            stamp is not None and stamp != _stamp(image["path"])
            for images, stamps in zip(
                columns["images"].to_pylist(), columns["stamps"].to_pylist(), strict=True
            )
            for image, stamp in zip(images, stamps, strict=True)
        )


def _stamp(path: str) -> str:
    """Size, modification time and readability of an image file, to detect changes.

    `inside` resolved links when the record was read, so a link at this path is a later change.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return "gone"
    if stat.S_ISLNK(status.st_mode):
        return "a link"
    return f"{status.st_size} {status.st_mtime_ns} {int(os.access(path, os.R_OK))}"
