"""Command `python -m realign.evaluate`: the digits, or a benchmark of photographs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from realign.cli import one_line_errors, parse_sections
from realign.evaluate.command import COMMANDS, run
from realign.evaluate.digits import EvaluateConfig, evaluate, save, table
from realign.terminal import show
from realign.third_party import silence_third_party


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print. Returns an exit code."""
    silence_third_party()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return run(words)
    if words and not words[0].startswith("-"):
        raise ValueError(f"unknown command {words[0]!r}. The commands are {', '.join(COMMANDS)}.")
    config = parse_sections(
        {"evaluate": EvaluateConfig},
        prog="python -m realign.evaluate",
        usage="%(prog)s [COMMAND] [--config FILE] [options]",
        description="Measure the hallucination of a digits model on unseen scenes. The commands "
        "below are for models of photographs. `COMMAND --help` lists their options.",
        commands=COMMANDS,
        example="python -m realign.evaluate --model runs/rdpo/model --output rates.json",
        headings={"model": "Evaluation of the digits"},
        metavars={"output": "FILE", "answers": "FILE"},
        arguments=words,
    )["evaluate"]
    rates = evaluate(config)
    show(table({config.model or "digits base": rates}))
    if config.output:
        rates_of = {name: vars(rate) for name, rate in rates.items()}
        save(config.output, json.dumps(rates_of, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
