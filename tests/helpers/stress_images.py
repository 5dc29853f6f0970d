"""Encoded images of all kinds, each with its pixels by a rule of its own, for the stress.

The rules are formulas on arrays, not Pillow's conversions: alpha over white, the upper byte of 16
bits, (1 - C)(1 - K) for CMYK, JFIF's matrix for YCbCr, EXIF's table of orientations.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 12, 10


class EncodedImage(NamedTuple):
    """One encoded image.

    Attributes:
        data: the file.
        pixels: (H, W, 3) uint8 that it shows; None where it must be refused.
        tolerance: of a value, for lossy formats and rounding.
        verdict: "good", "bad", or "either": refused, or shown right.
    """

    data: bytes
    pixels: np.ndarray | None
    tolerance: int = 0
    verdict: str = "good"


def colours(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8 without symmetry: each quadrant has a colour, with a slope over it."""
    rng = np.random.default_rng(seed)
    quadrants = rng.integers(20, 200, (2, 2, 3))
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 2 // width
    slope = 3 * np.arange(height)[:, None, None] + np.arange(width)[None, :, None]
    return (quadrants[rows][:, columns] + slope % 40).astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The file of an image."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def on_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(values * share + 255 * (1 - share)).astype(np.uint8)


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF's orientation shows of stored rows and columns."""
    flipped = {2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1]}
    across = values.transpose(1, 0, 2)
    flipped |= {5: across, 6: across[:, ::-1], 7: across[::-1, ::-1], 8: across[::-1]}
    return flipped[orientation]


