"""Patches of ten photographs of scikit-image in place of the ten digits.

Each quadrant of a scene shows a patch, and each number word is the name of a photograph. Train and
test patches come from different stripes of a photograph and share no pixel.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from realign.digits.scenes import CELL

PHOTOGRAPHS = (
    "brick", "gravel", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina",
    "rocket", "moon", "cell",
)  # fmt: skip
"""Names in `skimage.data`, in the order of the number words. Its wheel contains them all."""

SHORT_SIDE = 192  # pixels, 24 patches
STRIPE = 2 * CELL  # every fourth stripe of columns is in the test split
STEP = 2  # pixels between patches


@lru_cache(maxsize=2)
def patches(split: str) -> dict[int, np.ndarray]:
    """Return the patches of a split ("train" or "test").

    Returns:
        Number of a photograph, 0 to 9 -> patches, (count, CELL, CELL, 3), fp32 in [0, 1].

    Raises:
        ValueError: if scikit-image is missing.
    """
    try:
        from skimage import data
    except ImportError:
        raise ValueError(
            "Scenes of photographs need scikit-image. Install it with: pip install 'realign[study]'"
        ) from None
    return {
        number: _cut(_pixels(getattr(data, name)()), split)
        for number, name in enumerate(PHOTOGRAPHS)
    }


def _pixels(photograph: np.ndarray) -> np.ndarray:
    image = Image.fromarray(photograph).convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BOX), np.float32) / 255


def _cut(pixels: np.ndarray, split: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    columns = [
        x
        for x in range(0, width - CELL + 1, STEP)
        if x % STRIPE <= STRIPE - CELL and (x // STRIPE % 4 == 3) == (split == "test")
    ]
    rows = range(0, height - CELL + 1, STEP)
    return np.stack([pixels[y : y + CELL, x : x + CELL] for y in rows for x in columns])
