"""Ranks and commands in processes forked from one that has imported the libraries.

Importing them takes six seconds per process on one core.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from realign import distributed
from realign.distributed import rank_environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["realign.train", "realign.pairs.__main__"])


def run_ranks(worker, count, log, *arguments, nodes=1) -> str:
    """Run `worker(*arguments)` as the ranks of one group.

    Args:
        worker: a module-level function.
        count: number of ranks.
        log: file for the output of the ranks.
        arguments: picklable arguments.
        nodes: number of nodes that the ranks seem to be on.

    Returns:
        The content of `log`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = rank_environment(store.port, count)
    Path(log).write_text("")
    shared["LOCAL_WORLD_SIZE"] = str(count // nodes)
    ranks_of = [
        shared | {"RANK": str(r), "LOCAL_RANK": str(r % (count // nodes))} for r in range(count)
    ]
    ranks = [
        CONTEXT.Process(target=_rank, args=(worker, log, os.environ | given, *arguments))
        for given in ranks_of
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    output = Path(log).read_text()
    assert [rank.exitcode for rank in ranks] == [0] * count, output
    return output


class Forked:
    """`python -m realign.train` in a forked process, with the interface of `subprocess.Popen`.

    Args:
        words: its command line. Its ranks are forked as well.
        environment: its variables; by default those of this process.
    """

    def __init__(self, *words, environment=None) -> None:
        self._folder = tempfile.TemporaryDirectory()  # removed with this object
        self._logs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        given = (self._logs, dict(environment or os.environ), words)
        self._process = CONTEXT.Process(target=_train, args=given)
        self._process.start()
        self.pid, self.kill, self.terminate = (
            getattr(self._process, name) for name in ("pid", "kill", "terminate")
        )

    @property
    def returncode(self) -> int | None:
        """The exit code as in `subprocess`: the negative signal number for a killed process."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=None) -> None:
        """Wait for the end, up to a time limit."""
        self._process.join(timeout)

    def communicate(self, timeout=None) -> tuple[str, str]:
        """Wait for the end. Returns stdout and stderr."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        return tuple(log.read_text() for log in self._logs)


def _train(logs, environment, words):
    from realign import train

    SubprocessHandler._popen = _fork
    os.environ.clear()
    os.environ.update(environment)
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    distributed.exit_rank(train.main(list(words)))


def _fork(handler, command, environment):
    """`python -m realign.train words` as a fork, with the part of Popen's interface torch uses."""
    words = command[3:]
    rank = multiprocessing.get_context("fork").Process(target=_forked, args=(words, environment))
    rank.poll, rank.wait = lambda: rank.exitcode, rank.join
    rank.start()
    return rank


def _forked(words, environment):
    from realign import train

    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the default, as in a new process
    os.environ.update(environment)
    distributed.exit_rank(train.main(list(words)))


def _rank(worker, log, environment, *arguments):
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    worker(*arguments)
    sys.stdout.flush()


def run_command(module, words, code=0):
    """Run `python -m module words`, which must end with an exit code."""
    assert importlib.import_module(module).main(words) == code
