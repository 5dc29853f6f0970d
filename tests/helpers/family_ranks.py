"""One of two ranks that share the records of tiny models: `run(families)`.

Rank 0 compares the gradients of both with those of plain forwards over all records.
"""

import pytest
import torch
from family_cases import (
    OBJECTIVE,
    assert_same_gradients,
    encoded,
    gradients,
    true_loss,
    truth,
)
from tiny_vlms import make

from realign import distributed
from realign.modeling.forest import build_batch
from realign.modeling.model import ForestModel
from realign.training import fsdp


def run(families):
    """Compare all families. Rank 0 prints the number of tensors with a gradient of each."""
    device = distributed.start(fsdp=True)
    for family in families:
        _compare(family, device)
    distributed.stop()


def _compare(family, device):
    model = ForestModel(make(family)[0])
    fsdp.shard(model, device, torch.float32)
    examples, store = encoded(family, model)
    targets = -10 + torch.arange(3.0 * len(examples)).view(3, -1)
    rank, ranks = distributed.rank(), distributed.world_size()
    own = range(rank, len(examples), ranks)
    batch = build_batch([examples[i] for i in own], store, row_tokens=150)
    loss = model(batch, OBJECTIVE, targets[:, own]).loss
    (loss * ranks).backward()  # FSDP averages gradients over ranks
    whole = distributed.sum_over_ranks(loss.detach()[None])
    found = {n: g if g is None else g.full_tensor() for n, g in gradients(model.vlm).items()}
    if rank == 0:
        vlm, _ = make(family)
        ForestModel(vlm)  # freezes the tower
        true = true_loss(truth(vlm, family, examples), targets)
        true.backward()
        assert whole.item() == pytest.approx(true.item(), rel=1e-5)
        print(f"{family} gradients: {assert_same_gradients(found, gradients(vlm))}", flush=True)
