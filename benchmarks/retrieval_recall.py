"""Recall, time and memory of the retrieval indexes: `python -m benchmarks.retrieval_recall`.

There are two data sets of 200,000 unit vectors with 768 dimensions. The *clustered* one is similar
to images. It has 2,000 centres and noise 0.7 times as long as a centre. So vectors of one centre
have a cosine of 0.67. In the *Gaussian* one all vectors are about equally far apart, so that
no index has an advantage. 10,000 vectors are queries. recall@10 is the share of the 10 nearest
others (by exact search) that an index finds.

After that, `neighbours` runs for all of 100,000 vectors by exact search. With `--million` it also
runs for 20,000 of a million vectors by ivf.

Each printed line is measured in a separate process. Memory is the peak without the vectors. A
million vectors are mapped from a file, and their pages count. Times are wall-clock times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.step_contestants import memory

WIDE, CENTRES, NOISE, QUERIES, K = 768, 2000, 0.7, 10_000, 10


def draw(count: int, clustered: bool, path: Path) -> None:
    """Writes `count` unit vectors to `path`, in random order."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CENTRES, WIDE)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (count, WIDE))
    for start in range(0, count, 50_000):
        part = rng.standard_normal((min(50_000, count - start), WIDE), dtype=np.float32)
        if clustered:
            part *= NOISE / WIDE**0.5
            part += centres[rng.integers(CENTRES, size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
        vectors[start : start + len(part)] = part
    vectors.flush()


def measure(vectors: Path, truth: Path | None, kind: str, queries: int) -> dict:
    """Builds and searches one index in this process.

    Args:
        vectors: File of the vectors.
        truth: File of the nearest others, which exact search writes. None measures `neighbours`
            without hashes, and the recall of the first 1,000 queries. ivf then maps `vectors`.
        kind: Kind of index.
        queries: Number of queries, which are the first vectors.
    """
    import faiss  # noqa: F401 - the import is not part of the measurement

    from realign.pairs.retrieval.index import Index, neighbours

    mapped = truth is None and kind == "ivf"
    rows = np.load(vectors, mmap_mode="r" if mapped else None)
    hashes = np.arange(len(rows), dtype=np.uint64)

    def nearest(index: Index, count: int) -> np.ndarray:
        options = {"ceiling": 0.999, "hash_distance": -1, "queries": slice(0, count)}
        return neighbours(rows, hashes, k=K, index=index, **options)[0]

    index = Index(kind)
    before, began = memory()["VmHWM"], time.perf_counter()
    index.build(rows)
    built = time.perf_counter()
    if truth is None:
        found = nearest(index, queries)
    else:
        found = index.search(rows[:queries], K + 1)[1]
        itself = (
            found == np.arange(len(found))[:, None]
        )  # moves the query itself to the end, and drops it
        found = np.take_along_axis(found, np.argsort(itself, axis=1, kind="stable")[:, :K], 1)
    seconds, added = time.perf_counter() - built, memory()["VmHWM"] - before
    if truth is None:
        exact = nearest(Index("exact"), min(queries, 1000))
    else:
        if kind == "exact":
            np.save(truth, found)
        exact = np.load(truth)
    shared = [len(set(a) & set(b)) for a, b in zip(found, exact, strict=False)]
    return {
        "index": index.describe(),
        "recall@10": round(float(np.mean(shared)) / K, 4),
        "build_s": round(built - began, 1),
        "search_s": round(seconds, 1),
        "added_MB": round(added / 1e6),
    }


def line(data: str, *call) -> None:
    """Measures in a separate process and prints a line of JSON."""
    load = round(os.getloadavg()[0], 1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(measure, *call).result()
    print(json.dumps({"data": data, **found, "load": load}), flush=True)


def main() -> None:
    """Prints a line of JSON per index and data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--million", action="store_true", help="also search a million vectors by ivf"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=200_000,
        help="number of vectors in the comparison (default: %(default)s)",
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vectors, truth = Path(folder) / "vectors.npy", Path(folder) / "truth.npy"
        for data in ("clustered", "gaussian"):
            draw(given.count, data == "clustered", vectors)
            for kind in ("exact", "ivf", "hnsw"):
                line(f"{data} {given.count} x {WIDE}", vectors, truth, kind, QUERIES)
        draw(100_000, True, vectors)
        line("all of 100000 clustered", vectors, None, "exact", 100_000)
        if given.million:
            draw(1_000_000, True, vectors)
            line("20000 of 1000000 clustered", vectors, None, "ivf", 20_000)


if __name__ == "__main__":
    main()
