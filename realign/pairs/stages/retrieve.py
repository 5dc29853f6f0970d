"""Retrieve stage: the nearest neighbours of every image, among the images of all shards.

With `--reach` above `--k`, the stage selects the k neighbours among more images. Images whose own
response lacks a hidden word of the record come first, because the completion probably differs
there. Within both groups the nearest come first.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from realign.files import replacing
from realign.pairs.config import PairsConfig
from realign.pairs.filters.text import normal_words
from realign.pairs.io.rows import Row
from realign.pairs.io.shards import (
    INPUTS_KEY,
    Shards,
    digest_of,
    footer,
    read_array,
    read_table,
    save_array,
    write_table,
)
from realign.pairs.retrieval.index import Index, neighbours
from realign.pairs.stages.base import Result, Stage

_NEIGHBOUR = pa.struct(
    {"id": pa.string(), "shard": pa.int32(), "rank": pa.int32(), "similarity": pa.float32()}
)
_ARRAYS = ("vectors.npy", "hashes.npy")


class _Group(NamedTuple):
    """Records with the same number of images. Neighbours are always in one group."""

    images: int
    rows: np.ndarray  # (n,) indices among the rows of all shards
    vectors: np.ndarray  # (n, D)
    hashes: np.ndarray  # (n,)


class Retrieve(Stage):
    """Neighbours among all images.

    `prepare` writes the vectors of all shards to one file, which every process maps. The files are
    `vectors.npy` (N, D) fp32 and `hashes.npy` (N,) uint64, and an index unless search is exact. The
    last file is `rows.parquet`, with the id, the shard and the images of every vector. With a
    reach, `responses.parquet` holds the normal words of the response to every vector's record.
    """

    name = "retrieve"
    schema = pa.schema({"id": pa.string(), "neighbours": pa.list_(_NEIGHBOUR)})

    _indices: list[tuple[_Group, Index]]
    _responses: pa.ChunkedArray | None = None

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        self._reach = max(config.k, config.reach or 0)
        self._selects = self._reach > config.k
        self.needs = ("embed", "mask", config.response_stage) if self._selects else ("embed",)
        self.columns = {"embed": ["id"], config.response_stage: ["id"], "mask": ["id", "hidden"]}

    def settings(self) -> Row:
        """The settings of the search."""
        names = ("k", "ceiling", "floor", "hash_distance", "index")
        settings = {name: getattr(self.config, name) for name in names}
        return settings | ({"reach": self._reach} if self._selects else {})

    def prepare(self) -> None:
        """Writes the files that all shards share.

        Raises:
            ValueError: when no image could be read.
        """
        embedded = Shards(self.folders["embed"])
        self.shared = digest_of(*map(embedded.rows_digest, embedded.done()))
        self._save_vectors(embedded)
        if self._selects:
            self._save_responses(embedded)

    def _save_vectors(self, embedded: Shards) -> None:
        folder = self.folder
        file = folder / "rows.parquet"
        complete = all((folder / name).exists() for name in _ARRAYS)
        if complete and footer(file).get(INPUTS_KEY) == self.shared.encode():
            return
        file.unlink(missing_ok=True)  # this file marks the arrays as complete
        counts = {n: len(embedded.table(n, ["id"])) for n in embedded.done()}
        numbers = [n for n, count in counts.items() if count]
        if not numbers:
            raise ValueError("no image could be read, so there are no neighbours to retrieve.")

        def column(name: str) -> Iterator[pa.ChunkedArray]:
            return (embedded.table(n, [name])[name] for n in numbers)

        dim = len(embedded.read(numbers[0], ["embedding"])[0]["embedding"])
        total = sum(counts.values())
        vectors = map(_matrix, column("embedding"))
        hashes = (part.to_numpy() for part in column("phash"))
        save_array(folder / "vectors.npy", (total, dim), np.float32, vectors)
        save_array(folder / "hashes.npy", (total,), np.uint64, hashes)
        rows = pa.concat_tables([embedded.table(n, ["id", "plain"]) for n in numbers])
        shard = pa.array(np.repeat(numbers, [counts[n] for n in numbers]), pa.int32())
        rows = rows.append_column("shard", shard)
        self._save_index(rows)
        write_table(file, rows.replace_schema_metadata({INPUTS_KEY: self.shared}))

    def _save_responses(self, embedded: Shards) -> None:
        """Writes the normal words of all responses, in the order of the vectors."""
        answered = Shards(self.folders[self.config.response_stage])
        digests = map(answered.rows_digest, embedded.done())
        self.shared = digest_of(self.shared, *digests)
        file = self.folder / "responses.parquet"
        if footer(file).get(INPUTS_KEY) == self.shared.encode():
            return
        texts: list[pa.Array] = []
        for number in embedded.done():
            columns = answered.table(number, ["id", "chosen"]).to_pydict()
            chosen = dict(zip(columns["id"], columns["chosen"], strict=True))
            ids = embedded.table(number, ["id"])["id"].to_pylist()
            words = [_spaced(chosen.get(name) or "") for name in ids]
            texts.append(pa.array(words, pa.string()))
        table = pa.table({"response": pa.chunked_array(texts)})
        write_table(file, table.replace_schema_metadata({INPUTS_KEY: self.shared}))

    def _save_index(self, rows: pa.Table) -> None:
        """Builds the indices of approximate search once. Every process loads them."""
        for group in self._groups(rows):
            path = self._index_file(group)
            index = Index(self.config.index).build(group.vectors)
            if index.used == "exact":  # it has nothing to save
                continue
            try:
                with replacing(path) as file:
                    index.save(file.name)
            except RuntimeError as error:  # from FAISS
                if "No space left" in str(error):
                    raise OSError(errno.ENOSPC, str(error)) from error
                raise

    def _index_file(self, group: _Group) -> Path:
        return self.folder / f"index-{group.images}.faiss"

    def _groups(self, rows: pa.Table) -> list[_Group]:
        """Groups the rows by the number of images of their records."""
        vectors = read_array(self.folder / "vectors.npy", "r")
        hashes = read_array(self.folder / "hashes.npy")
        counts = np.array([len(images) for images in rows["plain"].to_pylist()])
        kinds = np.unique(counts).tolist()
        if len(kinds) == 1:
            return [_Group(kinds[0], np.arange(len(counts)), vectors, hashes)]
        groups = {kind: np.flatnonzero(counts == kind) for kind in kinds}
        return [_Group(kind, at, vectors[at], hashes[at]) for kind, at in groups.items()]

    def open(self) -> None:
        """Maps the vectors and loads the indices."""
        rows = read_table(self.folder / "rows.parquet")
        self._ids, self._shards = rows["id"], rows["shard"].to_numpy()
        self._indices = [
            (group, Index(self.config.index).load(self._index_file(group), group.vectors))
            for group in self._groups(rows)
        ]
        if self._selects:
            self._responses = read_table(self.folder / "responses.parquet")["response"]

    def close(self) -> None:
        """Releases the indices."""
        self._indices, self._responses = [], None

    def run(self, inputs: dict[str, list[Row]], number: int) -> Result:
        """Finds the neighbours of one shard's images among all images."""
        start, stop = np.searchsorted(self._shards, [number, number + 1]).tolist()
        ids = [row["id"] for row in inputs["embed"]]
        hidden = {row["id"]: row["hidden"] for row in inputs.get("mask", ())}
        near = self.near(np.arange(start, stop), [hidden.get(name, ()) for name in ids])
        return [{"id": i, "neighbours": rows} for i, rows in zip(ids, near, strict=True)], []

    def near(self, queries: np.ndarray, hidden: Sequence[Sequence[str]]) -> list[list[Row]]:
        """Neighbours of images. `open` must have been called.

        Args:
            queries: indices of the images in `rows.parquet`, ascending.
            hidden: the hidden segments of each image's record. They are used with a reach.

        Returns:
            The rows of the column `neighbours` for each image.
        """
        near: list[list[Row]] = [[] for _ in queries]
        config = self.config
        for group, index in self._indices:
            found = np.minimum(np.searchsorted(group.rows, queries), len(group.rows) - 1)
            at = np.flatnonzero(group.rows[found] == queries)
            if not len(at):
                continue
            places, similarities = neighbours(
                group.vectors,
                group.hashes,
                k=self._reach,
                ceiling=config.ceiling,
                floor=config.floor,
                hash_distance=config.hash_distance,
                index=index,
                queries=found[at],
            )
            for i, *result in zip(at.tolist(), places, similarities, strict=True):
                near[i] = self._neighbours(group, *result, hidden=hidden[i])
        return near

    def _neighbours(
        self,
        group: _Group,
        places: np.ndarray,
        similarities: np.ndarray,
        *,
        hidden: Sequence[str],
    ) -> list[Row]:
        """The neighbours of one image as rows of the column `neighbours`."""
        rows = group.rows[places[places >= 0]].tolist()
        ranks = self._differing_first(rows, hidden) if self._selects else range(len(rows))
        return [
            {
                "id": self._ids[rows[rank]].as_py(),
                "shard": int(self._shards[rows[rank]]),
                "rank": rank,
                "similarity": similarities[rank],
            }
            for rank in ranks
        ]

    def _differing_first(self, rows: Sequence[int], hidden: Sequence[str]) -> list[int]:
        """The `k` ranks to try. Ranks whose response lacks a hidden segment come first."""
        responses: Any = self._responses
        segments = [words for segment in hidden if (words := _spaced(segment)).strip()]

        def differs(rank: int) -> bool:
            text = responses[rows[rank]].as_py()
            return any(segment not in text for segment in segments)

        k = self.config.k
        differing = list(islice(filter(differs, range(len(rows))), k))
        others = set(range(len(rows))) - set(differing)
        return (differing + sorted(others))[:k]


def _spaced(text: str) -> str:
    """The normal words of a text between spaces, so that a search finds whole words."""
    return f" {' '.join(normal_words(text))} "


def _matrix(column: pa.ChunkedArray) -> np.ndarray:  # (rows, D)
    flat = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]).to_numpy()
    return flat.reshape(len(column), -1)
