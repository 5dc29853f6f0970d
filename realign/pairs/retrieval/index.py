"""Nearest-neighbour search by cosine among up to millions of images, without near-duplicates.

An `Index` finds candidates. Its similarities are always exact fp32 inner products, so all kinds of
index agree on similarities, ties and duplicates. `neighbours` excludes duplicates and images
outside the similarity limits.

docs/pairs.md (Search) reports recall, time and memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realign.files import open_regular
from realign.pairs.retrieval.phash import HASH_DISTANCE, first_of_image, hamming

KINDS = ("auto", "exact", "ivf", "hnsw")
EXACT_UP_TO = 200_000
"""Number of vectors up to which "auto" is exact."""
BLOCK = 1 << 14
"""Number of vectors that are read, converted and sent to a GPU at once."""
_GPU_MOST = 2048
"""Maximum number of results per query of FAISS on a GPU."""
_PROBED = 32
"""Lists of an ivf that are searched for each query."""
_POINTS_PER_LIST = 64
"""Training vectors per list for k-means. FAISS warns below 39."""
_LINKS, _EF_BUILD, _EF_SEARCH = 32, 80, 128
"""Of an hnsw: links per vector, and candidates kept while building and searching."""
_ROUNDING = 2e-6
"""Maximum rounding error of an fp32 inner product of unit vectors, in any order of summation."""
_SPARE = 8
"""Candidates requested in addition to k."""
_FLOATS = 1 << 25
"""Floats gathered at once, 128 MB."""
_QUERIES = 4096
"""Queries in a block."""


class Index:
    """Index for nearest neighbours among unit vectors.

    Exact search runs in torch, on a GPU if the vectors fit into its memory. The other kinds run in
    FAISS and store fp16 vectors. ivf runs on a GPU with faiss-gpu, and hnsw on the CPU.

    Args:
        kind: "exact", "ivf" (an inverted file), "hnsw" (a graph) or "auto". "auto" is ivf for
            more than `EXACT_UP_TO` vectors if FAISS is installed, else exact.

    Attributes:
        vectors: (N, D), the array that was passed to `build`, possibly memory-mapped.
        used: the kind of index in use, set by `build`.

    Raises:
        ValueError: for an unknown kind, or a kind that needs FAISS if it is not installed.
    """

    def __init__(self, kind: str = "auto") -> None:
        if kind not in KINDS:
            raise ValueError(f"index is {kind!r}; it must be one of {', '.join(KINDS)}.")
        if kind in ("ivf", "hnsw") and not _has_faiss():
            raise ValueError(
                f"index {kind!r} needs FAISS, which is not installed. Run pip install "
                "'realign[cpu]', or 'realign[gpu]' on a CUDA machine, or use the exact index."
            )
        self.kind = self.used = kind
        self.vectors = np.empty((0, 0), np.float32)
        self._faiss: Any = None  # the FAISS index, for ivf and hnsw
        self._faiss_gpu: tuple[Any, Any] | None = None  # its copy on a GPU, with its resources
        self._on_gpu: list[torch.Tensor] | None = None  # the vectors, for exact search
        self._first: tuple[np.ndarray, np.ndarray] | None = None  # hashes -> first_of_image

    def build(self, vectors: np.ndarray) -> Index:
        """Index the vectors.

        Args:
            vectors: (N, D) unit vectors, fp32 or fp16.

        Raises:
            ValueError: for an array that is empty or not two-dimensional.
        """
        self._hold(vectors)
        if self.used == "ivf":
            self._faiss = _build_ivf(vectors)
            self._faiss_gpu = _gpu_copy(self._faiss)
        elif self.used == "hnsw":
            self._faiss = _build_hnsw(vectors)
        return self

    def save(self, path: str | Path) -> None:
        """Write the index for other processes to `load`. An exact index writes nothing."""
        if self._faiss is not None:
            import faiss

            faiss.write_index(self._faiss, str(path))

    def load(self, path: str | Path, vectors: np.ndarray) -> Index:
        """Load the index that `save` wrote for these vectors.

        FAISS does not check the content, so nobody else may write to the folder of the file.

        Raises:
            OSError: when the file is not a regular file.
            ValueError: when the number or size of the vectors in the file differs.
        """
        self._hold(vectors)
        if self.used != "exact":
            import faiss

            with open_regular(path):  # FAISS would wait for a pipe
                self._faiss = faiss.read_index(str(path))
            shape = (self._faiss.ntotal, self._faiss.d)
            if shape != vectors.shape:
                raise ValueError(
                    f"{path} is an index of {shape[0]} vectors of size {shape[1]}, not of the "
                    f"{vectors.shape[0]} given vectors of size {vectors.shape[1]}. Build it again."
                )
            if self.used == "ivf":
                self._faiss_gpu = _gpu_copy(self._faiss)
        return self

    def search(
        self,
        queries: np.ndarray,  # (Q, D) unit vectors
        k: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest vectors of each query, including the query's own vector.

        Returns:
            (similarities, indices), each (Q, k), in fp32 and int64, nearest first and ties by
            index. They are -inf and -1 if the index finds fewer than k. If several vectors tie at
            place k, any of them may be returned.

        Raises:
            ValueError: when the index is empty.
        """
        if not len(self.vectors):
            raise ValueError("the index is empty. Call build() with vectors first.")
        similarities = np.full((len(queries), k), -np.inf, dtype=np.float32)
        indices = np.full((len(queries), k), -1, dtype=np.int64)
        width = min(k, len(self.vectors))
        for start in range(0, len(queries), _QUERIES):
            rows = slice(start, start + _QUERIES)
            block = np.array(queries[rows], dtype=np.float32, order="C")
            candidates = self._candidates(block, width)
            exact = self._similarities(block, candidates)
            order = np.lexsort((candidates, -exact), axis=-1)
            similarities[rows, :width] = np.take_along_axis(exact, order, 1)
            indices[rows, :width] = np.take_along_axis(candidates, order, 1)
        return similarities, indices

    def describe(self) -> str:
        """A short description of the search method."""
        if self.used == "ivf":
            lists = self._faiss.nlist
            where = "CPU" if self._faiss_gpu is None else "GPU"
            return f"FAISS ivf on the {where}, {min(_PROBED, lists)} of {lists} lists a query"
        if self.used == "hnsw":
            return f"FAISS hnsw, {_LINKS} links, {_EF_SEARCH} candidates a query"
        return f"exact search by torch on the {'CPU' if self._on_gpu is None else 'GPU'}"

    def first_of_image(self, hashes: np.ndarray) -> np.ndarray:
        """`first_of_image` of the index's vectors, computed once."""
        if self._first is None or self._first[0] is not hashes:
            self._first = (hashes, first_of_image(self.vectors, hashes))
        return self._first[1]

    def _hold(self, vectors: np.ndarray) -> None:
        if vectors.ndim != 2 or not len(vectors):
            raise ValueError(
                f"vectors has the shape {vectors.shape}; it must be (N, D) with N of 1 or more."
            )
        self.vectors, self.used = vectors, self.kind
        self._first = self._faiss = self._faiss_gpu = self._on_gpu = None
        if self.kind == "auto":
            self.used = "exact" if len(vectors) <= EXACT_UP_TO or not _has_faiss() else "ivf"
        if self.used == "exact" and torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info()
            if 4 * vectors.size <= 0.6 * free:
                self._on_gpu = [torch.from_numpy(block).cuda() for block in _blocks(vectors)]

    def _candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
        """(Q, k) indices of the nearest vectors in any order, -1 if the index finds fewer."""
        index = self._faiss
        if self.used == "ivf":
            if self._faiss_gpu is not None and k <= _GPU_MOST:
                index, _ = self._faiss_gpu
            index.nprobe = min(_PROBED, self._faiss.nlist)
        elif self.used == "hnsw":
            index.hnsw.efSearch = max(_EF_SEARCH, k)
        else:
            return self._brute_force(queries, k)
        return index.search(queries, k)[1]

    def _brute_force(self, queries: np.ndarray, k: int) -> np.ndarray:
        """(Q, k) indices of the largest inner products, computed block by block."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        query_rows = torch.from_numpy(queries).to(device)
        best_values = torch.empty(len(queries), 0, device=device)
        best_indices = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
        blocks = self._on_gpu or map(torch.from_numpy, _blocks(self.vectors))
        for i, block in enumerate(blocks):
            values, block_indices = (query_rows @ block.to(device).T).topk(min(k, len(block)))
            values = torch.cat([best_values, values], 1)
            block_indices = torch.cat([best_indices, block_indices + BLOCK * i], 1)
            best_values, order = values.topk(min(k, values.shape[1]))
            best_indices = block_indices.gather(1, order)
        return best_indices.cpu().numpy()

    def _similarities(self, queries: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """(Q, k) exact inner products, -inf where `indices` is -1."""
        exact = np.empty(indices.shape, dtype=np.float32)
        step = max(1, _FLOATS // max(1, indices.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            candidates = self.vectors[indices[rows]].astype(np.float32, copy=False)
            # Not a matrix product, because BLAS may round equal vectors differently in each row.
            exact[rows] = np.einsum("qd,qkd->qk", queries[rows], candidates)
        exact[indices < 0] = -np.inf
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
    """Find the k nearest other images of each image, without near-duplicates.

    Args:
        vectors: vectors of all images. Several rows may show the same image.
        hashes: perceptual hashes of the same rows (`phash.perceptual_hash`).
        k: number of neighbours.
        ceiling: images with at least this similarity are near-duplicates.
        floor: images with a similarity below this are not neighbours.
        hash_distance: images whose hashes differ in at most this many bits are near-duplicates. -1
            disables the comparison of hashes.
        index: the index. It is built on `vectors` if necessary.
        queries: the rows to find neighbours of, by default all rows.

    Returns:
        (indices, similarities), each (Q, k), in int64 and fp32, nearest first and ties by index.
        They are -1 and -inf if there are fewer than k neighbours. An image appears at most once,
        as the lowest row that shows it (`first_of_image`). An exact index finds all neighbours.

    Raises:
        ValueError: when the numbers of hashes and vectors differ, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1.")
    if hashes.shape != vectors.shape[:1]:
        raise ValueError(
            f"hashes has the shape {hashes.shape}; it must have one hash for each of the "
            f"{len(vectors)} vectors."
        )
    if index.vectors is not vectors:
        index.build(vectors)
    first = index.first_of_image(hashes)
    images, inverse = np.unique(first[queries], return_inverse=True)
    indices = np.full((len(images), k), -1, dtype=np.int64)
    similarities = np.full((len(images), k), -np.inf, dtype=np.float32)
    pending, width = np.arange(len(images)), min(len(vectors), k + _SPARE)
    # Some candidates are duplicates, and vectors that tie with the last candidate may be missing.
    # So the search is repeated with more candidates if fewer than k usable ones exceed the last.
    while len(pending):
        step, unfinished = max(1, _FLOATS // width), []
        for start in range(0, len(pending), min(step, _QUERIES)):
            rows = pending[start : start + min(step, _QUERIES)]
            query_rows = images[rows]
            values, candidates = index.search(vectors[query_rows], width)
            usable = (candidates >= 0) & (first[candidates] == candidates)
            usable &= candidates != query_rows[:, None]
            usable &= (values < ceiling) & (values >= floor)
            if hash_distance >= 0:
                usable &= hamming(hashes[query_rows][:, None], hashes[candidates]) > hash_distance
            last = values[:, -1:]
            enough = (usable & (values > last + _ROUNDING)).sum(1) >= k
            seen_all = (candidates[:, -1] < 0) | (last[:, 0] < floor) | (width == len(vectors))
            unfinished.append(rows[~(enough | seen_all)])
            nearest = np.argsort(~usable, axis=1, kind="stable")[:, :k]
            candidates, values = np.where(usable, candidates, -1), np.where(usable, values, -np.inf)
            indices[rows, : nearest.shape[1]] = np.take_along_axis(candidates, nearest, 1)
            similarities[rows, : nearest.shape[1]] = np.take_along_axis(values, nearest, 1)
        pending, width = np.concatenate(unfinished), min(len(vectors), 4 * width)
    return indices[inverse], similarities[inverse]


def _has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the vectors in blocks of `BLOCK`, in fp32 and in memory."""
    for start in range(0, len(vectors), BLOCK):
        yield np.array(vectors[start : start + BLOCK], dtype=np.float32, order="C")


def _build_ivf(vectors: np.ndarray) -> Any:
    """A FAISS inverted file with 4 sqrt(N) lists for N vectors."""
    import faiss

    count, size = vectors.shape
    lists = min(count, int(4 * count**0.5))
    index: Any = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(size),
        size,
        lists,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,  # complete vectors, not residuals; fp16 is accurate enough for either
    )
    index.cp.min_points_per_centroid = 1  # no warning on standard output for small sets
    sample = min(count, _POINTS_PER_LIST * lists)
    drawn = np.random.default_rng(0).choice(count, sample, replace=False)
    index.train(np.asarray(vectors[np.sort(drawn)], dtype=np.float32))
    for block in _blocks(vectors):
        index.add(block)
    return index


def _gpu_copy(index: Any) -> tuple[Any, Any] | None:
    """A copy of an ivf on the first GPU, and its resources. None without faiss-gpu or a GPU."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return None
    resources = faiss.StandardGpuResources()
    return faiss.index_cpu_to_gpu(resources, 0, index), resources


def _build_hnsw(vectors: np.ndarray) -> Any:
    """A FAISS graph, built on one thread because several threads would make it vary."""
    import faiss

    # For unit vectors, the nearest by distance are also the nearest by cosine.
    half: Any = faiss.ScalarQuantizer.QT_fp16
    index: Any = faiss.IndexHNSWSQ(vectors.shape[1], half, _LINKS, faiss.METRIC_L2)
    index.hnsw.efConstruction = _EF_BUILD
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for block in _blocks(vectors):
            if not index.is_trained:
                index.train(block)
            index.add(block)
    finally:
        faiss.omp_set_num_threads(threads)
    return index
