"""Stages that look at one record at a time: answer, embed, mask."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from PIL import Image

from realign.pairs.config import PairsConfig
from realign.pairs.io.pictures import PictureError
from realign.pairs.io.rows import (
    chat_images,
    engine_mark,
    images_of,
    in_threads,
    mark_of,
    name_of,
    record_of,
    reply_fault,
)
from realign.pairs.io.texts import problem_of
from realign.pairs.masking.mask import Masked, mask_response, masked_from
from realign.pairs.prompts import answer_chat, mask_chat, parse_answer, parse_segments
from realign.pairs.retrieval.phash import perceptual_hash
from realign.pairs.stages.base import NO_REPLY, Bad, ChatStage, Dropped, Row, Script, Stage, rng_of

_SIDE = 1024  # pixels of the longer side of an image that is embedded, at most


class Answer(ChatStage):
    """A response by a model for the records without one."""

    name = "answer"
    needs = ("read",)
    schema = pa.schema({"id": pa.string(), "chosen": pa.string(), "answer_model": pa.string()})

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        self.engine_spec = config.answer
        self.engine_options = config.engine_options

    def settings(self) -> Row:
        """Who answers."""
        return {"engine": engine_mark(self.engine_spec, self.config.dtype)}

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Ask for the missing responses."""
        left_out: list[Bad] = []
        asked, requests = [], []
        open_ = [row for row in inputs["read"] if not row["chosen"]]
        for row, images in zip(open_, in_threads(chat_images, open_), strict=True):
            if isinstance(images, PictureError):
                left_out.append(Bad(row["id"], self.name, images.reason, images.detail))
            else:
                asked.append(row["id"])
                requests.append(answer_chat(record_of(row), images))
        replies = dict(zip(asked, (yield requests), strict=True))
        rows = []
        for row in inputs["read"]:
            name, chosen, model = row["id"], row["chosen"], None
            if (reply := replies.get(name)) is not None:
                chosen, model = parse_answer(reply), name_of(self.engine_spec)
                if fault := reply_fault(reply, chosen):
                    left_out.append(Bad(name, self.name, fault, reply.error))
                elif problem := problem_of(chosen):
                    left_out.append(Bad(name, self.name, *problem))
                    chosen = None
            if chosen:
                rows.append({"id": name, "chosen": chosen, "answer_model": model})
        return rows, left_out


class Embed(Stage):
    """Unit vectors and perceptual hashes of the first images; every image is decoded once."""

    name = "embed"
    needs = ("read",)
    uses_gpu = True
    schema = pa.schema(
        {
            "id": pa.string(),
            "embedding": pa.list_(pa.float32()),
            "phash": pa.uint64(),
            "size": pa.list_(pa.int32()),
            "plain": pa.list_(pa.bool_()),  # of each image: every reader decodes it alike
        }
    )

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        self._embedder: Any = None

    def settings(self) -> Row:
        """Which encoder."""
        config = self.config
        name = config.embed_model or config.base
        own = config.embed_model is None
        return {"model": name, "mark": mark_of(name), "own tower": own, "dtype": config.dtype}

    def open(self) -> None:
        """Load the encoder."""
        from realign.pairs.retrieval.embed import Embedder

        config = self.config
        self._embedder = Embedder(
            config.embed_model, config.base, batch_size=config.batch_size, dtype=config.dtype
        )
        self._embedder.open()

    def close(self) -> None:
        """Forget the encoder."""
        self._embedder = None

    def run(self, inputs: dict[str, list[Row]], number: int) -> tuple[list[Row], list[Bad]]:
        """Embed the readable images in batches, decoding the next meanwhile."""
        rows: list[Row] = []
        left_out: list[Bad] = []
        sources, size = inputs["read"], self.config.batch_size
        parts = [sources[i : i + size] for i in range(0, len(sources), size)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            ahead = [pool.submit(self._look, row) for row in (parts or [[]])[0]]
            for following in [*parts[1:], []]:
                looked = [future.result() for future in ahead]
                ahead = [pool.submit(self._look, row) for row in following]
                left_out += [bad for bad in looked if isinstance(bad, Bad)]
                seen = [found for found in looked if not isinstance(found, Bad)]
                self.tick(len(looked))
                if seen:
                    vectors = self._embedder([image for image, _ in seen])
                    rows += [
                        row | {"embedding": vector}
                        for (_, row), vector in zip(seen, vectors, strict=True)
                    ]
        return rows, left_out

    def _look(self, row: Row) -> tuple[Image.Image, Row] | Bad:
        try:
            decoded = [stored.decode() for stored in images_of(row)]
            if not decoded:
                raise PictureError("no image")
        except PictureError as error:
            return Bad(row["id"], self.name, error.reason, error.detail)
        image = decoded[0][0]
        facts = {"phash": perceptual_hash(image), "size": image.size}
        image.thumbnail((_SIDE, _SIDE))  # a batch of photographs as they are takes gigabytes
        return image, {"id": row["id"], **facts, "plain": [alike for _, alike in decoded]}


class Mask(ChatStage):
    """Segments of the responses to hide, by rules or by a language model."""

    name = "mask"
    schema = pa.schema(
        {
            "id": pa.string(),
            "pieces": pa.list_(pa.string()),
            "hidden": pa.list_(pa.string()),
            "masker": pa.string(),
        }
    )

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        self.needs = (config.response_stage,)
        self.columns = {config.response_stage: ["id", "chosen"]}
        self.engine_spec = None if config.masker == "rules" else config.masker
        self.engine_options = config.engine_options

    def settings(self) -> Row:
        """Who masks what."""
        config = self.config
        if self.engine_spec is not None:
            return {"masker": engine_mark(self.engine_spec, config.dtype)}
        return {
            "masker": "rules",
            "categories": config.categories,
            "segments": config.segments,
            "share": config.share,
            "seed": config.seed,
        }

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Mask the responses; those without anything to mask are dropped."""
        sources = [row for row in inputs[self.needs[0]] if row["chosen"]]
        rows: list[Row] = []
        left_out: list[Bad] = [
            Bad(row["id"], self.name, "no response", "give one, or have it written by --answer")
            for row in inputs[self.needs[0]]
            if not row["chosen"]
        ]
        found: list[Masked | None | Bad]
        if self.engine_spec is None:
            found = [self._by_rules(row) for row in sources]
        else:
            replies = yield [mask_chat(row["chosen"]) for row in sources]
            found = [
                Bad(row["id"], self.name, NO_REPLY, reply.error)
                if reply.error
                else masked_from(row["chosen"], parse_segments(reply))
                for row, reply in zip(sources, replies, strict=True)
            ]
        for row, masked in zip(sources, found, strict=True):
            if isinstance(masked, Bad):
                left_out.append(masked)
            elif masked is None:
                left_out.append(Dropped(row["id"], self.name, "nothing to mask"))
            else:
                kept = {"pieces": masked.pieces, "hidden": masked.hidden}
                rows.append({"id": row["id"], "masker": self.config.masker, **kept})
        return rows, left_out

    def _by_rules(self, row: Row) -> Masked | None:
        config = self.config
        rng = rng_of(config.seed, row["id"], "mask")
        return mask_response(
            row["chosen"], config.categories, config.segments, rng, share=config.share
        )
