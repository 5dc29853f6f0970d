"""Search for the pairs: embeddings, hashes, indexes and other negatives, against plain truths."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from realign.digits.scenes import make_scenes
from realign.pairs.retrieval import backends
from realign.pairs.retrieval.index import Index, neighbours
from realign.pairs.retrieval.phash import HASH_DISTANCE, first_of_image, hamming, perceptual_hash


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
    from realign.pairs.retrieval import index

    vectors = _clustered(300, 8, 5)
    few = Index().build(vectors)
    by = "FAISS" if search == "faiss" else "torch"
    assert few.chosen == "exact" and few.describe() == f"exact search by {by} on the CPU"
    monkeypatch.setattr(index, "EXACT_UP_TO", 299)
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
