"""Image decoder: a file, its bytes and its PIL image give the same correct pixels, or an error.

`stress_images` makes files of all kinds, with expected pixels from independent formulas. This
module encodes the files that Pillow cannot write.
"""

import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from stress_images import chunk, colours, encode, make_images, on_white, png

import realign
from realign.data.images import DataFolder, ImageError, StoredImage
from realign.data.records import RecordError
from realign.hf.records import records_of
from realign.pairs.io.images import load_image, plain_image

CASES = make_images()
RED, GREEN, BLUE, WHITE = (200, 30, 40), (20, 160, 60), (10, 20, 220), (255, 255, 255)
COLOURS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
SQUARES = Image.fromarray(COLOURS.repeat(8, 0).repeat(8, 1))
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def pixels(stored, **options):
    if isinstance(stored, bytes):
        stored = StoredImage(stored)
    image = load_image(stored, **options)
    assert image.mode == "RGB" and not image.info
    return np.asarray(image).astype(int)


def refused(data, **options):
    stored = StoredImage(data) if isinstance(data, bytes) else data
    with pytest.raises(ImageError) as error:
        load_image(stored, **options)
    return error.value.reason, error.value.detail


def row_of(*images):
    return {"id": "r", "prompt": "what ?", "chosen": "a", "rejected": "b", "images": [*images]}


def trained_on(image):
    """Pixels that `RDPOTrainer` trains on, or the text of the error."""
    try:
        (record,) = records_of([row_of(image)])
        return np.asarray(record.images[0].open("r")).astype(int)
    except RecordError as error:
        return str(error)


@pytest.mark.parametrize("name", CASES)
def test_a_file_its_bytes_and_its_pil_image_have_the_same_pixels(name, tmp_path):
    case = CASES[name]
    if case.verdict == "either":  # JPEG 2000, AVIF, TGA, ICO, LAB: this Pillow may not read it
        return
    file = tmp_path / "image"
    file.write_bytes(case.data)
    if case.pixels is None:
        assert refused(case.data)[0] == refused(StoredImage(path=str(file)))[0] == "corrupt"
        assert "record 'r': " in trained_on(case.data)
        return
    found = pixels(case.data)
    assert found.shape == case.pixels.shape
    assert np.abs(found - case.pixels).max() <= case.tolerance
    kept = plain_image(StoredImage(case.data, "x.png"))
    assert kept.path == "x.png" and np.array_equal(pixels(kept), found)
    for image in (str(file), Image.open(file), Image.open(file).copy()):
        assert np.array_equal(trained_on(image), found)
    # Another reader decodes the same pixels from the stored file.
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept.data)).convert("RGB")), found)


def test_plain_images_keep_their_bytes():
    for name in ("RGB PNG", "L PNG", "RGB BMP", "RGB TIFF", "RGB JPEG", "progressive JPEG", "PPM"):
        stored = StoredImage(CASES[name].data)
        assert plain_image(stored) == stored
    for name in ("animated PNG", "CMYK TIFF", "EXIF 6", "P PNG"):
        assert plain_image(StoredImage(CASES[name].data)).data != CASES[name].data
    data = CASES["RGB PNG"].data
    assert StoredImage.from_pil(Image.open(io.BytesIO(data))).data == data
    for given in ({"bytes": data, "path": None, "url": None}, data):
        (record,) = records_of([row_of(given)])
        assert record.images == (StoredImage(data),)


def test_grey_of_16_bits_keeps_the_upper_byte():
    ppm = b"P5 3 1 65535\n" + struct.pack(">3H", 0, 77 * 257, 65535)
    edge = png(4, 1, 16, 0, [struct.pack(">4H", 0, 77 * 256 - 1, 77 * 256, 65535)])
    assert pixels(ppm)[0, :, 0].tolist() == [0, 77, 255]
    assert pixels(edge)[0, :, 0].tolist() == [0, 76, 77, 255]


