"""The image decoder: a file, its bytes and its PIL image give the same pixels or one error."""

import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_pairs_pictures import _chunk, _png

import realign
from realign.data.pictures import PictureError, StoredImage
from realign.data.records import RecordError
from realign.hf.records import records_of

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(60, 200, (6, 4, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 4, 1), dtype=np.uint8)
GREY = COLOURS[..., :1]
OPACITY = np.array([255, 0, 128, 7])  # of a palette's four colours
ENTRIES, PLACES = COLOURS.reshape(-1, 3)[:4], GREY[..., 0] % 4
RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))


def _white(colours, alpha):
    """Exact colours over white."""
    return colours * (alpha / 255) + 255 * (1 - alpha / 255)


def _palette():
    image = Image.new("P", (4, 6))
    image.putdata(PLACES.ravel().tolist())
    image.putpalette(ENTRIES.tobytes())
    image.info["transparency"] = bytes(OPACITY.tolist())
    return image


def _lab():
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    return ImageCms.profileToProfile(Image.fromarray(COLOURS), *profiles, outputMode="LAB")


def _deep(form):
    return Image.fromarray((GREY[..., 0].astype(np.uint16) * 256 + 255).astype(form))


PALETTE = _white(ENTRIES[PLACES], OPACITY[PLACES][..., None])
MODES = {  # mode: image, its exact colours, largest rounding, a file format that holds the mode
    "1": (Image.fromarray(GREY[..., 0] > 127), 255.0 * (GREY > 127), 0, "PNG"),
    "L": (Image.fromarray(GREY[..., 0]), GREY, 0, "PNG"),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), _white(GREY, ALPHA), 1, "PNG"),
    "La": (Image.fromarray(np.dstack([GREY, ALPHA])).convert("La"), None, 0, None),
    "P": (_palette(), PALETTE, 1, "PNG"),
    "PA": (_palette().convert("PA"), PALETTE, 1, None),
    "RGB": (Image.fromarray(COLOURS), COLOURS, 0, "PNG"),
    "RGBA": (RGBA, _white(COLOURS, ALPHA), 1, "PNG"),
    "RGBa": (RGBA.convert("RGBa"), _white(COLOURS, ALPHA), 2, None),
    "RGBX": (Image.fromarray(np.dstack([COLOURS, ALPHA]), "RGBX"), COLOURS, 0, None),
    "CMYK": (Image.merge("CMYK", [*RGBA.split()[:3], Image.new("L", (4, 6))]), 255.0 - COLOURS, 1,
             "TIFF"),
    "YCbCr": (Image.fromarray(COLOURS).convert("YCbCr"), COLOURS, 3, "TIFF"),
    "LAB": (_lab(), COLOURS, 10, "TIFF"),
    "HSV": (Image.fromarray(COLOURS).convert("HSV"), COLOURS, 3, None),
    "I;16": (_deep("<u2"), GREY, 0, "PNG"),
    "I;16B": (_deep(">u2"), GREY, 0, "TIFF"),
    "I": (Image.new("I", (4, 6)), None, 0, "TIFF"),
    "F": (Image.new("F", (4, 6)), None, 0, "TIFF"),
}  # fmt: skip


