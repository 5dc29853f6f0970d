"""Making pairs: embed, retrieve and infill, each beside the plain way to the same.

The digits model and its scenes, fp32; for the search random vectors, 768 wide.

- embed: 64 images by the model's own tower, from images to unit vectors; against one at a time.
- retrieve: the 10 nearest others of 1,024 vectors, exact, among 20,000; 100,000 with `-m full`.
  Against numpy, a product and argpartition over blocks.
- infill: one digit of each of 64 captions, in one batch that keeps keys and values; against its
  specification, one record at a time that reads everything again for each token. That one does 8
  records, and its seconds are scaled to 64.

Before a contestant is timed, its answers are those of the plain way. `rate` is in things a second.
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
    """(n, D) unit vectors, an image at a time."""
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
    """The same by numpy."""
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
    """The model, its processor, images, and captions in which one digit is hidden."""
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
    """Unit vectors, hashes that are not compared, and the similarities that numpy finds."""
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
    # A rounding may swap two that are as near; they must be as near, and each once.
    exact = np.einsum("nd,nkd->nk", vectors[:QUERIES], vectors[indices], dtype=np.float64)
    np.testing.assert_allclose(similarities, exact, atol=1e-6)
    np.testing.assert_allclose(similarities, truth, atol=1e-6)
    listed = np.sort(np.c_[indices, np.arange(QUERIES)])  # with itself, which must not be there
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
