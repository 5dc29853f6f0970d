"""How much faster infill is in batches than one record at a time without a cache, at equal output.

    OMP_NUM_THREADS=2 python -m benchmarks.infill_speed

On the digits model: 256 captions in batches of 64 by `infill`, 32 of them by `infill_plain`, in
turns within one process; time per record, its median over the rounds, and the ratio in each round.
Outputs are compared before anything is printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, make_scenes
from realign.modeling.loading import load_model, load_processor
from realign.pairs.infill.refill import infill, infill_plain
from realign.pairs.masking.mask import CATEGORIES, mask_response

RECORDS, BATCH, PLAIN, ROUNDS = 256, 64, 32, 7
MASKS = {
    "one number hidden": (("numbers",), 1),
    "all numbers hidden": (("numbers",), 0),
    "two of all segments hidden": (CATEGORIES, 2),
}


def main() -> None:
    """Measure and print a line for each way to mask."""
    vlm, processor = load_model(ASSETS).eval(), load_processor(ASSETS)
    scenes = make_scenes(RECORDS, biased=True, seed=7)
    pictures = [[scene.image] for scene in [*scenes[1:], scenes[0]]]  # of another scene
    prompts = [[{"role": "user", "content": CAPTION_PROMPT}]] * RECORDS
    rng = np.random.default_rng(0)
    for name, (kinds, segments) in MASKS.items():
        masked = [mask_response(scene.caption, kinds, segments, rng) for scene in scenes]
        given = (prompts, pictures, masked)
        few = [part[:PLAIN] for part in given]
        rounds = []
        for number in range(ROUNDS + 1):  # the first warms up
            batched, found = _time(lambda g=given: infill(vlm, processor, *g, batch_size=BATCH))
            plain, expected = _time(lambda g=few: infill_plain(vlm, processor, *g))
            if found[:PLAIN] != expected:
                raise AssertionError(f"{name}: outputs differ")
            if number:
                rounds.append((batched / RECORDS, plain / PLAIN))
        ratios = sorted(plain / batched for batched, plain in rounds)
        batched, plain = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        print(
            f"{name}: {batched:.2f} ms a record in batches of {BATCH}, {plain:.1f} ms one by one; "
            f"{statistics.median(ratios):.1f} times [{ratios[0]:.1f}, {ratios[-1]:.1f}]",
            flush=True,
        )


def _time(call: Callable[[], list]) -> tuple[float, list]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


if __name__ == "__main__":
    main()
