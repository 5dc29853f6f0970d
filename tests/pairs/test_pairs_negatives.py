"""Visual negatives made from an image: crop, noise and blank."""

import numpy as np
import pytest
from PIL import Image

from realign.pairs.negatives import KINDS, kept_at, visual_negative


def _ramp(width, height) -> Image.Image:
    """An image whose pixels encode their place: red across, green down, from 0 to 255."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))


def test_a_crop_keeps_1_to_20_percent_of_the_area_and_the_size():
    image, shares, ratios = _ramp(300, 200), [], []
    rng = np.random.default_rng(0)
    for _ in range(200):
        seen = np.asarray(visual_negative("crop", image, rng), dtype=float)
        assert seen.shape == (200, 300, 3)
        width, height = np.ptp(seen[..., 0]) / 255, np.ptp(seen[..., 1]) / 255
        shares.append(width * height)
        ratios.append(width / height)
    assert min(shares) > 0.005 and max(shares) < 0.21
    assert np.mean(shares) == pytest.approx(0.105, abs=0.01)  # drawn evenly
    assert 0.65 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.5
    small = visual_negative("crop", image, rng, crop=(0.5, 0.5))
    levels = np.asarray(small, dtype=float)
    assert np.ptp(levels[..., 0]) * np.ptp(levels[..., 1]) / 255**2 == pytest.approx(0.5, abs=0.02)
    assert visual_negative("crop", Image.new("RGB", (1, 2)), rng).size == (1, 2)


def test_noise_is_that_of_the_schedule():
    grey, ramp = Image.new("RGB", (256, 256), (128, 128, 128)), _ramp(128, 128)

    def made(image, step):
        seen = visual_negative("noise", image, np.random.default_rng(0), noise_step=step)
        return np.asarray(seen, dtype=float) / 127.5 - 1

    # On grey only the noise remains. sqrt(1 - a) is computed from VCD's schedule step by step.
    for step in (300, 500):
        kept = 1.0
        for i in range(step + 1):
            kept *= 1 - (0.00499 / (1 + np.exp(6 - 12 * i / 999)) + 1e-5)
        deviation = (1 - kept) ** 0.5
        assert kept_at(step) == pytest.approx(kept)
        levels = made(grey, step)
        assert (np.abs(levels) < deviation).mean() == pytest.approx(0.6827, abs=0.01)
        assert abs(levels.mean()) < 0.01
    assert kept == pytest.approx(0.745, abs=1e-3)
    # A ramp keeps its share: the slope shrinks by sqrt(a) where no value is clipped.
    levels, across = made(ramp, 300)[..., 0], np.linspace(-1, 1, 128)
    middle = np.abs(across) < 0.4
    slope = np.polyfit(across[middle], levels.mean(0)[middle], 1)[0]
    assert slope == pytest.approx(kept_at(300) ** 0.5, abs=0.05)
    assert np.abs(made(ramp, 0)[..., 0] - across).max() < 0.04


def test_negatives_follow_the_seed_and_leave_the_picture():
    image = _ramp(40, 30)
    before = image.tobytes()
    for kind in ("crop", "noise", "blank"):
        first, again, other = (
            visual_negative(kind, image, np.random.default_rng(seed)).tobytes()
            for seed in (1, 1, 2)
        )
        assert first == again and (first == other) == (kind == "blank")
        assert first != before
    assert image.tobytes() == before
    assert visual_negative("blank", image, None).getcolors() == [(1200, (128, 128, 128))]
    assert visual_negative("noise", image.convert("L"), np.random.default_rng(0)).mode == "RGB"


def test_which_negatives_are_refused():
    image, rng = _ramp(4, 4), np.random.default_rng(0)
    for kind in KINDS[:2]:
        with pytest.raises(ValueError, match="the image of another record"):
            visual_negative(kind, image, rng)
    with pytest.raises(ValueError, match="negative is 'blur'; it must be one of retrieved"):
        visual_negative("blur", image, rng)
    with pytest.raises(ValueError, match="crop is"):
        visual_negative("crop", image, rng, crop=(0, 0.2))
    with pytest.raises(ValueError, match="noise_step is 1000"):
        visual_negative("noise", image, rng, noise_step=1000)
