"""Benchmark of batched answers: questions per second, one by one and in batches.

    python -m benchmarks.answers --count 64 --rounds 3

Each contestant is one pass of `realign.evaluate.answering` over the same questions, with a random
LLaVA on the CPU in fp32. The contestants alternate, and a ratio is the median over the rounds. The
answers of all contestants must be equal. `--side` sets the size of the images, and so their tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks import models
from realign.evaluate import answering
from realign.pairs.engines import make_engine

BATCH = 16
CONTESTANTS = {
    "one by one": (1, True),
    "batches, unsorted": (BATCH, False),
    "batches": (BATCH, True),
}
"""Name -> batch size, and whether the questions are sorted by length."""


def write_setting(folder: Path, count: int, side: int) -> list[answering.Question]:
    """Write a model and images. Returns questions of 4 to 256 words."""
    config = models.llava_config(
        vision=(192, 384, 4, 4), text=(512, 1376, 8, 8), size=side, vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip
    models.random_on("cpu", config, torch.float32).save_pretrained(folder / "model")
    models.word_processor(size=side).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    questions = []
    for number in range(count):
        pixels = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        words = rng.integers(len(models.WORDS), models.IMAGE_ID, int(2 ** rng.uniform(2, 8)))
        text = " ".join(f"w{word}" for word in words)
        questions.append(answering.Question(str(number), text, f"{number}.jpg"))
    return questions


def seconds(folder: Path, questions, batch: int, by_length: bool, tokens: int):
    """Time of one pass, and its answers."""
    engine = make_engine(f"transformers:{folder / 'model'}", batch_size=batch, dtype="fp32")
    engine.open()
    with tempfile.TemporaryDirectory() as place:
        sheet = answering.prepare(
            questions, folder, Path(place) / "a.jsonl", model="m", max_tokens=tokens
        )
        if not by_length:
            answering._parts = lambda sheet, batch: [list(sheet.questions)]
        start = time.perf_counter()
        lines = answering.answer(engine, sheet, batch=4 * BATCH, progress=False)
        return time.perf_counter() - start, [line["answer"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--side", type=int, default=112, help="Side of an image in pixels.")
    args = parser.parse_args()
    sort = answering._parts
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    equal = True
    with tempfile.TemporaryDirectory() as place:
        questions = write_setting(Path(place), args.count, args.side)
        for _ in range(args.rounds):
            texts = []
            for name, (batch, by_length) in CONTESTANTS.items():
                answering._parts = sort
                took, answers = seconds(Path(place), questions, batch, by_length, args.tokens)
                times[name].append(took)
                texts.append(answers)
            equal = equal and all(answers == texts[0] for answers in texts)
    first = times["one by one"]
    found = {
        name: {
            "questions per second": round(args.count / median(values), 2),
            "times faster than one by one": round(
                median(a / b for a, b in zip(first, values, strict=True)), 2
            ),
        }
        for name, values in times.items()
    }
    print(json.dumps({"answers equal": equal, **found}, indent=1))


if __name__ == "__main__":
    main()
