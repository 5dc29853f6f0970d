"""Comparison of models by their answers: `python -m realign.evaluate compare BASE MODEL ...`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realign.data.errors import shorten
from realign.evaluate import tables
from realign.evaluate.answering import unanswered
from realign.evaluate.benchmarks import BENCHMARKS, Answered, read_answered, units
from realign.evaluate.paired import Comparison, compare_all, holm
from realign.evaluate.plots import PLOTS, Row, forest
from realign.files import check_file, check_overwritten, write_whole

FORMATS = {"text": (".txt", ""), "markdown": (".md",), "latex": (".tex",)}
"""Format of the table -> suffixes of its files."""
_OWN = ("model", "mark")  # settings that identify the model


def compare(args: argparse.Namespace) -> str:
    """Compare the answers of several models with those of the first, to the same questions.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: for answers to different questions or with different settings, answers without
            labels, or a file that cannot be written.
    """
    kind = _check_outputs(args)
    paths = [Path(path) for path in (args.base, *args.models)]
    suffixes = {suffix for of_kind in FORMATS.values() for suffix in of_kind} | set(PLOTS)
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path is not None:
            check_overwritten(flag, path, paths, suffixes)
    found, names = read_models(paths), distinct_names(paths)
    rows = _rows(names, found, args.seed, _chosen(args.rule, found[0]))
    notes = [*_skipped(paths, found), *_unanswered(names, found), *_notes(rows)]
    table = _table(rows)
    shown = _formatted(table, notes, "text" if args.output else kind)
    written = []
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.output, _formatted(table, notes, kind) + "\n")
        written.append(f"wrote {args.output}")
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        forest(args.plot, rows)
        written.append(f"wrote {args.plot}")
    return "\n".join([shown, *written])


def read_models(paths: Sequence[Path], second: str = "MODEL") -> list[dict[str, Answered]]:
    """The answers of each model by the name of a file. Single files may have any names.

    Args:
        paths: answers files, or folders of runs.
        second: name of the arguments after BASE, for errors.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: like `read_answered`.
    """
    for number, path in enumerate(paths):
        if not path.exists():
            raise FileNotFoundError(
                f"{second if number else 'BASE'}: there is no answers file or folder {path}. Pass "
                "the --output of a run."
            )
    found = [read_answered(path) for path in paths]
    if any(path.is_dir() for path in paths):
        return found
    stems = {path.stem for path in paths}
    name = stems.pop() if len(stems) == 1 else next(iter(found[0].values())).benchmark
    return [{name: next(iter(answered.values()))} for answered in found]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name of each answers folder or file. Folders above are added to equal names.

    Raises:
        ValueError: for a path that is given twice.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    if twice := [path for path, number in Counter(whole).items() if number > 1]:
        raise ValueError(f"{twice[0]} is given twice. Name the answers of each model once.")
    names = [
        path.name if given.is_dir() else path.stem for path, given in zip(whole, paths, strict=True)
    ]
    depth = 1
    while len(set(names)) < len(names):
        depth, used = depth + 1, Counter(names)
        names = [
            "/".join(path.parts[-depth:]) if used[name] > 1 else name
            for path, name in zip(whole, names, strict=True)
        ]
    return names


def _check_outputs(args: argparse.Namespace) -> str:
    """Check the files to write. Returns the format of the table.

    Raises:
        ValueError: for a file of an unknown kind, or one that cannot be written.
    """
    kind = args.format
    if args.output is not None:
        check_file("--output", args.output, device=False)
        suffix = Path(args.output).suffix.lower()
        if kind is None:
            kind = next((kind for kind, of_kind in FORMATS.items() if suffix in of_kind), None)
        if kind is None:
            raise ValueError(
                f"--output {args.output} ends in {suffix}. Name a file in .txt, .md or .tex, or "
                "choose the --format."
            )
    if args.plot is not None:
        if Path(args.plot).suffix.lower() not in PLOTS:
            raise ValueError(
                f"--plot is {args.plot!r}. Name a file that ends in {', '.join(PLOTS)}."
            )
        check_file("--plot", args.plot, device=False)
        if args.output is not None and _same(args.plot, args.output):
            raise ValueError(f"--output and --plot are both {args.plot}. Name two files.")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib. Install it: pip install 'realign[demo]'.")
    return kind or "text"


def _same(first: str | Path, second: str | Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _chosen(rule: str | None, found: Mapping[str, Answered]) -> list[str]:
    """The rules of --rule.

    Raises:
        ValueError: for a rule that no file has.
    """
    chosen = [name.strip() for name in rule.split(",")] if rule is not None else []
    known = {name for answered in found.values() for name in BENCHMARKS[answered.benchmark].rules}
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(
            f"--rule is {unknown[0]!r}; the rules of these files are {', '.join(sorted(known))}."
        )
    return chosen


def _rows(
    names: Sequence[str],
    found: Sequence[Mapping[str, Answered]],
    seed: int,
    chosen: Sequence[str],
) -> list[Row]:
    """Compare the models by each file and rule. A file without a chosen rule keeps its own."""
    matched = [
        match(names[0], found[0], name, other)
        for name, other in zip(names[1:], found[1:], strict=True)
    ]
    rows = []
    for file, base in found[0].items():
        lines = [base.lines] + [other[file] for other in matched]
        benchmark = BENCHMARKS[base.benchmark]
        scored = [units(own, benchmark) for own in lines]
        for rule in [name for name in benchmark.rules if name in chosen] or benchmark.rules:
            scores = [own.scores[rule] for own in scored]
            results = compare_all(scores, clusters=scored[0].clusters, seed=seed)
            for name, result in zip(names, results, strict=True):
                p = np.nan if name == names[0] else result.flip_p
                rows.append(Row(file, rule, name, result, p))
    adjusted = holm([row.adjusted for row in rows])
    return [row._replace(adjusted=p) for row, p in zip(rows, adjusted, strict=True)]


def match(
    first: str, before: Mapping[str, Answered], second: str, after: Mapping[str, Answered]
) -> dict[str, list[dict[str, Any]]]:
    """The second model's answers to each file, in the order of the first one's.

    Args:
        first: name of the first model, for errors.
        before: its answers.
        second: name of the second model.
        after: its answers.

    Raises:
        ValueError: for other files, other questions, or other settings.
    """
    if unmatched := sorted(before.keys() ^ after.keys()):
        raise ValueError(
            f"{first} and {second} answer different files: only one of them has "
            f"{shorten(', '.join(unmatched))}. Compare answers to the same files."
        )
    return {file: _matched(file, first, before[file], second, after[file]) for file in before}


def _matched(
    file: str, first: str, before: Answered, second: str, after: Answered
) -> list[dict[str, Any]]:
    if before.benchmark != after.benchmark:
        raise ValueError(
            f"{first} and {second} answer different benchmarks in {file}: {before.benchmark} and "
            f"{after.benchmark}. Compare answers to the same files."
        )
    settings = dict.fromkeys([*before.asked, *after.asked])
    for name in settings:
        values = before.asked.get(name), after.asked.get(name)
        if name not in _OWN and values[0] != values[1]:
            raise ValueError(
                f"{first} and {second} were asked the questions of {file} with a different {name}: "
                f"{shorten(repr(values[0]))} and {shorten(repr(values[1]))}. Run both with the "
                "same settings."
            )
    asked = [_by_id(answered) for answered in (before, after)]
    unmatched, difference = sorted(asked[0].keys() ^ asked[1].keys()), "are in only one"
    if not unmatched:
        # Facts such as the label or the options change the score, too.
        facts = ("question", "image", *BENCHMARKS[before.benchmark].facts)
        unmatched = [
            key
            for key, line in asked[0].items()
            if any(line[fact] != asked[1][key][fact] for fact in facts)
        ]
        difference = "differ"
    if unmatched:
        raise ValueError(
            f"{first} and {second} answer different questions in {file}: {len(unmatched)} "
            f"{difference}, such as {unmatched[0]!r}. Compare answers to the same files."
        )
    return [asked[1][key] for key in asked[0]]


def _by_id(answered: Answered) -> dict[str, dict[str, Any]]:
    lines = {line["id"]: line for line in answered.lines}
    if len(lines) < len(answered.lines):
        often = Counter(line["id"] for line in answered.lines).most_common(1)[0][0]
        raise ValueError(f"{answered.file} answers {often!r} twice. Remove one of the lines.")
    return lines


def _table(rows: Sequence[Row]) -> tables.Table:
    heads = (
        "file",
        "rule",
        "model",
        "units",
        "score [95 %]",
        "difference [95 %]",
        "gained",
        "lost",
    )
    heads += ("McNemar p", "sign-flip p", "Holm p")
    cells = []
    for file, rule, model, found, adjusted in rows:
        score = _percent(found.second, *found.interval, "")
        cells.append((file, rule, model, str(found.questions), score, *_change(found, adjusted)))
    return tables.Table("", heads, cells)


def _change(found: Comparison, adjusted: float) -> tuple[str, ...]:
    """The cells of a comparison. The first model has none."""
    if np.isnan(adjusted):
        return ("",) * 6
    difference = _percent(found.difference, found.low, found.high, "+")
    tests = (_p(found.p), _p(found.flip_p), _p(adjusted))
    return difference, str(found.gained), str(found.lost), *tests


def _percent(value: float, low: float, high: float, sign: str) -> str:
    """A share with its interval, which a single image does not give."""
    shown = f"{100 * value:{sign}.2f}"
    return shown if np.isnan(low) else f"{shown} [{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def _p(p: float) -> str:
    if np.isnan(p):
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _notes(rows: Sequence[Row]) -> list[str]:
    number = sum(not np.isnan(row.adjusted) for row in rows)
    notes = [
        f"Scores in percent, differences to {rows[0].model} in points. The bootstrap draws images.",
        "McNemar p: exact test of independent units. Sign-flip p: permutation test over images.",
        f"Holm p: sign-flip p after Holm's correction over {number} comparisons.",
    ]
    if any(np.isnan(row.found.p) for row in rows):
        notes.append("McNemar's test (-) does not apply to scores between 0 and 1.")
    return notes


def _skipped(paths: Sequence[Path], found: Sequence[Mapping[str, Answered]]) -> list[str]:
    """Notes on files without scores. All models lack them, as their files are the same."""
    files = sorted({file.stem for path in paths for file in path.glob("*.jsonl")})
    return [
        f"Skipped {name}.jsonl: it has no scored answers." for name in files if name not in found[0]
    ]


def _unanswered(names: Sequence[str], found: Sequence[Mapping[str, Answered]]) -> Iterator[str]:
    """Notes on questions without an answer."""
    for name, answered in zip(names, found, strict=True):
        for file, of_file in answered.items():
            lines = of_file.lines
            if failed := len(unanswered(lines)):
                yield (
                    f"{name} has no answer to {failed} of {len(lines)} questions of {file}. They "
                    "are scored as empty answers."
                )


def _formatted(table: tables.Table, notes: Sequence[str], kind: str) -> str:
    """The table with its notes in a format."""
    if kind == "latex":
        comments = (f"% {tables.one_line(note)}" for note in notes)
        return "\n".join([*comments, tables.latex(table, repeated=2)])
    if kind == "markdown":
        shown = [tables.markdown(table), "", *(f"{tables.markdown_text(note)}  " for note in notes)]
        return "\n".join(shown).rstrip()
    return "\n".join([tables.text(table), *map(tables.one_line, notes)])


def add_parser(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `realign.evaluate`."""
    command = add("compare", compare, "answers-base answers-dpo answers-rdpo")
    command.add_argument(
        "base", metavar="BASE", help="Answers of the first model: a file, or the folder of a run."
    )
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="Answers of a model that is compared with BASE."
    )
    command.add_argument(
        "--rule",
        metavar="NAMES",
        help="Rules to compare by, such as pope,evalai. Without it, all rules. A file without any "
        "of them keeps its own.",
    )
    command.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="Format of the table. Without it, the suffix of --output selects the format.",
    )
    command.add_argument(
        "--output", metavar="FILE", help="File for the table, such as table.tex or table.md."
    )
    command.add_argument(
        "--plot",
        metavar="FILE",
        help="File for a plot of the differences, in .png, .svg or .pdf. It needs matplotlib.",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="Seed of the bootstrap and of the flips."
    )
