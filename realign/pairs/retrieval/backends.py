"""What finds candidates for nearest neighbours: FAISS, on a GPU where it can, and plain torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import torch

BLOCK = 1 << 14
"""Vectors read, converted and sent to a GPU at once."""
GPU_MOST = 2048
"""Results and lists that a search of FAISS on a GPU can take."""

_POINTS_PER_LIST = 64  # for k-means; FAISS warns below 39


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def faiss_gpus() -> int:
    """GPUs that FAISS can search on."""
    if not has_faiss():
        return 0
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0


def blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """The vectors, `BLOCK` at a time, fp32 and in memory."""
    for start in range(0, len(vectors), BLOCK):
        yield np.array(vectors[start : start + BLOCK], dtype=np.float32, order="C")


def build_ivf(vectors: np.ndarray, nlist: int):
    """An inverted file of FAISS over unit vectors, which it keeps as fp16."""
    import faiss

    count, size = vectors.shape
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(size),
        size,
        nlist,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,  # whole vectors, not what is left after the centre: fp16 has the bits for both
    )
    index.cp.min_points_per_centroid = 1  # no warning on standard output for small sets
    drawn = np.random.default_rng(0).choice(
        count, min(count, _POINTS_PER_LIST * nlist), replace=False
    )
    index.train(np.asarray(vectors[np.sort(drawn)], dtype=np.float32))
    for block in blocks(vectors):
        index.add(block)
    return index


def build_hnsw(vectors: np.ndarray, links: int, ef_build: int):
    """A graph of FAISS over unit vectors, which it keeps as fp16."""
    import faiss

    # Of unit vectors the nearest by distance are the nearest by cosine.
    index = faiss.IndexHNSWSQ(
        vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, links, faiss.METRIC_L2
    )
    index.hnsw.efConstruction = ef_build
    for block in blocks(vectors):
        if not index.is_trained:
            index.train(block)
        index.add(block)
    return index


def to_gpu(index, vectors: np.ndarray):
    """A FAISS index on the first GPU, with the resources it lives on; None is an exact one."""
    import faiss

    resources = faiss.StandardGpuResources()
    if index is not None:
        return faiss.index_cpu_to_gpu(resources, 0, index), resources
    index = faiss.GpuIndexFlatIP(resources, vectors.shape[1])
    for block in blocks(vectors):
        index.add(block)
    return index, resources


def resident(vectors: np.ndarray) -> list[torch.Tensor] | None:
    """The vectors on torch's GPU, where there is one with room for them."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    if 4 * vectors.size > 0.6 * free:
        return None
    return [torch.from_numpy(block).cuda() for block in blocks(vectors)]


def takes_knn(vectors: np.ndarray, held: list[torch.Tensor] | None) -> bool:
    """Whether exact search is by FAISS on the CPU, which reads fp32 vectors where they lie."""
    plain = vectors.dtype == np.float32 and vectors.flags.c_contiguous
    return held is None and plain and has_faiss()


def brute_force(
    queries: np.ndarray,  # (Q, D) fp32
    vectors: np.ndarray,  # (N, D)
    k: int,
    held: list[torch.Tensor] | None = None,
) -> np.ndarray:
    """Indices of the k largest inner products of each query, (Q, k).

    Args:
        queries: unit vectors.
        vectors: unit vectors, of any floating dtype.
        k: at most N.
        held: what `resident` returned.
    """
    if takes_knn(vectors, held):
        import faiss

        return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.from_numpy(queries).to(device)
    best = torch.empty(len(queries), 0, device=device)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    read = held if held is not None else map(torch.from_numpy, blocks(vectors))
    for i, block in enumerate(read):
        values, found = (wanted @ block.to(device).T).topk(min(k, len(block)))
        values = torch.cat([best, values], 1)
        found = torch.cat([places, found + BLOCK * i], 1)
        best, order = values.topk(min(k, values.shape[1]))
        places = found.gather(1, order)
    return places.cpu().numpy()
