"""Images of a data set: checks of their paths, decoding, and conversion to plain images."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from realign.data.images import MAX_PIXELS, ImageError, StoredImage


def inside(folder: Path, path: str) -> str:
    """The absolute path of a file in a data set, which must be in the image folder.

    Symbolic links are resolved first. An absolute path is accepted if it is in the folder.

    Raises:
        ImageError: "outside the folder" for a file that is not in the folder.
    """
    root = os.path.realpath(folder)
    try:
        file = os.path.realpath(os.path.join(root, path))
    except ValueError:  # a null byte
        raise ImageError("missing", f"{path!r} is not a file name") from None
    if os.path.commonpath([root, file]) != root:
        raise ImageError("outside the folder", f"{path!r} is not in {root}")
    return file


def load_image(stored: StoredImage, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a stored image to 8-bit RGB, like training.

    Raises:
        ImageError: for an invalid image.
    """
    return stored.decode(max_pixels=max_pixels)[0]


def plain_image(stored: StoredImage) -> StoredImage:
    """An image that every reader decodes to the same pixels as `load_image`.

    An upright 8-bit RGB or grey image with one frame is not changed. Others are converted to PNG.

    Raises:
        ImageError: for an invalid image.
    """
    image, plain = stored.decode()
    return stored if plain else StoredImage.from_pil(image, stored.path)
