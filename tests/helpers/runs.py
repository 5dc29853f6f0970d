"""Runs of `realign.train` in tests: arguments, inputs, curves, and tolerances."""

import time

import numpy as np
import torch
from safetensors.torch import load_file

from realign.config import LossConfig, parse
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.files import read_jsonl
from realign.modeling.encode import encode_records
from realign.modeling.layouts import Layout
from realign.modeling.loading import load_processor
from realign.train import train
from realign.training.setup import load_inputs
from realign.training.throughput import TIMING
from realign_kernels import objectives

# Runs with other ranks or accumulation add the same numbers in another order. After six Adam steps
# fp32 rounding has grown to 1e-6 of the loss here. The bound is ten times that.
CURVE_TOLERANCE = 1e-5


def arguments(pairs, output, *more, steps=6):
    """The command line of a short run on digit pairs, in fp32 on every device."""
    given = ["--pairs", pairs, "--output", output, "--steps", steps, "--batch-size", 8]
    given += ["--micro-batch-size", 8, "--dtype", "fp32", "--quiet", *more]
    return [str(word) for word in given]


def run(pairs, output, *more, steps=6):
    """Train in this process. Returns the entries of the curve."""
    train(parse(arguments(pairs, output, *more, steps=steps)))
    return read_jsonl(output / "metrics.jsonl")


def encoded(records, processor=None, objective=None):
    """(examples, store) of records or a pairs file for the digits model, by default for rDPO."""
    records = records if isinstance(records, list) else read_pairs(records)
    return encode_records(
        records, processor or load_processor(ASSETS), objective or objectives.rdpo(),
        layout=Layout(4), max_response_tokens=100, max_tokens=512, progress=False,
    )  # fmt: skip


def loaded(pairs, dtype=torch.float32, weights_dtype=torch.float32):
    """The digits model and the examples of the pairs."""
    return load_inputs(
        ASSETS, pairs, LossConfig(), dtype=dtype, weights_dtype=weights_dtype, train_vision=False,
        max_response_tokens=100, progress=False,
    )  # fmt: skip


def wait_for_step(process, output, step):
    """Return when the log of a run in progress has an entry of that step."""
    log = output / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate()[1])


def curve(entries, name="loss"):
    """One metric of every step."""
    return np.array([entry[name] for entry in entries])


def assert_same_curves(entries, truth):
    """Both runs are equal up to rounding, relative to values if they exceed 1."""
    names = ("loss", "grad_norm", "rewards/margins", "rewards/visual_margins", "logps/chosen")
    for name in names:
        one, other = curve(entries, name), curve(truth, name)
        bound = CURVE_TOLERANCE * max(1, np.abs(other).max())
        assert one.shape == other.shape and np.abs(one - other).max() <= bound, name


def without_timing(entries):
    """A log without times and memory: equal for runs that did the same."""
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in entries]


def weights(output):
    """The final adapter or model of a run."""
    (file,) = (output / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_run(output, truth, steps=6):
    """The same complete curve, and bitwise the same final weights."""
    found = read_jsonl(output / "metrics.jsonl")
    assert [entry["step"] for entry in found] == list(range(1, steps + 1))
    assert without_timing(found) == without_timing(read_jsonl(truth / "metrics.jsonl"))
    ours, theirs = weights(output), weights(truth)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
