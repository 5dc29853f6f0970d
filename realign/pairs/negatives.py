"""Visual negatives made from a record's own image, `crop`, `noise` and `blank`.

They are baselines for retrieval.

- `crop` is mDPO's (arXiv 2406.11839), a crop of "0-20 %". We read this as the share that is
  *kept*, like other projects. The window has 1 to 20 % of the image's area, drawn uniformly. Its
  aspect ratio is 3/4 to 4/3 of the image's own. It is resized to the size of the image.
- `noise` is the diffusion noise of VCD (arXiv 2311.16922), `sqrt(a) x + sqrt(1 - a) e`. Here e is
  standard normal for each pixel and colour, and a = 0.74 at step 500 of the schedule of 1000. Our x
  is in [-1, 1], and the result is an image, rounded to 8 bits. VCD's x is the output of a processor
  with about twice that contrast, so the same step is stronger here.
- `blank` is a uniform grey, 128.

`retrieved` and `random` negatives are the images of other records. The pipeline selects them.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

DERIVED = ("crop", "noise", "blank")
"""Kinds made from the record's own image."""
KINDS = ("retrieved", "random", *DERIVED)
STEPS = 1000
"""Number of steps in the noise schedule."""
GREY = 128
"""Grey level of a blank image."""

_RATIO = 4 / 3  # maximum change of the aspect ratio by a crop


def visual_negative(
    kind: str,
    image: Image.Image,
    rng: np.random.Generator,
    *,
    crop: tuple[float, float] = (0.01, 0.20),
    noise_step: int = 500,
) -> Image.Image:
    """Make a visual negative of an image.

    Args:
        kind: crop, noise or blank.
        image: the RGB image, which is not changed.
        rng: draws the window or the noise.
        crop: minimum and maximum share of the area that a crop keeps.
        noise_step: step of the noise schedule, from 0 (almost no noise) to `STEPS` - 1 (almost
            only noise).

    Returns:
        An RGB image of the same size.

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
            f"a {kind!r} negative is the image of another record. Select that record, or use crop, "
            "noise or blank, which are made from the image itself."
        )
    raise ValueError(f"negative is {kind!r}; it must be one of {', '.join(KINDS)}.")


def kept_at(step: int) -> float:
    """The share `a` of an image's variance that remains at a step of VCD's noise schedule.

    `a` is the product of 1 - beta, and beta rises along a sigmoid from 1e-5 to 5e-3.
    """
    rise = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS)))
    return float(np.cumprod(1 - (rise * (5e-3 - 1e-5) + 1e-5))[step])


def _crop(image: Image.Image, rng: np.random.Generator, shares: tuple[float, float]) -> Image.Image:
    low, high = shares
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop is {shares}; it must be a minimum and a maximum share in (0, 1].")
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
