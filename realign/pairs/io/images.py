"""Images of a data set: decoding, and conversion to plain images."""

from __future__ import annotations

from PIL import Image

from realign.data.images import MAX_PIXELS, ImageError, StoredImage

__all__ = ["ImageError", "load_image", "plain_image"]


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