def _in_memory():
    """Modes without a file format: image, exact colours over white, maximum rounding error."""
    rgb = colours()
    alpha = np.linspace(0, 255, rgb[..., 0].size).astype(np.uint8).reshape(rgb.shape[:2])
    rgba, one = Image.fromarray(np.dstack([rgb, alpha])), rgb[..., 0]
    deep = (one.astype(np.uint16) << 8) + 255
    grey = np.dstack([one] * 3)
    return {
        "La": (Image.fromarray(np.dstack([one, alpha])).convert("La"), on_white(grey, alpha), 2),
        "RGBa": (rgba.convert("RGBa"), on_white(rgb, alpha), 2),
        "RGBX": (Image.fromarray(np.dstack([rgb, alpha]), "RGBX"), rgb, 0),
        "HSV": (Image.fromarray(rgb).convert("HSV"), rgb, 3),
        "I;16B": (Image.fromarray(deep.astype(">u2")), grey, 0),
        "PA": (Image.fromarray(one % 4).convert("P").convert("PA"), None, 0),
        "I": (Image.new("I", (4, 6)), None, 0),
        "F": (Image.new("F", (4, 6)), None, 0),
    }


@pytest.mark.parametrize("mode", ["La", "RGBa", "RGBX", "HSV", "I;16B", "PA", "I", "F"])
def test_pil_images_of_modes_without_a_file(mode):
    image, expected, rounding = _in_memory()[mode]
    assert image.mode == mode
    found = trained_on(image)
    if mode in ("I", "F"):
        assert "record 'r': " in found and "32-bit pixels" in found and "of mode RGB" in found
    else:
        expected = np.asarray(image.convert("RGB")) if expected is None else expected
        assert np.abs(found - expected.astype(int)).max() <= rounding


@pytest.mark.parametrize(
    ("depth", "kind", "samples", "colour", "expected"),
    [
        (2, 0, bytes([0b00011011]), (1,), [0, 255, 170, 255]),
        (4, 0, bytes([0x0F, 0x70]), (7,), [0, 255, 255, 0]),
        (16, 0, struct.pack(">4H", 300, 301, 77 * 257, 300), (300,), [255, 1, 77, 255]),
        (16, 2, struct.pack(">12H", *[0x4D01] * 3, *[0x4E01] * 9), (0x4D01,) * 3,
         [255, 78, 78, 78]),
    ],
)  # fmt: skip
def test_a_transparent_colour_has_the_depth_of_the_file(depth, kind, samples, colour, expected):
    """The colour is stored at the image's bit depth (PNG, section 11.3.2.1)."""
    clear = chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))
    data = png(4, 1, depth, kind, [samples], clear)
    assert pixels(data)[0, :, 0].tolist() == expected
    assert np.array_equal(trained_on(Image.open(io.BytesIO(data))), pixels(data))


def _bits(pairs):
    text = "".join(format(value, f"0{size}b") for value, size in pairs if size)
    text += "1" * (-len(text) % 8)
    data = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    return data.replace(b"\xff", b"\xff\0")


def _segment(kind, body):
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


def _jpeg(samples, transform):
    """A JPEG of 8 x 8 pixels with constant components, encoded by hand.

    It has only DC coefficients. With all quantizers 8, a coefficient is the sample minus 128. Each
    component is coded as one difference of that value and an end of block.
    """
    count, adobe = len(samples), b""
    if transform is not None:
        adobe = _segment(0xEE, b"Adobe" + bytes([0, 100, 0, 0, 0, 0, transform]))
    dc = bytes([0x00] + [0, 0, 0, 9] + [0] * 12) + bytes(range(9))  # nine codes of 4 bits
    ac = bytes([0x10]) + bytes([1] + [0] * 15) + bytes([0])  # one code of 1 bit: end of block
    parts = []
    for sample in samples:
        value = sample - 128
        size = abs(value).bit_length()
        parts += [(size, 4), (value if value > 0 else value + (1 << size) - 1, size), (0, 1)]
    frame = struct.pack(">BHHB", 8, 8, 8, count)
    frame += b"".join(bytes([i + 1, 0x11, 0]) for i in range(count))
    scan = bytes([count]) + b"".join(bytes([i + 1, 0]) for i in range(count)) + bytes([0, 63, 0])
    head = adobe + _segment(0xDB, bytes([0] + [8] * 64)) + _segment(0xC0, frame)
    tables = _segment(0xC4, dc + ac) + _segment(0xDA, scan)
    return b"\xff\xd8" + head + tables + _bits(parts) + b"\xff\xd9"


