"""Benchmark of the pairs pipeline: embed, retrieve and infill, each against a plain version.

The model is the digits model, in fp32, with its scenes. The search uses random vectors of 768
dimensions.

- embed: 64 images to unit vectors by the model's vision tower, against one image at a time.
- retrieve: exact search for the 10 nearest others of 1,024 vectors among 20,000 (100,000 with
  `-m full`), against numpy's product and argpartition over blocks.
- infill: one digit in each of 64 captions, in one batch with cached keys and values. The plain
  version takes one record at a time and reads all tokens again for each new one. It runs 8 records,
  and its time is scaled to 64.

All answers are compared with the plain version before timing. `rate` is in things per second.
"""

import time
from functools import lru_cache, partial

import numpy as np
import pytest
import torch

from benchmarks.contestants import DEVICE, OURS
from benchmarks.race import race
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, WORDS, make_scenes
from realign.modeling.loading import load_model, load_processor
from realign.pairs.infill.refill import infill, infill_plain
from realign.pairs.masking.mask import Masked
from realign.pairs.retrieval.embed import Embedder
from realign.pairs.retrieval.index import Index, neighbours

BATCH, LOOPED = 64, 8
WIDTH, NEAREST, QUERIES, BLOCK = 768, 10, 1024, 256
COUNTS = [20_000, pytest.param(100_000, marks=pytest.mark.slow)]
PROMPT = ({"role": "user", "content": CAPTION_PROMPT},)


@torch.inference_mode()
def embed_each(model, processor, images) -> np.ndarray:
    """(n, D) unit vectors, one image at a time."""
    found = []
    for image in images:
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels.to(DEVICE)).last_hidden_state
        found.append(torch.nn.functional.normalize(states.mean(1), dim=-1).cpu().numpy())
    return np.concatenate(found)


def retrieve(index, vectors, hashes) -> tuple[np.ndarray, np.ndarray]:
    """(indices, similarities) of the nearest others of the first queries, (Q, k) each."""
    settings = {"k": NEAREST, "ceiling": 2.0, "hash_distance": -1}
    return neighbours(vectors, hashes, index=index, queries=slice(QUERIES), **settings)


def retrieve_plainly(vectors) -> tuple[np.ndarray, np.ndarray]:
    """The result of `retrieve` by numpy."""
    indices, similarities = [], []
    for start in range(0, QUERIES, BLOCK):
        scores = vectors[start : start + BLOCK] @ vectors.T
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -np.inf
        best = np.argpartition(scores, -NEAREST, axis=1)[:, -NEAREST:]
        near = np.take_along_axis(scores, best, 1)
        order = np.argsort(-near, axis=1)
        indices.append(np.take_along_axis(best, order, 1))
        similarities.append(np.take_along_axis(near, order, 1))
    return np.concatenate(indices), np.concatenate(similarities)


def fill(how, model, processor, images, masked):
    """Completions by `infill` or `infill_plain`."""
    return how(model, processor, [PROMPT] * len(masked), [[image] for image in images], masked)


@pytest.fixture(scope="module")
def digits():
    """Model, processor, images, and captions with one masked digit each."""
    scenes, rng, masked = make_scenes(BATCH, biased=True), np.random.default_rng(0), []
    for scene in scenes:
        words = scene.caption.split(" ")
        at = rng.choice([i for i, word in enumerate(words) if word in WORDS])
        pieces = " ".join([*words[:at], ""]), " ".join(["", *words[at + 1 :]])
        masked.append(Masked(pieces, (words[at],)))
    model = load_model(ASSETS).eval().to(DEVICE)
    return model, load_processor(ASSETS), [scene.image for scene in scenes], masked


@lru_cache(maxsize=1)
def search(count: int):
    """Unit vectors, hashes (which the search ignores), and the similarities by numpy."""
    vectors = np.random.default_rng(0).standard_normal((count, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, np.arange(count, dtype=np.uint64), retrieve_plainly(vectors)[1]


def timed(benchmark, what, count, unit, contestant, call, ours=None, **case):
    """Races `call`, which handles `count` things of `unit`, with ours."""
    given = {"call": call, "ours": ours, "things": (count, unit), "budget": 2.0}
    case = {"what": what, "count": count} | case
    group = f"pairs, {what}, {count} {unit}"
    race(benchmark, group, case=case, contestant=contestant, **given)


@pytest.mark.parametrize("name", [OURS, "one image at a time"])
def test_embed(benchmark, digits, name):
    model, processor, images, _ = digits
    ours = partial(Embedder(None, batch_size=BATCH, dtype="fp32"), images)
    each = partial(embed_each, model, processor, images)
    np.testing.assert_allclose(ours(), each(), atol=1e-5)
    timed(benchmark, "embed", BATCH, "images", name, ours if name == OURS else each, ours)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", [OURS, "numpy argpartition"])
def test_retrieve(benchmark, count, name):
    vectors, hashes, truth = search(count)
    ours = partial(retrieve, Index("exact").build(vectors), vectors, hashes)
    call = ours if name == OURS else partial(retrieve_plainly, vectors)
    indices, similarities = call()
    # Rounding may swap two neighbours, so similarities are compared, and indices must differ.
    exact = np.einsum("nd,nkd->nk", vectors[:QUERIES], vectors[indices], dtype=np.float64)
    np.testing.assert_allclose(similarities, exact, atol=1e-6)
    np.testing.assert_allclose(similarities, truth, atol=1e-6)
    listed = np.sort(
        np.c_[indices, np.arange(QUERIES)]
    )  # includes the query, which must not be found
    assert (np.diff(listed) > 0).all()
    case = {"H": WIDTH, "k": NEAREST, "among": count}
    what = f"retrieve among {count:,}"
    timed(benchmark, what, QUERIES, "queries", name, call, ours, **case)


@pytest.mark.parametrize("name", [OURS, "one record at a time, no cache"])
def test_infill(benchmark, digits, name):
    model, processor, images, masked = digits
    ours = partial(fill, infill, model, processor, images, masked)
    few = partial(fill, infill_plain, model, processor, images[:LOOPED], masked[:LOOPED])
    assert ours()[:LOOPED] == few()

    def each():
        began = time.perf_counter()
        few()
        return BATCH / LOOPED * (time.perf_counter() - began)

    timed(benchmark, "infill", BATCH, "records", name, ours if name == OURS else each, ours)
