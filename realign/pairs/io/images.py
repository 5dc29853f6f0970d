"""Images of a data set: decoding, conversion to plain images, and a note about their folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote

from PIL import Image

from realign.data.images import MAX_PIXELS, DataFolder, ImageError, StoredImage
from realign.data.records import Record

__all__ = ["ImageError", "ImagePaths", "load_image", "plain_image"]


class ImagePaths:
    """Notes whether written records name image files outside the folder of the output."""

    def __init__(self) -> None:
        self._any = False

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yields the records."""
        for record in records:
            images = (*record.images, *record.retrieved_images)
            self._any = self._any or any(image.data is None for image in images)
            yield record

    def note(self, output: str | Path, folder: DataFolder) -> str:
        """The flag that other commands need to read the images, or "" if they need none."""
        beside = Path(folder.path).is_relative_to(Path(output).resolve().parent)
        if beside or not self._any:
            return ""
        return f"; read it with --image-folder {quote(folder.path)}"


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
