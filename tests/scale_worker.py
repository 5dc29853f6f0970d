"""A rank that makes several runs of `realign.train` in one process group, and counts collectives.

`torchrun ... scale_worker.py RUNS.json`, a file of [{"output": ..., "arguments": [...]}, ...]; the
counts go to `collectives.json` in the output folder of each run.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from realign import parallel
from realign.config import parse
from realign.noise import hush_libraries
from realign.train import train

COUNTED = ("all_gather_single", "reduce_scatter_single", "all_reduce")  # what FSDP2 calls


def count(name, counts):
    call = getattr(dist, name)

    def counted(*args, **kwargs):
        counts[name] += 1
        return call(*args, **kwargs)

    setattr(dist, name, counted)


if __name__ == "__main__":
    hush_libraries()
    counts = Counter()
    for name in COUNTED:
        count(name, counts)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        counts.clear()
        train(parse(run["arguments"]))
        if parallel.rank() == 0:
            Path(run["output"], "collectives.json").write_text(json.dumps(counts))
    parallel.stop()
