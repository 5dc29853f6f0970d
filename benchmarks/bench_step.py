"""A training step of a LLaVA: rDPO on the forest against plain DPO and plain rDPO.

Hidden 256, 6 layers, V = 32000, 576 image tokens, a prompt of 64, responses of 64, 2 examples,
fp32, LoRA on the language model, frozen vision tower. `plain` is what a trainer without forest,
cache and fused head does: a sequence per response, full logits, a reference forward each step.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import random_llava, random_pairs

from realign.forest import build_batch
from realign.loading import add_lora
from realign.model import ForestModel
from realign_kernels import objectives

PROMPT = RESPONSE = 64


@pytest.fixture(scope="module")
def setting():
    vlm = random_llava(hidden=256, intermediate=768, layers=6, heads=4)
    reference = copy.deepcopy(vlm).requires_grad_(False)
    add_lora(vlm, rank=32, alpha=64)
    return vlm, reference, *random_pairs(2, prompt=PROMPT, response=RESPONSE)


def plain_logps(model, examples, store, leaves):
    """(leaves, B): every leaf as a sequence of its own, full logits."""
    pairs = [(e, e.leaves[i]) for i in range(leaves) for e in examples]
    ids = torch.stack(
        [torch.tensor(np.concatenate([e.roots[x.root].ids, x.ids])) for e, x in pairs]
    )
    pixels = torch.cat([store.bundle(e.roots[x.root].images[0])["pixel_values"] for e, x in pairs])
    logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, :-1].float()
    logps = F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return logps[:, -RESPONSE:].sum(-1).view(leaves, len(examples))


def plain_step(setting, name):
    vlm, reference, examples, store = setting
    objective = objectives.get(name)
    leaves = len(objective.leaves)
    with torch.no_grad():
        constants = plain_logps(reference, examples, store, leaves)
    rewards = 0.1 * (plain_logps(vlm, examples, store, leaves) - constants)
    loss = sum(-F.logsigmoid(rewards[0] - rewards[i]).sum() for i in range(1, leaves))
    loss.backward()
    return loss.detach()


def forest_step(setting, constants):
    vlm, _, examples, store = setting
    batch = build_batch(
        examples, store, row_tokens=max(example.longest_tree for example in examples)
    )
    out = ForestModel(vlm)(batch, objectives.rdpo(), constants)
    out.loss.backward()
    return out.loss.detach()


def timed(benchmark, call):
    benchmark.group = "step"
    return benchmark.pedantic(call, rounds=5, warmup_rounds=1, iterations=1)


def test_rdpo_on_the_forest_with_kept_references(benchmark, setting):
    _, reference, examples, store = setting
    with torch.no_grad():
        constants = plain_logps(reference, examples, store, 3)
    loss = timed(benchmark, lambda: forest_step(setting, constants))
    assert abs(loss - plain_step(setting, "rdpo")) < 1e-3


def test_plain_dpo_with_live_reference(benchmark, setting):
    timed(benchmark, lambda: plain_step(setting, "dpo"))


def test_plain_rdpo_with_live_reference(benchmark, setting):
    timed(benchmark, lambda: plain_step(setting, "rdpo"))
