"""Making pairs: embed, retrieve and infill, each beside the plain way to the same.

The digits model and its scenes, fp32; for the search random vectors, 768 wide.

- embed: 64 images by the model's own tower, from pictures to unit vectors; against one at a time.
- retrieve: the 10 nearest others of every vector, exact, by FAISS and in torch; against numpy, a
  product and argpartition over blocks. 20,000 vectors with `-m full`, else 5,000.
- infill: one digit of each of 64 captions, in one batch that keeps keys and values; against one
  record at a time that reads everything again for each token. That one does 8 records, and its
  seconds are scaled to 64.

Before a contestant is timed, its answers are those of the plain way. `rate` is in things a second.
"""

import time
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.contestants import DEVICE, OURS
from benchmarks.race import race
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, WORDS, make_scenes
from realign.encode import chat_prompt
from realign.loading import load_model, load_processor
from realign.model import ForestModel
from realign.pairs import index, refill
from realign.pairs.embed import embed_images
from realign.pairs.mask import Masked

BATCH, LOOPED = 64, 8
WIDTH, NEAREST, BLOCK = 768, 10, 1024
COUNTS = [5_000, pytest.param(20_000, marks=pytest.mark.slow)]
MOST_TOKENS = 8
"""Of a gap; the default of infill."""
PROMPT = ({"role": "user", "content": CAPTION_PROMPT},)


def embed(model, processor, images) -> np.ndarray:
    """(n, D) unit vectors, by realign.pairs."""
    settings = {"name": None, "batch_size": BATCH, "progress": False}
    return embed_images(images, model=model, processor=processor, **settings)


def retrieve(kind, vectors) -> tuple[np.ndarray, np.ndarray]:
    """(indices, similarities) of the nearest others, (N, k) each, by realign.pairs."""
    found, used = index.importlib, {"FAISS": index.importlib.util.find_spec, "torch": _absent}
    index.importlib = SimpleNamespace(util=SimpleNamespace(find_spec=used[kind]))
    try:
        return index.neighbours(vectors, NEAREST, ceiling=2.0)
    finally:
        index.importlib = found


def infill(model, processor, images, holes) -> list[tuple[str, bool]]:
    """(text, closed) of each record, by realign.pairs; a hole is (pieces around it, hidden)."""
    masked, prompts = [Masked(*hole) for hole in holes], [PROMPT] * len(holes)
    images = [[image] for image in images]
    return [tuple(done) for done in refill.infill(model.vlm, processor, prompts, images, masked)]


def _absent(name):
    """No such package."""


@torch.inference_mode()
def embed_each(model, processor, images) -> np.ndarray:
    found = []
    for image in images:
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        states = model.vlm.model.vision_tower(pixels.to(DEVICE)).last_hidden_state
        found.append(torch.nn.functional.normalize(states.mean(1), dim=-1).cpu().numpy())
    return np.concatenate(found)


def retrieve_plainly(vectors) -> tuple[np.ndarray, np.ndarray]:
    indices, similarities = [], []
    for start in range(0, len(vectors), BLOCK):
        scores = vectors[start : start + BLOCK] @ vectors.T
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -np.inf
        best = np.argpartition(scores, -NEAREST, axis=1)[:, -NEAREST:]
        near = np.take_along_axis(scores, best, 1)
        order = np.argsort(-near, axis=1)
        indices.append(np.take_along_axis(best, order, 1))
        similarities.append(np.take_along_axis(near, order, 1))
    return np.concatenate(indices), np.concatenate(similarities)


@torch.inference_mode()
def infill_each(model, processor, images, holes) -> list[tuple[str, bool]]:
    """Words are tokens here, so text around a hole is split at its spaces."""
    tokenizer, found = processor.tokenizer, []
    for image, ((before, after), _) in zip(images, holes, strict=True):
        text = chat_prompt(processor, PROMPT, 1)[0]
        inputs = processor(images=[image], text=[text], return_tensors="pt").to(DEVICE)
        forced = [tokenizer.convert_tokens_to_ids(piece.split()) for piece in (before, after)]
        ids, gap, closed = inputs["input_ids"][0].tolist() + forced[0], [], False
        while not closed and len(gap) <= MOST_TOKENS:
            read = torch.tensor([ids + gap], device=DEVICE)
            scores = model.vlm(input_ids=read, pixel_values=inputs["pixel_values"]).logits[0, -1]
            closed = bool(gap) and int(scores.argmax()) == forced[1][0]
            scores[tokenizer.all_special_ids] = -torch.inf
            gap.append(int(scores.argmax()))
        words = tokenizer.convert_ids_to_tokens(gap[:-1])  # the last one was not wanted
        found.append((before + " ".join(words) + after, closed))
    return found


