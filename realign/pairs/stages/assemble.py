"""Assembler: combines the rows of all stages into preference records with a visual negative.

The rejected response is always completed on the retrieved neighbour. The visual negative is that
neighbour's image. For comparisons, it can be the image of a random record, or a crop, noise or
blank version of the record's own image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from realign.data.records import PROVENANCE, Record, StoredImage, has_parts
from realign.pairs.config import PairsConfig
from realign.pairs.io.images import ImageError, load_image, plain_image
from realign.pairs.io.rows import Row, by_id, images_of, load_in_threads, record_of
from realign.pairs.io.shards import RowLookup, Shards, read_array, read_table
from realign.pairs.masking.mask import Masked
from realign.pairs.negatives import DERIVED, visual_negative
from realign.pairs.stages.base import IMAGES, Result, Stage, rng_of

_DRAWS = 100  # random records to try before the neighbour is used


def derived_negatives(config: PairsConfig, row: Row) -> tuple[StoredImage, ...]:
    """Visual negatives made from the images of a row of the read stage.

    Raises:
        ImageError: when an image cannot be read.
    """
    negatives = []
    for i, stored in enumerate(images_of(row)):
        rng = rng_of(config.seed, row["id"], f"negative {i}")
        image = visual_negative(config.negative, load_image(stored), rng)
        negatives.append(StoredImage.from_pil(image))
    return tuple(negatives)


class Derive(Stage):
    """Visual negatives made from the own images of the records that passed the filters."""

    name = "negative"
    needs = ("read", "filter")
    columns = {"filter": ["id"]}
    schema = pa.schema({"id": pa.string(), "images": IMAGES})

    def settings(self) -> Row:
        """The kind of negative and the seed."""
        return {"negative": self.config.negative, "seed": self.config.seed}

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Makes the negatives of a shard."""
        accepted = by_id(inputs["filter"])
        sources = [row for row in inputs["read"] if row["id"] in accepted]
        rows, left_out = [], []
        negatives = load_in_threads(
            lambda row: derived_negatives(self.config, row), sources, self.config.worker_threads
        )
        for row, images in zip(sources, negatives, strict=True):
            if isinstance(images, ImageError):  # it has changed since the embed stage
                left_out.append(self.invalid(row["id"], images.reason, images.detail))
            else:
                stored = [{"bytes": image.data, "path": None} for image in images]
                rows.append({"id": row["id"], "images": stored})
        return rows, left_out


