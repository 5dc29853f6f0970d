"""Figures of a set of pairs: `python -m realign.pairs stats PAIRS.parquet`.

Prints a table of similarities, ranks and lengths, duplicates and what was left out and why, and
draws their histograms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from realign.data.entries import entry_of
from realign.data.errors import Malformed
from realign.data.pictures import StoredImage
from realign.files import check_file
from realign.pairs.gallery import changed_words, count_words, difference, pair_files, pair_rows
from realign.pairs.io.shards import Shards
from realign.pairs.stages.runner import run_note

_TEXT = ("words of chosen", "words of rejected", "changed words")
_NUMBERS = {
    "similarity": "similarity",
    "neighbour_rank": "rank",
    "text_similarity": "text similarity",
    "visual_margin": "visual margin",
}
_COLOURS = {"chosen": "#1a7a46", "rejected": "#b3372a", "other": "#3157c9", "left": "#8a8a90"}


@dataclass
class PairStats:
    """Figures of a set of pairs."""

    pairs: int = 0
    """Pairs read."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """What is measured of a pair -> (pairs that have it,)."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """What a pair shares with an earlier one -> pairs."""
    dropped: Counter = field(default_factory=Counter)
    """Reason -> sound records that no pair could be made of."""
    bad: Counter = field(default_factory=Counter)
    """Reason -> records that could not be used."""


def collect(pairs: str | Path, *, work: str | Path | None = None) -> PairStats:
    """Measure a set of pairs.

    Args:
        pairs: a Parquet file of preference pairs, or a folder of them.
        work: the work folder of the run that made it, for what was dropped; `pairs` with the
            suffix .work when absent. What could not be used is in its rejected_records.parquet.

    Raises:
        FileNotFoundError: when there is nothing at `pairs`, or at a `work` that is given.
        ValueError: for a file without pairs.
    """
    if work is not None and not Path(work).is_dir():
        raise FileNotFoundError(f"work is {str(work)!r}, which is no folder.")
    values: dict[str, list[float]] = {name: [] for name in (*_NUMBERS.values(), *_TEXT)}
    duplicates = dict.fromkeys(
        ("the same image", "the same prompt and chosen", "the same image, prompt and chosen"), 0
    )
    seen: set[bytes] = set()
    own_negative, count = 0, 0
    for file, _, row in pair_rows(pair_files(pairs)):
        count += 1
        for column, name in _NUMBERS.items():
            if (value := row.get(column)) is not None and np.isfinite(value):
                values[name].append(value)
        try:
            entry = entry_of(row)
        except Malformed:
            continue
        chosen, rejected = entry.chosen or "", entry.rejected or ""
        _, changed = difference(chosen, rejected)
        lengths = (count_words(chosen), count_words(rejected), changed_words(changed))
        for name, length in zip(_TEXT, lengths, strict=True):
            values[name].append(length)
        images, negatives = (
            [_mark(value, file.parent) for value in group]
            for group in (entry.images, entry.retrieved)
        )
        own_negative += images == negatives
        said = json.dumps([entry.prompt, chosen])
        for name, key in zip(duplicates, (images, said, [images, said]), strict=True):
            digest = hashlib.blake2b(f"{name} {key}".encode(), digest_size=16).digest()
            duplicates[name] += digest in seen
            seen.add(digest)
    if not count:
        raise ValueError(f"{pairs} holds no pairs.")
    duplicates["its own image as the negative"] = own_negative
    found = {name: np.array(list_) for name, list_ in values.items() if list_}
    folder = Path(work) if work is not None else Path(pairs).with_suffix(".work")
    return PairStats(count, found, duplicates, *_left_out(folder, pairs))


def table(stats: PairStats) -> str:
    """The figures as text."""
    heads = ("mean", "least", "10 %", "median", "90 %", "most")
    lines = [f"{stats.pairs:,} pairs", "", f"{'':20}" + "".join(f"{h:>9}" for h in heads)]
    for name, values in stats.values.items():
        marks = [values.mean(), *np.quantile(values, (0, 0.1, 0.5, 0.9, 1))]
        lines.append(f"{name:20}" + "".join(f"{_short(mark):>9}" for mark in marks))
    lines.append("")
    for name, number in stats.duplicates.items():
        earlier = "" if "own" in name else " as an earlier one"
        lines.append(f"pairs with {name}{earlier}: {number:,}")
    for name, reasons in (("dropped", stats.dropped), ("unusable", stats.bad)):
        shown = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
        lines.append(f"records {name}: {reasons.total():,}" + (f" ({shown})" if shown else ""))
    return "\n".join(lines)


def draw(stats: PairStats, path: str | Path) -> None:
    """Draw histograms, duplicates and what was left out, and save the picture.

    Raises:
        ValueError: where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "the plot needs matplotlib: pip install 'realign[demo]', or add --no-plot."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 4, figsize=(15, 6.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05, hspace=0.09)
    similarity, rank, lengths, changed, text, margin, duplicates, left = grid.flat
    _histogram(similarity, stats, ["similarity"], "Image and retrieved image", "cosine")
    _histogram(rank, stats, ["rank"], "Rank of the neighbour", "0 is the nearest")
    _histogram(lengths, stats, list(_TEXT[:2]), "Response lengths", "words")
    _histogram(changed, stats, [_TEXT[2]], "Changed words", "of the rejected response")
    _histogram(text, stats, ["text similarity"], "Chosen and rejected", "similarity")
    _histogram(margin, stats, ["visual margin"], "Visual margin of the reference", "nats")
    _bars(duplicates, stats.duplicates, "Duplicates", _COLOURS["other"])
    reasons = dict(stats.dropped.most_common(6))
    reasons |= {f"{reason} (unusable)": n for reason, n in stats.bad.most_common(6)}
    _bars(left, reasons, "Records left out", _COLOURS["left"])
    figure.suptitle(f"{stats.pairs:,} preference pairs", x=0.012, ha="left", weight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format=path.suffix[1:] or "png")  # a name without one stays
    plt.close(figure)


