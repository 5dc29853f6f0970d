"""One rank of four consecutive runs: `run_all(pairs, folder, record)`.

FOLDER/whole is an ordinary run. In FOLDER/pixels an image of the record with that index becomes NaN
at step 4. In FOLDER/gradient that record's loss is finite and its gradient is not. In FOLDER/image
the images of rank 1 change their sizes from its third micro-batch, so only rank 1 fails.
"""

import os
import sys
from pathlib import Path

import torch
from runs import arguments

from realign import distributed, train
from realign.data import record_table
from realign.modeling import model
from realign.modeling.images import ImageStore
from realign.training import setup, step
from realign.training.schedule import seed_step

GOOD = {
    "bundle": ImageStore.bundle,
    "digest": record_table.digest_of_bytes,
    "forward": model.ForestModel.forward,
    "load": setup.load_inputs,
    "feed": step.Feed.__call__,
}


def plant(what, record, first):
    """Make the record bad from step `first` until `restore`.

    A step is one micro-batch here. Batches are built ahead of steps, so both are counted.
    """
    now = {"step": 0, "fed": 0, "image": "", "name": ""}

    def load(*given, **more):
        inputs = GOOD["load"](*given, **more)
        now["image"] = inputs.examples[record].roots[0].images[0]
        now["name"] = inputs.examples[record].name
        return inputs

    def note(seed, number, rank):
        now["step"] = number
        seed_step(seed, number, rank)

    def feed(self, *part):
        now["fed"] += 1
        if what == "image" and now["fed"] == 3 and distributed.rank() == 1:
            self.store._bundles.clear()
            record_table.digest_of_bytes = lambda _: b""  # the bytes have changed
        return GOOD["feed"](self, *part)

    def bundle(store, key):
        good = GOOD["bundle"](store, key)
        bad = what == "pixels" and now["fed"] >= first and key == now["image"]
        return {"pixel_values": torch.full_like(good["pixel_values"], torch.nan)} if bad else good

    def forward(self, batch, *more):
        out = GOOD["forward"](self, batch, *more)
        if what == "gradient" and now["step"] >= first and now["name"] in batch.names:
            out.loss.register_hook(lambda gradient: gradient * torch.nan)
        return out

    setup.load_inputs, step.seed_step = load, note
    ImageStore.bundle, model.ForestModel.forward = bundle, forward
    step.Feed.__call__ = feed


def restore():
    """Undo `plant`."""
    setup.load_inputs, step.seed_step = GOOD["load"], seed_step
    ImageStore.bundle, step.Feed.__call__ = GOOD["bundle"], GOOD["feed"]
    record_table.digest_of_bytes = GOOD["digest"]
    model.ForestModel.forward = GOOD["forward"]


def run_all(pairs, folder, record):
    """Run all four as one rank. The last run loses the process group."""
    distributed.stop = lambda: None  # one process group for all four
    for what in ("whole", "pixels", "gradient", "image"):
        if what != "whole":
            plant(what, record, 4)
        words = arguments(pairs, Path(folder) / what, "--save-every", 2, "--fsdp")
        if what in ("pixels", "gradient"):
            # With a mask, NaN in one of the four trees of a row would spread to the others
            words += ["--attention", "sdpa", "--row-tokens", "240"]
        code = train.main(words)
        if os.environ["RANK"] == "0" or what == "image":
            print(f"{what} ends with {code}", file=sys.stderr, flush=True)
        restore()
    os._exit(0)
