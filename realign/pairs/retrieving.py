"""Retrieve: the nearest other images of every image, found among those of all shards."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from realign.pairs.config import PairsConfig
from realign.pairs.index import Index, neighbours
from realign.pairs.shards import Shards, save_array, write_table
from realign.pairs.stage import Bad, Row, Stage


class Retrieve(Stage):
    """Global: `prepare` puts the vectors of all shards into one file, which processes map.

    It writes `vectors.npy` (N, D) fp32, `hashes.npy` (N,) uint64, `index.faiss` unless search is
    exact and, last, `rows.parquet` with the id and shard of every vector.
    """

    name = "retrieve"
    needs = ("embed",)
    schema = pa.schema(
        {
            "id": pa.string(),
            "neighbours": pa.list_(
                pa.struct(
                    [
                        ("id", pa.string()),
                        ("shard", pa.int32()),
                        ("rank", pa.int32()),
                        ("similarity", pa.float32()),
                    ]
                )
            ),
        }
    )

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        self._index: Any = None

    def settings(self) -> Row:
        """How neighbours are found."""
        names = ("k", "ceiling", "floor", "hash_distance", "index")
        return {name: getattr(self.config, name) for name in names}

    def prepare(self) -> None:
        """Put the vectors of all shards into one file, from which every process maps them."""
        folder = self.folder
        if (folder / "rows.parquet").exists():
            return
        embedded = Shards(self.folders["embed"])
        counts = {n: len(embedded.table(n, ["id"])) for n in embedded.done()}
        numbers = [n for n, count in counts.items() if count]
        if not numbers:
            raise ValueError("no record is left to retrieve among: no image could be read.")
        wide = len(embedded.read(numbers[0], ["embedding"])[0]["embedding"])
        vectors = (_matrix(embedded.table(n, ["embedding"])["embedding"]) for n in numbers)
        hashes = (embedded.table(n, ["phash"])["phash"].to_numpy() for n in numbers)
        total = sum(counts.values())
        save_array(folder / "vectors.npy", (total, wide), np.float32, vectors)
        save_array(folder / "hashes.npy", (total,), np.uint64, hashes)
        rows = pa.concat_tables([embedded.table(n, ["id", "plain"]) for n in numbers])
        shard = pa.array(np.repeat(numbers, [counts[n] for n in numbers]), pa.int32())
        self._save_index()
        write_table(folder / "rows.parquet", rows.append_column("shard", shard))

    def _save_index(self) -> None:
        """Build an index that is not exact once, for every process to load."""
        path = self.folder / "index.faiss"
        partial = path.with_name(f".{path.name}.partial")
        try:
            with one_faiss_thread(self.config.index == "hnsw"):  # several build another graph
                index = Index(self.config.index).build(self._mapped())
            index.save(partial)
        except RuntimeError as error:  # of FAISS
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
        if partial.exists():  # exact search has nothing to save
            partial.replace(path)

    def _mapped(self) -> np.ndarray:
        return np.load(self.folder / "vectors.npy", mmap_mode="r")

    def open(self) -> None:
        """Map the vectors and load the index."""
        self._vectors = self._mapped()
        self._hashes = np.load(self.folder / "hashes.npy")
        rows = pq.read_table(self.folder / "rows.parquet", columns=["id", "shard"])
        self._ids, self._shards = rows["id"], rows["shard"].to_numpy()
        self._index = Index(self.config.index).load(self.folder / "index.faiss", self._vectors)

    def close(self) -> None:
        """Forget the index."""
        self._index = self._vectors = self._hashes = None

    def run(self, inputs: dict[str, list[Row]], number: int) -> tuple[list[Row], list[Bad]]:
        """Search for one shard's images among all."""
        start, stop = np.searchsorted(self._shards, [number, number + 1])
        config, rows = self.config, []
        if start == stop:
            return [], []
        found, similarity = neighbours(
            self._vectors,
            self._hashes,
            k=config.k,
            ceiling=config.ceiling,
            floor=config.floor,
            hash_distance=config.hash_distance,
            index=self._index,
            queries=slice(int(start), int(stop)),
        )
        for row, places, values in zip(inputs["embed"], found, similarity, strict=True):
            near = [
                {
                    "id": self._ids[int(place)].as_py(),
                    "shard": self._shards[place],
                    "rank": rank,
                    "similarity": value,
                }
                for rank, (place, value) in enumerate(zip(places, values, strict=True))
                if place >= 0
            ]
            rows.append({"id": row["id"], "neighbours": near})
        return rows, []


@contextmanager
def one_faiss_thread(wanted: bool) -> Iterator[None]:
    """FAISS on one thread, where that is wanted."""
    if not wanted:
        yield
        return
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:  # (rows, D)
    flat = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]).to_numpy()
    return flat.reshape(len(column), -1)
