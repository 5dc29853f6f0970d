"""Pictures as they come: what is refused, and how the rest becomes 8-bit RGB.

A picture's header is read first, so one that says it is too large is refused before any pixel is
decoded. Only common picture formats are opened; Pillow knows others that start programs or hold
further files inside.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from realign.records import StoredImage

MAX_PIXELS = 50_000_000
BACKGROUND = (
    255,
    255,
    255,
)  # behind transparent pixels: what they lie on when a browser shows them
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture cannot be used.

    Attributes:
        reason: "missing", "corrupt", "too large", "outside the folder", "no image" or "malformed".
        detail: what exactly, for the person who looks.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def inside(folder: Path, path: str) -> str:
    """The absolute path of a file named in a data set, which must lie in the image folder.

    Symbolic links are followed first. An absolute path is taken if it lies in the folder, too.

    Raises:
        PictureError: "outside the folder" where it does not.
    """
    root = os.path.realpath(folder)
    try:
        found = os.path.realpath(os.path.join(root, path))
    except ValueError:  # a null byte
        raise PictureError("missing", f"{path!r} is no file name") from None
    if os.path.commonpath([root, found]) != root:
        raise PictureError("outside the folder", f"{path!r} is not in {root}")
    return found


def load_picture(stored: StoredImage, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to 8-bit RGB.

    The first frame of an animation, upright as EXIF says, transparent parts on white. 16 bits per
    pixel keep their upper 8. CMYK is converted without colour management; a CMYK JPEG is read as
    inverted, which is how Adobe's programs write it and browsers read it.

    Args:
        stored: bytes, or a path that was checked (`inside`).
        max_pixels: width times height above which a picture is refused. Pillow itself refuses
            what is above 179 million.

    Returns:
        An RGB picture without further information (no EXIF, no colour profile).

    Raises:
        PictureError: for a picture that cannot be used.
    """
    return decode_picture(stored, max_pixels=max_pixels)[0]


def plain_picture(stored: StoredImage, *, max_pixels: int = MAX_PIXELS) -> StoredImage:
    """A picture that every reader decodes to the same pixels as `load_picture`.

    An upright 8-bit RGB or grey picture with one frame stays as it is stored; others become PNG.

    Raises:
        PictureError: for a picture that cannot be used.
    """
    image, plain = decode_picture(stored, max_pixels=max_pixels)
    return stored if plain else StoredImage.from_pil(image, stored.path)


def decode_picture(
    stored: StoredImage, *, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, bool]:
    """The picture as `load_picture` gives it, and whether every reader decodes it to that.

    Raises:
        PictureError: for a picture that cannot be used.
    """
    if stored.data is None and stored.path is None:
        raise PictureError("no image", "neither bytes nor a path")
    if stored.data is None and not os.path.isfile(stored.path):  # a pipe would block
        raise PictureError("missing", f"{stored.path} is no file")
    source = stored.path if stored.data is None else io.BytesIO(stored.data)
    try:
        with Image.open(source, formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise PictureError(
                    "too large", f"{width} x {height} is more than {max_pixels} pixels"
                )
            return _to_rgb(image)
    except (PictureError, MemoryError):
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise PictureError("missing", str(error)) from error
    except Image.DecompressionBombError as error:
        raise PictureError("too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise PictureError("corrupt", f"none of the formats {', '.join(_formats())}") from error
    except Exception as error:  # damaged files end in IndexError, struct.error, KeyError, ...
        raise PictureError("corrupt", f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    mode = image.mode
    # The further pictures of an MPO, a phone's JPEG, are no animation.
    still = not getattr(image, "is_animated", False) or image.format == "MPO"
    image.load()
    plain = still and mode in ("RGB", "L") and "transparency" not in image.info
    flat = _flatten(image)
    try:
        turned = image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF says nothing about the pixels, but stops other readers
        turned, plain = 1, False
    if turned in _UPRIGHT:
        flat, plain = flat.transpose(_UPRIGHT[turned]), False
    return flat, plain


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB, without metadata."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow would clip at 255. 255 * 257 = 65535, so the upper byte is the same grey.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise PictureError("corrupt", "32 bits per pixel have no defined white; save it with 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(ground, image)
    flat = image.convert("RGB")  # a copy, also of RGB
    flat.info = {}
    return flat