def _file(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _row(*images):
    return {"id": "r", "prompt": "what ?", "chosen": "a", "rejected": "b", "images": [*images]}


def _seen(image):
    """Pixels that `RDPOTrainer` trains on, or the error's text."""
    try:
        (record,) = records_of([_row(image)])
        return np.asarray(record.images[0].open("r")).astype(int)
    except RecordError as error:
        return str(error)


@pytest.mark.parametrize("mode", MODES)
def test_pil_images_and_files_of_every_mode(mode, tmp_path):
    image, colours, rounding, form = MODES[mode]
    assert image.mode == mode
    found = _seen(image)
    if mode in ("I", "F"):
        assert "record 'r': " in found and "32 bits per pixel" in found and "of mode RGB" in found
    elif colours is not None:
        assert found.shape == (6, 4, 3) and np.abs(found - colours).max() <= rounding
    else:  # premultiplied grey: as Pillow's own LA
        assert np.abs(found - _seen(image.convert("LA"))).max() == 0
    if form is None:
        return
    data = _file(image, form)
    (tmp_path / "a").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    for other in (data, str(tmp_path / "a"), opened, opened.copy()):
        if mode in ("I", "F"):
            with pytest.raises(RecordError, match="32 bits per pixel"):
                records_of([_row(other)])[0].images[0].open("r")
        else:
            assert np.array_equal(_seen(other), found)


@pytest.mark.parametrize(
    "data",
    [
        _file(RGBA.convert("CMYK"), "JPEG"),  # as Adobe writes it: inverted
        _file(RGBA.convert("RGB"), "JPEG"),
        _file(RGBA, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 6))]),
        _png(4, 1, 2, 0, [bytes([0b00011011])], _chunk(b"tRNS", struct.pack(">H", 1))),
        _png(2, 1, 16, 0, [bytes([1, 44, 77, 77])], _chunk(b"tRNS", bytes([1, 44]))),
        _png(1, 1, 16, 2, [bytes([0, 3, 0, 2, 0, 1])], _chunk(b"tRNS", bytes([0, 3, 0, 2, 0, 1]))),
    ],
    ids=["CMYK JPEG", "JPEG", "animation", "2 bits", "16 bits", "3 x 16 bits"],
)  # fmt: skip
def test_a_file_and_its_pil_image_agree(data):
    assert np.array_equal(_seen(data), _seen(Image.open(io.BytesIO(data))))


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
    """PNG, section 11.3.2.1: the colour is stored at the image's bit depth."""
    chunk = _chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))
    found = _seen(_png(4, 1, depth, kind, [samples], chunk))
    assert found[0, :, 0].tolist() == expected


def test_images_are_turned_as_their_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = _file(Image.fromarray(COLOURS), "PNG", exif=exif)
    opened = Image.open(io.BytesIO(data))
    for image in (data, opened, opened.copy(), opened.convert("RGBA")):
        assert np.array_equal(_seen(image), np.rot90(COLOURS, -1))


def test_plain_images_keep_their_bytes():
    for image in (Image.fromarray(COLOURS), Image.fromarray(GREY[..., 0])):
        data = _file(image, "PNG")
        assert StoredImage.from_pil(image).data == data
        (record,) = records_of([_row({"bytes": data, "path": None, "url": None})])
        assert record.images == (StoredImage(data),)
        (record,) = records_of([_row(data)])
        assert record.images == (StoredImage(data),)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of the formats"),
        (b"GIF89a", "cannot be read"),
        ("nowhere.png", "nowhere.png does not exist"),
        (".", "is no file"),
        ("pipe", "is no file"),
        ("a\0b.png", "does not exist"),
        (b"", "has no bytes of an image file"),
        (np.zeros((2, 2, 3), np.uint8), "has no bytes of an image file. Give a PIL image, bytes"),
        ([[1, 2], [3, 4]], "has no bytes"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": "aGk=", "path": None}, "no bytes of an image file"),
        ({"url": "a.png"}, "'url' is not read"),
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
    found = _seen(image)
    assert isinstance(found, str) and found.startswith("record 'r': ") and len(found) < 500
    assert problem in found


def test_a_pil_image_whose_file_is_cut_names_the_record():
    data = _file(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
    assert "record 'r': its images has the image" in _seen(Image.open(io.BytesIO(data[:2000])))
    with pytest.raises(PictureError, match="corrupt"):
        StoredImage(data[:2000]).decode()


def test_images_are_opened_in_one_place():
    """A second decoder would see other pixels."""
    found = [
        path.name
        for path in Path(realign.__file__).parent.rglob("*.py")
        if re.search(r"Image\.open\(|ImageOps|exif_transpose", path.read_text())
    ]
    assert found == ["pictures.py"]
