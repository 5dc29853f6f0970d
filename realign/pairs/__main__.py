"""`python -m realign.pairs`: make preference pairs; without --data, of the shipped digits.

    python -m realign.pairs --data records.parquet --output pairs.parquet
    python -m realign.pairs embed --data records.parquet --output pairs.parquet

The second runs up to one stage. `gallery` and `stats` look at finished pairs, `import` takes over
those that a data set has.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from realign.cli import parse_sections
from realign.pairs.config import PairsConfig
from realign.pairs.pipeline import STAGES, build_pairs, run_stages
from realign.third_party import silence_third_party

_ALONE = STAGES[1:]  # reading belongs to every one of them
_OTHERS = {"import": "io.importers", "gallery": "gallery", "stats": "stats"}  # command -> module


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, report; returns an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    silence_third_party()
    try:
        if words and words[0] in _OTHERS:
            module = importlib.import_module(f"realign.pairs.{_OTHERS[words[0]]}")
            return module.main(words[1:])
        last = words.pop(0) if words and not words[0].startswith("-") else None
        if last is not None and last not in _ALONE:
            raise ValueError(
                f"unknown command {last!r}: {', '.join(_ALONE)} run up to that stage, "
                f"{', '.join(_OTHERS)} are about finished pairs, and without one pairs are made."
            )
        config = parse_sections(
            {"pairs": PairsConfig},
            prog="python -m realign.pairs",
            description="Turn images with true responses into dual-preference pairs. Without "
            "--data it makes them of the shipped handwritten digits. A stage's name in front "
            f"({', '.join(_ALONE)}) runs up to that stage; {', '.join(_OTHERS)} are about finished "
            "pairs and have flags of their own.",
            arguments=words,
        )["pairs"]
        if last is None:
            print(build_pairs(config))
        else:
            print(f"the shards of {last} are in {run_stages(config, last).folders[last]}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
