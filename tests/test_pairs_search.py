"""Search for the pairs: embeddings, hashes, indexes and other negatives, against plain truths."""

import importlib.util
import io
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import make, random_images
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from realign.digits.scenes import make_scenes
from realign.images import bundle_of
from realign.pairs import backends
from realign.pairs.embed import Embedder
from realign.pairs.index import Index, neighbours
from realign.pairs.negatives import KINDS, kept_at, visual_negative
from realign.pairs.phash import HASH_DISTANCE, first_of_image, hamming, perceptual_hash


def _unit(values, dtype=np.float32) -> np.ndarray:
    values = np.asarray(values, dtype=np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(dtype)


def _clustered(count: int, wide: int, centres: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = _unit(rng.normal(size=(centres, wide)))
    noise = 0.7 / wide**0.5 * rng.normal(size=(count, wide))
    return _unit(middle[rng.integers(centres, size=count)] + noise)


def _apart(count: int) -> np.ndarray:
    """Hashes that differ in half of their bits or so."""
    return np.random.default_rng(9).integers(0, 1 << 63, count).astype(np.uint64)


def _brute_force(vectors, hashes, k, ceiling, floor=-1.0, hash_distance=HASH_DISTANCE, first=None):
    """The definition: (indices, similarities) from the whole fp64 table, a row at a time."""
    cosine = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    count = len(vectors)
    first = np.arange(count) if first is None else first
    indices, similarities = np.full((count, k), -1), np.full((count, k), -np.inf)
    for i in range(count):
        allowed = [
            j
            for j in range(count)
            if first[j] == j != first[i]
            and floor <= cosine[first[i], j] < ceiling
            and bin(int(hashes[i]) ^ int(hashes[j])).count("1") > hash_distance
        ]
        best = sorted(allowed, key=lambda j: (-cosine[first[i], j], j))[:k]
        indices[i, : len(best)] = best
        similarities[i, : len(best)] = cosine[first[i], best]
    return indices, similarities


@pytest.fixture(params=["faiss", "torch"])
def search(request, monkeypatch):
    """Exact search by FAISS, and by torch as if FAISS were not installed."""
    found = importlib.util.find_spec
    if request.param == "torch":
        hidden = lambda name: None if name == "faiss" else found(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hidden)
    return request.param


# --- index ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "k"), [(60, 1), (60, 7), (60, 90), (3, 2), (1, 3)])
def test_exact_neighbours_are_those_of_brute_force(search, count, k):
    vectors = _unit(np.random.default_rng(count).normal(size=(count, 7)))
    for copy in range(10, 40 if count == 60 else 0, 4):  # eight near-duplicates of image 3
        vectors[copy] = _unit(vectors[[3]] + 1e-3 * copy / 40)[0]
    hashes = _apart(count)
    if count == 60:
        hashes[50] = hashes[51] ^ np.uint64(0b1011)  # near-duplicates by hash alone
    for floor in (-1.0, 0.3):
        places, similarities = neighbours(
            vectors, hashes, k=k, ceiling=0.999, floor=floor, index=Index("exact")
        )
        expected, cosine = _brute_force(vectors, hashes, k, 0.999, floor)
        assert np.array_equal(places, expected)
        np.testing.assert_allclose(similarities, cosine, atol=1e-6)


def test_torch_finds_what_faiss_finds_in_blocks_of_fp16_as_well(monkeypatch):
    monkeypatch.setattr(backends, "BLOCK", 100)  # several blocks
    vectors = _clustered(1234, 24, 30)
    hashes = _apart(1234)

    def found(vectors):
        return neighbours(vectors, hashes, k=10, ceiling=0.99, index=Index("exact"))

    by_faiss = found(vectors)
    half = vectors.astype(np.float16)  # is searched by torch
    truth = _brute_force(half, hashes, 10, 0.99)
    in_half = found(half)
    assert np.array_equal(in_half[0], truth[0])
    np.testing.assert_allclose(in_half[1], truth[1], atol=1e-6)
    find_spec = importlib.util.find_spec
    hidden = lambda name: None if name == "faiss" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    by_torch = found(vectors)
    assert np.array_equal(by_faiss[0], by_torch[0]) and np.array_equal(by_faiss[1], by_torch[1])


def test_ties_go_to_the_lower_index(search):
    # Corners of a cube have exact cosines -1, -1/2, 0, 1/2, 1 and many ties.
    corners = np.array(np.meshgrid(*[[-0.5, 0.5]] * 4)).reshape(4, -1).T.astype(np.float32)
    for k in (1, 3, 5, 15):
        places, _ = neighbours(corners, _apart(16), k=k, ceiling=0.999, index=Index("exact"))
        cosine = corners @ corners.T
        np.fill_diagonal(cosine, -np.inf)
        assert np.array_equal(places, np.argsort(-cosine, axis=1, kind="stable")[:, :k])


def test_equal_vectors_tie_wherever_they_stand(search):
    """BLAS rounds a product by its place in the table; a tie must not depend on it."""
    rng = np.random.default_rng(3)
    one = _unit(rng.normal(size=(1, 771)))
    vectors = np.concatenate([_unit(rng.normal(size=(40, 771))), np.tile(one, (61, 1))])
    places, similarities = neighbours(
        vectors, _apart(101), k=61, ceiling=0.999, index=Index("exact"), queries=np.arange(40)
    )
    for near, values in zip(places, similarities, strict=True):
        same = near >= 40
        assert np.array_equal(near[same], np.arange(40, 101)[: same.sum()])
        assert len(set(values[same])) == 1


def test_an_image_is_named_once_by_its_lowest_row_and_has_one_list(search):
    rng = np.random.default_rng(0)
    images = _unit(rng.normal(size=(12, 16)))
    shown = np.array([*range(12), 3, 3, 5, 0, 11])
    vectors = _unit(images[shown] + 1e-6 * rng.normal(size=(17, 16)))  # as batches round
    hashes = _apart(12)[shown]
    first = first_of_image(vectors, hashes)
    assert np.array_equal(first, shown)
    options = {"k": 11, "ceiling": 2.0, "hash_distance": -1, "index": Index("exact")}
    places, similarities = neighbours(vectors, hashes, **options)
    expected, cosine = _brute_force(vectors, hashes, 11, 2.0, hash_distance=-1, first=first)
    assert np.array_equal(places, expected)
    np.testing.assert_allclose(similarities, cosine, atol=1e-6)
    assert np.array_equal(places[12], places[3]) and (places < 12).all()
    # Some rows only, in any order and repeated.
    rows = np.array([13, 2, 2])
    assert np.array_equal(neighbours(vectors, hashes, queries=rows, **options)[0], expected[rows])


def test_equal_hashes_alone_do_not_make_one_image():
    vectors = _unit([[1, 0], [0, 1], [1, 0.001], [0, 1], [0.7, 0.7], [1, 0]])
    assert first_of_image(vectors, np.zeros(6, np.uint64)).tolist() == [0, 1, 0, 1, 4, 0]
    assert first_of_image(vectors, np.arange(6, dtype=np.uint64)).tolist() == [*range(6)]
    assert first_of_image(vectors, np.array([7, 7, 8, 7, 8, 8], np.uint64)).tolist() == [
        0, 1, 2, 1, 4, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_planted_near_duplicates_are_left_out(kind):
    vectors = _clustered(2000, 32, 40)
    hashes = _apart(2000)
    rng = np.random.default_rng(1)
    copies = rng.choice(1000, 300)  # some images have several copies
    near = _unit(vectors[copies] + 3e-3 * rng.normal(size=(300, 32)))
    cosine = np.einsum("nd,nd->n", near, vectors[copies])
    assert cosine.min() > 0.999 and cosine.max() < 0.99999
    vectors = np.concatenate([vectors, near])
    hashes = np.concatenate([hashes, hashes[copies] ^ np.uint64(0b10100)])
    # By similarity, by hash alone, and by neither.
    for ceiling, distance, there in ((0.999, -1, False), (2.0, 8, False), (2.0, -1, True)):
        places, values = neighbours(
            vectors, hashes, k=10, ceiling=ceiling, hash_distance=distance, index=Index(kind)
        )
        planted = (places[2000:] == copies[:, None]).any(1)
        assert planted.mean() == there or (there and planted.mean() > 0.99)
        assert (places >= 0).mean() > 0.999  # they cost no neighbours
        assert (values[places >= 0] < ceiling).all()
        assert (places != np.arange(2300)[:, None]).all()


def test_a_pile_of_duplicates_hides_no_neighbour(search):
    """300 copies fill the first results; the search goes on behind them, for those images alone."""
    vectors = _clustered(700, 16, 20)
    vectors[100:400] = _unit(
        vectors[[100]] + 1e-4 * np.random.default_rng(0).normal(size=(300, 16))
    )
    hashes = _apart(700)
    places, _ = neighbours(vectors, hashes, k=5, ceiling=0.999, index=Index("exact"))
    expected, _ = _brute_force(vectors, hashes, 5, 0.999)
    assert np.array_equal(places, expected) and (places[100:400] >= 0).all()


def test_nothing_is_left_when_all_are_duplicates(search):
    vectors, hashes = np.tile(_unit([[1, 2]]), (5, 1)), _apart(5)
    places, values = neighbours(vectors, hashes, k=3, ceiling=0.999, index=Index("exact"))
    assert (places == -1).all() and (values == -np.inf).all()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_other_kinds_find_nearly_all_and_agree_on_similarities(kind, tmp_path):
    vectors = _clustered(6000, 64, 120)
    truth = Index("exact").build(vectors)
    values, places = truth.search(vectors[:500], 11)
    index = Index(kind, nprobe=8).build(vectors)
    found_values, found = index.search(vectors[:500], 11)
    shared = [len(set(a) & set(b)) for a, b in zip(places, found, strict=True)]
    assert np.mean(shared) / 11 > 0.97
    cosine = (vectors[:500, None].astype(np.float64) * vectors[found]).sum(-1)
    np.testing.assert_allclose(found_values, cosine, atol=1e-6)
    assert (np.diff(found_values, axis=1) <= 0).all()
    # What is saved finds the same; a file of other vectors is refused.
    index.save(tmp_path / "index")
    again = Index(kind, nprobe=8).load(tmp_path / "index", vectors)
    assert np.array_equal(again.search(vectors[:500], 11)[1], found)
    assert again.describe() == index.describe()
    with pytest.raises(ValueError, match="6000 vectors of size 64"):
        Index(kind).load(tmp_path / "index", vectors[:99])


def test_memory_mapped_vectors_are_searched_where_they_lie(tmp_path):
    vectors, hashes = _clustered(500, 16, 10), _apart(500)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    for kind in ("exact", "ivf", "hnsw"):
        index = Index(kind)
        index.build(mapped)
        found = neighbours(mapped, hashes, k=4, ceiling=0.999, index=index, queries=slice(100, 200))
        assert index.vectors is mapped
        there = neighbours(vectors, hashes, k=4, ceiling=0.999, index=Index("exact"))
        assert (found[0] == there[0][100:200]).mean() > 0.95


def test_auto_is_exact_for_few_and_an_ivf_for_many(monkeypatch, search):
    from realign.pairs import index as module

    vectors = _clustered(300, 8, 5)
    few = Index().build(vectors)
    by = "FAISS" if search == "faiss" else "torch"
    assert few.chosen == "exact" and few.describe() == f"exact search by {by} on the CPU"
    monkeypatch.setattr(module, "EXACT_UP_TO", 299)
    many = Index().build(vectors)
    assert many.chosen == ("ivf" if search == "faiss" else "exact")
    assert search == "torch" or many.describe() == "FAISS ivf on the CPU, 32 of 69 lists a query"


def test_what_an_index_refuses(monkeypatch):
    with pytest.raises(ValueError, match="index is 'tree'"):
        Index("tree")
    with pytest.raises(ValueError, match="nprobe of the index is 0"):
        Index("ivf", nprobe=0)
    with pytest.raises(ValueError, match="build"):
        Index().search(np.ones((1, 2), np.float32), 1)
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        Index().build(np.empty((0, 4), np.float32))
    vectors = _unit(np.eye(3))
    with pytest.raises(ValueError, match="k is 0"):
        neighbours(vectors, _apart(3), k=0, ceiling=1.0, index=Index())
    with pytest.raises(ValueError, match="3 vectors"):
        neighbours(vectors, _apart(2), k=1, ceiling=1.0, index=Index())
    find_spec = importlib.util.find_spec
    hidden = lambda name: None if name == "faiss" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(ValueError, match=r"realign\[cpu\]"):
        Index("hnsw")


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_a_gpu_of_faiss_is_used_and_wide_searches_are_not_sent_there(kind, monkeypatch):
    """Stands in for faiss-gpu: the same calls, answered by indexes on the CPU."""
    import faiss

    calls = []
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: calls.append("resources") or "r",
                        raising=False)  # fmt: skip
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)

    def flat(resources, wide):
        calls.append((resources, wide))
        return faiss.IndexFlatIP(wide)

    monkeypatch.setattr(faiss, "GpuIndexFlatIP", flat, raising=False)
    monkeypatch.setattr(
        faiss, "index_cpu_to_gpu", lambda r, n, i: calls.append((r, n)) or i, raising=False
    )
    monkeypatch.setattr(backends, "GPU_MOST", 40)
    vectors, hashes = _clustered(400, 8, 4), _apart(400)
    index = Index(kind, nlist=10, nprobe=10).build(vectors)
    assert calls == ["resources", ("r", 8) if kind == "exact" else ("r", 0)]
    assert "on the GPU" in index.describe()
    brute = []
    plain = backends.brute_force
    monkeypatch.setattr(backends, "brute_force", lambda *a: brute.append(a[2]) or plain(*a))
    for k, sent in ((30, []), (60, [68])):
        found = neighbours(vectors, hashes, k=k, ceiling=0.999, index=index)[0]
        assert np.array_equal(found, _brute_force(vectors, hashes, k, 0.999)[0]) or kind == "ivf"
        assert brute[: len(sent)] == sent and bool(brute) == bool(sent)


# --- hashes -----------------------------------------------------------------------------------


def _picture(rng, width, height, roughness) -> Image.Image:
    """Smooth structure with the spectrum of a photograph: amplitude ~ frequency ** -roughness/2."""
    down, across = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    shape = frequency.shape
    planes = []
    for _ in range(4):
        spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) * frequency ** (
            -roughness / 2
        )
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(plane / plane.std())
    colours = np.stack([0.8 * planes[3] + 0.6 * plane for plane in planes[:3]], -1)
    return Image.fromarray(np.clip(128 + 45 * colours, 0, 255).astype(np.uint8))


