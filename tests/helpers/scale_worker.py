"""A rank of several runs of `realign.train` in one process group, with counts of collectives.

`run_all(RUNS.json)` reads [{"output": ..., "arguments": [...]}, ...] and writes the counts to
`collectives.json` in the output folder of each run. Of two ranks the last one has no weights of its
own. It first compares the weights it receives with loaded ones (`weights.json`).
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from realign import distributed
from realign.config import parse
from realign.digits import ASSETS
from realign.modeling.loading import add_lora, load_model
from realign.modeling.model import ForestModel
from realign.third_party import silence_third_party
from realign.train import train
from realign.training import fsdp

COUNTED = ("all_gather_single", "reduce_scatter_single", "all_reduce")  # the collectives of FSDP2


def count(name, counts):
    call = getattr(dist, name)

    def counted(*args, **kwargs):
        counts[name] += 1
        return call(*args, **kwargs)

    setattr(dist, name, counted)


def received(dtype):
    """{name: whether it is bitwise that of a loaded model} for all parameters and buffers."""
    device = distributed.start(fsdp=True)
    vlm = load_model(ASSETS, dtype, meta=distributed.rank() > 0)
    if distributed.rank() and dtype == torch.bfloat16:  # as if rank 0 had merged an adapter
        vlm.lm_head.weight = vlm.get_input_embeddings().weight
    torch.manual_seed(distributed.rank())
    add_lora(vlm, 4, 8.0)
    meta = {name for name, value in vlm.named_parameters() if value.is_meta}
    fsdp.shard(ForestModel(vlm), device, dtype)
    loaded = load_model(ASSETS, dtype)
    torch.manual_seed(0)
    add_lora(loaded, 4, 8.0)
    truth = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    found = dict(vlm.named_parameters()) | dict(vlm.named_buffers())
    assert list(found) == list(truth) and (len(meta) > 90) == (distributed.rank() > 0)
    whole = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in found.items()}
    return {n: v.dtype == truth[n].dtype and torch.equal(v, truth[n]) for n, v in whole.items()}


def run_all(file):
    """Run all runs that a file lists, as one rank."""
    silence_third_party()
    if os.environ["WORLD_SIZE"] == "2":
        weights = {str(dtype): received(dtype) for dtype in (torch.float32, torch.bfloat16)}
        if distributed.rank() == distributed.world_size() - 1:
            Path(file).with_name("weights.json").write_text(json.dumps(weights))
    counts = Counter()
    for name in COUNTED:
        count(name, counts)
    for run in json.loads(Path(file).read_text()):
        counts.clear()
        train(parse(run["arguments"]))
        if distributed.rank() == 0:
            Path(run["output"], "collectives.json").write_text(json.dumps(counts))
    distributed.stop()
