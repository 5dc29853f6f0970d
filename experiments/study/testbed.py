"""Testbeds of the study: the base model, the source records and the test scenes of all arms.

The scenes are scenes of the demo with more noise and a stronger prior, with digits or patches of
photographs. The base depends on the prior: it misnames few images where the prior holds, and many
where it does not. So a method can be better or worse than the base. The base also learns to
complete a masked caption, so that the study can compare `--refill prompt`. All settings were
selected by results of bases only.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.digits_pretrain import pretrain
from experiments.study import photographs
from realign.data.records import Record, StoredImage
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, NOISE, PRIOR, Scene, handwritten, make_scenes
from realign.evaluate import EVALUATION_SEED

TUNING_SEED = 100
"""Seed for the tuning of learning rates. Its scenes are not used again."""


@dataclass(frozen=True)
class Testbed:
    """Kind of images and sizes of a testbed. docs/study.md reports `TESTBEDS`."""

    pictures: str = "digits"  # codespell:ignore
    noise: float = 0.25  # grey levels
    follow: float = 0.99  # share of rows that follow the prior
    base_steps: int = 1000  # of pretraining, or 0 for the shipped digits model
    records: int = 1024  # source scenes of the pairs
    steps: int = 80  # of training
    batch_size: int = 32
    lora_rank: int = 16
    scenes: int = 1500  # unbiased test scenes
    biased_scenes: int = 500  # test scenes in which the prior holds

    @property
    def images(self) -> str:
        """Kind of images, "digits" or "photographs"."""
        return self.pictures  # codespell:ignore

    @property
    def drawn(self) -> dict[str, Any]:
        """Options of `make_scenes`."""
        return {"noise": self.noise, "follow": self.follow, "glyphs": GLYPHS[self.images]}


GLYPHS = {"digits": handwritten, "photographs": photographs.patches}
TESTBEDS = {
    "digits": Testbed(),
    "photographs": Testbed("photographs", noise=0.1),
    "demo": Testbed(noise=NOISE, follow=PRIOR, base_steps=0),
}


def make_base(folder: Path, bed: Testbed, seed: int) -> None:
    """Write the base of a seed to `folder` atomically: pretrained, or the shipped model."""
    if not bed.base_steps:
        shutil.copytree(ASSETS, folder.with_name(f".{folder.name}.partial"), dirs_exist_ok=True)
        folder.with_name(f".{folder.name}.partial").replace(folder)
        return
    model, processor = pretrain(bed.base_steps, seed, completions=True, progress=False, **bed.drawn)
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.replace(folder)


def source_records(bed: Testbed, seed: int) -> list[Record]:
    """Return the source records of the pairs: biased scenes with true captions."""
    prompt = ({"role": "user", "content": CAPTION_PROMPT},)
    scenes = make_scenes(bed.records, biased=True, seed=seed, **bed.drawn)
    return [
        Record(f"scene-{i:05d}", prompt, s.caption, "", (StoredImage.from_pil(s.image),))
        for i, s in enumerate(scenes)
    ]


def test_scenes(bed: Testbed, seed: int, *, biased: bool = False) -> tuple[list[Scene], int]:
    """Return test scenes, and the seed of the questions about them.

    No model is trained on images of the test split. The scenes are unbiased, or follow the prior as
    often as the training scenes. All seeds share their test scenes, except the tuning seed.
    """
    own = EVALUATION_SEED + 1000 + (seed == TUNING_SEED)
    count = bed.biased_scenes if biased else bed.scenes
    return make_scenes(count, biased=biased, split="test", seed=own, **bed.drawn), own
