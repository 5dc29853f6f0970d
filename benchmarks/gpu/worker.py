"""One part of the GPU check in a process of its own: `python -m benchmarks.gpu.worker MODULE`."""

import argparse
import faulthandler
import importlib
import os
import sys
from pathlib import Path

from benchmarks.gpu.record import Record

INTERPRETED = ("correct", "variants")
"""Parts that call Triton kernels themselves: a rehearsal interprets them on the CPU. Elsewhere the
variable would only disturb torch.compile."""


def main() -> None:
    """Runs the part. Exceptions end the process; the parent keeps the tail of what they print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="a module with run(record)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, required=True, help="until the parent kills it")
    parser.add_argument("--call", type=int, required=True, help="number of the parent's call")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    given = parser.parse_args()
    faulthandler.enable()
    # Shows the line that hangs: SIGKILL leaves no traceback. The parent's clock began before ours.
    faulthandler.dump_traceback_later(max(0.5 * given.seconds, given.seconds - 3))
    part = given.module.rpartition(".")[2]
    if given.rehearse:
        # One thread: toy sizes only wait for more, and sums do not depend on who set the number.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if part in INTERPRETED:
            os.environ["TRITON_INTERPRET"] = "1"
    settings = {"rehearse": given.rehearse, "seconds": given.seconds, "call": given.call}
    importlib.import_module(given.module).run(Record(given.out, part, **settings))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
