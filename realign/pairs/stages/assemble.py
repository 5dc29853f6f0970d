"""From the rows of all stages to preference records, with a visual negative of the kind asked for.

The rejected response is always completed on the retrieved neighbour; the visual negative is that
neighbour's image, or for comparisons the image of a random record, or the record's own image
cropped, noised or blank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.records import Record, StoredImage, has_parts
from realign.pairs.config import PairsConfig
from realign.pairs.io.pictures import PictureError, load_picture, plain_picture
from realign.pairs.io.rows import by_id, images_of, in_threads, record_of
from realign.pairs.io.shards import Library, Shards
from realign.pairs.masking.mask import Masked
from realign.pairs.negatives import DERIVED, visual_negative
from realign.pairs.stages.base import Bad, Row, Stage, rng_of
from realign.pairs.stages.read import IMAGES

_DRAWS = 100  # random records looked at before the neighbour serves


def derived_negatives(config: PairsConfig, row: Row) -> tuple[StoredImage, ...]:
    """Visual negatives made of the pictures of a row of read.

    Raises:
        PictureError: when one cannot be read.
    """
    made = []
    for i, stored in enumerate(images_of(row)):
        rng = rng_of(config.seed, row["id"], f"negative {i}")
        image = visual_negative(config.negative, load_picture(stored), rng)
        made.append(StoredImage.from_pil(image))
    return tuple(made)


class Derive(Stage):
    """Visual negatives of the finished pairs, where they are made of the records' own pictures."""

    name = "negative"
    needs = ("read", "filter")
    columns = {"filter": ["id"]}
    schema = pa.schema({"id": pa.string(), "images": IMAGES})

    def __init__(self, config: PairsConfig) -> None:
        self.config = config

    def settings(self) -> Row:
        """What is made."""
        return {"negative": self.config.negative, "seed": self.config.seed}

    def run(self, inputs: dict[str, list[Row]], number: int) -> tuple[list[Row], list[Bad]]:
        """Make the negatives of a shard."""
        wanted = by_id(inputs["filter"])
        sources = [row for row in inputs["read"] if row["id"] in wanted]
        rows, left_out = [], []
        made = in_threads(lambda row: derived_negatives(self.config, row), sources)
        for row, images in zip(sources, made, strict=True):
            if isinstance(images, PictureError):  # it was readable before
                left_out.append(Bad(row["id"], self.name, images.reason, images.detail))
            else:
                stored = [{"bytes": image.data, "path": None} for image in images]
                rows.append({"id": row["id"], "images": stored})
        return rows, left_out


