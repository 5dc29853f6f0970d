"""Encoded images of all kinds for the stress test, with expected pixels.

The expected pixels come from formulas on arrays, not from Pillow's conversions. These are alpha
over white, the upper byte of 16 bits, (1 - C)(1 - K) for CMYK, JFIF's matrix for YCbCr, and EXIF's
table of orientations.
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


class Encoded(NamedTuple):
    """One encoded image.

    Attributes:
        data: bytes of the file.
        pixels: expected pixels, (H, W, 3) uint8. None if the image must be rejected.
        tolerance: maximum error of a value, for lossy formats and rounding.
        verdict: "good", "bad" or "either". "either" means rejected or decoded correctly.
    """

    data: bytes
    pixels: np.ndarray | None
    tolerance: int = 0
    verdict: str = "good"


def colours(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8 pixels without symmetry: each quadrant has a colour with a gradient."""
    rng = np.random.default_rng(seed)
    quadrants = rng.integers(20, 200, (2, 2, 3))
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 2 // width
    slope = 3 * np.arange(height)[:, None, None] + np.arange(width)[None, :, None]
    return (quadrants[rows][:, columns] + slope % 40).astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a file with the image."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def on_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(values * share + 255 * (1 - share)).astype(np.uint8)


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """The upright pixels for stored rows and columns with an EXIF orientation."""
    flipped = {2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1]}
    across = values.transpose(1, 0, 2)
    flipped |= {5: across, 6: across[:, ::-1], 7: across[::-1, ::-1], 8: across[::-1]}
    return flipped[orientation]


