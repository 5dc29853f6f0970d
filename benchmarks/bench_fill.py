"""Benchmark of the reference pass: filling the cache from forests, against a plain loop.

The models are the shipped digits model, on pairs of digits, and a random LLaVA of 60 M parameters.
The latter has hidden size 512, 8 layers, V = 32000, 576 image tokens, prompts of 64 and responses
of 128 tokens. Both run in fp32. The log-probs of these contestants are compared before timing:

- ours: `ReferenceCache.fill` into an empty table, with all its overhead.
- bare forward: only the model's forward over the same forest rows, with logits of the response
  rows. It computes no log-probs, has no cache, and gets prepared batches.
- plain loop: one sequence at a time with full logits, log_softmax and gather, as in the authors'
  release.
"""

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import models
from benchmarks.models import LLAVA_60M, encode, random_forests, random_llava
from benchmarks.race import race
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.modeling.layouts import Layout
from realign.modeling.loading import load_model, load_processor
from realign.modeling.model import ForestModel
from realign.pairs.pipeline import PairsConfig, build_pairs

OURS = "ours"


def digits():
    """The shipped digits model, and pairs of 96 scenes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        build_pairs(PairsConfig(output=str(path), scenes=96, quiet=True))
        examples, store = encode(read_pairs(path), load_processor(ASSETS), Layout(4))
    return load_model(ASSETS).eval(), examples, store, 32


def llava_60m():
    """A random LLaVA, and pairs of the usual lengths."""
    vlm = random_llava(*LLAVA_60M).eval()
    return vlm, *random_forests(2, prompt=64, response=128), 2


@pytest.fixture(scope="module", params=["digits", "llava-60m"])
def setting(request):
    return request.param, *{"digits": digits, "llava-60m": llava_60m}[request.param]()


@pytest.fixture(scope="module")
def error(setting):
    """Largest difference between the log-probs of `fill` and the plain loop, in nats."""
    off = float((fill(setting) - plain(setting)).abs().max())
    assert off < 2e-3  # rounding of fp32 sums of 128 log-probs near -10
    return off


def fill(setting):
    _, vlm, *forests, batch_rows = setting
    with tempfile.TemporaryDirectory() as folder:
        given = folder, {"weights": "x"}, ForestModel(vlm), *forests
        return models.fill(*given, batch_rows=batch_rows, device=torch.device("cpu"))


def bare(setting):
    """The forwards of `fill` over its batches, with the logits of the response rows."""
    model, head, batches = ForestModel(setting[1]), setting[1].lm_head, []
    hidden = ForestModel._hidden

    def keep(model, batch):
        batches.append(batch)
        return hidden(model, batch)

    with patch.object(ForestModel, "_hidden", keep):
        fill(setting)

    @torch.inference_mode()
    def call():
        for batch in batches:
            head(model._hidden(batch))

    return call


@torch.inference_mode()
def plain(setting):
    """(L, B) log-probs, one sequence at a time."""
    _, vlm, examples, store, _ = setting
    found = []
    for example in examples:
        for leaf in example.leaves:
            root = example.roots[leaf.root]
            ids = torch.from_numpy(np.concatenate([root.ids, leaf.ids]))[None]
            pixels = store.bundle(root.images[0])["pixel_values"]
            logits = vlm(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, :-1]
            logps = F.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])
            found.append(logps[0, len(root.ids) - 1 :].double().sum())
    return torch.stack(found).view(len(examples), -1).T


CONTESTANTS = {
    OURS: lambda setting: lambda: fill(setting),
    "bare forward": bare,
    "plain loop": lambda setting: lambda: plain(setting),
}


@pytest.mark.parametrize("name", CONTESTANTS)
def test_reference_pass(benchmark, setting, error, name):
    race(
        benchmark,
        f"cache, fill, {setting[0]}",
        case={"what": f"fill {setting[0]}"},
        contestant=name,
        role="limit" if name == "bare forward" else None,
        call=CONTESTANTS[name](setting),
        ours=CONTESTANTS[OURS](setting),
        budget=8.0,
        error={"log-prob": error} if name == OURS else None,
    )
