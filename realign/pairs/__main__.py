"""Command `python -m realign.pairs`: makes preference pairs.

    python -m realign.pairs --data records.parquet --output pairs.parquet
    python -m realign.pairs embed --data records.parquet --output pairs.parquet

Without --data, the records are the shipped digits. The second form runs the pipeline up to a stage.
`gallery` shows finished pairs, `stats` prints their statistics, and `import` converts the pairs of
an existing data set.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from realign.cli import one_line_errors, parse_sections
from realign.modeling.loading import DTYPES
from realign.pairs import gallery, negatives, stats
from realign.pairs.config import REFILLS, PairsConfig
from realign.pairs.io import importers
from realign.pairs.pipeline import STAGES, build_pairs, run_stages
from realign.pairs.retrieval.index import KINDS
from realign.terminal import show
from realign.third_party import silence_third_party

_LAST = STAGES[1:]  # stages that a command may name; every run starts with `read`
_COMMANDS = {"import": importers.main, "gallery": gallery.main, "stats": stats.main}
_SUMMARIES = {
    "import": "Convert existing preference pairs",
    "gallery": "Write an HTML file that shows preference pairs",
    "stats": "Print statistics of preference pairs",
}
_HEADINGS = {
    "output": "Input and output",
    "model": "Models",
    "scenes": "Input and output",
    "answer": "Models",
    "keep_target": "Visual negatives",
    "masker": "Masking",
    "refill": "Refill of masked words",
    "tau": "Filters",
    "concurrency": "Endpoints",
    "negative": "Visual negatives",
    "work": "Run",
}
_METAVARS = {
    "output": "FILE",
    "data": "PATH",
    "image_folder": "FOLDER",
    "split": "NAME",
    "embed_model": "MODEL",
    "dtype": tuple(DTYPES),
    "answer": "ENGINE",
    "keep_target": "SHARE",
    "index": KINDS,
    "ceiling": "COSINE",
    "floor": "COSINE",
    "hash_distance": "BITS",
    "mask": "KINDS",
    "share": "FRACTION",
    "refill": REFILLS,
    "temperature": "T",
    "tau": "SIMILARITY",
    "similarity": "MEASURE",
    "judge": "ENGINE",
    "requests_per_minute": "N",
    "price_in": "PRICE",
    "price_out": "PRICE",
    "negative": negatives.KINDS,
    "work": "FOLDER",
    "max_bad": "FRACTION",
    "ray": "ADDRESS",
}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs the command. Returns an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    silence_third_party()
    try:
        if words and words[0] in _COMMANDS:
            return _COMMANDS[words[0]](words[1:])
        last = words.pop(0) if words and not words[0].startswith("-") else None
        if last is not None and last not in _LAST:
            raise ValueError(
                f"unknown command {last!r}. Name a stage to run up to ({', '.join(_LAST)}), a "
                f"command for finished pairs ({', '.join(_COMMANDS)}), or none to make pairs."
            )
        config = parse_sections(
            {"pairs": PairsConfig},
            prog="python -m realign.pairs",
            usage="%(prog)s [STAGE] [--config FILE] [options]",
            description="Make preference pairs from images with true responses. Without --data, "
            "the records are scenes of the shipped handwritten digits. To stop after a stage, "
            f"give its name before the options: {', '.join(_LAST)}. The commands below process "
            "finished pairs and have their own --help.",
            commands=_SUMMARIES,
            example="python -m realign.pairs --data records.parquet --output pairs.parquet",
            headings=_HEADINGS,
            metavars=_METAVARS,
            arguments=words,
        )["pairs"]
        if last is None:
            show(build_pairs(config))
        else:
            show(f"the shards of {last} are in {run_stages(config, last).folders[last]}")
    except KeyboardInterrupt:
        show("stopped; the same command resumes", error=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
