"""`python -m realign.pairs`: make preference pairs; without --data, of the shipped digits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from realign.cli import parse_sections
from realign.noise import hush_libraries
from realign.pairs import index
from realign.pairs.pipeline import PairsConfig, build_pairs


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, report; returns an exit code."""
    hush_libraries()
    try:
        config = parse_sections(
            {"pairs": PairsConfig},
            prog="python -m realign.pairs",
            description="Turn images with true responses into dual-preference pairs. Without "
            "--data it makes them of the shipped handwritten digits.",
            arguments=arguments,
        )["pairs"]
        print(f"neighbours by {index.backend()}")
        print(build_pairs(config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
