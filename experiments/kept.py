"""Share of records that give pairs with and without `--keep-target` (docs/pairs.md, Pairs kept).

python -m experiments.kept copies                 # 64 digit scenes, 16 noisy copies each
python -m experiments.kept copies --train 3       # and rDPO on equal numbers of pairs, 3 seeds
python -m experiments.kept photographs            # crops of scikit-image's photographs
python -m experiments.kept emoji --emoji package  # the unpacked npm package of the emoji
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realign.data.records import Record, StoredImage, read_pairs, write_pairs
from realign.digits.scenes import CAPTION_PROMPT, NOISE, WORDS, handwritten, make_scenes
from realign.pairs import engines
from realign.pairs.engines import Chat, Engine, Reply
from realign.pairs.masking import MASKERS
from realign.pairs.masking.mask import Masked
from realign.pairs.pipeline import PairsConfig, build_pairs

KINDS = (
    "country-flag", "animal-mammal", "transport-ground", "sky & weather", "clothing",
    "food-prepared", "geometric", "heart", "face-concerned", "person-sport",
)  # fmt: skip
"""Subcategories of `emoji-datasource-twitter` 16.0.0."""
EACH, SIDE = 60, 64  # images of a class, pixels of a crop
_BEFORE = "It shows "


def copies(seed: int, noise: float, scenes: int = 64, each: int = 16) -> list[Record]:
    """Return digit scenes with several noisy copies of each."""
    rng = np.random.default_rng([seed, 99])
    prompt = ({"role": "user", "content": CAPTION_PROMPT},)
    clean = make_scenes(scenes, biased=True, seed=seed, noise=0.0)
    records = []
    for copy in range(each):
        for i, scene in enumerate(clean):
            pixels = np.asarray(scene.image, np.float32) / 255
            pixels += rng.normal(0, noise, (*pixels.shape[:2], 1)).astype(np.float32)
            image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
            stored = (StoredImage.from_pil(image),)
            records.append(Record(f"s{i:03d}-{copy:02d}", prompt, scene.caption, "", stored))
    return records


def digits() -> Iterator[tuple[str, Image.Image]]:
    """Yield single digits with their names."""
    for digit, images in handwritten("train").items():
        for pixels in images[:EACH]:
            image = Image.fromarray((pixels * 255).astype(np.uint8)).convert("RGB")
            yield WORDS[digit], image.resize((16, 16))


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Yield random crops of photographs with their names."""
    from skimage import data

    from experiments.study.photographs import PHOTOGRAPHS

    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)()).convert("RGB")
        image.thumbnail((6 * SIDE, 6 * SIDE))
        for _ in range(EACH):
            x, y = (int(rng.integers(length - SIDE)) for length in image.size)
            yield name.replace("_", " "), image.crop((x, y, x + SIDE, y + SIDE))


def emoji(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yield emoji on white with the names of their subcategories."""
    entries = json.loads((package / "emoji.json").read_text())
    for kind in KINDS:
        found = [e for e in entries if e["has_img_twitter"] and e["subcategory"] == kind]
        for entry in found[:EACH]:
            image = Image.open(package / "img/twitter/64" / entry["image"]).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            yield kind.replace("-", " ").replace("& ", ""), white.convert("RGB")


class TrueClass(Engine):
    """An engine that completes with the true class of its image, and counts the requests."""

    name = "the true class"

    def __init__(self, classes: dict[bytes, str]) -> None:
        self.classes, self.asked = classes, 0

    def chat(self, requests: Any) -> list[Reply]:
        """Return the completed responses."""
        self.asked += len(requests)
        return [Reply(f"{_BEFORE}{self.classes[_pixels(chat)]}.") for chat in requests]


def _pixels(chat: Chat) -> bytes:
    return chat.images[0].convert("RGB").tobytes()


def _hide_class(text: str, *_: Any, **__: Any) -> Masked:
    return Masked((_BEFORE, "."), (text.removeprefix(_BEFORE).removesuffix("."),))


def compare(folder: Path, records: list[Record], engine: TrueClass | None, **settings: Any) -> None:
    """Print the result of both targets, and the number of completions of the engine."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.parquet"
    if not data.exists():
        write_pairs(data, records)
    config = PairsConfig(
        output=str(folder / "before.parquet"), data=str(data), quiet=True, **settings
    )
    for name, target in (("before", 0.0), ("after", config.keep_target)):
        if engine is not None:
            engine.asked = 0
        output = str(folder / f"{name}.parquet")
        print(build_pairs(replace(config, output=output, keep_target=target)))
        if engine is not None:
            print(f"{engine.asked} completions")


def train_both(folder: Path, seed: int) -> None:
    """Train rDPO on equal numbers of both pairs, and print the misnamed digits."""
    from realign.config import (
        DataConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        RunConfig,
        TrainConfig,
    )
    from realign.evaluate import EvaluateConfig, evaluate
    from realign.train import train

    pairs = {name: read_pairs(folder / f"{name}.parquet") for name in ("before", "after")}
    count = min(map(len, pairs.values()))
    for name, rows in pairs.items():
        chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
        file, run = folder / f"{name}-{count}.parquet", folder / f"{name}-rdpo"
        write_pairs(file, [rows[i] for i in np.sort(chosen)])
        train(
            TrainConfig(
                model=ModelConfig(lora_rank=128),
                data=DataConfig(pairs=str(file)),
                loss=LossConfig(objective="rdpo"),
                optim=OptimConfig(steps=100),
                run=RunConfig(output=str(run), seed=seed, quiet=True, save_every=0),
            )
        )
        rates = evaluate(EvaluateConfig(model=str(run / "model"), scenes=1000, seed=1))
        print(f"{name}, {count} pairs, seed {seed}: {rates['hallucination_rate'].value:.2%}")


def main() -> None:
    """Parse the arguments and run the comparison."""
    parser = argparse.ArgumentParser(description="Share of records that give pairs.")
    parser.add_argument("data", choices=("copies", "digits", "photographs", "emoji"))
    parser.add_argument("--emoji", type=Path, help="folder of the unpacked package")
    parser.add_argument("--noise", type=float, default=NOISE, help="noise of the copies")
    parser.add_argument("--train", type=int, default=0, help="seeds to train on the copies")
    parser.add_argument("--output", type=Path, default=Path("runs/kept"))
    options = parser.parse_args()
    if options.data == "copies":
        for seed in range(max(1, options.train)):
            folder = options.output / f"copies-{options.noise:g}-{seed}"
            records = copies(seed, options.noise)
            compare(folder, records, None, mask="numbers", seed=seed)
            if options.train:
                train_both(folder, seed)
        return
    if options.data == "emoji" and options.emoji is None:
        parser.error("emoji needs --emoji with the folder of the unpacked package")
    sources = {"digits": digits, "photographs": photographs, "emoji": lambda: emoji(options.emoji)}
    prompt = ({"role": "user", "content": "What is it?"},)
    records, classes = [], {}
    for i, (label, image) in enumerate(sources[options.data]()):
        classes[image.tobytes()] = label
        stored = (StoredImage.from_pil(image),)
        records.append(Record(f"r{i:04d}", prompt, f"{_BEFORE}{label}.", "", stored))
    engine = TrueClass(classes)
    engines.make_engine = lambda *_, **__: engine
    MASKERS["class"] = _hide_class
    folder = options.output / options.data
    compare(folder, records, engine, masker="class", refill="prompt")


if __name__ == "__main__":
    main()
