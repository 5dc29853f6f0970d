"""Image decoder: converts a file, bytes or a PIL image to 8-bit RGB, or raises an `ImageError`.

Training, pairs, evaluation and `RDPOTrainer` all decode here, so they see the same pixels. The
header is read first, and an image that is too large is rejected before any pixel is decoded. Only
common image formats are opened, because some of Pillow's formats start programs or embed files.

Images may come from strangers. `DataFolder` keeps their paths in a folder, and `open_regular`
refuses pipes and devices.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError, features

from realign.data.errors import RecordError, shorten
from realign.files import open_regular

MAX_PIXELS = 50_000_000
MAX_BYTES = 4 * MAX_PIXELS
"""Limit on an encoded image: the size of an uncompressed RGBA image of `MAX_PIXELS`."""
MAX_RATIO = 200
"""Limit on the longer side by the shorter one, as in Qwen's processors. Those of CLIP enlarge the
shorter side, so 370 bytes with 100,000 x 1 pixels would take 100 GB."""
_MOST_PLAIN = 100_000
"""Limit on a plain PNM in bytes, because Pillow skips its comments in quadratic time."""
_TILE = (322, 323)
"""TIFF tags of the sides of a tile."""
_MOST_SCANNED = 200 * MAX_PIXELS  # pixels times scans of a JPEG; usual are at most 14 scans
_SHORTEST_SCAN = 10  # bytes
_MOST_CHUNKS = 100_000
"""Chunks of a PNG searched for EXIF. A PNG of `MAX_PIXELS` in chunks of 8 kB has 25,000."""
_REPOSITORIES = ("datasets--", "models--", "spaces--")  # folders of the Hub's cache
BACKGROUND = (255, 255, 255)  # behind transparent pixels, as in browsers
_RULES = 1
"""Version of `StoredImage.decode`; changed when the same bytes would decode to other pixels."""
_SIZED = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
"""Formats whose header gives the size and orientation that decoding gives."""
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_UPRIGHT = {  # EXIF orientation -> its inverse
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
# Pillow scales 2- and 4-bit samples to 8 bits, and truncates 16-bit ones. It leaves the
# transparent colour at its original depth.
_WIDENED = {"L;2": 85, "L;4": 17}


class ImageError(ValueError):
    """An invalid image.

    Attributes:
        reason: "missing", "corrupt", "too large", "outside the folder", "no image" or "malformed".
        detail: the cause, in words for the user.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class StoredImage:
    """An image of a record, stored as encoded bytes or as a path."""

    data: bytes | None = None
    path: str | None = None
    given: str | None = field(default=None, compare=False, repr=False)
    """The path with links that led to `path`, if there are links."""

    @classmethod
    def from_pil(cls, image: Image.Image, path: str | None = None) -> StoredImage:
        """Encode an image of any mode as PNG, without loss for 8-bit RGB and grey.

        Raises:
            ImageError: for an invalid image.
        """
        with _image_errors():
            flat, plain = _to_rgb(image, MAX_PIXELS)
        buffer = io.BytesIO()
        (image if plain else flat).save(buffer, format="PNG")
        return cls(buffer.getvalue(), path)

    def decode(self, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, bool]:
        """Decode to 8-bit RGB.

        The result is the first frame, rotated upright by its EXIF orientation, with transparent
        pixels on white. Of 16-bit samples the upper 8 bits are kept. CMYK is converted without
        colour management. A CMYK JPEG is read as inverted, like in Adobe's programs and browsers.

        An image of `MAX_PIXELS` takes up to 0.4 GB, with transparency 0.8 GB, and a JPEG 2000 of
        65,000 tiles 0.8 GB (measured). Several threads may decode at once.

        Args:
            max_pixels: limit on width times height.

        Returns:
            An RGB image without metadata, and whether every other reader decodes the same pixels.
            That is the case for a single frame of RGB or grey, opaque and upright.

        Raises:
            ImageError: for an invalid image.
        """
        with (
            _image_errors(),
            self._encoded() as file,
            Image.open(file, formats=_formats()) as image,
        ):
            _check_coding(image, file, max_pixels)
            return _to_rgb(image, max_pixels)

    def size(self, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
        """Width and height of the upright image. Common formats need only their header.

        Args:
            max_pixels: limit on width times height.

        Raises:
            ImageError: for an invalid header, and for an invalid image of an uncommon format.
        """
        with (
            _image_errors(),
            self._encoded() as file,
            Image.open(file, formats=_formats()) as image,
        ):
            _check_coding(image, file, max_pixels)
            _check_size(image, max_pixels)
            # Pillow decodes a PNG to find EXIF behind its pixels.
            if image.format not in _SIZED or (image.format == "PNG" and _has_exif(file)):
                return _to_rgb(image, max_pixels)[0].size
            width, height = image.size
            sideways = _orientation(image) in _SIDEWAYS
            return (height, width) if sideways else (width, height)

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            ImageError: for a file that is missing, is not regular, or has more than `MAX_BYTES`.
        """
        with _image_errors(), self._encoded() as file:
            return file.read(MAX_BYTES + 1)

    def _encoded(self) -> BinaryIO:
        """The encoded image, as an open file of at most `MAX_BYTES`."""
        if self.data is not None:
            file: BinaryIO = io.BytesIO(self.data)
            size = len(self.data)
        elif self.path is None:
            raise ImageError("no image", "it has neither bytes nor a path")
        else:
            file = _opened(self.path)
            size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            file.close()
            raise ImageError("too large", f"its {size:,} bytes are more than {MAX_BYTES:,}")
        return file

    def open(self, record: str) -> Image.Image:
        """Decode to 8-bit RGB. See `decode`.

        Raises:
            RecordError: for an invalid image. The message names `record` and the file.
        """
        try:
            return self.decode()[0]
        except ImageError as error:
            raise self.named(error, record) from error

    def named(self, error: ImageError, record: str) -> RecordError:
        """The error of this image with the name of its record."""
        named = self.path or f"{len(self.data or b'')} embedded bytes"
        problem = f"{shorten(named)} cannot be read ({error.detail})"
        if error.reason == "missing":
            problem = error.detail
        return RecordError(
            record, f"its image {problem}.", "Replace the image or remove the record."
        )


def digest_of_bytes(data: bytes) -> bytes:
    """128-bit digest of an encoded image, which identifies the image."""
    return hashlib.blake2b(data, digest_size=16).digest()


def decoder() -> str:
    """Versions of everything that turns encoded bytes into pixels."""
    names = ("libjpeg_turbo", "jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")
    versions = {name: features.version(name) for name in names}
    parts = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join([f"rules {_RULES}", f"pillow {PIL.__version__}", *parts])


class DataFolder:
    """The folder that must contain the files of a data set, such as its images.

    Symbolic links are resolved first. The links of a folder of many files are resolved once. Files
    in the cache of the Hub are links to the blobs of their repository, and these are accepted.

    Args:
        folder: the folder. Relative paths start here.
        start: where else relative paths start, for files that are not in `folder` under this path.
    """

    def __init__(self, folder: str | Path, start: str | Path | None = None) -> None:
        self.given, self.path = str(folder), os.path.realpath(folder)
        self._starts = [self.path] + ([] if start is None else [os.path.realpath(start)])
        self._roots = [self.path]
        for parent in Path(self.path).parents:
            if parent.name.startswith(_REPOSITORIES):
                snapshots, blobs = parent / "snapshots", parent / "blobs"
                self._roots += [str(blobs)] * Path(self.path).is_relative_to(snapshots)
        self._resolved: dict[str, str] = {}  # folder as in a path -> folder without links

    @classmethod
    def of_images(cls, data: Path, images: str | Path | None) -> DataFolder:
        """The folder `images`, by default the folder of the data set.

        Relative paths start at either.

        Raises:
            ValueError: when `images` is not a folder.
        """
        own = data if data.is_dir() else data.parent
        if images is None:
            return cls(own)
        if not Path(images).is_dir():
            raise ValueError(
                f"--image-folder {images} is not a folder. Pass the folder of the images."
            )
        return cls(images, own)

    def file(self, path: str) -> str:
        """The absolute path of a file in the folder, without links.

        An absolute path is accepted if it is in the folder.

        Raises:
            ImageError: "outside the folder" for a file that is not in the folder.
        """
        try:
            if "\0" in path:
                raise ValueError("a null byte")
            places = [self._place(os.path.join(start, path)) for start in self._starts]
        except ValueError:  # also half of a surrogate pair
            raise ImageError("missing", f"{shorten(repr(path))} is not a file name") from None
        file = places[0]
        if len(places) > 1 and not os.path.exists(file):
            file = next(filter(os.path.exists, places), file)
        if all(os.path.commonpath([root, file]) != root for root in self._roots):
            named = shorten(repr(path))
            detail = f"{named} leads to {shorten(file)}, which is not in {shorten(self.path)}"
            raise ImageError("outside the folder", detail)
        return file

    def _place(self, path: str) -> str:
        """A path without links."""
        folder, name = os.path.split(path)
        if folder not in self._resolved:
            self._resolved[folder] = os.path.realpath(folder)
        file = os.path.join(self._resolved[folder], name)
        return os.path.realpath(file) if name in ("", ".", "..") or os.path.islink(file) else file


def _check_coding(image: Image.Image, file: BinaryIO, max_pixels: int) -> None:
    """Refuse an image whose coding takes much more time or memory than its pixels."""
    if image.format in ("JPEG", "MPO"):
        _check_scans(file, image.width * image.height)
    elif image.format == "PPM":
        _check_plain(file)
    elif image.format == "TIFF":
        _check_tile(image, max_pixels)


def _check_scans(file: BinaryIO, pixels: int) -> None:
    """Refuse a JPEG with so many scans that it takes hours. Each decodes all pixels again."""
    place = file.seek(0, os.SEEK_CUR)
    size = file.seek(0, os.SEEK_END)
    if pixels * (size // _SHORTEST_SCAN) > _MOST_SCANNED:
        file.seek(0)
        scans = file.read().count(b"\xff\xda")  # in the data of a scan, 0 follows 255
        if pixels * scans > _MOST_SCANNED:
            raise ImageError("corrupt", f"it is a JPEG of {scans:,} scans")
    file.seek(place)


def _check_plain(file: BinaryIO) -> None:
    """Refuse a large PNM in text."""
    place, size = file.seek(0, os.SEEK_CUR), file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > _MOST_PLAIN and file.read(2) in (b"P1", b"P2", b"P3"):
        raise ImageError("too large", f"a plain PNM has at most {_MOST_PLAIN:,} bytes; use PNG")
    file.seek(place)


def _check_tile(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF with tiles above the limit, which libtiff decodes in full."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag, 0) for tag in _TILE]
    if any(not isinstance(side, int) for side in sides) or math.prod(sides) > max_pixels:
        raise ImageError("too large", f"its tiles have {sides[0]} x {sides[1]} pixels")


def _opened(path: str) -> BinaryIO:
    try:
        return open_regular(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        raise ImageError("missing", f"{shorten(path)} does not exist") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ImageError("missing", f"{shorten(path)} is not a file") from None


@contextmanager
def _image_errors() -> Iterator[None]:
    """Converts Pillow's errors to `ImageError`."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (FileNotFoundError, PermissionError) as error:
        state = f"cannot be opened ({error.strerror})"
        raise ImageError("missing", f"{shorten(str(error.filename))} {state}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too large", str(error)) from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_formats())
        raise ImageError("corrupt", f"it has none of the formats {formats}") from error
    except Exception as error:  # damaged files raise IndexError, struct.error, KeyError, ...
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats among `_FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image, max_pixels: int) -> tuple[Image.Image, bool]:
    """Decodes a PIL image of any mode, loaded or not. See `StoredImage.decode`."""
    _check_size(image, max_pixels)
    # An MPO, a phone's JPEG with further images, is not an animation.
    still = not getattr(image, "is_animated", False) or image.format == "MPO"
    transparent = _transparent_colour(image)
    image.load()
    plain = still and image.mode in ("RGB", "L") and "transparency" not in image.info
    flat = _flatten(image, transparent)
    orientation = _orientation(image)
    plain = plain and orientation is not None
    if orientation in _UPRIGHT:
        flat, plain = flat.transpose(_UPRIGHT[orientation]), False
    return flat, plain


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too large", f"{width} x {height} is more than {max_pixels} pixels")
    if max(width, height) > MAX_RATIO * max(1, min(width, height)):
        raise ImageError("too large", f"{width} x {height} is a ratio of more than {MAX_RATIO}")
    if width * height == 0:
        raise ImageError("corrupt", f"its size is {width} x {height} pixels")


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 without any. None for broken EXIF."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF is ignored here, but makes other readers fail
        return None


def _has_exif(file: BinaryIO) -> bool:
    """Whether a PNG may hold EXIF. Only the heads of its chunks are read."""
    place, at = file.seek(0, os.SEEK_CUR), 8
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            break
        at += 12 + int.from_bytes(head[:4], "big")
    file.seek(place)
    return len(head) == 8


def _transparent_colour(image: Image.Image) -> Any:
    """The transparent colour at the depth of Pillow's pixels. Call it before `image.load()`."""
    colour = image.info.get("transparency")
    coded = {tile[3] for tile in getattr(image, "tile", ()) if isinstance(tile[3], str)}
    if isinstance(colour, int) and (width := _WIDENED.keys() & coded):
        return colour * _WIDENED[width.pop()]
    if isinstance(colour, tuple) and "RGB;16B" in coded:
        return tuple(value >> 8 for value in colour)
    return colour


def _flatten(image: Image.Image, transparent: Any) -> Image.Image:
    """Converts any mode to RGB, without metadata."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow would clip at 255. The upper byte is the same grey, since 255 * 257 = 65535.
        samples = np.asarray(image)
        grey = (samples >> 8).astype(np.uint8)
        if transparent is not None:
            grey[samples == transparent] = BACKGROUND[0]
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("corrupt", "32-bit pixels have no defined white; save it with 8 bits")
    if image.has_transparency_data:
        if image.info.get("transparency") not in (None, transparent):
            image = image.copy()
            image.info["transparency"] = transparent
        # Pillow converts premultiplied grey (La) only to LA.
        image = image.convert("LA") if image.mode == "La" else image
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # it would copy
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    flat = image.convert("RGB")  # a copy, also of RGB
    flat.info = {}
    return flat