class Assembler:
    """Makes records of the shards of a work folder.

    Args:
        config: of the run.
        folders: of the stages, by name.
    """

    def __init__(self, config: PairsConfig, folders: Mapping[str, Path]) -> None:
        self._config = config
        self._folders = folders
        self._library = Library(folders["read"])
        self._all = pq.read_table(folders["retrieve"] / "rows.parquet")
        self._hashes = np.load(folders["retrieve"] / "hashes.npy")
        # Ids of records with an image that other readers would decode otherwise: a few as a rule.
        odd = [i for i, plain in enumerate(self._all["plain"].to_pylist()) if not all(plain)]
        self._odd = set(self._all["id"].take(pa.array(odd, pa.int64())).to_pylist())

    def pairs(self) -> Iterator[Record]:
        """The finished pairs, in the order of the data; one shard is in memory at a time."""
        stages = ["read", self._config.response_stage, "retrieve", "mask", "refill", "filter"]
        stages += [Derive.name] if self._config.negative in DERIVED else []
        shards = {name: Shards(self._folders[name]) for name in dict.fromkeys(stages)}
        for number in shards["filter"].done():
            inputs = {name: shard.read(number) for name, shard in shards.items()}
            yield from self.records(inputs, number, self._accepted(inputs))

    def _accepted(self, inputs: Mapping[str, list[Row]]) -> dict[str, Row]:
        found = by_id(inputs["filter"])
        last = inputs.get(Derive.name, inputs["filter"])
        return {row["id"]: found[row["id"]] for row in last}

    def typed(self) -> bool:
        """Whether the prompt of some record is in typed parts."""
        read = Shards(self._folders["read"])
        prompts = (read.table(number, ["prompt"])["prompt"].to_pylist() for number in read.done())
        return any(has_parts(json.loads(prompt)) for part in prompts for prompt in part)

    def records(
        self, inputs: Mapping[str, list[Row]], number: int, accepted: Mapping[str, Row]
    ) -> list[Record]:
        """Records of one shard.

        Args:
            inputs: rows of the stages before filter, by name; derived negatives where they are
                made already.
            number: of the shard.
            accepted: id -> a row of filter, or what is known of it: rank and rejected.

        Returns:
            Those records, in the order of the data.
        """
        config = self._config
        near = {row["id"]: row["neighbours"] for row in inputs["retrieve"]}
        rows = [row for row in inputs["read"] if row["id"] in accepted]
        neighbours = {r["id"]: near[r["id"]][accepted[r["id"]]["rank"]] for r in rows}
        if Derive.name in inputs:
            derived = by_id(inputs[Derive.name])
            negatives = {r["id"]: (None, images_of(derived[r["id"]])) for r in rows}
        else:
            negatives = self._negatives(rows, number, neighbours)
        chosen, masks = by_id(inputs[config.response_stage]), by_id(inputs["mask"])
        refilled = by_id(inputs["refill"])
        records = []
        for row in rows:
            name = row["id"]
            fact, neighbour, masked = accepted[name], neighbours[name], masks[name]
            source = record_of(row, chosen[name]["chosen"])
            other, images = negatives[name]
            provenance = {
                "masked": str(Masked(tuple(masked["pieces"]), tuple(masked["hidden"]))),
                "masker": masked["masker"],
                "neighbour": neighbour["id"],
                "neighbour_rank": fact["rank"],
                "similarity": neighbour["similarity"],
                "text_similarity": fact.get("text_similarity"),
                "visual_margin": fact.get("visual_margin"),
                "judge": fact.get("judge"),
                "negative": config.negative,
                "negative_record": other,
                "answer_model": chosen[name].get("answer_model"),
                "embed_model": config.embed_model or config.model or "digits",
                "refill_model": refilled[name]["refill_model"],
                "seed": config.seed,
            }
            own = self._plain(name, source.images)
            records.append(
                Record(
                    name, source.prompt, source.chosen, fact["rejected"], own, images, provenance
                )
            )
        return records

    def _negatives(
        self, rows: list[Row], number: int, neighbours: Mapping[str, Row]
    ) -> dict[str, tuple[str | None, tuple[StoredImage, ...]]]:
        """For each record the visual negative: whose image it is, and the images."""
        config = self._config
        found: dict[str, tuple[str | None, tuple[StoredImage, ...]]] = {}
        if config.negative in ("retrieved", "random"):
            keys = {
                row["id"]: self._random(row, number, neighbours[row["id"]])
                if config.negative == "random"
                else (neighbours[row["id"]]["shard"], neighbours[row["id"]]["id"])
                for row in rows
            }
            fetched = self._library.rows(keys.values())
            for name, key in keys.items():
                found[name] = key[1], self._plain(key[1], images_of(fetched[key]))
            return found
        for row in rows:
            found[row["id"]] = None, derived_negatives(config, row)
        return found

    def _random(self, row: Row, number: int, neighbour: Row) -> tuple[int, str]:
        """(shard, id) of a random record with another image, and with as many."""
        shards, names = self._all["shard"], self._all["id"]
        rng = rng_of(self._config.seed, row["id"], "random negative")
        own = self._hash_of(number, row["id"])
        for place in rng.integers(len(names), size=_DRAWS).tolist():
            alike = len(self._all["plain"][place]) == len(row["images"])
            if alike and self._hashes[place] != own:
                return shards[place].as_py(), names[place].as_py()
        return neighbour["shard"], neighbour["id"]

    def _hash_of(self, number: int, name: str) -> np.uint64:
        if getattr(self, "_number", None) != number:
            shards = self._all["shard"].to_numpy()
            start, stop = np.searchsorted(shards, [number, number + 1]).tolist()
            names = self._all["id"].slice(start, stop - start).to_pylist()
            self._number, self._places = number, {n: start + i for i, n in enumerate(names)}
        return self._hashes[self._places[name]]

    def _plain(self, name: str, images: tuple[StoredImage, ...]) -> tuple[StoredImage, ...]:
        """Images as every reader decodes them."""
        return tuple(map(plain_picture, images)) if name in self._odd else images
