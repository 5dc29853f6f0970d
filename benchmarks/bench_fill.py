"""The reference pass: leaves by forest into the cache, against a plain loop over sequences.

Two models: the shipped digits, on pairs made of them, and a random LLaVA of 60 M parameters (hidden
512, 8 layers, V = 32000, 576 image tokens, prompt 64, responses 128). fp32, two threads or what
the machine has. Contestants, each computing the same log-probs (compared before timing):

- cache: `ReferenceCache.fill` into an empty table, everything included.
- bare forward: the model's own forward over the very same forest rows with logits for the response
  rows alone, and nothing else: no log-probs, no cache, batches built beforehand.
- plain loop: one sequence at a time through the model, full logits, log_softmax, gather; what the
  authors' release does for its reference.
- plain batches: the same, eight sequences at a time, padded.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import random_llava, random_pairs

from realign import reference
from realign.digits import ASSETS
from realign.encode import encode_records
from realign.forest import build_batch
from realign.layouts import Layout
from realign.loading import load_model, load_processor
from realign.model import ForestModel
from realign.pairs.pipeline import PairsConfig, build_pairs
from realign.records import read_pairs
from realign_kernels import ReferenceCache, objectives
from realign_kernels.filling import plan
from realign_kernels.leaves import collect_leaves

CPU = torch.device("cpu")
OURS = "fill"


def digits():
    """About 250 pairs of the shipped digits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        build_pairs(PairsConfig(output=str(path), scenes=256, quiet=True))
        examples, store = encode_records(
            read_pairs(path),
            load_processor(ASSETS),
            objectives.rdpo(),
            layout=Layout(4),
            max_response_tokens=64,
            max_tokens=512,
            progress=False,
        )
    return load_model(ASSETS).eval(), examples, store, 32


def llava_60m():
    """A random LLaVA and pairs of the usual lengths."""
    vlm = random_llava(hidden=512, intermediate=1376, layers=8, heads=8).eval()
    return vlm, *random_pairs(4, prompt=64, response=128), 2


@pytest.fixture(scope="module", params=["digits", "llava-60m"])
def setting(request):
    return request.param, *{"digits": digits, "llava-60m": llava_60m}[request.param]()


def fill(setting):
    _, vlm, examples, store, batch_rows = setting
    with (
        tempfile.TemporaryDirectory() as folder,
        ReferenceCache.open(folder, {"weights": "x"}) as cache,
    ):
        return reference.fill(
            cache,
            ForestModel(vlm).eval(),
            examples,
            store,
            row_tokens=max(example.longest_tree for example in examples),
            batch_rows=batch_rows,
            device=CPU,
            progress=False,
            say=lambda _: None,
        )


def forest_batches(setting):
    """The batches that `fill` runs, built."""
    _, _, examples, store, batch_rows = setting
    row_tokens = max(example.longest_tree for example in examples)
    leaves = collect_leaves(examples)
    made = []
    for batch in plan(leaves, np.ones(len(leaves.keys), bool), row_tokens, batch_rows):
        single = [reference._alone(examples[i], j) for i, j in leaves.pairs[batch.leaves].tolist()]
        made.append(build_batch(single, store, row_tokens=row_tokens))
    return made


@torch.inference_mode()
def bare_forward(setting, batches):
    model = ForestModel(setting[1])
    return [setting[1].lm_head(model._hidden(batch)) for batch in batches]


@torch.inference_mode()
def plain(setting, size):
    """(L, B): `size` sequences at a time, padded on the right."""
    _, vlm, examples, store, _ = setting
    found = []
    pairs = [(e, leaf) for e in examples for leaf in e.leaves]
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        lengths = [len(e.roots[x.root].ids) + len(x.ids) for e, x in part]
        ids = torch.zeros(len(part), max(lengths), dtype=torch.int64)
        for row, (e, x) in enumerate(part):
            ids[row, : lengths[row]] = torch.tensor(np.concatenate([e.roots[x.root].ids, x.ids]))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        pixels = torch.cat(
            [store.bundle(e.roots[x.root].images[0])["pixel_values"] for e, x in part]
        )
        logits = vlm(
            input_ids=ids, attention_mask=mask.long(), pixel_values=pixels, use_cache=False
        ).logits[:, :-1].float()  # fmt: skip
        logps = F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        for row, (e, x) in enumerate(part):
            first = len(e.roots[x.root].ids) - 1
            found.append(logps[row, first : first + len(x.ids)].double().sum())
    return torch.stack(found).view(len(examples), -1).T


def timed(benchmark, setting, call):
    """Times `call`, with a fill before each round: ratios in pairs stand a machine that drifts."""
    benchmark.group = f"reference pass, {setting[0]}"
    beside = []

    def before():
        began = time.perf_counter()
        fill(setting)
        beside.append(time.perf_counter() - began)

    setup = None if call is OURS else before
    run = (lambda: fill(setting)) if call is OURS else call
    found = benchmark.pedantic(run, setup=setup, rounds=5, warmup_rounds=1, iterations=1)
    if beside:
        ratios = np.array(benchmark.stats.stats.data) / np.array(beside[-5:])
        benchmark.extra_info["paired"] = [float(f(ratios)) for f in (np.median, np.min, np.max)]
    return found


def test_fill_of_the_cache(benchmark, setting):
    found = timed(benchmark, setting, OURS)
    truth = plain(setting, 1)
    benchmark.extra_info["error"] = float((found - truth).abs().max())
    assert (found - truth).abs().max() < 2e-3  # fp32 sums of 128 log-probs near -10


def test_bare_forward_over_the_same_rows(benchmark, setting):
    batches = forest_batches(setting)
    timed(benchmark, setting, lambda: bare_forward(setting, batches))


def test_plain_loop(benchmark, setting):
    timed(benchmark, setting, lambda: plain(setting, 1))


def test_plain_batches_of_8(benchmark, setting):
    timed(benchmark, setting, lambda: plain(setting, 8))
