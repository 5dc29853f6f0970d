"""Images of a data set: paths in the image folder, and images that all readers decode alike."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from realign.data.images import MAX_PIXELS, ImageError, StoredImage


def inside(folder: Path, path: str) -> str:
    """The absolute path of a file named in a data set, which must be in the image folder.

    Symbolic links are followed first. An absolute path is accepted if it is in the folder.

    Raises:
        ImageError: "outside the folder" for a file in another folder.
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
    """Decode a stored image to 8-bit RGB, as training does.

    Raises:
        ImageError: for an image that cannot be used.
    """
    return stored.decode(max_pixels=max_pixels)[0]


def plain_image(stored: StoredImage) -> StoredImage:
    """An image that every reader decodes to the same pixels as `load_image`.

    An upright 8-bit RGB or grey image with one frame is not changed; others become PNG.

    Raises:
        ImageError: for an image that cannot be used.
    """
    image, plain = stored.decode()
    return stored if plain else StoredImage.from_pil(image, stored.path)
