"""Statistics of preference pairs: `python -m realign.pairs stats PAIRS.parquet`.

Prints similarities, ranks, lengths, changed words and duplicates, and the number of dropped and
invalid records by reason. The gallery shows the same statistics above its pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from realign.cli import CommandParser, one_line_errors
from realign.data.entries import entry_of
from realign.data.errors import Malformed, shorten
from realign.data.images import StoredImage
from realign.data.tables import rows_of
from realign.files import read_json
from realign.pairs.io.words import Matcher
from realign.pairs.stages.runner import run_note
from realign.terminal import show

FACTS = (
    "neighbour", "masked", "masker", "answer_model", "refill_model", "embed_model",
    "negative_record", "seed",
)  # fmt: skip
_NUMBERS = {  # column -> title
    "similarity": "similarity",
    "neighbour_rank": "rank",
    "text_similarity": "text similarity",
    "visual_margin": "visual margin",
}
_TEXT = ("words of chosen", "words of rejected", "changed words")
_DUPLICATES = (
    "the same image", "the same prompt and chosen", "the same image, prompt and chosen",
)  # fmt: skip
_COLUMNS = (*FACTS, *_NUMBERS, "judge", "negative")  # in addition to the preference columns

_SHOWN = 20
"""Reasons in the output. The package has fewer, but a downloaded note may have any."""

_TOKENS = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+|\s+|.", re.DOTALL)
"""A letter of a script without spaces, a word, white space, or any other character."""

Segments = list[tuple[str, bool]]
"""Text, and whether it is in only one of the two responses."""


@dataclass
class PairStats:
    """Statistics of a set of pairs."""

    pairs: int = 0
    """Number of pairs."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Title of a measure -> its values, one for each pair that has the measure."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Property shared with an earlier pair -> number of pairs."""
    dropped: Counter = field(default_factory=Counter)
    """Reason -> number of valid records that gave no pair."""
    bad: Counter = field(default_factory=Counter)
    """Reason -> number of invalid records."""

    def __str__(self) -> str:
        heads = ("mean", "min", "10 %", "median", "90 %", "max")
        lines = [f"{self.pairs:,} pairs", "", f"{'':20}" + "".join(f"{h:>9}" for h in heads)]
        for name, values in self.values.items():
            marks = [values.mean(), *np.quantile(values, (0, 0.1, 0.5, 0.9, 1))]
            lines.append(f"{name:20}" + "".join(f"{_short(mark):>9}" for mark in marks))
        lines.append("")
        for name, number in self.duplicates.items():
            earlier = "" if "own" in name else " as an earlier one"
            lines.append(f"pairs with {name}{earlier}: {number:,}")
        for name, reasons in (("dropped", self.dropped), ("invalid", self.bad)):
            shown = reasons.most_common(_SHOWN)
            counts = ", ".join(f"{n:,} {shorten(reason)}" for reason, n in shown)
            lines.append(
                f"records {name}: {reasons.total():,}" + (f" ({counts})" if counts else "")
            )
        return "\n".join(lines)


def collect(pairs: str | Path, *, work: str | Path | None = None) -> PairStats:
    """Compute the statistics of a set of pairs.

    Args:
        pairs: a Parquet file of preference pairs, or a folder of them.
        work: the work folder of the run that wrote the pairs, for the dropped and invalid records.
            By default `pairs` with the suffix .work.

    Raises:
        FileNotFoundError: when `pairs` does not exist, or `work` is not a folder.
        ValueError: for a file without pairs.
    """
    if work is not None and not Path(work).is_dir():
        raise FileNotFoundError(
            f"work {str(work)!r} is not a folder. Give the work folder of the run."
        )
    values: dict[str, list[float]] = {name: [] for name in (*_NUMBERS.values(), *_TEXT)}
    duplicates = dict.fromkeys([*_DUPLICATES, "their own image as the negative"], 0)
    seen: set[tuple[str, bytes]] = set()
    count = 0
    for file, _, row in pair_rows(pairs):
        count += 1
        if isinstance(row, Malformed):
            continue
        for column, name in _NUMBERS.items():
            if (value := finite(row.get(column))) is not None:
                values[name].append(value)
        try:
            entry = entry_of(row)
        except Malformed:
            continue
        chosen, rejected = entry.chosen or "", entry.rejected or ""
        changed = changed_words(difference(chosen, rejected)[1])
        lengths = (count_words(chosen), count_words(rejected), changed)
        for name, length in zip(_TEXT, lengths, strict=True):
            values[name].append(length)
        images = [image_digest(image, file.parent) for image in entry.images]
        negatives = [image_digest(image, file.parent) for image in entry.retrieved]
        duplicates["their own image as the negative"] += images == negatives
        image = b"".join(images)
        text = hashlib.blake2b(json.dumps([entry.prompt, chosen]).encode(), digest_size=16).digest()
        for key in zip(_DUPLICATES, (image, text, image + text), strict=True):
            duplicates[key[0]] += key in seen
            seen.add(key)
    if not count:
        raise ValueError(f"{pairs} holds no pairs.")
    measured = {name: np.array(numbers) for name, numbers in values.items() if numbers}
    folder = Path(work) if work is not None else Path(pairs).with_suffix(".work")
    return PairStats(count, measured, duplicates, *_left_out(folder, Path(pairs)))


def pair_rows(pairs: str | Path) -> Iterator[tuple[Path, str, dict[str, Any] | Malformed]]:
    """Yields (file, name made of file and row number, row) for every row of a data set.

    Raises:
        FileNotFoundError: when there is no Parquet file.
        ValueError: for a file that cannot be read, or that has no columns of pairs.
    """
    path = Path(pairs)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise FileNotFoundError(
            f"there is no Parquet file at {pairs}; `python -m realign.pairs` writes one."
        )
    for file in files:
        for name, row in rows_of([file], ("chosen", "rejected"), _COLUMNS):
            yield file, name, row


def difference(chosen: str, rejected: str) -> tuple[Segments, Segments]:
    """Splits both responses into segments, and marks the segments that differ.

    The joined segments are the complete responses. Adjacent changed words form one segment.
    The time is bounded. In long texts of repeated words, more words count as changed (`Matcher`).
    """
    sides = [_TOKENS.findall(text) for text in (chosen, rejected)]
    flags = [[not token.isspace() for token in tokens] for tokens in sides]
    words = [[i for i, is_word in enumerate(side) if is_word] for side in flags]
    matcher = Matcher(*([t[i] for i in places] for t, places in zip(sides, words, strict=True)))
    for *starts, size in matcher.get_matching_blocks():
        for side, places, start in zip(flags, words, starts, strict=True):
            for i in places[start : start + size]:
                side[i] = False
    return _joined(sides[0], flags[0]), _joined(sides[1], flags[1])


def count_words(text: str) -> int:
    """Number of words; in a script without spaces, the number of letters."""
    return sum(token[0].isalnum() for token in _TOKENS.findall(text))


def changed_words(segments: Segments) -> int:
    """Number of words in the changed segments of a response."""
    return sum(count_words(text) for text, changed in segments if changed)


def _joined(tokens: list[str], flags: list[bool]) -> Segments:
    """Joins tokens into segments. White space counts as changed only between changed words."""
    for i, token in enumerate(tokens):
        if token.isspace():
            flags[i] = 0 < i < len(tokens) - 1 and flags[i - 1] and flags[i + 1]
    texts = iter(tokens)
    return [("".join(next(texts) for _ in run), changed) for changed, run in groupby(flags)]


def image_digest(image: StoredImage, folder: Path) -> bytes:
    """Digest of an image's bytes, or of its path relative to `folder`."""
    data = image.data or str(folder / (image.path or "")).encode("utf-8", "replace")
    return hashlib.blake2b(data, digest_size=16).digest()