CYAN_INK, HALF_BLACK = (0, 255, 255), (127, 127, 127)


@pytest.mark.parametrize(
    ("samples", "transform", "colour"),
    [
        ((0, 255, 255, 255), 0, CYAN_INK),  # Adobe marker: 0 is full ink
        ((255, 255, 255, 127), 0, HALF_BLACK),
        ((200, 30, 40, 255), 0, RED),
        ((0, 128, 128, 255), 2, WHITE),  # YCCK: luma and chroma of 255 minus the first three
        ((155, 128, 128, 255), 2, (100, 100, 100)),
        ((200, 30, 40, 255), None, RED),  # no Adobe marker, read like in browsers
        ((200, 30, 40), 0, RED),  # the same encoder; three components are not inverted
    ],
)
def test_cmyk_jpegs_are_not_inverted(samples, transform, colour):
    found = pixels(_jpeg(samples, transform))
    assert found.shape == (8, 8, 3)
    assert np.abs(found - np.array(colour)).max() <= 1


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_tiff_is_upright_and_kept(turned):
    """Pillow rotates TIFF files itself, so every reader decodes them upright."""
    exif = Image.Exif()
    exif[0x0112] = turned
    data = encode(SQUARES.crop((0, 0, 16, 8)), "TIFF", exif=exif)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert plain_image(StoredImage(data)).data == data


