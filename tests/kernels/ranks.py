"""Worker processes for checks, forked from a process that has loaded the libraries."""

import contextlib
import datetime
import traceback

import torch
import torch.distributed as dist
from forked_ranks import CONTEXT

ANSWER = 60
"""Timeout of a check in seconds."""


def serve(rank, size, members, store, pipe):
    """Runs checks from the pipe. Answers each with its traceback, or ''."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=20)  # turns a hang into an error
    store = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    groups = {name: dist.new_group(ranks, timeout=limit) for name, ranks in members.items()}
    while message := pipe.recv():
        check, arguments = message
        try:
            check(*(groups.get(a, a) for a in arguments))
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


@contextlib.contextmanager
def processes(size, members, store):
    """Yields run(check, *arguments), which calls check in `size` processes.

    run fails if a process fails. `members` is {name: ranks}. An argument that is one of its names
    is replaced by that process group.
    """
    pipes, started = [], []
    for rank in range(size):
        here, there = CONTEXT.Pipe()
        args = (rank, size, members, store, there)
        started.append(CONTEXT.Process(target=serve, args=args, daemon=True))
        started[-1].start()
        pipes.append(here)

    def run(check, *arguments):
        for pipe in pipes:
            pipe.send((check, arguments))
        answers = [pipe.recv() if pipe.poll(ANSWER) else f"silent for {ANSWER} s" for pipe in pipes]
        failed = [f"rank {rank}:\n{answer}" for rank, answer in enumerate(answers) if answer]
        assert not failed, "\n".join(failed)

    try:
        yield run
        for pipe in pipes:
            pipe.send(None)
        for process in started:
            process.join(10)
    finally:
        for process in started:
            process.kill()
