"""Recall, time and memory of the kinds of index: `python -m benchmarks.retrieval_recall`.

200,000 unit vectors of 768 dimensions, twice: *clustered* as images are (2,000 centres, noise 0.7
times as long as a centre, so that vectors of one centre have a cosine of 0.67), and *Gaussian*,
where all vectors are about equally far apart and no index can know where to look. 10,000 of them
are queries; recall@10 counts how many of the 10 nearest others, by exact search, an index finds.
Then `neighbours` of all of 100,000 vectors by exact search, and with `--million` of 20,000 among a
million by ivf.

Each line is a process of its own. Memory is what its peak adds to the vectors themselves; a million
are mapped from a file, and their pages count. Times are of wall clocks, so they mean something on
an idle machine only; the load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDE, CENTRES, NOISE, QUERIES, K = 768, 2000, 0.7, 10_000, 10


def draw(count: int, clustered: bool, path: Path) -> None:
    """Write `count` unit vectors to `path`, in an order that tells nothing."""
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


def run(vectors: Path, truth: Path, kind: str, settings: dict, queries: int) -> dict:
    """Build and search one index in this process; exact search writes the truth."""
    import faiss  # noqa: F401, not part of what is measured

    from realign.pairs.retrieval.index import Index

    rows = np.load(vectors)
    index = Index(kind, **settings)
    before, began = _peak(), time.perf_counter()
    index.build(rows)
    built = time.perf_counter()
    _, found = index.search(rows[:queries], K + 1)
    seconds = time.perf_counter() - built
    others = _without_itself(found)
    if kind == "exact":
        np.save(truth, others)
    return {
        "index": index.describe(),
        "recall@10": _recall(others, np.load(truth)),
        "build_s": round(built - began, 1),
        "search_s": round(seconds, 1),
        "added_MB": round((_peak() - before) / 1e6),
    }


def run_neighbours(vectors: Path, kind: str, queries: int) -> dict:
    """`neighbours` of the first `queries` vectors, without hashes; recall of the first 1,000."""
    import faiss  # noqa: F401, not part of what is measured

    from realign.pairs.retrieval.index import Index, neighbours

    rows = np.load(vectors, mmap_mode="r" if kind == "ivf" else None)
    hashes = np.arange(len(rows), dtype=np.uint64)
    index = Index(kind)
    before, began = _peak(), time.perf_counter()
    index.build(rows)
    built = time.perf_counter()
    options = {"ceiling": 0.999, "hash_distance": -1, "queries": slice(0, queries)}
    found, _ = neighbours(rows, hashes, k=K, index=index, **options)
    seconds, peak = time.perf_counter() - built, _peak()
    options["queries"] = slice(0, min(queries, 1000))
    truth, _ = neighbours(rows, hashes, k=K, index=Index("exact"), **options)
    return {
        "index": index.describe(),
        "recall@10": _recall(found[: len(truth)], truth),
        "build_s": round(built - began, 1),
        "search_s": round(seconds, 1),
        "added_MB": round((peak - before) / 1e6),
    }


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    shared = [len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)]
    return round(float(np.mean(shared)) / K, 4)


def _without_itself(found: np.ndarray) -> np.ndarray:
    keep = np.argsort(found == np.arange(len(found))[:, None], axis=1, kind="stable")[:, :K]
    return np.take_along_axis(found, keep, 1)


def _peak() -> int:
    """Peak resident bytes of this program; `ru_maxrss` would count the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def _child(what: str, call: list) -> None:
    """Run one line in a process of its own and print it."""
    load = os.getloadavg()[0]
    arguments = [sys.executable, "-m", "benchmarks.retrieval_recall", "--child", json.dumps(call)]
    made = subprocess.run(arguments, capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    print(json.dumps({"data": what, **json.loads(made.stdout), "load": round(load, 1)}), flush=True)


def main() -> None:
    """Print one line of JSON for every index and data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--million", action="store_true", help="a million vectors by ivf, too")
    parser.add_argument("--count", type=int, default=200_000, help="vectors of the comparison")
    parser.add_argument("--data", default="clustered,gaussian", help="what is compared on")
    parser.add_argument("--only", help="kinds of index, with commas; exact is always run")
    arguments = parser.parse_args()
    if arguments.child:
        name, *rest = json.loads(arguments.child)
        print(json.dumps({"run": run, "neighbours": run_neighbours}[name](*rest)))
        return
    kinds = arguments.only.split(",") if arguments.only else ["ivf", "hnsw"]
    with tempfile.TemporaryDirectory() as folder:
        vectors, truth = str(Path(folder) / "vectors.npy"), str(Path(folder) / "truth.npy")
        for what in arguments.data.split(","):
            draw(arguments.count, what == "clustered", Path(vectors))
            for kind in ["exact", *kinds]:
                name = f"{what} {arguments.count} x {WIDE}"
                _child(name, ["run", vectors, truth, kind, {}, QUERIES])
        draw(100_000, True, Path(vectors))
        _child("all of 100000 clustered", ["neighbours", vectors, "exact", 100_000])
        if arguments.million:
            draw(1_000_000, True, Path(vectors))
            _child("20000 of 1000000 clustered", ["neighbours", vectors, "ivf", 20_000])


if __name__ == "__main__":
    main()
