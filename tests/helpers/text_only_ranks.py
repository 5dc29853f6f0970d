"""One of two ranks, of which one has no image in its micro-batch: `run_all(families, words)`.

Rank 0 compares the summed gradients with those of plain forwards over all records.
"""

import pytest
import torch
from family_cases import assert_same_gradients, encoded, gradients, truth
from tiny_vlms import make

from realign import distributed
from realign.config import parse
from realign.modeling.forest import build_batch
from realign.modeling.model import ForestModel
from realign.train import train
from realign.training import fsdp


def run_all(families, words):
    """Compare all families, as one rank. Rank 0 prints a line for each. Then `train words` runs."""
    device = distributed.start(fsdp=True)
    for family in families:
        try:
            line = _same(family, device)
        except Exception as error:  # the next families are compared all the same
            line = repr(error)
        if distributed.rank() == 0:
            print(f"compared {family}: {line}", flush=True)
    train(parse(words))
    distributed.stop()


def _same(family, device):
    from test_text_only import DPO, dpo_loss, mixed, references

    model = ForestModel(make(family)[0]).train()
    fsdp.shard(model, device, torch.float32)
    records = mixed(family)
    examples, store = encoded(family, model, DPO, records)
    tower = 0
    for own in ([0, 2], [1, 3]), ([1], [3]):  # images on rank 0 only, then on none
        model.zero_grad()
        part = own[distributed.rank()]
        batch = build_batch([examples[i] for i in part], store, row_tokens=150)
        assert batch.images is not None and batch.examples == len(part)
        with torch.no_grad():
            logps = batch.leaf_sums(model.logps(batch))
        loss = model(batch, DPO, references(len(records))[:, part]).loss
        (loss * 2).backward()  # FSDP averages gradients over ranks
        found = {n: g if g is None else g.full_tensor() for n, g in gradients(model.vlm).items()}
        whole = distributed.sum_over_ranks(loss.detach()[None])
        if distributed.rank():
            continue
        used = [i for share in own for i in share]
        vlm, _ = make(family)
        ForestModel(vlm).train()  # freezes the tower
        given = [records[i] for i in used]
        true = truth(vlm, family, [examples[i] for i in used], DPO, given)
        assert (logps - true[:, : len(part)]).abs().max() < 5e-5
        expected = dpo_loss(true, used)
        expected.backward()
        assert whole.item() == pytest.approx(expected.item(), rel=1e-5)
        tower += assert_same_gradients(found, gradients(vlm))
    return tower > 16
