"""Embed stage: unit vectors and perceptual hashes of the records' first images."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from realign.modeling.prefetch import ahead
from realign.pairs.io.images import ImageError
from realign.pairs.io.rows import InvalidRecord, Row, images_of, model_digest
from realign.pairs.retrieval.embed import Embedder
from realign.pairs.retrieval.phash import perceptual_hash
from realign.pairs.stages.base import Result, Stage

_SIDE = 1024  # pixels of the longer side; larger images would take longer to preprocess
_BATCHES = 2  # one for the encoder, one for the workers


class Embed(Stage):
    """Unit vectors and perceptual hashes of the first images. Every image is decoded once."""

    name = "embed"
    needs = ("read",)
    schema = pa.schema(
        {
            "id": pa.string(),
            "embedding": pa.list_(pa.float32()),
            "phash": pa.uint64(),
            "size": pa.list_(pa.int32()),
            "plain": pa.list_(pa.bool_()),  # whether all readers decode the same pixels, per image
        }
    )

    _embedder: Embedder | None = None

    @property
    def uses_gpu(self) -> bool:
        """Always true, because the encoder runs on a GPU if there is one."""
        return True

    def settings(self) -> Row:
        """The encoder and its dtype."""
        config = self.config
        name = config.embed_model or config.base
        own = config.embed_model is None
        mark = model_digest(name.removeprefix("st:"))
        return {"model": name, "mark": mark, "own tower": own, "dtype": config.dtype}

    def open(self) -> None:
        """Loads the encoder."""
        config = self.config
        self._embedder = Embedder(
            config.embed_model, config.base, batch_size=config.batch_size, dtype=config.dtype
        )
        self._embedder.open()

    def close(self) -> None:
        """Releases the encoder."""
        self._embedder = None

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Embeds the readable images in batches, while workers preprocess the next batch."""
        embedder, size = self._embedder, self.config.batch_size
        assert embedder is not None
        rows, left_out = [], []
        tasks = (partial(self._prepare, row) for row in inputs["read"])
        workers, depth = self.config.worker_threads, _BATCHES * size
        with ahead(tasks, embedder.device, workers=workers, depth=depth) as entries:
            while batch := list(islice(entries, size)):
                left_out += [entry for entry in batch if isinstance(entry, InvalidRecord)]
                readable = [entry for entry in batch if not isinstance(entry, InvalidRecord)]
                self.tick(len(batch))
                vectors = embedder.encode([prepared for prepared, _ in readable])
                for (_, row), vector in zip(readable, vectors, strict=True):
                    rows.append(row | {"embedding": vector})
        return rows, left_out

    def _prepare(self, row: Row) -> tuple[Any, Row] | InvalidRecord:
        """The first image, preprocessed, and all columns except the embedding."""
        assert self._embedder is not None
        try:
            decoded = [stored.decode() for stored in images_of(row)]
            if not decoded:
                raise ImageError("no image")
        except ImageError as error:
            return self.invalid(row["id"], error.reason, error.detail)
        image = decoded[0][0]
        columns = {"id": row["id"], "phash": perceptual_hash(image), "size": image.size}
        image.thumbnail((_SIDE, _SIDE))
        prepared = self._embedder.prepare(image)
        return prepared, columns | {"plain": [plain for _, plain in decoded]}
