"""Embed stage: unit vectors and perceptual hashes of the records' first images."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from PIL import Image

from realign.pairs.io.images import ImageError
from realign.pairs.io.rows import InvalidRecord, Row, files_digest, images_of
from realign.pairs.retrieval.embed import Embedder
from realign.pairs.retrieval.phash import perceptual_hash
from realign.pairs.stages.base import Result, Stage

_SIDE = 1024  # pixels of the longer side; a batch of full-size photographs would need gigabytes


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
        return {"model": name, "mark": files_digest(name), "own tower": own, "dtype": config.dtype}

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
        """Embeds the readable images in batches, while the next batch is decoded."""
        assert self._embedder is not None
        rows, left_out = [], []
        sources, size = inputs["read"], self.config.batch_size
        batches = [sources[i : i + size] for i in range(0, len(sources), size)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            pending = [pool.submit(self._decode, row) for row in (batches or [[]])[0]]
            for following in [*batches[1:], []]:
                decoded = [future.result() for future in pending]
                pending = [pool.submit(self._decode, row) for row in following]
                left_out += [entry for entry in decoded if isinstance(entry, InvalidRecord)]
                readable = [entry for entry in decoded if not isinstance(entry, InvalidRecord)]
                self.tick(len(decoded))
                vectors = self._embedder([image for image, _ in readable])
                for (_, row), vector in zip(readable, vectors, strict=True):
                    rows.append(row | {"embedding": vector})
        return rows, left_out

    def _decode(self, row: Row) -> tuple[Image.Image, Row] | InvalidRecord:
        """The first image, reduced in size, and all columns except the embedding."""
        try:
            decoded = [stored.decode() for stored in images_of(row)]
            if not decoded:
                raise ImageError("no image")
        except ImageError as error:
            return self.invalid(row["id"], error.reason, error.detail)
        image = decoded[0][0]
        columns = {"id": row["id"], "phash": perceptual_hash(image), "size": image.size}
        image.thumbnail((_SIDE, _SIDE))
        return image, columns | {"plain": [plain for _, plain in decoded]}
