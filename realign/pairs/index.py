"""Exact nearest neighbours by cosine, through FAISS where it is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch


def neighbours(
    embeddings: np.ndarray,  # (N, D) fp32 unit vectors
    k: int,
    *,
    ceiling: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each image, leaving out itself and near-duplicates.

    Args:
        embeddings: unit vectors.
        k: neighbours wanted.
        ceiling: images at least this similar count as duplicates and are left out.

    Returns:
        (indices, similarities), both (N, k), nearest first; index -1 and similarity -inf where
        there are no more neighbours. Ties go to the lower index.
    """
    count = len(embeddings)
    wanted = min(count, k + 2)
    while True:
        similarity, found = _search(embeddings, wanted)
        usable = (found != np.arange(count)[:, None]) & (similarity < ceiling)
        # Duplicates take up places, and a tie with the last image found may go on behind it: widen
        # the search until k others are above that or all were seen.
        above = usable & (similarity > similarity[:, -1:])
        if wanted == count or (above.sum(1) >= k).all():
            break
        wanted = min(count, 2 * wanted)
    indices = np.full((count, k), -1, dtype=np.int64)
    similarities = np.full((count, k), -np.inf, dtype=np.float32)
    for row in range(count):
        kept = np.flatnonzero(usable[row])
        kept = kept[np.lexsort((found[row, kept], -similarity[row, kept]))][:k]
        indices[row, : len(kept)] = found[row, kept]
        similarities[row, : len(kept)] = similarity[row, kept]
    return indices, similarities


def backend() -> str:
    """What searches, in a few words."""
    if importlib.util.find_spec("faiss"):
        return "FAISS exact search"
    return "exact search in torch (FAISS is not installed: pip install 'realign[cpu]')"


def _search(embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(similarities, indices) of the k largest inner products, (N, k) each."""
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(embeddings.shape[1])
        index.add(embeddings)
        return index.search(embeddings, k)
    vectors = torch.from_numpy(embeddings)
    parts = [(block @ vectors.T).topk(k) for block in vectors.split(1024)]
    values = torch.cat([part.values for part in parts])
    return values.numpy(), torch.cat([part.indices for part in parts]).numpy()
