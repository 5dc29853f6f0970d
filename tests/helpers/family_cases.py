"""Records, true log-probs and losses of a tiny model of every family."""

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_truth import encode, separate_logps
from tiny_vlms import FAMILIES as ATTENDING
from tiny_vlms import make, random_record

from realign.data.records import Record
from realign.modeling.encode import chat_prompt, encode_records
from realign.modeling.forest import build_batch
from realign.modeling.loading import add_lora
from realign.modeling.model import ForestModel
from realign_kernels import objectives

FAMILIES = (*ATTENDING, "qwen3_5")

# fp32 rounding: a leaf's log-prob is a sum of up to 10 tokens of magnitude up to 10. Measured: 5e-6
# of it, and 6e-6 of the largest entry of any gradient.
LOGP_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 5e-5
CPU = torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs" / "families.md"
OBJECTIVE = objectives.rdpo(beta=0.3, visual_weight=0.7)
ROW_TOKENS = (1, 150, 4096)  # at most one tree per row, several trees, all trees in one row


@functools.cache
def made(family):
    """(processor, records): one, two and three images; the second's negatives are the first's."""
    processor = make(family)[1]
    rng = np.random.default_rng(FAMILIES.index(family))
    records = [random_record(family, processor, rng, images=n) for n in (1, 1, 2, 3)]
    first, second = records[:2]
    turns = first.prompt
    records[1] = Record(second.name, turns, second.chosen, "red", second.images, first.images)
    return processor, records


def encoded(family, model, objective=OBJECTIVE, records=None):
    processor, own = made(family)
    return encode_records(
        records or own,
        processor,
        objective,
        layout=model.layout,
        max_response_tokens=64,
        max_tokens=512,
        progress=False,
    )


def truth(vlm, family, examples, objective=OBJECTIVE, records=None):
    """(L, B): each leaf as one plain sequence, encoded as by `apply_chat_template`."""
    processor, own = made(family)
    table = []
    for record, example in zip(records or own, examples, strict=True):
        row = []
        for leaf, named in zip(example.leaves, objective.leaves, strict=True):
            stored = record.images if named.image == "image" else record.retrieved_images
            text = chat_prompt(processor, record.prompt, len(stored))[0]
            inputs = encode(processor, [one.open("") for one in stored], text)
            row.append(separate_logps(vlm, inputs, [leaf.ids])[0].sum())
        table.append(torch.stack(row))
    return torch.stack(table, 1)


def true_loss(logps, targets):
    chosen, rejected, visual = 0.3 * (logps - targets.double())
    return -(F.logsigmoid(chosen - rejected) + 0.7 * F.logsigmoid(chosen - visual)).sum()


def forest_loss(model, examples, store, row_tokens=150):
    targets = -10 + torch.arange(3.0 * len(examples)).view(3, -1)
    out = model(build_batch(examples, store, row_tokens=row_tokens), OBJECTIVE, targets)
    out.loss.backward()
    return out.loss, targets


def gradients(vlm):
    return {name: p.grad for name, p in vlm.named_parameters() if p.requires_grad}


def assert_same_gradients(found, true):
    """Entries agree relative to the whole gradient. Returns the number of changed tensors."""
    scale = max(g.abs().max() for g in true.values() if g is not None)
    assert found.keys() == true.keys()
    for name, expected in true.items():
        got = found[name]
        zero = torch.zeros(())
        worst = (zero if got is None else got) - (zero if expected is None else expected)
        assert worst.abs().max() / scale < GRADIENT_TOLERANCE, (name, worst.abs().max() / scale)
    return sum(g is not None and bool(g.any()) for g in true.values())


def outputs_of(module):
    """A list that collects the tensors that the parts of `module` return."""
    seen = []
    for part in module.modules():
        part.register_forward_hook(
            lambda _, args, out: seen.append(out) if isinstance(out, torch.Tensor) else None
        )
    return seen


def with_lora(family, attention="sdpa"):
    vlm, _ = make(family, attention=attention)
    linear = [m for m in vlm.model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    model = ForestModel(vlm)
    torch.manual_seed(0)
    add_lora(vlm, 2, 4)
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    assert sum(p.requires_grad for p in vlm.parameters()) == 2 * len(linear) >= 28
    return vlm, model, *encoded(family, model)


def lines(model, examples, store):
    return list(model.check_forest(examples[0], store, CPU))
