"""Ranks forked from a process that has the libraries: importing them takes a rank six seconds."""

import multiprocessing
import os
from pathlib import Path

import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["realign.train", "realign.pairs.__main__"])


def run_ranks(worker, count, log, *arguments) -> str:
    """Run `worker(*arguments)` as the ranks of one group.

    Args:
        worker: a function of a module.
        count: of ranks.
        log: file that takes what the ranks write to stderr.
        arguments: that can be pickled.

    Returns:
        The content of `log`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours, as in parallel.launch
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    Path(log).write_text("")
    ranks_of = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
    ranks = [
        CONTEXT.Process(target=_rank, args=(worker, log, os.environ | given, *arguments))
        for given in ranks_of
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    said = Path(log).read_text()
    assert [rank.exitcode for rank in ranks] == [0] * count, said
    return said


def _rank(worker, log, environment, *arguments):
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    worker(*arguments)
