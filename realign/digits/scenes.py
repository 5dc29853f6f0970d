"""Scenes of four handwritten digits, their captions and questions about them.

A scene shows four of scikit-learn's 1,797 real handwritten digits (8 x 8 grey levels). In a
*biased* scene, the right digit of a row nearly always follows from the left one. A model that is
trained on biased scenes learns this prior. In an *unbiased* scene, all four digits are independent.
A model that relies on the prior then names digits that are not in the image: it hallucinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top right", "bottom left", "bottom right")
PROPERTIES = {"even": (0, 2, 4, 6, 8), "large": (5, 6, 7, 8, 9)}
CAPTION_PROMPT = "name the digits ."

CELL = 8  # pixels of a quadrant: one handwritten digit
SIZE = 2 * CELL
NOISE = 0.20  # standard deviation of the pixel noise, for grey levels in [0, 1].
PRIOR = 0.97  # share of biased rows whose right digit follows from the left one.
TEST_DIGITS = 400  # number of digits for testing, at the end of the set.


@dataclass(frozen=True)
class Scene:
    """An image and its four digits."""

    image: Image.Image  # RGB, SIZE x SIZE
    digits: tuple[int, ...]  # four, in the order of PLACES

    @property
    def caption(self) -> str:
        """The true caption, e.g. "top left seven , top right two , ..."."""
        return caption_of(self.digits)


@dataclass(frozen=True)
class Question:
    """A yes/no question about a scene."""

    text: str
    answer: str  # "yes" or "no"


def caption_of(digits: tuple[int, ...]) -> str:
    """Write a caption that names `digits` in the order of PLACES."""
    named = (f"{place} {WORDS[digit]}" for place, digit in zip(PLACES, digits, strict=True))
    return " , ".join(named) + " ."


def digits_in(caption: str) -> list[int | None]:
    """Read the four digits in a caption; None for a place without a digit."""
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    digits: list[int | None] = []
    for place in PLACES:
        first, second = place.split()
        digit = None
        for i in range(len(words) - 2):
            if words[i] == first and words[i + 1] == second and words[i + 2] in WORDS:
                digit = WORDS.index(words[i + 2])
                break
        digits.append(digit)
    return digits


def prior(left: int) -> int:
    """The digit to the right of `left` in a biased row."""
    return (3 * left + 7) % 10


@lru_cache(maxsize=2)
def handwritten(split: str) -> dict[int, np.ndarray]:
    """scikit-learn's digits of a split: digit -> (count, CELL, CELL) fp32 in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    assert isinstance(data, dict)
    part = slice(-TEST_DIGITS, None) if split == "test" else slice(None, -TEST_DIGITS)
    images, targets = data["images"][part] / 16.0, data["target"][part]
    return {digit: images[targets == digit].astype(np.float32) for digit in range(10)}


Glyphs = Callable[[str], Mapping[int, np.ndarray]]
"""Split -> digit -> images, fp32 in [0, 1]: (count, CELL, CELL) grey levels or (..., 3) colours."""


def make_scenes(
    count: int,
    *,
    biased: bool,
    split: str = "train",
    seed: int = 0,
    noise: float = NOISE,
    follow: float = PRIOR,
    glyphs: Glyphs = handwritten,
) -> list[Scene]:
    """Draw `count` scenes.

    Args:
        count: number of scenes.
        biased: whether the right digit of a row follows from the left one (see `prior`).
        split: "train" or "test", which share no handwritten digit.
        seed: seed of the scenes.
        noise: standard deviation of the pixel noise, in grey levels from 0 to 1.
        follow: share of biased rows whose right digit follows from the left one
        glyphs: function that returns the images of each digit in a split.

    Returns:
        The scenes, each an RGB image of SIZE x SIZE pixels with its four digits.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'.")
    images = glyphs(split)
    rng = np.random.default_rng([seed, biased, split == "test"])
    scenes = []
    for _ in range(count):
        digits = []
        for _ in range(2):
            left = int(rng.integers(10))
            free = int(rng.integers(10))
            digits += [left, prior(left) if biased and rng.random() < follow else free]
        canvas = np.zeros((SIZE, SIZE, *images[0].shape[3:]), dtype=np.float32)
        for i, digit in enumerate(digits):
            glyph = images[digit][rng.integers(len(images[digit]))]
            y, x = CELL * (i // 2), CELL * (i % 2)
            canvas[y : y + CELL, x : x + CELL] = glyph
        canvas += rng.normal(0.0, noise, canvas.shape).astype(np.float32)
        pixels = (np.clip(canvas, 0, 1) * 255).astype(np.uint8)
        scenes.append(Scene(Image.fromarray(pixels).convert("RGB"), tuple(digits)))
    return scenes


def make_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Two yes/no questions about one place of a scene: the answers are yes, then no.

    As in POPE's adversarial setting, the prior often makes the wrong digit likely. At right-hand
    places, it is the digit of a biased row half of the time.
    """
    place = int(rng.integers(4))
    true = scene.digits[place]
    false = (true + int(rng.integers(1, 10))) % 10
    likely = prior(scene.digits[place - 1]) if place % 2 else true
    if likely != true and rng.random() < 0.5:
        false = likely
    return [
        Question(f"is {PLACES[place]} {WORDS[true]} ?", "yes"),
        Question(f"is {PLACES[place]} {WORDS[false]} ?", "no"),
    ]


def make_easy_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Two easier questions as a curriculum for yes/no answers: a digit, and a property of a digit.

    The answer to "is PLACE DIGIT ?" depends on place and digit together, so a model learns nothing
    from either of them. The answers to these questions are simpler.
    """
    first, second = rng.integers(4, size=2)
    name = sorted(PROPERTIES)[rng.integers(len(PROPERTIES))]
    answer = "yes" if scene.digits[second] in PROPERTIES[name] else "no"
    return [
        Question(f"what is {PLACES[first]} ?", WORDS[scene.digits[first]]),
        Question(f"is {PLACES[second]} {name} ?", answer),
    ]
