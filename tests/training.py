"""Short runs on digit pairs, for the tests of training."""

import subprocess
import sys
import time

import numpy as np
import torch
from safetensors.torch import load_file

from realign.config import parse
from realign.metrics import read_jsonl
from realign.train import train

# Runs that differ in ranks or accumulation add the same numbers in another order. After six Adam
# steps fp32 rounding has grown to 1e-6 of the loss here; ten times that is the bound.
CURVE_TOLERANCE = 1e-5


def arguments(pairs, output, *more, steps=6):
    """Command-line words of a run with batches of 8."""
    given = ["--pairs", pairs, "--output", output, "--steps", steps, "--batch-size", 8]
    given += ["--micro-batch-size", 8, "--quiet", *more]
    return [str(word) for word in given]


def run(pairs, output, *more, steps=6):
    """Train in this process; returns the entries of its log."""
    train(parse(arguments(pairs, output, *more, steps=steps)))
    return read_jsonl(output / "metrics.jsonl")


def start(*words):
    """Train in a process of its own, with its messages in pipes."""
    command = [sys.executable, "-m", "realign.train", *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(process, output, step):
    """Return when the log of a run in progress has an entry of that step."""
    log = output / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate()[1])


def curve(entries, name="loss"):
    """One quantity of a log, over its steps."""
    return np.array([entry[name] for entry in entries])


def without_seconds(entries):
    """A log less its wall times: two runs that did the same have equal ones."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def weights(output):
    """The final adapter of a run."""
    return load_file(output / "model" / "adapter_model.safetensors")


def assert_same_run(output, truth, steps=6):
    """Same curve, all of it, and same final weights, bit for bit."""
    found = read_jsonl(output / "metrics.jsonl")
    assert [entry["step"] for entry in found] == list(range(1, steps + 1))
    assert without_seconds(found) == without_seconds(read_jsonl(truth / "metrics.jsonl"))
    ours, theirs = weights(output), weights(truth)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
