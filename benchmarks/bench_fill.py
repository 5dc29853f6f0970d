"""The reference pass: leaves by forest into the cache, against a plain loop over sequences.

Two models: the shipped digits, on pairs made of them, and a random LLaVA of 60 M parameters (hidden
512, 8 layers, V = 32000, 576 image tokens, prompt 64, responses 128). fp32, two threads or what
the machine has. Contestants, each computing the same log-probs (compared before timing):

- cache: `ReferenceCache.fill` into an empty table, everything included.
- bare forward: the model's own forward over the very same forest rows with logits for the response
  rows only, and nothing else: no log-probs, no cache, batches built beforehand.
- plain loop: one sequence at a time through the model, full logits, log_softmax, gather, as the
  authors' release does for its reference.
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
    """Pairs of the shipped digits, from 96 scenes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        build_pairs(PairsConfig(output=str(path), scenes=96, quiet=True))
        examples, store = encode(read_pairs(path), load_processor(ASSETS), Layout(4))
    return load_model(ASSETS).eval(), examples, store, 32


def llava_60m():
    """A random LLaVA and pairs of the usual lengths."""
    vlm = random_llava(*LLAVA_60M).eval()
    return vlm, *random_forests(2, prompt=64, response=128), 2


@pytest.fixture(scope="module", params=["digits", "llava-60m"])
def setting(request):
    return request.param, *{"digits": digits, "llava-60m": llava_60m}[request.param]()


@pytest.fixture(scope="module")
def error(setting):
    """The largest difference between what fill and the plain loop find, in nats."""
    off = float((fill(setting) - plain(setting)).abs().max())
    assert off < 2e-3  # fp32 sums of 128 log-probs near -10
    return off


def fill(setting):
    _, vlm, *forests, batch_rows = setting
    with tempfile.TemporaryDirectory() as folder:
        given = folder, {"weights": "x"}, ForestModel(vlm), *forests
        return models.fill(*given, batch_rows=batch_rows, device=torch.device("cpu"))


def bare(setting):
    """The forwards of `fill` over its own batches, and the logits of their response rows."""
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
    """(L, B): one sequence at a time."""
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
