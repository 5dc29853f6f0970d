"""Runs of the pairs pipeline that end in SIGKILL, forked from a process with the libraries."""

import os
import signal
from pathlib import Path

from forked_ranks import CONTEXT

from realign.pairs.__main__ import main
from realign.pairs.io import shards


def exit_code(way, *arguments) -> int | None:
    """The exit code of a process that runs `way(*arguments)`; None after two minutes."""
    process = CONTEXT.Process(target=way, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def before_a_file(stage, name, *flags):
    """Die when a file of a stage is written under its temporary name, before it is renamed."""
    replace = Path.replace

    def replaced(self, target):
        if target.parent.name.startswith(stage) and target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replaced
    main(flags)


def before_a_shard(*flags):
    """Die when a list of bad records is written, before its shard is."""
    write = shards.Shards.write_left_out

    def died(self, number, left_out):
        write(self, number, left_out)
        if self.folder.name.startswith("read"):
            os.kill(os.getpid(), signal.SIGKILL)

    shards.Shards.write_left_out = died
    main(flags)
