"""Gallery of pairs: `python -m realign.pairs gallery PAIRS.parquet --output gallery.html`.

The gallery is one HTML file that needs no network (`page`). It shows the statistics of `stats`
above the pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from realign.cli import CommandParser, one_line_errors
from realign.data.entries import Entry, entry_of
from realign.data.errors import Malformed
from realign.data.images import DataFolder
from realign.files import check_file, check_overwritten
from realign.pairs.page import (
    Album,
    Answer,
    Card,
    Figure,
    Order,
    Page,
    Turn,
    check_numbers,
    spread,
    write_page,
)
from realign.pairs.stats import FACTS, changed_words, collect, difference, finite, pair_rows
from realign.terminal import show

_ORDERS: tuple[Order, ...] = (
    ("place", "Order of the file", "place", 1),
    ("similar", "Most similar images", "similarity", -1),
    ("dissimilar", "Least similar images", "similarity", 1),
    ("near", "Lowest rank", "rank", 1),
    ("far", "Highest rank", "rank", -1),
    ("most", "Most changed words", "changed", -1),
    ("fewest", "Fewest changed words", "changed", 1),
)


def write_gallery(
    pairs: str | Path,
    output: str | Path,
    *,
    image_folder: str | Path | None = None,
    most: int = 500,
    side: int = 320,
) -> tuple[int, int]:
    """Write the gallery.

    The page contains the images, so an image outside the folder is not read.

    Args:
        pairs: a Parquet file of preference pairs, or a folder of them.
        output: HTML file to write.
        image_folder: folder that contains the images and that relative image paths start at. None
            means the folder of the file.
        most: maximum number of pairs to show, sampled evenly over the file. 0 shows all.
        side: longer side of a thumbnail, in pixels.

    Returns:
        The number of pairs shown, and the number of all pairs.

    Raises:
        FileNotFoundError: when `pairs` does not exist.
        ValueError: for a file without pairs, a number out of range, or an output that would replace
            an input.
    """
    return _write(pairs, output, image_folder, most, side)[:2]


def _write(
    pairs: str | Path, output: str | Path, image_folder: str | Path | None, most: int, side: int
) -> tuple[int, int, str]:
    """The numbers of `write_gallery`, and a report of the images that are not shown."""
    check_numbers(most=most, side=side)
    inputs = [Path(pairs), *([Path(image_folder)] if image_folder else [])]
    check_overwritten("--output", output, inputs, (".html", ".htm"))
    stats = collect(pairs)
    total = stats.pairs
    shown = set(spread(total, most or total))
    album = Album(side, DataFolder.of_images(Path(pairs), image_folder))
    cards = [
        _card(row, name, album)
        for number, (_, name, row) in enumerate(pair_rows(pairs))
        if number in shown
    ]
    name = Path(pairs).name
    count = f"{total:,} pairs" if len(cards) == total else f"{len(cards):,} of {total:,} pairs"
    page = Page(
        heading="Preference pairs",
        about=f"{count} in {name}",
        figures=("Statistics of all pairs", str(stats)),
        thing="pair",
        all="All verdicts",
        cards=cards,
        images=album.images,
        orders=_ORDERS,
    )
    write_page(output, f"Preference pairs: {name}", page)
    return len(cards), total, album.report()


def _card(row: dict | Malformed, place: str, album: Album) -> Card:
    """The card of a row."""
    try:
        if isinstance(row, Malformed):
            raise row
        entry = entry_of(row)
    except Malformed as error:
        entry = Entry(None, [], f"({error})", None, [], [])
        row = {} if isinstance(row, Malformed) else row
    chosen, rejected = difference(entry.chosen or "", entry.rejected or "")
    images, retrieved = album.places_of(entry.images), album.places_of(entry.retrieved)
    chips, labels = _verdicts(row, same=bool(images) and images == retrieved)
    negative = str(row.get("negative") or "retrieved")
    similarity, rank = finite(row.get("similarity")), finite(row.get("neighbour_rank"))
    rank = None if rank is None else int(rank)
    other = Figure(negative[:1].upper() + negative[1:], retrieved)
    if negative == "retrieved":
        measures = (
            None if similarity is None else f"similarity {similarity:.3f}",
            None if rank is None else f"rank {rank}",
        )
        other.note, other.bar = ", ".join(filter(None, measures)), similarity
    elif similarity is not None:  # of the neighbour, which is not shown
        name = "similarity of the neighbour"
        chips.insert(0, {"name": name, "value": f"{similarity:.3f}", "tone": ""})
    roles = len(entry.prompt) > 1
    prompt = [(m["role"] if roles else "", _text(m["content"])) for m in entry.prompt]
    answers = [
        Answer("Chosen", chosen, {"": ("good", "")}),
        Answer("Rejected", rejected, {"": ("bad", "")}),
    ]
    return Card(
        id=place if row.get("id") is None else str(row["id"]),
        figures=[Figure("Image", images), other],
        turns=[Turn(prompt, answers)],
        labels={"": labels},
        sort={"similarity": similarity, "rank": rank, "changed": changed_words(rejected)},
        chips=chips,
        facts=[(k.replace("_", " "), str(row[k])) for k in FACTS if row.get(k) is not None],
    )


def _verdicts(row: dict, same: bool) -> tuple[list[dict], list[str]]:
    """Results of the filters, as (verdicts to show, labels for the page's filter)."""
    results: list[tuple[str, str, str, str | None]] = []  # name, value, tone, label
    if (value := finite(row.get("text_similarity"))) is not None:
        results.append(("text similarity", f"{value:.2f}", "", None))
    if (value := finite(row.get("visual_margin"))) is not None:
        tone = "good" if value > 0 else "bad"
        label = f"visual margin {'above' if value > 0 else 'not above'} 0"
        results.append(("visual margin", f"{value:+.2f}", tone, label))
    if row.get("judge"):
        for subject, verdict in _judged(str(row["judge"])).items():
            tone = {"false": "good", "true": "bad"}.get(verdict, "")
            results.append((f"judge: {subject}", verdict, tone, f"judge: {subject} {verdict}"))
    if same:
        results.append(("both images", "the same", "bad", "both images the same"))
    verdicts = [{"name": n, "value": v, "tone": tone} for n, v, tone, _ in results]
    return verdicts, [label for *_, label in results if label]


def _judged(text: str) -> dict[str, str]:
    """Subject -> verdict of the judge: "true", "false" or "no verdict"."""
    try:
        verdicts = json.loads(text)
    except (ValueError, RecursionError):
        verdicts = text
    verdicts = verdicts if isinstance(verdicts, dict) else {"verdict": verdicts}
    words = {True: "true", False: "false", None: "no verdict"}
    return {
        str(key): words[value] if value is None or isinstance(value, bool) else str(value)
        for key, value in verdicts.items()
    }


def _text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part["type"] == "text" else "[image]" for part in content)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and writes the gallery. Returns an exit code."""
    parser = CommandParser(
        prog="python -m realign.pairs gallery",
        description="Write one HTML file that shows preference pairs and needs no network.",
        example="python -m realign.pairs gallery pairs.parquet --output gallery.html",
    )
    parser.add_argument(
        "pairs", metavar="PAIRS.parquet", help="Parquet file of pairs, or a folder of such files."
    )
    parser.add_argument(
        "--output", default="gallery.html", metavar="FILE", help="HTML file to write."
    )
    parser.add_argument(
        "--image-folder",
        metavar="FOLDER",
        help="Folder that contains the images and that their paths are relative to. Images outside "
        "of it are not shown. Without it, the folder of PAIRS.",
    )
    parser.add_argument(
        "--most",
        type=int,
        default=500,
        metavar="N",
        help="Maximum number of pairs to show, sampled evenly. 0 shows all.",
    )
    parser.add_argument(
        "--side",
        type=int,
        default=320,
        metavar="PIXELS",
        help="Longer side of a thumbnail.",
    )
    args = parser.parse_args(arguments)
    check_file("--output", args.output)
    shown, total, report = _write(args.pairs, args.output, args.image_folder, args.most, args.side)
    size = Path(args.output).stat().st_size / 1e6
    show(f"wrote {args.output}: {shown} of {total} pairs, {size:.1f} MB")
    if report:
        show(report)
    return 0