def make_images() -> dict[str, Encoded]:
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
        "RGB PNG": Encoded(encode(plain), rgb),
        "RGB BMP": Encoded(encode(plain, "BMP"), rgb),
        "RGB TIFF": Encoded(encode(plain, "TIFF"), rgb),
        "RGB JPEG": Encoded(encode(Image.fromarray(large), "JPEG", **jpeg), large, 4),
        "progressive JPEG": Encoded(
            encode(Image.fromarray(large), "JPEG", progressive=True, **jpeg), large, 4
        ),
        "RGB WEBP": Encoded(encode(plain, "WEBP", lossless=True), rgb),
        "PPM": Encoded(encode(plain, "PPM"), rgb),
        "L PNG": Encoded(encode(grey), _grey(one)),
        "1 PNG": Encoded(
            encode(Image.fromarray(one > 110)), _grey(np.where(one > 110, 255, 0).astype(np.uint8))
        ),
        "RGBA PNG": Encoded(encode(rgba), on_white(rgb, alpha), 1),
        "RGBA WEBP": Encoded(
            encode(rgba, "WEBP", lossless=True, exact=True), on_white(rgb, alpha), 2
        ),
        "LA PNG": Encoded(
            encode(Image.fromarray(np.dstack([one, alpha]), "LA")), on_white(_grey(one), alpha), 1
        ),
        "transparent black": Encoded(
            encode(Image.fromarray(np.dstack([rgb * 0, clear]))), on_white(rgb * 0, clear)
        ),
        "1x1": Encoded(encode(Image.fromarray(rgb[:1, :1])), rgb[:1, :1]),
        "190x1": Encoded(encode(Image.fromarray(colours(1, 1, 190))), colours(1, 1, 190)),
        "truncated PNG": Encoded(encode(Image.fromarray(colours(2, 200, 200)))[:-400], None),
        "truncated JPEG": Encoded(
            encode(Image.fromarray(colours(2, 200, 200)), "JPEG")[:-900], None
        ),
        "zero bytes": Encoded(b"", None),
        "not an image": Encoded(b"\x00\x01 no image at all " * 9, None),
        "PDF": Encoded(encode(plain, "PDF"), None),
        "JPEG 2000": Encoded(encode(plain, "JPEG2000", irreversible=False), rgb, 0, "either"),
        "AVIF": Encoded(encode(Image.fromarray(large), "AVIF", quality=100), large, 60, "either"),
        "TGA": Encoded(encode(plain, "TGA"), rgb, 0, "either"),
        "ICO": Encoded(encode(plain, "ICO", sizes=[(WIDTH, HEIGHT)]), rgb, 0, "either"),
        "broken EXIF": Encoded(encode(plain, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"), rgb),
        "an orientation of 9": Encoded(encode(plain, exif=_oriented(9)), rgb),
        "HTML": Encoded(b"<!DOCTYPE html><html><body>404 Not Found</body></html>", None),
        "SVG": Encoded(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', None),
        "EPS": Encoded(encode(plain, "EPS"), None),
        "only a header": Encoded(encode(plain)[:30], None),
        "base64": Encoded(base64.b64encode(encode(plain)), None),
    }
    found |= _palettes(one, clear)
    found |= _png_by_hand(rgb, alpha)
    found |= _deep(one)
    found |= _spaces()
    found |= _animations()
    for orientation in range(2, 9):
        turned = _turned(rgb, orientation)
        exif = _oriented(orientation)
        found[f"EXIF {orientation}"] = Encoded(encode(plain, exif=exif), turned)
        shown = _turned(large, orientation)
        found[f"EXIF {orientation}, JPEG"] = Encoded(
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


def _palettes(one: np.ndarray, clear: np.ndarray) -> dict[str, Encoded]:
    index = (one % 7).astype(np.uint8)
    table = np.random.default_rng(3).integers(0, 256, (7, 3)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(table.tobytes())
    shown = table[index]
    alphas = np.array([0, 40, 255, 255, 90, 255, 255], np.uint8)
    both = Image.merge("LA", (Image.fromarray(index), Image.fromarray(clear)))
    both.putpalette(table.tobytes())  # mode PA
    return {
        "P PNG": Encoded(encode(image), shown),
        "P PNG, one clear colour": Encoded(
            encode(image, transparency=2),
            on_white(shown, np.where(index == 2, 0, 255).astype(np.uint8)),
        ),
        "P PNG, alpha in bytes": Encoded(
            encode(image, transparency=alphas.tobytes()), on_white(shown, alphas[index]), 1
        ),
        "P GIF": Encoded(encode(image, "GIF"), shown),
        "P GIF, one clear colour": Encoded(
            encode(image, "GIF", transparency=2),
            on_white(shown, np.where(index == 2, 0, 255).astype(np.uint8)),
        ),
        "PA as RGBA": Encoded(encode(both.convert("RGBA")), on_white(shown, clear)),
    }


def _png_by_hand(rgb: np.ndarray, alpha: np.ndarray) -> dict[str, Encoded]:
    """PNG files that Pillow cannot write: 16 bits with colours, and a transparent colour."""
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
        "RGB PNG, 16 bits": Encoded(_png(wide(rgb), 16, 2), rgb),
        "RGBA PNG, 16 bits": Encoded(
            _png(wide(np.dstack([rgb, alpha])), 16, 6), on_white(rgb, alpha), 2
        ),
        "RGB PNG, one clear colour": Encoded(
            _png(rgb, 8, 2, key), np.where(same[..., None], 255, rgb).astype(np.uint8)
        ),
        "L PNG, one clear grey": Encoded(
            _png(one, 8, 0, struct.pack(">H", grey)),
            _grey(np.where(equal, 255, one).astype(np.uint8)),
        ),
        "L PNG, 2 bits": Encoded(_png(packed, 2, 0), _grey(shades * 85)),
    }


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *more: bytes) -> bytes:
    """A PNG encoded by hand from the bytes of each row and further chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _png(values: np.ndarray, depth: int, colour: int, clear: bytes = b"") -> bytes:
    rows = values.astype(">u2" if depth == 16 else np.uint8).reshape(HEIGHT, -1)
    more = [chunk(b"tRNS", clear)] if clear else []
    return png(WIDTH, HEIGHT, depth, colour, [row.tobytes() for row in rows], *more)


def _deep(one: np.ndarray) -> dict[str, Encoded]:
    """More than 8 bits. 16 bits give the upper byte. 32 bits have no defined white."""
    wide = (one.astype(np.uint16) << 8) + 77
    return {
        "I;16 PNG": Encoded(encode(Image.fromarray(wide)), _grey(one)),
        "I;16 TIFF": Encoded(encode(Image.fromarray(wide), "TIFF"), _grey(one)),
        "I TIFF": Encoded(encode(Image.fromarray(one.astype(np.int32) * 1000), "TIFF"), None),
        "F TIFF": Encoded(encode(Image.fromarray(one.astype(np.float32) / 9), "TIFF"), None),
    }


def _spaces() -> dict[str, Encoded]:
    """CMYK, YCbCr and LAB in TIFF, which is lossless."""
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
        "CMYK JPEG": Encoded(
            encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100),
            np.rint(255 * printed).astype(np.uint8),
            4,
        ),
        "CMYK TIFF": Encoded(encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), shown, 2),
        "YCbCr TIFF": Encoded(
            encode(Image.fromarray(ycc, "YCbCr"), "TIFF"),
            np.rint(np.clip(np.dstack(sides), 0, 255)).astype(np.uint8),
            3,
        ),
        "LAB TIFF": Encoded(encode(Image.fromarray(lab, "LAB"), "TIFF"), neutral, 6, "either"),
    }


def _animations() -> dict[str, Encoded]:
    """Animations of two frames, of which the first is expected."""
    index = [(colours(seed)[..., 0] % 5).astype(np.uint8) for seed in (8, 9)]
    table = np.random.default_rng(10).integers(0, 256, (5, 3)).astype(np.uint8)
    frames = [Image.fromarray(values) for values in index]
    for frame in frames:
        frame.putpalette(table.tobytes())
    first, second = (Image.fromarray(table[values]) for values in index)
    more = {"save_all": True, "duration": 100}
    return {
        "animated GIF": Encoded(encode(frames[0], "GIF", append_images=frames[1:], **more),
                                table[index[0]]),
        "animated PNG": Encoded(encode(first, append_images=[second], **more), table[index[0]]),
        "animated WEBP": Encoded(
            encode(first, "WEBP", lossless=True, append_images=[second], **more), table[index[0]], 2
        ),
        "TIFF of two pages": Encoded(
            encode(first, "TIFF", save_all=True, append_images=[second]), table[index[0]]
        ),
    }  # fmt: skip