def make_images() -> dict[str, EncodedImage]:
    """Images of all kinds, by name."""
    rgb = colours()
    one = rgb[..., 0]
    plain, grey = Image.fromarray(rgb), Image.fromarray(one)
    large = colours(11, 80, 96)
    jpeg = {"quality": 100, "subsampling": 0}
    alpha = np.linspace(0, 255, rgb[..., 0].size).astype(np.uint8).reshape(one.shape)
    clear = np.where(np.arange(WIDTH) < 5, 0, 255)[None].repeat(HEIGHT, 0).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    found = {
        "RGB PNG": EncodedImage(encode(plain), rgb),
        "RGB BMP": EncodedImage(encode(plain, "BMP"), rgb),
        "RGB TIFF": EncodedImage(encode(plain, "TIFF"), rgb),
        "RGB JPEG": EncodedImage(encode(Image.fromarray(large), "JPEG", **jpeg), large, 4),
        "progressive JPEG": EncodedImage(
            encode(Image.fromarray(large), "JPEG", progressive=True, **jpeg), large, 4
        ),
        "RGB WEBP": EncodedImage(encode(plain, "WEBP", lossless=True), rgb),
        "PPM": EncodedImage(encode(plain, "PPM"), rgb),
        "L PNG": EncodedImage(encode(grey), _grey(one)),
        "1 PNG": EncodedImage(
            encode(Image.fromarray(one > 110)), _grey(np.where(one > 110, 255, 0).astype(np.uint8))
        ),
        "RGBA PNG": EncodedImage(encode(rgba), on_white(rgb, alpha), 1),
        "RGBA WEBP": EncodedImage(
            encode(rgba, "WEBP", lossless=True, exact=True), on_white(rgb, alpha), 2
        ),
        "LA PNG": EncodedImage(
            encode(Image.fromarray(np.dstack([one, alpha]), "LA")), on_white(_grey(one), alpha), 1
        ),
        "transparent black": EncodedImage(
            encode(Image.fromarray(np.dstack([rgb * 0, clear]))), on_white(rgb * 0, clear)
        ),
        "1x1": EncodedImage(encode(Image.fromarray(rgb[:1, :1])), rgb[:1, :1]),
        "3000x1": EncodedImage(encode(Image.fromarray(colours(1, 1, 3000))), colours(1, 1, 3000)),
        "truncated PNG": EncodedImage(encode(Image.fromarray(colours(2, 200, 200)))[:-400], None),
        "truncated JPEG": EncodedImage(
            encode(Image.fromarray(colours(2, 200, 200)), "JPEG")[:-900], None
        ),
        "zero bytes": EncodedImage(b"", None),
        "not an image": EncodedImage(b"\x00\x01 no image at all " * 9, None),
        "PDF": EncodedImage(encode(plain, "PDF"), None),
        "JPEG 2000": EncodedImage(encode(plain, "JPEG2000", irreversible=False), rgb, 0, "either"),
        "AVIF": EncodedImage(
            encode(Image.fromarray(large), "AVIF", quality=100), large, 60, "either"
        ),
        "TGA": EncodedImage(encode(plain, "TGA"), rgb, 0, "either"),
        "ICO": EncodedImage(encode(plain, "ICO", sizes=[(WIDTH, HEIGHT)]), rgb, 0, "either"),
        "broken EXIF": EncodedImage(encode(plain, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"), rgb),
        "an orientation of 9": EncodedImage(encode(plain, exif=_oriented(9)), rgb),
        "HTML": EncodedImage(b"<!DOCTYPE html><html><body>404 Not Found</body></html>", None),
        "SVG": EncodedImage(
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', None
        ),
        "EPS": EncodedImage(encode(plain, "EPS"), None),
        "only a header": EncodedImage(encode(plain)[:30], None),
        "base64": EncodedImage(base64.b64encode(encode(plain)), None),
    }
    found |= _palettes(one, clear)
    found |= _png_by_hand(rgb, alpha)
    found |= _deep(one)
    found |= _spaces()
    found |= _animations()
    for orientation in range(2, 9):
        turned = _turned(rgb, orientation)
        exif = _oriented(orientation)
        found[f"EXIF {orientation}"] = EncodedImage(encode(plain, exif=exif), turned)
        shown = _turned(large, orientation)
        found[f"EXIF {orientation}, JPEG"] = EncodedImage(
            encode(Image.fromarray(large), "JPEG", exif=exif, **jpeg), shown, 4
        )
    return {
        name: image._replace(verdict="bad") if image.pixels is None else image
        for name, image in found.items()
    }


def _oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _palettes(one: np.ndarray, clear: np.ndarray) -> dict[str, EncodedImage]:
    index = (one % 7).astype(np.uint8)
    table = np.random.default_rng(3).integers(0, 256, (7, 3)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(table.tobytes())
    shown = table[index]
    alphas = np.array([0, 40, 255, 255, 90, 255, 255], np.uint8)
    both = Image.merge("LA", (Image.fromarray(index), Image.fromarray(clear)))
    both.putpalette(table.tobytes())  # mode PA
    return {
        "P PNG": EncodedImage(encode(image), shown),
        "P PNG, one clear colour": EncodedImage(
            encode(image, transparency=2),
            on_white(shown, np.where(index == 2, 0, 255).astype(np.uint8)),
        ),
        "P PNG, alpha in bytes": EncodedImage(
            encode(image, transparency=alphas.tobytes()), on_white(shown, alphas[index]), 1
        ),
        "P GIF": EncodedImage(encode(image, "GIF"), shown),
        "P GIF, one clear colour": EncodedImage(
            encode(image, "GIF", transparency=2),
            on_white(shown, np.where(index == 2, 0, 255).astype(np.uint8)),
        ),
        "PA as RGBA": EncodedImage(encode(both.convert("RGBA")), on_white(shown, clear)),
    }


def _png_by_hand(rgb: np.ndarray, alpha: np.ndarray) -> dict[str, EncodedImage]:
    """PNG files that Pillow does not write: 16 bits with colours, and one colour made clear."""
    one = rgb[..., 0]
    wide = lambda values: (values.astype(np.uint16) << 8) + 90  # noqa: E731
    chosen, grey = rgb[3, 4], int(one[3, 4])
    same, equal = (rgb == chosen).all(-1), one == grey
    key = struct.pack(">3H", *map(int, chosen))
    shades = (one // 64).astype(np.uint8)
    packed = np.zeros((HEIGHT, WIDTH // 4), np.uint8)
    for place in range(4):
        packed |= shades[:, place::4] << (6 - 2 * place)
    return {
        "RGB PNG, 16 bits": EncodedImage(_png(wide(rgb), 16, 2), rgb),
        "RGBA PNG, 16 bits": EncodedImage(
            _png(wide(np.dstack([rgb, alpha])), 16, 6), on_white(rgb, alpha), 2
        ),
        "RGB PNG, one clear colour": EncodedImage(
            _png(rgb, 8, 2, key), np.where(same[..., None], 255, rgb).astype(np.uint8)
        ),
        "L PNG, one clear grey": EncodedImage(
            _png(one, 8, 0, struct.pack(">H", grey)),
            _grey(np.where(equal, 255, one).astype(np.uint8)),
        ),
        "L PNG, 2 bits": EncodedImage(_png(packed, 2, 0), _grey(shades * 85)),
    }


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *more: bytes) -> bytes:
    """A PNG by hand, of the bytes of each row and further chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _png(values: np.ndarray, depth: int, colour: int, clear: bytes = b"") -> bytes:
    rows = values.astype(">u2" if depth == 16 else np.uint8).reshape(HEIGHT, -1)
    more = [chunk(b"tRNS", clear)] if clear else []
    return png(WIDTH, HEIGHT, depth, colour, [row.tobytes() for row in rows], *more)


def _deep(one: np.ndarray) -> dict[str, EncodedImage]:
    """More than 8 bits: the upper byte of 16, nothing for 32, which have no defined white."""
    wide = (one.astype(np.uint16) << 8) + 77
    return {
        "I;16 PNG": EncodedImage(encode(Image.fromarray(wide)), _grey(one)),
        "I;16 TIFF": EncodedImage(encode(Image.fromarray(wide), "TIFF"), _grey(one)),
        "I TIFF": EncodedImage(encode(Image.fromarray(one.astype(np.int32) * 1000), "TIFF"), None),
        "F TIFF": EncodedImage(encode(Image.fromarray(one.astype(np.float32) / 9), "TIFF"), None),
    }


def _spaces() -> dict[str, EncodedImage]:
    """CMYK, YCbCr and LAB in TIFF, which loses nothing."""
    cmyk = np.random.default_rng(4).integers(0, 256, (HEIGHT, WIDTH, 4)).astype(np.uint8)
    parts = 1 - cmyk / 255
    shown = np.rint(255 * parts[..., :3] * parts[..., 3:]).astype(np.uint8)
    inks = np.dstack([255 - colours(12, 80, 96), np.full((80, 96), 30, np.uint8)])
    printed = (1 - inks / 255)[..., :3] * (1 - 30 / 255)
    luma = np.random.default_rng(5).integers(60, 190, (HEIGHT, WIDTH)).astype(np.uint8)
    chroma = np.random.default_rng(6).integers(110, 146, (2, HEIGHT, WIDTH)).astype(np.uint8)
    blue, red = chroma.astype(float) - 128
    sides = (luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue)
    ycc = np.dstack([luma, *chroma])
    light = np.random.default_rng(7).integers(40, 220, (HEIGHT, WIDTH)).astype(np.uint8)
    lab = np.dstack([light, np.zeros_like(light), np.zeros_like(light)])
    height = (light / 255 * 100 + 16) / 116
    linear = np.where(height > 6 / 29, height**3, 3 * (6 / 29) ** 2 * (height - 4 / 29))
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    neutral = _grey(np.rint(255 * curve).astype(np.uint8))
    return {
        "CMYK JPEG": EncodedImage(
            encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100),
            np.rint(255 * printed).astype(np.uint8),
            4,
        ),
        "CMYK TIFF": EncodedImage(encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), shown, 2),
        "YCbCr TIFF": EncodedImage(
            encode(Image.fromarray(ycc, "YCbCr"), "TIFF"),
            np.rint(np.clip(np.dstack(sides), 0, 255)).astype(np.uint8),
            3,
        ),
        "LAB TIFF": EncodedImage(encode(Image.fromarray(lab, "LAB"), "TIFF"), neutral, 6, "either"),
    }


def _animations() -> dict[str, EncodedImage]:
    """The first of two frames."""
    index = [(colours(seed)[..., 0] % 5).astype(np.uint8) for seed in (8, 9)]
    table = np.random.default_rng(10).integers(0, 256, (5, 3)).astype(np.uint8)
    frames = [Image.fromarray(values) for values in index]
    for frame in frames:
        frame.putpalette(table.tobytes())
    first, second = (Image.fromarray(table[values]) for values in index)
    more = {"save_all": True, "duration": 100}
    return {
        "animated GIF": EncodedImage(encode(frames[0], "GIF", append_images=frames[1:], **more),
                                table[index[0]]),
        "animated PNG": EncodedImage(encode(first, append_images=[second], **more), table[index[0]]),
        "animated WEBP": EncodedImage(
            encode(first, "WEBP", lossless=True, append_images=[second], **more), table[index[0]], 2
        ),
        "TIFF of two pages": EncodedImage(
            encode(first, "TIFF", save_all=True, append_images=[second]), table[index[0]]
        ),
    }  # fmt: skip
