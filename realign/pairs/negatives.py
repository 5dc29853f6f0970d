"""Visual negatives from a record's own picture: crop, noise, blank; baselines for retrieval.

- `crop` is mDPO's (arXiv 2406.11839), a crop of "0-20 %". We read this as the share that is
  *kept*, as other projects do: a window of 1 to 20 % of the picture's area, drawn evenly, with
  sides in a ratio of 3/4 to 4/3 of the picture's own, resized to the picture's size.
- `noise` is the diffusion noise of VCD (arXiv 2311.16922): `sqrt(a) x + sqrt(1 - a) e` with e
  standard normal for each pixel and colour, and a = 0.74 at step 500 of its schedule of 1000. Our x
  is in [-1, 1], and the result is rounded to 8 bits, because it is a picture. VCD's x is the
  output of a processor with about twice that contrast, so the same step is stronger in ours.
- `blank` is one grey, 128.

`retrieved` and `random` are other records' pictures, which the pipeline selects.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

DERIVED = ("crop", "noise", "blank")
"""Kinds made from the record's own picture."""
KINDS = ("retrieved", "random", *DERIVED)
STEPS = 1000
"""Steps of the noise schedule."""
GREY = 128
"""Level of the blank picture."""

_RATIO = 4 / 3  # of the sides of a crop to those of the picture, at most


def visual_negative(
    kind: str,
    image: Image.Image,
    rng: np.random.Generator,
    *,
    crop: tuple[float, float] = (0.01, 0.20),
    noise_step: int = 500,
) -> Image.Image:
    """Make a visual negative of a picture.

    Args:
        kind: crop, noise or blank.
        image: the RGB picture; it is not changed.
        rng: draws the window or the noise.
        crop: least and largest share of the area that a crop keeps.
        noise_step: of `STEPS`; the first adds almost nothing, the last leaves almost nothing.

    Returns:
        An RGB picture of the same size.

    Raises:
        ValueError: for another kind, shares outside (0, 1], or a step outside the schedule.
    """
    if kind == "crop":
        return _crop(image, rng, crop)
    if kind == "noise":
        return _noise(image, rng, noise_step)
    if kind == "blank":
        return Image.new("RGB", image.size, (GREY, GREY, GREY))
    if kind in KINDS:
        raise ValueError(
            f"a {kind!r} negative is another record's picture; choose the record, or use crop, "
            "noise or blank, which are made from the picture itself."
        )
    raise ValueError(f"negative is {kind!r}; it must be one of {', '.join(KINDS)}.")


def kept_at(step: int) -> float:
    """The share `a` of a picture's variance that remains at a step of the noise schedule.

    VCD's: `a` is the product of 1 - beta, and beta rises along a sigmoid from 1e-5 to 5e-3.
    """
    rise = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS)))
    return float(np.cumprod(1 - (rise * (5e-3 - 1e-5) + 1e-5))[step])


def _crop(image: Image.Image, rng: np.random.Generator, shares: tuple[float, float]) -> Image.Image:
    low, high = shares
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop is {shares}; give the least and the largest share, in (0, 1].")
    area, stretch = rng.uniform(low, high), _RATIO ** rng.uniform(-1, 1)
    width, height = (
        min(side, max(1, round(side * (area * ratio) ** 0.5)))
        for side, ratio in zip(image.size, (stretch, 1 / stretch), strict=True)
    )
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    box = (left, top, left + width, top + height)
    return image.convert("RGB").resize(image.size, Image.Resampling.BICUBIC, box=box)


def _noise(image: Image.Image, rng: np.random.Generator, step: int) -> Image.Image:
    if not 0 <= step < STEPS:
        raise ValueError(f"noise_step is {step}; it must be from 0 to {STEPS - 1}.")
    variance = kept_at(step)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    mixed = variance**0.5 * pixels + (1 - variance) ** 0.5 * noise
    return Image.fromarray(np.clip((mixed + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8))
