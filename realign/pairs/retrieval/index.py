"""Nearest neighbours by cosine among up to millions of images, near-duplicates left out.

An `Index` says which images may be nearest; the similarities it returns are always the exact fp32
inner products with the vectors it was built on, so all kinds agree on what a similarity, a tie and
a duplicate is. `neighbours` leaves out what is no neighbour.

Measured by `python -m benchmarks.retrieval_recall` on two shared cores (load 1 to 4), vectors of
768 dimensions around 2,000 centres; memory is what a search adds to the vectors:

| vectors | kind, default settings | recall@10 | build | search | memory |
|---|---|---|---|---|---|
| 200,000 | exact | 1 | 0 s | 10,000 in 18 s | 160 MB |
| 200,000 | ivf, 32 of 1,788 lists | 0.9992 | 18 s | 10,000 in 1.8 s | 690 MB |
| 200,000 | hnsw, 32 links, 128 candidates | 0.9996 | 112 s | 10,000 in 6 s | 540 MB |
| 100,000 | exact, `neighbours` of all | 1 | 0 s | 100,000 in 193 s | 280 MB |
| 1,000,000 | ivf, 32 of 4,000 lists, `neighbours` | 1.0000 | 247 s | 20,000 in 15 s | 2.4 GB |

(A million vectors are 3.1 GB, mapped from a file.) Clusters are what ivf and hnsw live by: among
200,000 plain Gaussian vectors, which have no structure, they find 8 % and 31 % of the 10 nearest.

"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from realign.pairs.retrieval import backends
from realign.pairs.retrieval.phash import HASH_DISTANCE, first_of_image, hamming

KINDS = ("auto", "exact", "ivf", "hnsw")
EXACT_UP_TO = 200_000
"""Vectors up to which "auto" searches exactly."""
_ROUNDING = 2e-6  # of an fp32 inner product of unit vectors, in any order of summation
_SPARE = 8  # candidates asked for beyond k
_FLOATS = 1 << 25  # gathered at once: 128 MB
_QUERIES = 4096  # in a block of queries


class Index:
    """Finds the nearest of many unit vectors.

    Args:
        kind: "exact"; "ivf", an inverted file whose vectors are kept as fp16; "hnsw", a graph over
            fp16 vectors; or "auto", exact up to `EXACT_UP_TO` vectors and ivf beyond. Without FAISS
            exact search runs in torch and the others are refused.
        nlist: lists of an ivf; 4 times the square root of the number of vectors when None.
        nprobe: lists searched for each query.
        links: of a vector in an hnsw graph.
        ef_build: candidates kept while an hnsw graph is built.
        ef_search: candidates kept while it is searched; at least the neighbours asked for.

    Attributes:
        vectors: what it was built on, (N, D); kept by reference, so a memory-mapped file stays one.
        chosen: the kind that searches, once built.

    A FAISS with GPU support and a GPU searches exact and ivf there, torch with a GPU exact. Exact
    and ivf give the same result every time; an hnsw that several threads build does not.

    Raises:
        ValueError: for an unknown kind, a setting below 1, or a kind that needs FAISS without it.
    """

    def __init__(
        self,
        kind: str = "auto",
        *,
        nlist: int | None = None,
        nprobe: int = 32,
        links: int = 32,
        ef_build: int = 80,
        ef_search: int = 128,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"index is {kind!r}; it must be one of {', '.join(KINDS)}.")
        settings = {"nprobe": nprobe, "links": links, "ef_build": ef_build, "ef_search": ef_search}
        for name, value in (settings | {"nlist": nlist or 1}).items():
            if value < 1:
                raise ValueError(f"{name} of the index is {value}; it must be at least 1.")
        if kind in ("ivf", "hnsw") and not backends.has_faiss():
            raise ValueError(
                f"index {kind!r} needs FAISS, which is not installed: pip install 'realign[cpu]', "
                "or 'realign[gpu]' on a CUDA machine; or take the exact index."
            )
        self.kind = self.chosen = kind
        self.nlist, self.nprobe, self.links = nlist, nprobe, links
        self.ef_build, self.ef_search = ef_build, ef_search
        self.vectors: np.ndarray | None = None
        self._faiss_index = None  # of ivf and hnsw, and of exact on a GPU
        self._resources = None  # of FAISS, of an index on a GPU
        self._held: list[torch.Tensor] | None = None  # the vectors on a GPU, for torch
        self._first: tuple[np.ndarray, np.ndarray] | None = None  # hashes -> first_of_image

    def build(self, vectors: np.ndarray) -> Index:
        """Take the vectors to search among.

        Args:
            vectors: (N, D) unit vectors, fp32 or fp16; fp16 halves what exact search holds.

        Raises:
            ValueError: for anything but a table of at least one vector.
        """
        self._take(vectors)
        if self.chosen == "ivf":
            nlist = min(len(vectors), self.nlist or int(4 * len(vectors) ** 0.5))
            self._faiss_index = backends.build_ivf(vectors, nlist)
        elif self.chosen == "hnsw":
            self._faiss_index = backends.build_hnsw(vectors, self.links, self.ef_build)
        self._ready()
        return self

    def save(self, path: str | Path) -> None:
        """Write what `build` made, so that other processes `load` it; exact search has nothing."""
        if self._faiss_index is not None and self.chosen != "exact":
            import faiss

            index = self._faiss_index
            on_gpu = self._resources is not None
            faiss.write_index(faiss.index_gpu_to_cpu(index) if on_gpu else index, str(path))

    def load(self, path: str | Path, vectors: np.ndarray) -> Index:
        """As `build`, of what `save` wrote under the same settings on the same vectors.

        Raises:
            ValueError: when the file holds another number or size of vectors.
        """
        self._take(vectors)
        if self.chosen != "exact":
            import faiss

            self._faiss_index = faiss.read_index(str(path))
            have = (self._faiss_index.ntotal, self._faiss_index.d)
            if have != vectors.shape:
                raise ValueError(
                    f"{path} is an index of {have[0]} vectors of size {have[1]}, not of the "
                    f"{vectors.shape[0]} of size {vectors.shape[1]} given. Build it again."
                )
        self._ready()
        return self

    def search(
        self,
        queries: np.ndarray,  # (Q, D) unit vectors
        k: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest vectors of each query; a query's own vector is among them.

        Returns:
            (similarities, indices), (Q, k) fp32 and int64, nearest first, ties by index; -inf and
            -1 where the index finds no more. Which of several vectors that tie at place k is
            returned is open.

        Raises:
            ValueError: when the index is empty.
        """
        if self.vectors is None:
            raise ValueError("the index is empty; give it vectors with build().")
        similarities = np.full((len(queries), k), -np.inf, dtype=np.float32)
        indices = np.full((len(queries), k), -1, dtype=np.int64)
        there = min(k, len(self.vectors))
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            block = np.ascontiguousarray(queries[part], dtype=np.float32)
            found = self._candidates(block, there)
            exact = self._similarities(block, found)
            order = np.lexsort((found, -exact), axis=-1)
            similarities[part, :there] = np.take_along_axis(exact, order, 1)
            indices[part, :there] = np.take_along_axis(found, order, 1)
        return similarities, indices

    def describe(self) -> str:
        """What searches, in a few words."""
        on_gpu = self._resources is not None or self._held is not None
        where = "on the GPU" if on_gpu else "on the CPU"
        if self.chosen == "ivf":
            lists = self._faiss_index.nlist
            return f"FAISS ivf {where}, {min(self.nprobe, lists)} of {lists} lists a query"
        if self.chosen == "hnsw":
            return f"FAISS hnsw, {self.links} links, {self.ef_search} candidates a query"
        by_faiss = self._resources is not None or backends.takes_knn(self.vectors, self._held)
        return f"exact search by {'FAISS' if by_faiss else 'torch'} {where}"

    def first_of_image(self, hashes: np.ndarray) -> np.ndarray:
        """`first_of_image` of the index's vectors, computed once."""
        if self._first is None or self._first[0] is not hashes:
            self._first = (hashes, first_of_image(self.vectors, hashes))
        return self._first[1]

    def _take(self, vectors: np.ndarray) -> None:
        if vectors.ndim != 2 or not len(vectors):
            raise ValueError(
                f"an index takes a table of one vector a row, not one of shape {vectors.shape}."
            )
        self.vectors, self._first = vectors, None
        self._faiss_index = self._resources = self._held = None
        self.chosen = self.kind
        if self.kind == "auto":
            few = len(vectors) <= EXACT_UP_TO or not backends.has_faiss()
            self.chosen = "exact" if few else "ivf"

    def _ready(self) -> None:
        """To a GPU, where there is one and the kind can."""
        if self.chosen != "hnsw" and backends.faiss_gpus():
            self._faiss_index, self._resources = backends.to_gpu(self._faiss_index, self.vectors)
        elif self.chosen == "exact":
            self._held = backends.resident(self.vectors)

    def _candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
        """(Q, k) indices of what may be nearest, in any order; -1 where there is none."""
        index, most = self._faiss_index, len(self.vectors)
        if self._resources is not None:
            most = backends.GPU_MOST
        if index is None or k > most:
            return backends.brute_force(queries, self.vectors, k, self._held)
        if self.chosen == "ivf":
            index.nprobe = min(self.nprobe, index.nlist, most)
        elif self.chosen == "hnsw":
            index.hnsw.efSearch = max(self.ef_search, k)
        return index.search(queries, k)[1]

    def _similarities(self, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
        """(Q, k) exact inner products; -inf where `found` is -1."""
        exact = np.empty(found.shape, dtype=np.float32)
        step = max(1, _FLOATS // max(1, found.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            near = self.vectors[found[part]].astype(np.float32, copy=False)
            # Not a matrix product: BLAS would round equal vectors at other places differently.
            exact[part] = np.einsum("qd,qkd->qk", queries[part], near)
        exact[found < 0] = -np.inf
        return exact


def neighbours(
    vectors: np.ndarray,  # (N, D) unit vectors
    hashes: np.ndarray,  # (N,) uint64 perceptual hashes
    *,
    k: int,
    ceiling: float,
    floor: float = -1.0,
    hash_distance: int = HASH_DISTANCE,
    index: Index,
    queries: slice | np.ndarray = slice(None),
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each image, without near-duplicates.

    Args:
        vectors: of all images; rows may repeat an image.
        hashes: of the same rows (`phash.perceptual_hash`).
        k: neighbours wanted.
        ceiling: images at least this similar are near-duplicates.
        floor: images less similar than this are none.
        hash_distance: images whose hashes differ in at most this many bits are near-duplicates; -1
            compares no hashes.
        index: searched; built here on `vectors` unless it was.
        queries: the rows whose neighbours are wanted; all by default.

    Returns:
        (indices, similarities), (Q, k) int64 and fp32, nearest first, ties by index; -1 and -inf
        where there are no more. Every image is named by the lowest row that shows it
        (`first_of_image`), and once at most. With an exact index these are the neighbours that
        brute force finds; others may miss some.

    Raises:
        ValueError: when there are not as many hashes as vectors, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1.")
    if hashes.shape != vectors.shape[:1]:
        raise ValueError(
            f"there are {hashes.shape} hashes of {len(vectors)} vectors; give one for each."
        )
    if index.vectors is not vectors:
        index.build(vectors)
    first = index.first_of_image(hashes)
    images, back = np.unique(first[queries], return_inverse=True)
    indices = np.full((len(images), k), -1, dtype=np.int64)
    similarities = np.full((len(images), k), -np.inf, dtype=np.float32)
    open_, wanted = np.arange(len(images)), min(len(vectors), k + _SPARE)
    # Duplicates take up places, and a tie with the last one found may go on behind it: search
    # wider for the images that have fewer than k usable ones above the last.
    while len(open_):
        step, left = max(1, _FLOATS // wanted), []
        for start in range(0, len(open_), min(step, _QUERIES)):
            rows = open_[start : start + min(step, _QUERIES)]
            own = images[rows]
            values, found = index.search(vectors[own], wanted)
            usable = (found >= 0) & (first[found] == found) & (found != own[:, None])
            usable &= (values < ceiling) & (values >= floor)
            if hash_distance >= 0:
                usable &= hamming(hashes[own][:, None], hashes[found]) > hash_distance
            last = values[:, -1:]
            enough = (usable & (values > last + _ROUNDING)).sum(1) >= k
            seen_all = (found[:, -1] < 0) | (last[:, 0] < floor) | (wanted == len(vectors))
            left.append(rows[~(enough | seen_all)])
            kept = np.argsort(~usable, axis=1, kind="stable")[:, :k]
            there = np.take_along_axis(usable, kept, 1)
            width = kept.shape[1]
            indices[rows, :width] = np.where(there, np.take_along_axis(found, kept, 1), -1)
            values = np.take_along_axis(values, kept, 1)
            similarities[rows, :width] = np.where(there, values, -np.inf)
        open_, wanted = np.concatenate(left), min(len(vectors), 4 * wanted)
    return indices[back], similarities[back]
