"""Comparison of two models by their answers: `python -m realign.evaluate compare FIRST SECOND`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from realign.evaluate import paired
from realign.evaluate.benchmarks import BENCHMARKS, Answered, read_answered, units


def compare(args: argparse.Namespace) -> str:
    """Compare the answers of two models to the same questions. Single files may have any names.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: for answers to different questions, or without labels.
    """
    paths = [Path(args.first), Path(args.second)]
    for argument, path in zip(("FIRST", "SECOND"), paths, strict=True):
        if not path.exists():
            raise FileNotFoundError(
                f"{argument}: there is no answers file or folder {path}. Pass the "
                "--output of a run."
            )
    single = not any(path.is_dir() for path in paths)
    name = " -> ".join(dict.fromkeys(path.stem for path in paths)) if single else None
    first, second = (read_answered(path) for path in paths)
    if single:
        first, second = ({str(name): next(iter(found.values()))} for found in (first, second))
    check_same(args.first, first, args.second, second)
    lines = []
    for file, before in first.items():
        benchmark = BENCHMARKS[before.benchmark]
        scored = [units(answered.lines, benchmark) for answered in (before, second[file])]
        lines.append(file)
        for rule in benchmark.rules:
            right = [found.scores[rule] > 0.5 for found in scored]
            comparison = paired.compare(*right, clusters=scored[0].clusters, seed=args.seed)
            lines.append(f"  {rule:6} {comparison}")
    return "\n".join([*lines, "(difference with its 95 % bootstrap interval over images)"])


def check_same(
    first: str, before: dict[str, Answered], second: str, after: dict[str, Answered]
) -> None:
    """Check that two models answered the same questions about the same images.

    Raises:
        ValueError: for files or questions that only one of them answered, or that differ.
    """
    asked = [
        {
            (file, line["id"]): (line["question"], line["image"])
            for file, answered in found.items()
            for line in answered.lines
        }
        for found in (before, after)
    ]
    unmatched, difference = sorted(asked[0].keys() ^ asked[1].keys()), "are in only one"
    if not unmatched:
        unmatched = [key for key in asked[0] if asked[0][key] != asked[1][key]]
        difference = "differ"
    if unmatched:
        raise ValueError(
            f"{first} and {second} answer different questions: {len(unmatched)} {difference}, such "
            f"as {unmatched[0][1]!r}. Compare answers to the same files."
        )


def add_parser(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `realign.evaluate`."""
    command = add("compare", compare, "answers-base answers-rdpo")
    for name, model in (("first", "first"), ("second", "second")):
        command.add_argument(
            name, metavar=name.upper(), help=f"Answers of the {model} model: a file or a folder."
        )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of the bootstrap.")
