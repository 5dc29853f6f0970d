"""One part of the GPU check in a process of its own: see `run_once` of the command."""

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu.record import Record

INTERPRETED = ("correct", "variants")
"""Parts that call Triton kernels themselves: a rehearsal interprets them on the CPU. Elsewhere the
variable would only disturb torch.compile."""


def main() -> None:
    """Runs the part. Exceptions end the process; the parent keeps the tail of what they print."""
    module, folder, given = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    faulthandler.enable()
    # Shows the line that hangs: SIGKILL leaves no traceback. The parent's clock began before ours.
    faulthandler.dump_traceback_later(max(0.5 * given["seconds"], given["seconds"] - 3))
    part = module.rpartition(".")[2]
    if given["rehearse"]:
        # One thread: toy sizes only wait for more, and sums do not depend on who set the number.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if part in INTERPRETED:
            os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module(module).run(Record(folder, part, **given))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
