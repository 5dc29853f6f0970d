"""Testbeds, equal for every arm: the base, its records, and the scenes of its evaluation.

The scenes are those of the demo with more noise and a stronger prior, or the same with patches of
photographs in place of digits. The base then depends on the prior: it misnames few images where the
prior holds and many where it does not, so a method can be better or worse. The base also learns to
complete a masked caption, so that `--refill prompt` can be compared. These settings were selected
only by results of bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.digits_pretrain import pretrain
from experiments.study import photographs
from realign.data.records import Record, StoredImage
from realign.digits.scenes import CAPTION_PROMPT, Scene, handwritten, make_scenes
from realign.evaluate import EVALUATION_SEED

TUNING_SEED = 100
"""The seed for tuning of learning rates; none of its scenes is used again."""


@dataclass(frozen=True)
class Testbed:
    """Kind and sizes; docs/study.md reports `TESTBEDS`."""

    pictures: str = "digits"  # or "photographs"
    noise: float = 0.25  # grey levels
    follow: float = 0.99  # share of rows that follow the prior
    base_steps: int = 1000
    records: int = 1024  # scenes that the pairs come from
    steps: int = 80  # of training
    batch_size: int = 32
    lora_rank: int = 16
    scenes: int = 1500  # unbiased test scenes
    biased_scenes: int = 500  # test scenes in which the prior holds

    @property
    def drawn(self) -> dict[str, Any]:
        """Options of `make_scenes`."""
        return {"noise": self.noise, "follow": self.follow, "glyphs": GLYPHS[self.pictures]}


GLYPHS = {"digits": handwritten, "photographs": photographs.patches}
TESTBEDS = {"digits": Testbed(), "photographs": Testbed("photographs", noise=0.1)}


def make_base(folder: Path, bed: Testbed, seed: int) -> None:
    """Pretrain a seed's base and write it to `folder`, whole or not at all."""
    model, processor = pretrain(bed.base_steps, seed, completions=True, progress=False, **bed.drawn)
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.replace(folder)


def source_records(bed: Testbed, seed: int) -> list[Record]:
    """Source records of the pairs: biased scenes with true captions, without rejected responses."""
    prompt = ({"role": "user", "content": CAPTION_PROMPT},)
    scenes = make_scenes(bed.records, biased=True, seed=seed, **bed.drawn)
    return [
        Record(f"scene-{i:05d}", prompt, s.caption, "", (StoredImage.from_pil(s.image),))
        for i, s in enumerate(scenes)
    ]


def test_scenes(bed: Testbed, seed: int, *, biased: bool = False) -> tuple[list[Scene], int]:
    """Scenes of images never trained on, and the seed of the questions about them.

    They are unbiased, or follow the prior as often as the scenes of training do.
    All seeds of the study have the same test scenes; the tuning seed has others.
    """
    own = EVALUATION_SEED + 1000 + (seed == TUNING_SEED)
    count = bed.biased_scenes if biased else bed.scenes
    return make_scenes(count, biased=biased, split="test", seed=own, **bed.drawn), own
