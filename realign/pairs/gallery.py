"""Gallery of pairs: `python -m realign.pairs gallery PAIRS.parquet --output gallery.html`.

The gallery is one HTML file that needs no network, with the statistics of `stats` above the pairs.
Images are data URIs. Texts are in a JSON block, and the script inserts them as text, not markup. A
Content-Security-Policy allows only the page's own script and style.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realign.cli import CommandParser, one_line_errors
from realign.data.entries import Entry, entry_of
from realign.data.errors import Malformed
from realign.data.images import DataFolder, ImageError, StoredImage
from realign.files import check_file
from realign.pairs.io.images import load_image
from realign.pairs.stats import (
    FACTS,
    changed_words,
    collect,
    difference,
    finite,
    image_digest,
    pair_rows,
)
from realign.terminal import show

_TEMPLATE = Path(__file__).with_name("gallery.html")
_OUTSIDE = "outside the folder"  # reason of an ImageError
_SMALL = 128  # pixels; images up to this size are not reduced, and are shown with sharp pixels


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
        ValueError: for a file without pairs, or a number out of range.
    """
    return _write(pairs, output, image_folder, most, side)[:2]


def _write(
    pairs: str | Path, output: str | Path, image_folder: str | Path | None, most: int, side: int
) -> tuple[int, int, int]:
    """The numbers of `write_gallery`, and the number of images outside the folder."""
    for name, value, least in (("most", most, 0), ("side", side, 16)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    stats = collect(pairs)
    total = stats.pairs
    shown: Collection[int] = range(total)
    if most and most < total:
        shown = set(np.linspace(0, total - 1, most).round().astype(int).tolist())
    album = _Album(side, DataFolder.of_images(Path(pairs), image_folder))
    cards = [
        _card(row, name, album)
        for number, (_, name, row) in enumerate(pair_rows(pairs))
        if number in shown
    ]
    name = Path(pairs).name
    count = f"{total:,} pairs" if len(cards) == total else f"{len(cards):,} of {total:,} pairs"
    data = {
        "about": f"{count} in {name}",
        "figures": str(stats),
        "pairs": cards,
        "images": album.images,
    }
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_page(name, data), encoding="utf-8")
    outside = sum(image.get("problem") == _OUTSIDE for image in album.images)
    return len(cards), total, outside


def _card(row: dict | Malformed, place: str, album: _Album) -> dict[str, Any]:
    """The data of a row for the page."""
    try:
        if isinstance(row, Malformed):
            raise row
        entry = entry_of(row)
    except Malformed as error:
        entry = Entry(None, [], f"({error})", None, [], [])
        row = {} if isinstance(row, Malformed) else row
    chosen, rejected = difference(entry.chosen or "", entry.rejected or "")
    images = [album.place_of(image) for image in entry.images]
    retrieved = [album.place_of(image) for image in entry.retrieved]
    verdicts, labels = _verdicts(row, same=bool(images) and images == retrieved)
    facts = [(key.replace("_", " "), str(row[key])) for key in FACTS if row.get(key) is not None]
    negative = str(row.get("negative") or "retrieved")
    similarity, rank = finite(row.get("similarity")), finite(row.get("neighbour_rank"))
    # The similarity is for the neighbour. With another negative, the neighbour is not shown.
    if negative != "retrieved" and similarity is not None:
        name = "similarity of the neighbour"
        verdicts.insert(0, {"name": name, "value": f"{similarity:.3f}", "tone": ""})
    return {
        "id": place if row.get("id") is None else str(row["id"]),
        "prompt": [(m["role"], _text(m["content"])) for m in entry.prompt],
        "chosen": chosen,
        "rejected": rejected,
        "changed": changed_words(rejected),
        "images": images,
        "retrieved": retrieved,
        "negative": negative,
        "similarity": similarity,
        "rank": None if rank is None else int(rank),
        "verdicts": verdicts,
        "labels": labels,
        "facts": facts,
    }


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


class _Album:
    """Thumbnails as data URIs. Equal images share one."""

    def __init__(self, side: int, folder: DataFolder) -> None:
        self._side = side
        self._folder = folder
        self._places: dict[bytes, int] = {}
        self.images: list[dict[str, Any]] = []

    def place_of(self, image: StoredImage) -> int:
        """The index of an image in `images`."""
        key = image_digest(image, Path(self._folder.path))
        if key not in self._places:
            self._places[key] = len(self.images)
            self.images.append(self._thumbnail(image))
        return self._places[key]

    def _thumbnail(self, stored: StoredImage) -> dict[str, Any]:
        try:
            if stored.data is None and stored.path is not None:
                stored = StoredImage(path=self._folder.file(stored.path))
            image = load_image(stored)
        except ImageError as error:
            return {"problem": error.reason}
        small = max(image.size) <= _SMALL
        if not small:
            image.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if small else "JPEG", quality=82, optimize=True)
        kind = "png" if small else "jpeg"
        text = base64.b64encode(buffer.getvalue()).decode()
        return {"source": f"data:image/{kind};base64,{text}", "small": small}


def _page(name: str, data: dict[str, Any]) -> str:
    """The template, filled with the data and a policy for only its own script and style."""
    page = _TEMPLATE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = hashlib.sha256(text.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; img-src data:; style-src {hashes['style']}; "
        f"script-src {hashes['script']}; base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Without `<`, no text in the block can end the block, or begin a tag or comment.
    text = text.replace("<", "\\u003c").encode("utf-8", "replace").decode()
    title = html.escape(f"Preference pairs: {name}")
    parts = {"%POLICY%": policy, "%TITLE%": title, "%DATA%": text}
    return re.sub("|".join(parts), lambda match: parts[match[0]], page)


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
    shown, total, outside = _write(args.pairs, args.output, args.image_folder, args.most, args.side)
    size = Path(args.output).stat().st_size / 1e6
    show(f"wrote {args.output}: {shown} of {total} pairs, {size:.1f} MB")
    if outside:
        show(f"{outside} images are outside the folder and are not shown. Pass --image-folder.")
    return 0