class Assembler:
    """Makes records from the shards of a work folder.

    Args:
        config: settings of the run.
        folders: name of a stage -> its folder.
    """

    def __init__(self, config: PairsConfig, folders: Mapping[str, Path]) -> None:
        self._config = config
        self._folders = folders
        self._lookup = RowLookup(folders["read"])
        self._all = read_table(folders["retrieve"] / "rows.parquet", ["id", "plain", "shard"])
        self._hashes = read_array(folders["retrieve"] / "hashes.npy")
        self._places = lru_cache(1)(self._places_of)
        # Ids of records with an image that other readers decode to different pixels; usually few.
        not_plain = [i for i, plain in enumerate(self._all["plain"].to_pylist()) if not all(plain)]
        self._not_plain = set(self._all["id"].take(pa.array(not_plain, pa.int64())).to_pylist())

    def pairs(self) -> Iterator[Record]:
        """Yields the finished pairs in the order of the data, one shard in memory at a time."""
        stages = ["read", self._config.response_stage, "retrieve", "mask", "refill", "filter"]
        stages += [Derive.name] if self._config.negative in DERIVED else []
        shards = {name: Shards(self._folders[name]) for name in dict.fromkeys(stages)}
        for number in shards["filter"].done():
            inputs = {name: shard.read(number) for name, shard in shards.items()}
            filtered = by_id(inputs["filter"])
            last = inputs.get(Derive.name, inputs["filter"])
            accepted = {row["id"]: filtered[row["id"]] for row in last}
            yield from self.records(inputs, number, accepted)

    def typed(self) -> bool:
        """Whether any record has a prompt with typed parts."""
        read = Shards(self._folders["read"])
        prompts = (read.table(number, ["prompt"])["prompt"].to_pylist() for number in read.done())
        return any(has_parts(json.loads(prompt)) for part in prompts for prompt in part)

    def records(
        self, inputs: Mapping[str, list[Row]], number: int, accepted: Mapping[str, Row]
    ) -> list[Record]:
        """Records of one shard.

        Args:
            inputs: name of a stage -> rows, for the stages before filter. It also has the rows of
                `Derive`, if that stage has run.
            number: number of the shard.
            accepted: id -> row of the filter stage, or only its columns rank and rejected. The
                rank is a place in the list of neighbours.

        Returns:
            The accepted records, in the order of the data.
        """
        config = self._config
        near = {row["id"]: row["neighbours"] for row in inputs["retrieve"]}
        rows = [row for row in inputs["read"] if row["id"] in accepted]
        neighbours = {r["id"]: near[r["id"]][accepted[r["id"]]["rank"]] for r in rows}
        derived = {row["id"]: images_of(row) for row in inputs.get(Derive.name, ())}
        negatives = self._negatives(rows, number, neighbours, derived)
        chosen, masks = by_id(inputs[config.response_stage]), by_id(inputs["mask"])
        refilled = by_id(inputs["refill"])
        records = []
        for row in rows:
            name = row["id"]
            columns, neighbour, masked = accepted[name], neighbours[name], masks[name]
            source = record_of(row, chosen[name]["chosen"])
            negative_record, negative = negatives[name]
            provenance = {
                "masked": str(Masked(tuple(masked["pieces"]), tuple(masked["hidden"]))),
                "masker": masked["masker"],
                "neighbour": neighbour["id"],
                "neighbour_rank": neighbour["rank"],
                "similarity": neighbour["similarity"],
                **{name: value for name, value in columns.items() if name in PROVENANCE},
                "negative": config.negative,
                "negative_record": negative_record,
                "answer_model": chosen[name].get("answer_model"),
                "embed_model": config.embed_model or config.model or "digits",
                "refill_model": refilled[name]["refill_model"],
                "seed": config.seed,
            }
            images = self._plain(name, source.images)
            prompt, response = source.prompt, source.chosen
            records.append(
                Record(name, prompt, response, columns["rejected"], images, negative, provenance)
            )
        return records

    def _negatives(
        self,
        rows: list[Row],
        number: int,
        neighbours: Mapping[str, Row],
        derived: Mapping[str, tuple[StoredImage, ...]],
    ) -> dict[str, tuple[str | None, tuple[StoredImage, ...]]]:
        """Id of a record -> (id of its negative's record, or None if derived; images)."""
        config = self._config
        if config.negative in DERIVED:
            return {
                row["id"]: (None, derived.get(row["id"]) or derived_negatives(config, row))
                for row in rows
            }
        keys = {name: (near["shard"], near["id"]) for name, near in neighbours.items()}
        if config.negative == "random":
            keys = {row["id"]: self._random(row, number, keys[row["id"]]) for row in rows}
        rows_of = self._lookup.rows(keys.values())
        return {
            name: (key[1], self._plain(key[1], images_of(rows_of[key])))
            for name, key in keys.items()
        }

    def _random(self, row: Row, number: int, neighbour: tuple[int, str]) -> tuple[int, str]:
        """(shard, id) of a random record with other images and the same number of them.

        Returns `neighbour` if `_DRAWS` draws find none.
        """
        shards, names = self._all["shard"], self._all["id"]
        rng = rng_of(self._config.seed, row["id"], "random negative")
        own_hash = self._hashes[self._places(number)[row["id"]]]
        for index in rng.integers(len(names), size=_DRAWS).tolist():
            same_count = len(self._all["plain"][index]) == len(row["images"])
            if same_count and self._hashes[index] != own_hash:
                return shards[index].as_py(), names[index].as_py()
        return neighbour

    def _places_of(self, number: int) -> dict[str, int]:
        """Id -> index among the rows of all shards, for the records of one shard."""
        shards = self._all["shard"].to_numpy()
        start, stop = np.searchsorted(shards, [number, number + 1]).tolist()
        names = self._all["id"].slice(start, stop - start).to_pylist()
        return {name: start + i for i, name in enumerate(names)}

    def _plain(self, name: str, images: tuple[StoredImage, ...]) -> tuple[StoredImage, ...]:
        """The images in a form that every reader decodes to the same pixels."""
        return tuple(map(plain_image, images)) if name in self._not_plain else images
