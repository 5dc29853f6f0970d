"""Images along an arc of similarity, for tests of the choice of neighbours.

Image i is at the angle i * STEP. Neighbours in a group of `GROUP` images show the same colour, and
the engine completes "A [MASK] box." with the colour of its image. So brute force knows all pairs.
"""

from pathlib import Path

import numpy as np
import torch
from killed_runs import before_a_file
from PIL import Image

from realign.data.records import Record, StoredImage, write_pairs
from realign.pairs import engines
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.stages import embed

COUNT, GROUP, STEP = 120, 30, 0.01  # images, images of a colour, radians
COLOURS = ("red", "green", "blue", "black")


def place(stored: StoredImage | Image.Image) -> int:
    """The number of an image."""
    image = stored.open("") if isinstance(stored, StoredImage) else stored
    return image.convert("RGB").getpixel((0, 0))[0]


def colour(number: int) -> str:
    return COLOURS[number // GROUP]


class Arc:
    """An encoder of these images."""

    def __init__(self, *_, **__):
        self.open, self.device = lambda: None, torch.device("cpu")

    def prepare(self, image):
        return place(image)

    def encode(self, places):
        angles = STEP * np.array(places)
        return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


class Sees:
    """An engine that sees a word in each image."""

    def __init__(self, word=colour):
        self.word, self.asked, self.name = word, 0, "sees"

    def open(self):
        pass

    def close(self):
        pass

    def estimate(self, requests, total=None):
        return f"about {total} requests"

    def chat(self, requests):
        self.asked += len(requests)
        return [Reply(f"A {self.word(place(request.images[0]))} box.") for request in requests]


def use_arc(setattr=setattr) -> Sees:
    """Makes the pipeline use `Arc`, and every engine the returned one."""
    engine = Sees()
    setattr(embed, "Embedder", Arc)
    setattr(engines, "make_engine", lambda *_, **__: engine)
    return engine


def write_arc(path: Path, chosen=lambda i: f"A {colour(i)} box.", *, files=False) -> None:
    """Writes the records with the response `chosen(i)` to image i, and `files` of images."""
    prompt = ({"role": "user", "content": "What is it?"},)
    records = []
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(256, size=(8, 8, 3), dtype=np.uint8)
        pixels[0, 0, 0] = i
        image = StoredImage.from_pil(Image.fromarray(pixels))
        if files:
            (path.parent / f"{i}.png").write_bytes(image.data)
            image = StoredImage(path=f"{i}.png")
        records.append(Record(f"{i:03d}", prompt, chosen(i), "", (image,)))
    write_pairs(path, records)


def arc_settings(folder: Path) -> dict:
    """Settings of a run on the records in `folder`."""
    return {
        "output": str(folder / "pairs.parquet"),
        "data": str(folder / "data.parquet"),
        "mask": "attributes",
        "refill": "prompt",
        "hash_distance": -1,
        "quiet": True,
    }


def arc_config(folder: Path, **changed) -> PairsConfig:
    return PairsConfig(**arc_settings(folder) | changed)


def killed_on_arc(stage: str, name: str, folder: Path, output: str) -> None:
    """Runs the pipeline, and dies when a file of a stage is written."""
    use_arc()
    settings = arc_settings(folder) | {"output": output}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    before_a_file(stage, name, *(flag.removesuffix("=True") for flag in flags))


def nearest(i: int, ceiling: float) -> list[int]:
    """Other images below the ceiling, nearest first and ties by index."""
    below = [j for j in range(COUNT) if j != i and np.cos(STEP * (i - j)) < ceiling]
    return sorted(below, key=lambda j: (abs(i - j), j))


def brute_force(ceiling: float, reach: int, k: int = 10) -> int:
    """Number of records with another colour among the tried images."""
    kept = 0
    for i in range(COUNT):
        near = nearest(i, ceiling)[:reach]
        tried = sorted(near, key=lambda j: colour(j) == colour(i))[:k]
        kept += any(colour(j) != colour(i) for j in tried)
    return kept