def _jpeg(image, quality) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _cut(image, share, rng) -> Image.Image:
    width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


_COPIES = {
    "half": lambda i, rng: i.resize((i.width // 2, i.height // 2), Image.Resampling.BICUBIC),
    "larger": lambda i, rng: i.resize((i.width * 17 // 10, i.height * 17 // 10)),
    "jpeg": lambda i, rng: _jpeg(i, 60),
    "brighter": lambda i, rng: i.point(lambda level: min(255, level * 1.1)),
    "darker": lambda i, rng: i.point(lambda level: level * 0.9),
    "cut": lambda i, rng: _cut(i, 0.02, rng),
    "all": lambda i, rng: _jpeg(_cut(i, 0.02, rng).resize((150, 110)), 60),
}


def test_copies_of_a_picture_are_near_and_other_pictures_are_not():
    rng = np.random.default_rng(5)
    sizes = [(320, 240), (240, 320), (256, 256), (400, 266)]
    pictures = [_picture(rng, *sizes[i % 4], (1.6, 2.0, 2.4, 2.8)[i // 4 % 4]) for i in range(120)]
    hashes = np.array([perceptual_hash(p) for p in pictures], dtype=np.uint64)
    for name, copy in _COPIES.items():
        copies = np.array([perceptual_hash(copy(p, rng)) for p in pictures], dtype=np.uint64)
        caught = (hamming(hashes, copies) <= HASH_DISTANCE).mean()
        assert caught >= (0.95 if name in ("cut", "all") else 1.0), name
    apart = hamming(hashes[:, None], hashes[None])[np.triu_indices(120, 1)]
    assert apart.min() > HASH_DISTANCE + 3 and abs(apart.mean() - 32) < 1


def test_noisy_digits_keep_their_neighbours():
    """Scenes of 16 x 16 pixels: hashing takes at most 0.1 % of the neighbours by pixels."""
    scenes = make_scenes(600, biased=True, seed=3)
    pixels = np.stack([np.asarray(s.image.convert("L"), np.float32).ravel() for s in scenes])
    vectors = _unit(pixels - pixels.mean(0))
    hashes = np.array([perceptual_hash(s.image) for s in scenes], dtype=np.uint64)
    index = Index("exact")
    plain, _ = neighbours(vectors, hashes, k=10, ceiling=0.999, hash_distance=-1, index=index)
    hashed, _ = neighbours(vectors, hashes, k=10, ceiling=0.999, index=index)
    kept = [len(set(a) & set(b)) for a, b in zip(plain, hashed, strict=True)]
    assert np.mean(kept) / 10 >= 0.999
    assert (hashed >= 0).all()


def test_hashes_by_the_definition():
    """Against scipy's DCT, the lowest frequencies picked one by one, and bits counted by Python."""
    from scipy.fft import dctn

    image = _picture(np.random.default_rng(1), 32, 32, 2.0)
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    table = dctn(grey, norm="ortho")
    order = sorted(
        ((down, across) for down in range(32) for across in range(32) if down + across),
        key=lambda at: (sum(at), at[0]),
    )
    bits = "".join("1" if table[at] > 0 else "0" for at in order[:64])
    assert perceptual_hash(image) == int(bits, 2)
    pair = np.array([int(bits, 2), (1 << 64) - 1], dtype=np.uint64)
    assert hamming(pair[0], pair[1]) == bits.count("0")
    assert hamming(pair[:, None], pair[None]).tolist() == [
        [0, bits.count("0")], [bits.count("0"), 0],
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_flat_and_tiny_pictures_of_any_mode_have_a_hash(mode):
    assert perceptual_hash(Image.new(mode, (50, 3))) == 0
    assert 0 <= perceptual_hash(Image.new(mode, (1, 1))) < 1 << 64


# --- embeddings -------------------------------------------------------------------------------


def test_the_digits_tower_by_default(vlm, processor, scenes):
    images = [scene.image for scene in scenes[:10]]
    found = Embedder(None, None, batch_size=4, dtype="fp32")(images)
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = vlm.model.vision_tower(pixels).last_hidden_state.mean(1)
    truth = torch.nn.functional.normalize(states, dim=-1).numpy()
    assert found.dtype == np.float32 and found.shape == (10, 128)
    np.testing.assert_allclose(found, truth, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert Embedder(None, None)([]).shape == (0, 0)


def test_bf16_is_near_fp32_and_still_unit(scenes):
    images = [scene.image for scene in scenes[:6]]
    exact = Embedder(None, None, dtype="fp32")(images)
    rough = Embedder(None, None, dtype="bf16")(images)
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-6)
    assert 0 < np.abs(exact - rough).max() < 0.02
    assert ((exact * rough).sum(1) > 0.999).all()


# Pixels of one size; tiles of one; patches with a grid; tiles with a mask.
@pytest.mark.parametrize("family", ["gemma3", "llava_next", "qwen2_vl", "idefics3", "internvl"])
def test_own_tower_of_a_family(family, tmp_path):
    vlm, processor = make(family)
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = random_images(np.random.default_rng(0), 5)
    found = Embedder(None, str(tmp_path), batch_size=2, dtype="fp32")(images)
    truth = []
    for image in images:
        made = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
        inputs = bundle_of(made)
        with torch.no_grad():
            if family == "gemma3":
                tower = vlm.model.get_encoder("image")
                seen = tower(inputs["pixel_values"]).last_hidden_state
            else:
                seen = vlm.model.get_image_features(**inputs).pooler_output
        seen = torch.cat([part.flatten(0, -2) for part in seen]) if len(seen) > 1 else seen[0]
        truth.append(torch.nn.functional.normalize(seen.flatten(0, -2).mean(0), dim=0))
    np.testing.assert_allclose(found, torch.stack(truth).numpy(), atol=1e-5)


def _encoder(kind, folder, processor):
    """A tiny CLIP or SigLIP folder, and the model."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {**small, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {**small, "num_attention_heads": 2, "vocab_size": 20}
    classes = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    encoder = classes[1](classes[0](vision_config=vision, text_config=text)).eval()
    encoder.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return encoder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_named_encoder(kind, tmp_path, processor):
    encoder = _encoder(kind, tmp_path, processor)
    images = [scene.image for scene in make_scenes(5, biased=False)]
    found = Embedder(str(tmp_path), None, batch_size=2, dtype="fp32")(images)
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = encoder.vision_model(pixel_values=pixels).pooler_output
        truth = encoder.visual_projection(pooled) if kind == "clip" else pooled
    truth = torch.nn.functional.normalize(truth, dim=-1).numpy()
    assert np.abs(found - truth).max() < 1e-6


def test_pictures_of_odd_shapes_are_embedded(tmp_path, processor, monkeypatch):
    """A height of 3 is not taken for colours, and a strip makes no picture of gigabytes."""
    _encoder("clip", tmp_path, processor)
    embed = Embedder(str(tmp_path), None, dtype="fp32")
    embed.open()
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda i, size, *a, **k: made.append(size) or resize(i, size, *a, **k),
    )
    sizes = [(40, 3), (3, 40), (1, 1), (3, 1), (20_000, 2), (1, 9000)]
    drawn = [Image.new("RGB", size, (200, 30, 90)) for size in sizes]
    flat = embed([Image.new("RGB", (16, 16), (200, 30, 90))])
    np.testing.assert_allclose(embed(drawn), np.repeat(flat, 6, axis=0), atol=1e-5)
    assert max(max(size) for size in made) == 20 * 16


def test_which_encoders_are_refused(tmp_path, vlm, processor):
    with pytest.raises(ValueError, match="dtype is 'fp8'"):
        Embedder(None, None, dtype="fp8")
    with pytest.raises(ValueError, match="batch_size is 0"):
        Embedder(None, None, batch_size=0)
    with pytest.raises(ValueError, match="no image encoder could be loaded from --embed-model"):
        Embedder(str(tmp_path / "none"), None).open()
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llava' model without one feature vector"):
        Embedder(str(tmp_path), None).open()


def test_embeddings_that_are_not_finite_are_refused(tmp_path, processor):
    encoder = _encoder("clip", tmp_path, processor)
    with torch.no_grad():
        encoder.visual_projection.weight[0, 0] = torch.inf
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite; check its weights"):
        Embedder(str(tmp_path), None, dtype="fp32")([Image.new("RGB", (16, 16))])
    with pytest.raises(ValueError, match="take --dtype fp32"):
        Embedder(str(tmp_path), None, dtype="bf16")([Image.new("RGB", (16, 16))])


def test_sentence_transformers_by_name(monkeypatch):
    """Its calls, answered by a stand-in: the mean colours of a picture."""
    asked = []

    class Stand:
        def __init__(self, name, device, trust_remote_code):
            asked.append((name, device, trust_remote_code))

        def to(self, dtype):
            asked.append(dtype)
            return self

        def encode(self, images, batch_size, convert_to_tensor, show_progress_bar):
            if asked[0][0] == "text-only":
                raise AttributeError("'Image' object has no attribute 'strip'")
            return torch.stack([torch.tensor(np.asarray(i).mean((0, 1))) for i in images])

    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Stand
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    reds = [Image.new("RGB", (4, 4), (3 * n, 4 * n, 0)) for n in (1, 2)]
    found = Embedder("st:clip-ViT-B-32", None, batch_size=1, dtype="bf16")(reds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert asked == [("clip-ViT-B-32", device, False), torch.bfloat16]
    np.testing.assert_allclose(found, [[0.6, 0.8, 0]] * 2, atol=1e-6)
    asked.clear()
    Embedder("sentence-transformers/clip-ViT-B-32", None).open()
    assert asked[0][0] == "sentence-transformers/clip-ViT-B-32"
    asked.clear()
    with pytest.raises(ValueError, match="no embedding of an image"):
        Embedder("st:text-only", None).open()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"realign\[sentences\]"):
        Embedder("st:clip-ViT-B-32", None).open()


# --- negatives --------------------------------------------------------------------------------


def _ramp(width, height) -> Image.Image:
    """Every pixel says where it is: red across, green down, 0 to 255."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))


def test_a_crop_keeps_1_to_20_percent_of_the_area_and_the_size():
    image, shares, ratios = _ramp(300, 200), [], []
    rng = np.random.default_rng(0)
    for _ in range(400):
        seen = np.asarray(visual_negative("crop", image, rng), dtype=float)
        assert seen.shape == (200, 300, 3)
        width, height = np.ptp(seen[..., 0]) / 255, np.ptp(seen[..., 1]) / 255
        shares.append(width * height)
        ratios.append(width / height)
    assert min(shares) > 0.005 and max(shares) < 0.21
    assert np.mean(shares) == pytest.approx(0.105, abs=0.01)  # drawn evenly
    assert 0.65 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.5
    small = visual_negative("crop", image, rng, crop=(0.5, 0.5))
    levels = np.asarray(small, dtype=float)
    assert np.ptp(levels[..., 0]) * np.ptp(levels[..., 1]) / 255**2 == pytest.approx(0.5, abs=0.02)
    assert visual_negative("crop", Image.new("RGB", (1, 2)), rng).size == (1, 2)


def test_noise_is_that_of_the_schedule():
    grey, ramp = Image.new("RGB", (256, 256), (128, 128, 128)), _ramp(128, 128)

    def made(image, step):
        seen = visual_negative("noise", image, np.random.default_rng(0), noise_step=step)
        return np.asarray(seen, dtype=float) / 127.5 - 1

    # Of grey only the noise is left; sqrt(1 - a) worked out from VCD's schedule, step by step.
    for step in (300, 500):
        kept = 1.0
        for i in range(step + 1):
            kept *= 1 - (0.00499 / (1 + np.exp(6 - 12 * i / 999)) + 1e-5)
        deviation = (1 - kept) ** 0.5
        assert kept_at(step) == pytest.approx(kept)
        levels = made(grey, step)
        assert (np.abs(levels) < deviation).mean() == pytest.approx(0.6827, abs=0.01)
        assert abs(levels.mean()) < 0.01
    assert kept == pytest.approx(0.745, abs=1e-3)
    # Of a ramp its part is left: the slope shrinks by sqrt(a) where nothing is cut off.
    levels, across = made(ramp, 300)[..., 0], np.linspace(-1, 1, 128)
    middle = np.abs(across) < 0.4
    slope = np.polyfit(across[middle], levels.mean(0)[middle], 1)[0]
    assert slope == pytest.approx(kept_at(300) ** 0.5, abs=0.05)
    assert np.abs(made(ramp, 0)[..., 0] - across).max() < 0.04


def test_negatives_follow_the_seed_and_leave_the_picture():
    image = _ramp(40, 30)
    before = image.tobytes()
    for kind in ("crop", "noise", "blank"):
        first, again, other = (
            visual_negative(kind, image, np.random.default_rng(seed)).tobytes()
            for seed in (1, 1, 2)
        )
        assert first == again and (first == other) == (kind == "blank")
        assert first != before
    assert image.tobytes() == before
    assert visual_negative("blank", image, None).getcolors() == [(1200, (128, 128, 128))]
    assert visual_negative("noise", image.convert("L"), np.random.default_rng(0)).mode == "RGB"


def test_which_negatives_are_refused():
    image, rng = _ramp(4, 4), np.random.default_rng(0)
    for kind in KINDS[:2]:
        with pytest.raises(ValueError, match="another record's picture"):
            visual_negative(kind, image, rng)
    with pytest.raises(ValueError, match="negative is 'blur'; it must be one of retrieved"):
        visual_negative("blur", image, rng)
    with pytest.raises(ValueError, match="crop is"):
        visual_negative("crop", image, rng, crop=(0, 0.2))
    with pytest.raises(ValueError, match="noise_step is 1000"):
        visual_negative("noise", image, rng, noise_step=1000)
