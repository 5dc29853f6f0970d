"""One rank of three runs, one after the other: `run_all(pairs, folder, record)`.

Nothing happens to the first, in FOLDER/whole. In FOLDER/pixels an image of the record with that
index becomes NaN at step 4, in FOLDER/gradient its loss is finite and its gradient is not.
"""

import os
import sys
from pathlib import Path

import torch
from runs import arguments

from realign import distributed, train
from realign.modeling import model
from realign.modeling.images import ImageStore
from realign.training import setup, step
from realign.training.schedule import seed_step

GOOD = {
    "bundle": ImageStore.bundle,
    "forward": model.ForestModel.forward,
    "load": setup.load_inputs,
    "feed": step.Feed.__call__,
}


def plant(what, record, first):
    """From step `first` on the record is bad, until `restore`.

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
    model.ForestModel.forward = GOOD["forward"]


def run_all(pairs, folder, record):
    """The three runs, one after the other, as one rank."""
    leave, distributed.stop = distributed.stop, lambda: None  # one process group for all three
    for what in ("whole", "pixels", "gradient"):
        if what != "whole":
            plant(what, record, 4)
        words = arguments(pairs, Path(folder) / what, "--save-every", 2, "--fsdp", steps=8)
        code = train.main(words)
        if os.environ["RANK"] == "0":
            print(f"{what} ends with {code}", file=sys.stderr)
        restore()
    leave()
