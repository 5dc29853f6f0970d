"""Command `python -m realign.pairs`: make preference pairs; without --data, of the shipped digits.

    python -m realign.pairs --data records.parquet --output pairs.parquet
    python -m realign.pairs embed --data records.parquet --output pairs.parquet

The second form runs up to one stage. `gallery` shows finished pairs, `stats` prints their figures,
and `import` writes the pairs that a data set already has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from realign.cli import one_line_errors, parse_sections
from realign.pairs import gallery, stats
from realign.pairs.config import PairsConfig
from realign.pairs.io import importers
from realign.pairs.pipeline import STAGES, build_pairs, run_stages
from realign.third_party import silence_third_party

_LAST = STAGES[1:]  # stages that a command may name; every run begins with reading
_COMMANDS = {"import": importers.main, "gallery": gallery.main, "stats": stats.main}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, report; returns an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    silence_third_party()
    try:
        if words and words[0] in _COMMANDS:
            return _COMMANDS[words[0]](words[1:])
        last = words.pop(0) if words and not words[0].startswith("-") else None
        if last is not None and last not in _LAST:
            raise ValueError(
                f"unknown command {last!r}: {', '.join(_LAST)} run up to that stage, "
                f"{', '.join(_COMMANDS)} are about finished pairs, and without one pairs are made."
            )
        config = parse_sections(
            {"pairs": PairsConfig},
            prog="python -m realign.pairs",
            description="Turn images with true responses into dual-preference pairs. Without "
            "--data it makes them of the shipped handwritten digits. A stage's name in front "
            f"({', '.join(_LAST)}) runs up to that stage. {', '.join(_COMMANDS)} are about "
            "finished pairs and have flags of their own.",
            arguments=words,
        )["pairs"]
        if last is None:
            print(build_pairs(config))
        else:
            print(f"the shards of {last} are in {run_stages(config, last).folders[last]}")
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