def _histogram(axes: Any, stats: PairStats, names: list[str], title: str, unit: str) -> None:
    _plain(axes, title)
    known = [name for name in names if name in stats.values]
    if not known:
        axes.text(0.5, 0.5, "not known", ha="center", va="center", color=_COLOURS["left"])
        axes.set_axis_off()
        axes.set_title(title, loc="left", fontsize=10.5)
        return
    values = [stats.values[name] for name in known]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    whole = all((v == v.round()).all() for v in values)
    if whole and high - low < 60:
        edges = np.arange(low - 0.5, high + 1)  # one bar for each number
    else:
        edges = np.linspace(low, high if high > low else low + 1, 31)
    for name, found in zip(known, values, strict=True):
        word = name.rpartition(" ")[2]
        colour = _COLOURS.get(word if len(known) > 1 else "", _COLOURS["other"])
        if name == known[0]:
            axes.hist(found, edges, color=colour, alpha=0.85, rwidth=0.92, label=word)
        else:  # an outline, so that both are seen
            axes.hist(found, edges, histtype="step", color=colour, linewidth=1.6, label=word)
    if len(known) > 1:
        axes.legend(
            frameon=False,
            fontsize=9,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=2,
            handlelength=1,
        )
    axes.set_xlabel(unit, fontsize=9)
    axes.yaxis.get_major_locator().set_params(integer=True)
    if whole:
        axes.xaxis.get_major_locator().set_params(integer=True)


def _bars(axes: Any, counts: dict[str, int], title: str, colour: str) -> None:
    _plain(axes, title)
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=10.5)
    most = max([1, *counts.values()])
    for place, (name, number) in enumerate(counts.items()):
        axes.barh(place, number / most, height=0.3, color=colour)
        shown = name if len(name) <= 44 else name[:43] + "…"
        axes.text(0, place - 0.22, shown, fontsize=9, va="bottom", parse_math=False)
        axes.text(1, place - 0.22, f"{number:,}", fontsize=9, va="bottom", ha="right")
    if not counts:
        axes.text(0, 0, "none", fontsize=9, color=_COLOURS["left"])
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(counts), 4) - 0.3, -0.8)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _mark(image: StoredImage, folder: Path) -> str:
    """The identity of an image: its bytes, or its file."""
    if image.data is not None:
        return hashlib.blake2b(image.data, digest_size=16).hexdigest()
    return str(folder / image.path)


def _left_out(work: Path, output: str | Path) -> tuple[Counter, Counter]:
    """(drops, unusable records) by reason, as the run that wrote `output` noted them; where none
    did, of the newest folder of each stage."""
    with suppress(OSError, ValueError, KeyError):
        noted = json.loads(run_note(work, str(output)).read_text())
        return Counter(noted["dropped"]), Counter(noted["bad"])
    newest: dict[str, Path] = {}
    folders = (f for f in work.iterdir() if f.is_dir() and "-" in f.name) if work.is_dir() else ()
    for folder in sorted(folders, key=lambda f: f.stat().st_mtime):
        newest[folder.name.rpartition("-")[0]] = folder
    dropped = Counter(
        entry.reason for folder in newest.values() for entry in Shards(folder).left_out("dropped")
    )
    return dropped, _unusable(work)


def _unusable(folder: Path) -> Counter:
    file = folder / "rejected_records.parquet"
    if not file.exists():
        return Counter()
    return Counter(pq.read_table(file, columns=["reason"])["reason"].to_pylist())


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print, draw; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m realign.pairs stats",
        description="Print and plot figures of preference pairs.",
    )
    parser.add_argument("pairs", metavar="PAIRS.parquet", help="pairs, or a folder of such files")
    parser.add_argument("--output", help="PNG to write (PAIRS-stats.png)")
    parser.add_argument("--work", help="work folder of the run, for what it dropped (PAIRS.work)")
    parser.add_argument("--no-plot", action="store_true", help="print only")
    given = parser.parse_args(arguments)
    try:
        path = Path(given.pairs)
        output = given.output or str(path.with_name(f"{path.stem}-stats.png"))
        if not given.no_plot and find_spec("matplotlib"):
            check_file("--output", output)
        stats = collect(given.pairs, work=given.work)
        print(table(stats))
        if not given.no_plot and given.output is None and not find_spec("matplotlib"):
            print("no plot: it needs matplotlib, pip install 'realign[demo]'")
        elif not given.no_plot:
            draw(stats, output)
            print(f"wrote {output}")
    except (ValueError, OSError, pa.ArrowInvalid) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