@pytest.fixture(scope="module")
def digits():
    """The model, its processor, pictures, and captions in which one digit is hidden."""
    model = ForestModel(load_model(ASSETS)).eval().to(DEVICE)
    scenes = make_scenes(BATCH, biased=True)
    rng, holes = np.random.default_rng(0), []
    for scene in scenes:
        words = scene.caption.split(" ")
        at = rng.choice([i for i, word in enumerate(words) if word in WORDS])
        pieces = " ".join([*words[:at], ""]), " ".join(["", *words[at + 1 :]])
        holes.append((pieces, (words[at],)))
    return model, load_processor(ASSETS), [scene.image for scene in scenes], holes


@lru_cache(maxsize=1)
def search(count: int):
    """Unit vectors, and the similarities that numpy finds."""
    vectors = np.random.default_rng(0).standard_normal((count, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, retrieve_plainly(vectors)[1]


def timed(benchmark, what, count, unit, contestant, call, ours=None, **case):
    """Races `call`, which does `count` things of `unit`, with ours."""
    race(
        benchmark,
        f"pairs, {what}, {count} {unit}",
        suite="pairs",
        case={"what": what, "count": count} | case,
        contestant=contestant,
        role="ours" if ours is None else "peer",
        call=call,
        ours=ours,
        budget=2.0,
    )
    if benchmark.stats is not None:  # --benchmark-disable leaves no stats
        benchmark.extra_info.update(rate=count / benchmark.stats.stats.median, unit=unit)


@pytest.mark.parametrize("name", [OURS, "one image at a time"])
def test_embed(benchmark, digits, name):
    inputs = digits[:3]
    ours, each = partial(embed, *inputs), partial(embed_each, *inputs)
    np.testing.assert_allclose(ours(), each(), atol=1e-5)
    calls = (ours, None) if name == OURS else (each, ours)
    timed(benchmark, "embed", BATCH, "images", name, *calls)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", [OURS, "ours, torch", "numpy argpartition"])
def test_retrieve(benchmark, count, name):
    pytest.importorskip("faiss", reason="faiss is missing; pip install -c constraints.txt '.[cpu]'")
    vectors, truth = search(count)
    ours = partial(retrieve, "FAISS", vectors)
    calls = {OURS: ours, "ours, torch": partial(retrieve, "torch", vectors)}
    call = calls.get(name, partial(retrieve_plainly, vectors))
    indices, similarities = call()
    # A rounding may swap two that are as near; they must be as near, and each once.
    exact = np.einsum("nd,nkd->nk", vectors, vectors[indices], dtype=np.float64)
    np.testing.assert_allclose(similarities, exact, atol=1e-6)
    np.testing.assert_allclose(similarities, truth, atol=1e-6)
    listed = np.sort(np.c_[indices, np.arange(count)])  # with itself, which must not be there
    assert (np.diff(listed) > 0).all()
    case = {"H": WIDTH, "k": NEAREST}
    timed(
        benchmark, "retrieve", count, "vectors", name, call, None if name == OURS else ours, **case
    )


@pytest.mark.parametrize("name", [OURS, "one record at a time, no cache"])
def test_infill(benchmark, digits, name):
    model, processor, images, holes = digits
    ours = partial(infill, model, processor, images, holes)
    few = partial(infill_each, model, processor, images[:LOOPED], holes[:LOOPED])
    assert ours()[:LOOPED] == few()

    def each():
        began = time.perf_counter()
        few()
        return BATCH / LOOPED * (time.perf_counter() - began)

    calls = (ours, None) if name == OURS else (each, ours)
    timed(benchmark, "infill", BATCH, "records", name, *calls)
