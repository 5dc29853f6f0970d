"""Pictures as they come: the right colours of every kind, and what is refused without decoding."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from realign.data.records import StoredImage
from realign.pairs.io.pictures import PictureError, inside, load_picture, plain_picture

RED, GREEN, BLUE, WHITE = (200, 30, 40), (20, 160, 60), (10, 20, 220), (255, 255, 255)
COLOURS = np.array([[RED, GREEN], [BLUE, WHITE]], dtype=np.uint8)
PICTURE = Image.fromarray(COLOURS.repeat(8, 0).repeat(8, 1))  # four squares of 8 x 8


def _encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def _pixels(data, **options):
    image = load_picture(StoredImage(data), **options)
    assert image.mode == "RGB" and not image.info
    return np.asarray(image).astype(int)


def _refused(stored, **options):
    with pytest.raises(PictureError) as error:
        load_picture(stored, **options)
    return error.value.reason, error.value.detail


@pytest.mark.parametrize(
    ("form", "options", "error"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 3),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 3),
    ],
)
def test_colours_of_the_formats(form, options, error):
    data = _encoded(PICTURE, form, **options)
    assert np.abs(_pixels(data) - np.asarray(PICTURE)).max() <= error
    assert plain_picture(StoredImage(data)) == StoredImage(data)


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width, height, depth, colour, rows, *extra):
    """A PNG by hand; `rows` are the bytes of each row."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [_chunk(b"IHDR", header), *extra, _chunk(b"IDAT", packed), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


PALETTE = _chunk(b"PLTE", bytes([*RED, *GREEN, *BLUE]))


@pytest.mark.parametrize(
    ("data", "colours"),
    [
        (_png(3, 1, 8, 3, [bytes([0, 1, 2])], PALETTE), [RED, GREEN, BLUE]),
        (_png(3, 1, 2, 3, [bytes([0b00011000])], PALETTE), [RED, GREEN, BLUE]),
        (  # the second entry of the palette is transparent, the third half of it
            _png(3, 1, 8, 3, [bytes([0, 1, 2])], PALETTE, _chunk(b"tRNS", bytes([255, 0, 51]))),
            [RED, WHITE, tuple(round(0.8 * 255 + 0.2 * c) for c in BLUE)],
        ),
        (_png(2, 1, 1, 0, [bytes([0b01000000])]), [(0, 0, 0), WHITE]),
        (_png(3, 1, 8, 0, [bytes([0, 77, 255])]), [(0, 0, 0), (77, 77, 77), WHITE]),
        (  # grey and alpha
            _png(3, 1, 8, 4, [bytes([77, 255, 77, 0, 0, 51])]),
            [(77, 77, 77), WHITE, (204, 204, 204)],
        ),
        (_png(2, 1, 8, 6, [bytes([*RED, 255, *BLUE, 0])]), [RED, WHITE]),
        (  # 16 bits: 0, one below and at the border of a grey, white
            _png(4, 1, 16, 0, [struct.pack(">4H", 0, 77 * 256 - 1, 77 * 256, 65535)]),
            [(0, 0, 0), (76, 76, 76), (77, 77, 77), WHITE],
        ),
        (
            _png(1, 1, 16, 2, [struct.pack(">3H", *(257 * c for c in RED))]),
            [RED],
        ),
        (  # grey 77 stands for transparent
            _png(2, 1, 8, 0, [bytes([77, 78])], _chunk(b"tRNS", struct.pack(">H", 77))),
            [WHITE, (78, 78, 78)],
        ),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 77 * 257, 65535), [(0, 0, 0), (77,) * 3, WHITE]),
        (  # little-endian TIFF of 16 bits
            _encoded(Image.fromarray(np.array([[0, 77 * 257]], np.uint16)), "TIFF"),
            [(0, 0, 0), (77, 77, 77)],
        ),
    ],
    ids=["palette", "2 bit palette", "palette and alpha", "1 bit", "grey", "grey and alpha"]
    + ["rgba", "grey 16", "rgb 16", "transparent grey", "ppm 16", "tiff 16"],
)  # fmt: skip
def test_colours_of_the_modes(data, colours):
    assert _pixels(data)[0].tolist() == [list(c) for c in colours]
    kept = plain_picture(StoredImage(data, "x.png"))
    assert np.array_equal(np.asarray(kept.open("r")), _pixels(data))
    assert kept.path == "x.png"


