"""One rank of a run in which a record turns bad after a step: `nan_worker.py WHAT RECORD STEP ...`.

WHAT is `pixels`, where an image of the record becomes NaN, or `gradient`, where its loss is finite
and its gradient is not. RECORD is an index into the pairs; the other words are those of the run.
"""

import sys

import torch

from realign import encode, model, train
from realign.schedule import seed_step

GOOD = {
    "pixels": encode.ImageStore.pixels,
    "forward": model.ForestModel.forward,
    "load": train.load_inputs,
}


def plant(what, record, first):
    """From step `first` on the record is bad; returns what undoes it."""
    now = {"step": 0, "image": "", "name": ""}

    def load(*given, **more):
        inputs = GOOD["load"](*given, **more)
        now["image"] = inputs.examples[record].roots[0].images[0]
        now["name"] = inputs.examples[record].name
        return inputs

    def note(seed, number, rank):
        now["step"] = number
        seed_step(seed, number, rank)

    def pixels(store, key):
        good = GOOD["pixels"](store, key)
        bad = what == "pixels" and now["step"] >= first and key == now["image"]
        return torch.full_like(good, torch.nan) if bad else good

    def forward(self, batch, *more):
        out = GOOD["forward"](self, batch, *more)
        if what == "gradient" and now["step"] >= first and now["name"] in batch.names:
            out.loss.register_hook(lambda gradient: gradient * torch.nan)
        return out

    train.load_inputs, train.seed_step = load, note
    encode.ImageStore.pixels, model.ForestModel.forward = pixels, forward
    return now


def restore():
    """Undo `plant`."""
    train.load_inputs, train.seed_step = GOOD["load"], seed_step
    encode.ImageStore.pixels = GOOD["pixels"]
    model.ForestModel.forward = GOOD["forward"]


if __name__ == "__main__":
    kind, index, first_step, *words = sys.argv[1:]
    plant(kind, int(index), int(first_step))
    sys.exit(train.main(words))
