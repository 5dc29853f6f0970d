"""Cached features of a frozen tower: reading, damage, ranks, and runs that use them."""

import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from runs import assert_same_curves, curve, run

from realign.data.records import read_pairs
from realign.modeling import feature_cache, model
from realign.modeling.feature_cache import FeatureCache, fill

CPU = torch.device("cpu")


def features(seed, dtype=torch.bfloat16):
    """Features of one image: a table of tokens and one DeepStack level."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 3 + seed % 4
    return {
        "tokens": torch.randn(tokens, 8, generator=generator).to(dtype),
        "deepstack.0": torch.randn(tokens, 8, generator=generator).to(dtype),
    }


def same(found, truth):
    return found.keys() == truth.keys() and all(torch.equal(found[k], truth[k]) for k in truth)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, {"weights": "a"})


def test_features_come_back_in_this_and_another_process(cache, tmp_path):
    cache.add({"a": features(1), "b": features(2)})
    cache.add({"c": features(3, torch.float32)})
    again = FeatureCache(tmp_path, {"weights": "a"})
    for one in (cache, again):
        assert len(one) == 3 and one.missing(["c", "d", "a", "d"]) == ["d"]
        assert same(one.get("a"), features(1)) and same(one.get("b"), features(2))
        assert same(one.get("c"), features(3, torch.float32))


def test_another_fingerprint_is_another_folder(cache, tmp_path):
    cache.add({"a": features(1)})
    assert len(FeatureCache(tmp_path, {"weights": "b"})) == 0


def test_a_truncated_file_is_computed_again_and_a_flipped_bit_is_refused(cache, tmp_path, capsys):
    cache.add({"a": features(1)})
    cache.add({"b": features(2)})
    first, second = sorted(cache.folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-3])
    data = bytearray(second.read_bytes())
    data[-2] ^= 1
    second.write_bytes(data)
    again = FeatureCache(tmp_path, {"weights": "a"})
    assert f"{first} is damaged" in capsys.readouterr().err
    assert len(again.missing(["a", "b"])) == 1
    (kept,) = {"a", "b"} - set(again.missing(["a", "b"]))
    with pytest.raises(ValueError, match=rf"{second.name} is damaged: features of image {kept}"):
        again.get(kept)


def test_a_full_disk_is_reported_and_leaves_no_partial_file(cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # the system refuses the 65th byte
    try:
        with pytest.raises(OSError, match="could not be written to .*File too large"):
            cache.add({"a": features(1)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in cache.folder.iterdir()] == ["about.json"]


def test_a_file_that_is_truncated_during_a_run_is_an_error_and_no_crash(cache):
    """A mapped file would end the process with SIGBUS."""
    big = {"tokens": torch.zeros(1 << 20)}
    for image in "cd":
        cache.add({image: big})
    assert same(cache["c"], big)  # its checksum is not compared again
    for image in "cd":
        os.truncate(cache._places[image][0], 4096)
        with pytest.raises(ValueError, match=f"is damaged: features of image {image}"):
            cache.get(image)
    cache.add({"b": big})
    file = next(cache.folder.glob("*.safetensors"))
    file.unlink()
    with pytest.raises(ValueError, match="was removed. Start the run again"):
        cache.get("b")


def test_a_link_in_place_of_the_folder_is_refused(cache, tmp_path):
    """Files would be written to the folder that the link names."""
    victim, place = tmp_path / "victim", cache.folder
    shutil.move(place, victim)
    place.symlink_to(victim)
    with pytest.raises(ValueError, match="is a symbolic link, which may lead anywhere"):
        FeatureCache(tmp_path, {"weights": "a"})


def test_permissions_follow_the_umask(cache):
    before = os.umask(0o027)
    try:
        cache.add({"a": features(1)})
    finally:
        os.umask(before)
    (file,) = cache.folder.glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o640


def _safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _header(shape, end, checksum=0, dtype="F32"):
    about = {"images": json.dumps({"x": {"tokens": checksum}})}
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return {"__metadata__": about, "x/tokens": entry}


PLANTED = {
    "empty": b"",
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "no JSON": _safetensors(b"\xff\xfe"),
    "deep": _safetensors(b"[" * 200_000),
    "array": _safetensors([]),
    "no metadata": _safetensors({}),
    "number": _safetensors({"__metadata__": {"images": 5}}),
    "images": _safetensors({"__metadata__": {"images": "[1]"}}),
    "names": _safetensors({"__metadata__": {"images": json.dumps({"x": "tokens"})}}),
    "deep images": _safetensors({"__metadata__": {"images": "[" * 200_000}}),
    "no tensor": _safetensors({"__metadata__": {"images": json.dumps({"x": {"tokens": 1}})}}),
    "behind the end": _safetensors(_header([4], 16), bytes(8)),
    "negative": _safetensors(_header([-2, -2], 16), bytes(16)),
    "overflow": _safetensors(_header([1 << 62, 1 << 62], 16), bytes(16)),
    "many sides": _safetensors(_header([1] * 9 + [4], 16), bytes(16)),
    "beyond int64": _safetensors(_header([0, 1 << 70], 0)),
    "strides overflow": _safetensors(_header([0, 1 << 62, 1 << 62], 0)),
    "text": _safetensors(_header(["4"], 16), bytes(16)),
    "dtype": _safetensors(_header([4], 16, dtype="\x1b[2J"), bytes(16)),
    "checksum": _safetensors(_header([4], 16, checksum="0"), bytes(16)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_file_is_reported_and_skipped(name, cache, capsys):
    (cache.folder / "0.safetensors").write_bytes(PLANTED[name])
    cache.add({"a": features(1)})
    assert "0.safetensors is damaged" in (report := capsys.readouterr().err)
    assert report.count("\n") == 1 and "\x1b" not in report
    assert list(cache) == ["a"] and same(cache["a"], features(1))


def test_a_pipe_and_a_sparse_giant_among_the_files_are_skipped(cache, capsys):
    os.mkfifo(cache.folder / "0.safetensors")
    giant = cache.folder / "1.safetensors"
    giant.write_bytes(_safetensors(_header([1 << 38], 1 << 40)))
    os.truncate(giant, 2 << 40)  # takes no space on the disk
    cache.add({"a": features(1)})
    assert list(cache) == ["a"]
    assert capsys.readouterr().err.count("is damaged") == 2


class Fake:
    """Model and store in one; a batch of images is their names."""

    dtype = None

    def __init__(self, *images):
        self.images, self.asked = images, []

    def keys(self):
        return self.images

    def batch(self, images):
        return SimpleNamespace(to=lambda *_: images)

    def image_features(self, images):
        self.asked += images
        return [features(int(image)) for image in images]


def test_fill_computes_each_image_once(cache):
    lines = []
    options = {"progress": False, "log": lines.append}
    for images, asked in (("53149", "13459"), ("531497", "7")):
        fake = Fake(*images)
        fill(cache, fake, fake, CPU, 2, **options)
        assert sorted(fake.asked) == list(asked)
        assert all(same(cache.get(image), features(int(image))) for image in images)
    assert lines[0].startswith("image features: 0 of 5 known") and "5 of 6 known" in lines[1]


def test_the_file_limit_loses_nothing(cache, monkeypatch):
    monkeypatch.setattr(feature_cache, "_FILE_BYTES", 100)
    fake = Fake(*"0123456")
    fill(cache, fake, fake, CPU, 2, progress=False, log=lambda _: None)
    assert len(list(cache.folder.glob("*.safetensors"))) == 4
    assert all(same(cache.get(image), features(int(image))) for image in "0123456")


# --- in training ---


@pytest.fixture
def towers(monkeypatch):
    """Number of images in each forward of a vision tower."""
    found = []
    features = model.features

    def counted(vlm, images, **options):
        found.append(len(images.tokens))
        return features(vlm, images, **options)

    monkeypatch.setattr(model, "features", counted)
    return found


def test_a_run_with_cached_features_equals_one_without(pairs_file, tmp_path, monkeypatch, towers):
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path))
    truth = run(pairs_file, tmp_path / "live", steps=2)
    images = len({image for r in read_pairs(pairs_file) for image in pixels(r)})
    for number, (dtype, forwards) in enumerate(
        (("fp32", images), ("fp32", 0), ("bf16", images), ("bf16", 0))
    ):
        del towers[:]
        output = tmp_path / str(number)
        entries = run(pairs_file, output, "--dtype", dtype, "--cache-vision", steps=2)
        # One image is encoded to count FLOP, and eight to check the forest. Then each is encoded
        # once, and never again.
        assert sum(towers) == 1 + 8 + forwards
        if dtype == "fp32":
            assert_same_curves(entries, truth)
        else:
            assert abs(curve(entries) - curve(truth)).max() < 0.03


def pixels(record):
    """The content of a record's images."""
    stored = (*record.images, *record.retrieved_images)
    return [image.open(record.name).tobytes() for image in stored]
