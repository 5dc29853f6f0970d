"""Search for neighbours: indices and perceptual hashes, against plain implementations."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from realign.digits.scenes import make_scenes
from realign.pairs.retrieval import index as index_module
from realign.pairs.retrieval.index import Index, neighbours
from realign.pairs.retrieval.phash import HASH_DISTANCE, first_of_image, hamming, perceptual_hash


def _unit(values, dtype=np.float32) -> np.ndarray:
    values = np.asarray(values, dtype=np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(dtype)


def _clustered(count: int, wide: int, centres: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    middle = _unit(rng.normal(size=(centres, wide)))
    noise = 0.7 / wide**0.5 * rng.normal(size=(count, wide))
    return _unit(middle[rng.integers(centres, size=count)] + noise)


def _apart(count: int) -> np.ndarray:
    """Random hashes, which differ in about half of their bits."""
    return np.random.default_rng(9).integers(0, 1 << 63, count).astype(np.uint64)


def _truth(vectors, hashes, k, ceiling, floor=-1.0, hash_distance=HASH_DISTANCE, first=None):
    """Reference result (indices, similarities), computed row by row in fp64."""
    cosine = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    count = len(vectors)
    first = np.arange(count) if first is None else first
    bits = np.array([[(int(a) ^ int(b)).bit_count() for b in hashes] for a in hashes])
    indices, similarities = np.full((count, k), -1), np.full((count, k), -np.inf)
    for i in range(count):
        near = cosine[first[i]]
        allowed = (first == np.arange(count)) & (first != first[i]) & (bits[i] > hash_distance)
        allowed &= (near >= floor) & (near < ceiling)
        best = sorted(np.flatnonzero(allowed).tolist(), key=lambda j: (-near[j], j))[:k]
        indices[i, : len(best)], similarities[i, : len(best)] = best, near[best]
    return indices, similarities


def _assert_true(vectors, hashes, k, ceiling, **options):
    """Asserts that exact search gives the reference result, and returns the indices."""
    truth = _truth(vectors, hashes, k, ceiling, **options)
    options.pop("first", None)
    found = neighbours(vectors, hashes, k=k, ceiling=ceiling, index=Index("exact"), **options)
    assert np.array_equal(found[0], truth[0])
    np.testing.assert_allclose(found[1], truth[1], atol=1e-6)
    return found[0]


# --- index ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "k"), [(60, 1), (60, 7), (60, 90), (3, 2), (1, 3)])
def test_exact_neighbours_are_the_true_ones(count, k):
    vectors = _unit(np.random.default_rng(count).normal(size=(count, 7)))
    hashes = _apart(count)
    if count == 60:
        for copy in range(10, 40, 4):  # eight near-duplicates of image 3
            vectors[copy] = _unit(vectors[[3]] + 1e-3 * copy / 40)[0]
        hashes[50] = hashes[51] ^ np.uint64(0b1011)  # near-duplicates by hash only
    for floor in (-1.0, 0.3):
        _assert_true(vectors, hashes, k, 0.999, floor=floor)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blocks_and_many_duplicates_hide_no_neighbour(monkeypatch, dtype):
    """100 copies fill the first results, and the search continues after them."""
    monkeypatch.setattr(index_module, "BLOCK", 64)
    vectors = _clustered(300, 16, 10)
    noise = 1e-4 * np.random.default_rng(0).normal(size=(100, 16))
    vectors[100:200] = _unit(vectors[[100]] + noise)
    places = _assert_true(vectors.astype(dtype), _apart(300), 5, 0.99)
    assert (places[100:200] >= 0).all()


def test_ties_go_to_the_lower_index():
    # The corners of a cube have the exact cosines -1, -1/2, 0, 1/2 and 1, and many ties.
    corners = np.array(np.meshgrid(*[[-0.5, 0.5]] * 4)).reshape(4, -1).T.astype(np.float32)
    for k in (1, 3, 5, 15):
        _assert_true(corners, _apart(16), k, 0.999)


def test_equal_vectors_tie_wherever_they_are():
    """BLAS may round a product by its place in the matrix. Ties must not depend on it."""
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


def test_an_image_is_named_once_by_its_lowest_row_and_has_one_list():
    rng = np.random.default_rng(0)
    images = _unit(rng.normal(size=(12, 16)))
    shown = np.array([*range(12), 3, 3, 5, 0, 11])
    vectors = _unit(images[shown] + 1e-6 * rng.normal(size=(17, 16)))  # rounding as in batches
    hashes = _apart(12)[shown]
    first = first_of_image(vectors, hashes)
    assert np.array_equal(first, shown)
    places = _assert_true(vectors, hashes, 11, 2.0, hash_distance=-1, first=first)
    assert np.array_equal(places[12], places[3]) and (places < 12).all()
    rows = np.array([13, 2, 2])  # some rows, shuffled and repeated
    options = {"k": 11, "ceiling": 2.0, "hash_distance": -1, "index": Index("exact")}
    assert np.array_equal(neighbours(vectors, hashes, queries=rows, **options)[0], places[rows])


def test_equal_hashes_alone_do_not_make_one_image():
    vectors = _unit([[1, 0], [0, 1], [1, 0.001], [0, 1], [0.7, 0.7], [1, 0]])
    assert first_of_image(vectors, np.zeros(6, np.uint64)).tolist() == [0, 1, 0, 1, 4, 0]
    assert first_of_image(vectors, np.arange(6, dtype=np.uint64)).tolist() == [*range(6)]
    mixed = np.array([7, 7, 8, 7, 8, 8], np.uint64)
    assert first_of_image(vectors, mixed).tolist() == [0, 1, 2, 1, 4, 2]


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_planted_near_duplicates_are_left_out(kind):
    vectors = _clustered(1000, 32, 20)
    hashes = _apart(1000)
    rng = np.random.default_rng(1)
    copies = rng.choice(500, 150)  # some images have several copies
    near = _unit(vectors[copies] + 3e-3 * rng.normal(size=(150, 32)))
    cosine = np.einsum("nd,nd->n", near, vectors[copies])
    assert cosine.min() > 0.999 and cosine.max() < 0.99999
    vectors = np.concatenate([vectors, near])
    hashes = np.concatenate([hashes, hashes[copies] ^ np.uint64(0b10100)])
    index = Index(kind).build(vectors)
    # Duplicates by similarity, by hash only, and by neither.
    for ceiling, distance, there in ((0.999, -1, False), (2.0, 8, False), (2.0, -1, True)):
        places, values = neighbours(
            vectors, hashes, k=10, ceiling=ceiling, hash_distance=distance, index=index
        )
        planted = (places[1000:] == copies[:, None]).any(1)
        assert planted.mean() == there or (there and planted.mean() > 0.99)
        assert (places >= 0).mean() > 0.999  # they replace no neighbours
        assert (values[places >= 0] < ceiling).all()
        assert (places != np.arange(1150)[:, None]).all()


def test_no_neighbour_is_left_when_all_are_duplicates():
    vectors, hashes = np.tile(_unit([[1, 2]]), (5, 1)), _apart(5)
    places, values = neighbours(vectors, hashes, k=3, ceiling=0.999, index=Index("exact"))
    assert (places == -1).all() and (values == -np.inf).all()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_other_kinds_find_nearly_all_and_agree_on_similarities(kind, tmp_path):
    np.save(tmp_path / "vectors.npy", _clustered(2000, 64, 40))
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    _, places = Index("exact").build(vectors).search(vectors[:300], 11)
    index = Index(kind).build(vectors)
    assert index.vectors is vectors  # the vectors stay memory-mapped
    found_values, found = index.search(vectors[:300], 11)
    shared = [len(set(a) & set(b)) for a, b in zip(places, found, strict=True)]
    assert np.mean(shared) / 11 > 0.97
    cosine = (vectors[:300, None].astype(np.float64) * vectors[found]).sum(-1)
    np.testing.assert_allclose(found_values, cosine, atol=1e-6)
    assert (np.diff(found_values, axis=1) <= 0).all()
    # The saved index and a new one give the same result. A file of other vectors is refused.
    index.save(tmp_path / "index")
    for again in (Index(kind).load(tmp_path / "index", vectors), Index(kind).build(vectors)):
        assert np.array_equal(again.search(vectors[:300], 11)[1], found)
    with pytest.raises(ValueError, match="2000 vectors of size 64"):
        Index(kind).load(tmp_path / "index", vectors[:99])


def test_auto_is_exact_for_few_and_an_ivf_for_many(monkeypatch):
    vectors = _clustered(300, 8, 5)
    assert Index().build(vectors).describe() == "exact search by torch on the CPU"
    monkeypatch.setattr(index_module, "EXACT_UP_TO", 299)
    assert Index().build(vectors).describe() == "FAISS ivf on the CPU, 32 of 69 lists a query"
    assert Index("hnsw").build(vectors).describe() == "FAISS hnsw, 32 links, 128 candidates a query"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "faiss" else find(n))
    assert Index().build(vectors).used == "exact"
    with pytest.raises(ValueError, match=r"realign\[cpu\]"):
        Index("hnsw")


def test_an_ivf_is_searched_on_a_gpu_but_for_wide_searches(monkeypatch, tmp_path):
    """A fake faiss-gpu answers the calls with a copy on the CPU, and counts them."""
    import faiss

    sent = []

    class OnGpu:
        def __init__(self, index):
            self.index, self.nprobe = index, 0

        def search(self, queries, k):
            sent.append(k)
            self.index.nprobe = self.nprobe
            return self.index.search(queries, k)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *a: OnGpu(a[2]), raising=False)
    monkeypatch.setattr(index_module, "_GPU_MOST", 40)
    vectors = _clustered(400, 8, 4)
    index = Index("ivf").build(vectors)
    index.save(tmp_path / "saved")
    for given in (index, Index("ivf").load(tmp_path / "saved", vectors)):
        assert "on the GPU" in given.describe()
        found = given.search(vectors[:5], 30)[1]
        assert np.array_equal(found, np.argsort(-(vectors[:5] @ vectors.T), kind="stable")[:, :30])
        assert sent == [30]
        given.search(vectors[:5], 60)
        assert sent == [30]
        sent.clear()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="index is 'tree'"):
        Index("tree")
    with pytest.raises(ValueError, match="build"):
        Index().search(np.ones((1, 2), np.float32), 1)
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        Index().build(np.empty((0, 4), np.float32))
    vectors = _unit(np.eye(3))
    with pytest.raises(ValueError, match="k is 0"):
        neighbours(vectors, _apart(3), k=0, ceiling=1.0, index=Index())
    with pytest.raises(ValueError, match="3 vectors"):
        neighbours(vectors, _apart(2), k=1, ceiling=1.0, index=Index())


# --- hashes -----------------------------------------------------------------------------------


def _picture(rng, width, height, roughness) -> Image.Image:
    """A smooth image with the spectrum of a photograph: amplitude ~ frequency ** -roughness/2."""
    down, across = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(4):
        real, imaginary = rng.normal(size=frequency.shape), rng.normal(size=frequency.shape)
        spectrum = (real + 1j * imaginary) * frequency ** (-roughness / 2)
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(plane / plane.std())
    colours = np.stack([0.8 * planes[3] + 0.6 * plane for plane in planes[:3]], -1)
    return Image.fromarray(np.clip(128 + 45 * colours, 0, 255).astype(np.uint8))


def _jpeg(image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def _cut(image, rng) -> Image.Image:
    width, height = round(image.width * 0.98), round(image.height * 0.98)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


_COPIES = {
    "half": lambda i, rng: i.resize((i.width // 2, i.height // 2), Image.Resampling.BICUBIC),
    "larger": lambda i, rng: i.resize((i.width * 17 // 10, i.height * 17 // 10)),
    "jpeg": lambda i, rng: _jpeg(i),
    "brighter": lambda i, rng: i.point(lambda level: min(255, level * 1.1)),
    "darker": lambda i, rng: i.point(lambda level: level * 0.9),
    "cut": lambda i, rng: _cut(i, rng),
    "all": lambda i, rng: _jpeg(_cut(i, rng).resize((150, 110))),
}


def test_copies_of_a_picture_are_near_and_other_pictures_are_not():
    rng = np.random.default_rng(5)
    sizes = [(160, 120), (120, 160), (128, 128), (200, 133)]
    images = [_picture(rng, *sizes[i % 4], (1.6, 2.0, 2.4, 2.8)[i // 4 % 4]) for i in range(64)]
    hashes = np.array([perceptual_hash(p) for p in images], dtype=np.uint64)
    for name, copy in _COPIES.items():
        copies = np.array([perceptual_hash(copy(p, rng)) for p in images], dtype=np.uint64)
        caught = (hamming(hashes, copies) <= HASH_DISTANCE).mean()
        assert caught >= (0.95 if name in ("cut", "all") else 1.0), name
    apart = hamming(hashes[:, None], hashes[None])[np.triu_indices(64, 1)]
    assert apart.min() > HASH_DISTANCE + 3 and abs(apart.mean() - 32) < 1


def test_noisy_digits_keep_their_neighbours():
    """For scenes of 16 x 16 pixels, hashes exclude at most 0.1 % of the neighbours by pixels."""
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
    """Compares with scipy's DCT, frequencies selected one by one, and bits counted in Python."""
    image = _picture(np.random.default_rng(1), 32, 32, 2.0)
    table = dctn(np.asarray(image.convert("L"), dtype=np.float64), norm="ortho")
    order = sorted(
        ((down, across) for down in range(32) for across in range(32) if down + across),
        key=lambda at: (sum(at), at[0]),
    )
    bits = "".join("1" if table[at] > 0 else "0" for at in order[:64])
    assert perceptual_hash(image) == int(bits, 2)
    pair, zeros = np.array([int(bits, 2), (1 << 64) - 1], dtype=np.uint64), bits.count("0")
    assert hamming(pair[:, None], pair[None]).tolist() == [[0, zeros], [zeros, 0]]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_flat_and_tiny_pictures_of_any_mode_have_a_hash(mode):
    assert perceptual_hash(Image.new(mode, (50, 3))) == 0
    assert 0 <= perceptual_hash(Image.new(mode, (1, 1))) < 1 << 64