def _bits(pairs):
    text = "".join(format(value, f"0{size}b") for value, size in pairs if size)
    text += "1" * (-len(text) % 8)
    data = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    return data.replace(b"\xff", b"\xff\0")


def _segment(kind, body):
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


def _jpeg(samples, transform):
    """A JPEG of 8 x 8 pixels with constant components, by hand: only DC coefficients.

    With all quantizers 8 the coefficient is the sample less 128; each component is coded as one
    difference of that size and an end of block.
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
        ((0, 255, 255, 255), 0, CYAN_INK),  # Adobe's: 0 is full ink
        ((255, 255, 255, 127), 0, HALF_BLACK),
        ((200, 30, 40, 255), 0, RED),
        ((0, 128, 128, 255), 2, WHITE),  # YCCK: luma and chroma of 255 less the first three
        ((155, 128, 128, 255), 2, (100, 100, 100)),
        ((200, 30, 40, 255), None, RED),  # unmarked: as browsers read it
    ],
)
def test_cmyk_jpegs_are_not_inverted(samples, transform, colour):
    found = _pixels(_jpeg(samples, transform))
    assert found.shape == (8, 8, 3)
    assert np.abs(found - np.array(colour)).max() <= 1


def test_the_jpeg_by_hand_is_one():
    # The same writer on three components, where nothing is inverted.
    found = _pixels(_jpeg((200, 30, 40), 0))
    assert np.abs(found - np.array(RED)).max() <= 1


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_cmyk_inks(form):
    inks = Image.fromarray(
        np.array([[[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 128]]], np.uint8)
        .repeat(8, 0).repeat(8, 1),
        "CMYK",
    )  # fmt: skip
    data = _encoded(inks, form, **({"quality": 100} if form == "JPEG" else {}))
    found = _pixels(data)[4, 4::8]
    expected = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [127, 127, 127]]
    assert np.abs(found - np.array(expected)).max() <= 2
    kept = plain_picture(StoredImage(data))
    assert kept.data != data and np.array_equal(np.asarray(kept.open("r")), _pixels(data))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = _encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (_pixels(data) == np.array(RED)).all()
    kept = plain_picture(StoredImage(data))
    assert Image.open(io.BytesIO(kept.data)).format == "PNG"
    assert not getattr(Image.open(io.BytesIO(kept.data)), "is_animated", False)


def test_a_gif_with_a_transparent_colour_lies_on_white():
    image = PICTURE.quantize(4)
    hidden = image.getpixel((0, 0))
    found = _pixels(_encoded(image, "GIF", transparency=hidden))
    assert found[0, 0].tolist() == list(WHITE)
    assert found[0, -1].tolist() == list(GREEN)


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_photos_stand_upright(turned, form):
    exif = Image.Exif()
    exif[0x0112] = turned
    image = PICTURE.crop((0, 0, 16, 8)) if form != "JPEG" else PICTURE
    data = _encoded(image, form, exif=exif)
    stored = Image.open(io.BytesIO(data)) if form == "JPEG" else image
    stored.getexif()[0x0112] = turned
    expected = np.asarray(ImageOps.exif_transpose(stored))
    assert np.array_equal(_pixels(data), expected)
    kept = plain_picture(StoredImage(data))
    assert (kept.data == data) == (turned == 1 or form == "TIFF")  # Pillow turns those itself
    assert np.array_equal(np.asarray(kept.open("r")), expected)


def test_broken_exif_is_no_reason_to_lose_the_picture():
    data = _encoded(PICTURE, "PNG", exif=b"Exif\0\0" + b"\xff" * 30)
    assert np.array_equal(_pixels(data), np.asarray(PICTURE))
    kept = plain_picture(StoredImage(data))
    assert np.array_equal(np.asarray(kept.open("r")), np.asarray(PICTURE))


def _webp_bomb():
    """An animation on a canvas of 16383 x 16383 with one frame of one pixel."""

    def riff(kind, body):
        return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    still = _encoded(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    body = riff(b"VP8X", bytes([2, 0, 0, 0]) + 2 * struct.pack("<I", 16382)[:3])
    body += riff(b"ANIM", bytes(6)) + riff(b"ANMF", bytes(16) + still)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _gif_bomb():
    """A screen of 1 x 1, but a frame of 60000 x 60000."""
    return (
        b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
        + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x02\x4c\x01\0;"
    )  # fmt: skip


BOMBS = {
    "png": _png(60000, 60000, 1, 0, [b""]),
    "png, over Pillow's limit for itself": _png(12000, 12000, 8, 2, [b""]),
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
    reason, detail = _refused(StoredImage(BOMBS[name]))
    assert reason == "too large" and "pixels" in detail


def test_the_limit_is_exact():
    data = _encoded(PICTURE, "PNG")  # 16 x 16
    assert _pixels(data, max_pixels=256).shape == (16, 16, 3)
    assert _refused(StoredImage(data), max_pixels=255) == (
        "too large",
        "16 x 16 is more than 255 pixels",
    )


def test_text_bombs_in_metadata_are_refused():
    packed = b"Comment\0\0" + zlib.compress(bytes(64 << 20))
    data = _png(1, 1, 8, 0, [b"\0"], _chunk(b"zTXt", packed))
    assert _refused(StoredImage(data))[0] == "corrupt"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_pictures_are_refused(form, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = _encoded(Image.fromarray(noise), form)
    assert _refused(StoredImage(data[: int(share * len(data))]))[0] == "corrupt"


@pytest.mark.filterwarnings("ignore")  # Pillow's on odd metadata
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damage_gives_a_picture_or_a_reason(form):
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data = _encoded(PICTURE, form, **options)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            damaged[place] = rng.integers(0, 256)
        try:
            outcomes.add(load_picture(StoredImage(bytes(damaged)), max_pixels=10**6).mode)
        except PictureError as error:
            outcomes.add(error.reason)
    assert outcomes <= {"RGB", "corrupt", "too large"} and len(outcomes) > 1


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "none of the formats"),
        (b"no picture", "none of the formats JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "none of the formats"),
        (_encoded(PICTURE, "ICO"), "none of the formats"),
        (_encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "32 bits per pixel"),
    ],
    ids=["empty", "text", "postscript", "icon", "float"],
)
def test_what_is_no_picture_is_refused(data, detail):
    reason, found = _refused(StoredImage(data))
    assert reason == "corrupt" and detail in found


def test_missing_pictures(tmp_path):
    assert _refused(StoredImage()) == ("no image", "neither bytes nor a path")
    assert _refused(StoredImage(path=str(tmp_path / "no.png")))[0] == "missing"
    assert _refused(StoredImage(path=str(tmp_path)))[0] == "missing"
    os.mkfifo(tmp_path / "pipe.png")
    assert _refused(StoredImage(path=str(tmp_path / "pipe.png")))[0] == "missing"
    PICTURE.save(tmp_path / "a.png")
    found = load_picture(StoredImage(path=str(tmp_path / "a.png")))
    assert np.array_equal(np.asarray(found), np.asarray(PICTURE))


def test_paths_stay_in_their_folder(tmp_path):
    folder = tmp_path / "pictures"
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
        assert inside(folder, path) == there
        assert inside(tmp_path / "alias", path) == there
    assert inside(folder, "~/a.png") == str(folder.resolve() / "~" / "a.png")
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
        with pytest.raises(PictureError) as error:
            inside(folder, path)
        assert error.value.reason == "outside the folder" and repr(path) in str(error.value)
    with pytest.raises(PictureError, match="missing"):
        inside(folder, "a\0.png")
