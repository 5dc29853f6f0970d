"""Process of one part of the GPU check, started by `run_once` in `__main__.py`."""

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu.record import Record

INTERPRETED = ("correct", "variants")
"""Parts that call Triton kernels, which a rehearsal interprets on the CPU. In other parts the
variable would disturb torch.compile."""


def main() -> None:
    """Runs the part. An exception ends the process, and the parent keeps the tail of its output."""
    module, folder, given = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    faulthandler.enable()
    # Prints the line that hangs, because SIGKILL leaves no traceback. The parent's clock is ahead.
    faulthandler.dump_traceback_later(max(0.5 * given["seconds"], given["seconds"] - 3))
    part = module.rpartition(".")[2]
    if given["rehearse"]:
        # One thread: toy sizes do not gain from more, and sums stay the same on every machine.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if part in INTERPRETED:
            os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module(module).run(Record(folder, part, **given))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