def _webp_bomb():
    """An animation with a canvas of 16383 x 16383 pixels and one frame of one pixel."""

    def riff(kind, body):
        return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    still = encode(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    body = riff(b"VP8X", bytes([2, 0, 0, 0]) + 2 * struct.pack("<I", 16382)[:3])
    body += riff(b"ANIM", bytes(6)) + riff(b"ANMF", bytes(16) + still)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _gif_bomb():
    """A screen of 1 x 1 pixel, but a frame of 60000 x 60000."""
    return (
        b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
        + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x02\x4c\x01\0;"
    )  # fmt: skip


BOMBS = {
    "png": png(60000, 60000, 1, 0, [b""]),
    "png, over Pillow's limit for itself": png(12000, 12000, 8, 2, [b""]),
    "jpeg": _jpeg((1, 2, 3), 0).replace(struct.pack(">HH", 8, 8), struct.pack(">HH", 65000, 65000)),
    "gif": _gif_bomb(),
    "webp": _webp_bomb(),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 50000, 50000, 1, 24, *[0] * 6),
    "ppm": b"P6 50000 50000 255\n",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    reason, detail = refused(BOMBS[name])
    assert reason == "too large" and "pixels" in detail


def test_the_limit_is_exact():
    data = encode(SQUARES, "PNG")  # 16 x 16
    assert pixels(data, max_pixels=256).shape == (16, 16, 3)
    assert refused(StoredImage())[0] == "no image"
    too_large = "too large", "16 x 16 is more than 255 pixels"
    assert refused(data, max_pixels=255) == too_large


def test_text_bombs_in_metadata_are_refused():
    packed = b"Comment\0\0" + zlib.compress(bytes(64 << 20))
    data = png(1, 1, 8, 0, [b"\0"], chunk(b"zTXt", packed))
    assert refused(data)[0] == "corrupt"


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_images_are_refused(form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), form)
    for share in (0.02, 0.3, 0.6, 0.9):
        cut = data[: int(share * len(data))]
        assert refused(cut)[0] == "corrupt"
    if form == "PNG":
        opened = Image.open(io.BytesIO(data[: len(data) // 2]))
        assert "record 'r': its images has the image" in trained_on(opened)


@pytest.mark.filterwarnings("ignore")  # warnings of Pillow about odd metadata
@pytest.mark.parametrize("form", FORMATS[:-1])
def test_a_damaged_file_gives_an_image_or_a_reason(form):
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(SQUARES, form, **({} if form in ("GIF", "BMP") else {"exif": exif}))
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            damaged[place] = rng.integers(0, 256)
        try:
            outcomes.add(load_image(StoredImage(bytes(damaged)), max_pixels=10**6).mode)
        except ImageError as error:
            outcomes.add(error.reason)
    assert outcomes <= {"RGB", "corrupt", "too large"} and len(outcomes) > 1


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of the formats"),
        (b"GIF89a", "cannot be read"),
        ("nowhere.png", "nowhere.png does not exist"),
        (".", "is not a file"),
        ("pipe", "is not a file"),
        ("a\0b.png", "does not exist"),
        (b"", "does not hold the bytes of an image file"),
        (np.zeros((2, 2, 3), np.uint8), "the bytes of an image file. Give a PIL image, bytes"),
        ([[1, 2], [3, 4]], "does not hold the bytes"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": "aGk=", "path": None}, "the bytes of an image file"),
        ({"url": "a.png"}, "with the unsupported key 'url'"),
        ("iVBORw0KGgo" + "A" * 100_000, "looks like base64. Decode it"),
        ("data:image/png;base64,AAAA", "looks like base64"),
        ("https://example.com/a.png", "not fetched. Download it"),
        (None, "one of its images is null"),
        (7, "the image 7"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
        (Image.new("1", (8_000, 8_000)), "more than 50000000 pixels"),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) < 60 else "",
)
def test_an_image_that_cannot_be_used_names_the_record(image, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    found = trained_on(image)
    assert isinstance(found, str) and found.startswith("record 'r': ") and len(found) < 500
    assert problem in found


def test_paths_stay_in_their_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.png").touch()
    (tmp_path / "secret.png").touch()
    (tmp_path / "pictures-of-others").mkdir()
    (tmp_path / "alias").symlink_to(folder)
    (folder / "good").symlink_to(folder / "deep")
    (folder / "bad").symlink_to(tmp_path)
    (folder / "bad.png").symlink_to(tmp_path / "secret.png")
    there = str(folder.resolve() / "deep" / "a.png")
    for path in ("deep/a.png", "./deep/../deep/a.png", "good/a.png", there):
        assert DataFolder(folder).file(path) == there
        assert DataFolder(tmp_path / "alias").file(path) == there
    assert DataFolder(folder).file("~/a.png") == str(folder.resolve() / "~" / "a.png")
    for path in (
        "../secret.png",
        "deep/../../secret.png",
        "../pictures-of-others/a.png",
        "bad.png",
        "bad/secret.png",
        "/etc/passwd",
        str(tmp_path / "secret.png"),
        "..",
    ):
        with pytest.raises(ImageError) as error:
            DataFolder(folder).file(path)
        assert error.value.reason == "outside the folder" and repr(path) in str(error.value)
    with pytest.raises(ImageError, match="missing"):
        DataFolder(folder).file("a\0.png")


def test_images_are_opened_in_one_place():
    """A second decoder could give other pixels."""
    found = [
        f"{path.parent.name}/{path.name}"
        for path in Path(realign.__file__).parent.rglob("*.py")
        if re.search(r"Image\.open\(|ImageOps|exif_transpose", path.read_text())
    ]
    assert found == ["data/images.py"]