def finite(value: Any) -> float | None:
    """The number, or None if it is not a finite number."""
    is_number = isinstance(value, int | float) and np.isfinite(value)
    return float(value) if is_number else None


def _left_out(work: Path, pairs: Path) -> tuple[Counter, Counter]:
    """(dropped, invalid) records by reason, from the note of the run that wrote the pairs.

    If the data set and its work folder were moved, the latest note with the file's name is used.
    """
    notes = sorted(work.glob(f"{pairs.name}.*.json"), key=lambda file: file.stat().st_mtime)
    if (note_file := run_note(work, str(pairs))).exists():
        notes.append(note_file)
    if notes:
        note = read_json(notes[-1])
        counts = [note.get(key) for key in ("dropped", "bad")]
        if not all(isinstance(c, dict) and {int} >= {*map(type, c.values())} for c in counts):
            raise ValueError(f"{notes[-1]} is not a note of a run. Remove it.")
        return Counter(counts[0]), Counter(counts[1])
    rejected_file = work / "rejected_records.parquet"  # `import` writes only this file
    if not rejected_file.exists():
        return Counter(), Counter()
    rows = (row for _, row in rows_of([rejected_file], (), ("reason",)))
    return Counter(), Counter(str(row.get("reason")) for row in rows if isinstance(row, dict))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3f}"


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and prints the statistics. Returns an exit code."""
    parser = CommandParser(
        prog="python -m realign.pairs stats",
        description="Print statistics of preference pairs, and why records were left out.",
        example="python -m realign.pairs stats pairs.parquet",
    )
    parser.add_argument(
        "pairs", metavar="PAIRS.parquet", help="Parquet file of pairs, or a folder of such files."
    )
    parser.add_argument(
        "--work",
        metavar="FOLDER",
        help="Work folder of the run, with its dropped and invalid records. Without it, the folder "
        "PAIRS.work beside PAIRS.parquet.",
    )
    args = parser.parse_args(arguments)
    show(collect(args.pairs, work=args.work))
    return 0
