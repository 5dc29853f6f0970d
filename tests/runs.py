"""Runs of `realign.train` in tests: their arguments, their curves, and how far two may differ."""

import numpy as np

from realign.config import parse
from realign.metrics import read_jsonl
from realign.train import train

# Runs that differ in ranks or accumulation add the same numbers in another order. After six Adam
# steps fp32 rounding has grown to 1e-6 of the loss here; ten times that is the bound.
CURVE_TOLERANCE = 1e-5


def arguments(pairs, output, *more, steps=6):
    """The command line of a short run on digit pairs."""
    given = ["--pairs", pairs, "--output", output, "--steps", steps, "--batch-size", 8]
    given += ["--micro-batch-size", 8, "--quiet", *more]
    return [str(word) for word in given]


def run(pairs, output, *more, steps=6):
    """Train in this process; returns the entries of the curve."""
    train(parse(arguments(pairs, output, *more, steps=steps)))
    return read_jsonl(output / "metrics.jsonl")


def curve(entries, name="loss"):
    """One metric of every step."""
    return np.array([entry[name] for entry in entries])


def assert_same_curves(entries, truth, factor=1):
    """Both runs are the same up to rounding, relative to the largest value where it is above 1."""
    names = ("loss", "grad_norm", "rewards/margins", "rewards/visual_margins", "logps/chosen")
    for name in names:
        one, other = curve(entries, name), curve(truth, name)
        bound = factor * CURVE_TOLERANCE * max(1, np.abs(other).max())
        assert one.shape == other.shape and np.abs(one - other).max() <= bound, name
