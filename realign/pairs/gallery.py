"""A page to look at pairs: `python -m realign.pairs gallery PAIRS.parquet --output gallery.html`.

One HTML file that needs no network: pictures are data URIs, texts lie in a JSON block and are set
as text, and a Content-Security-Policy allows its own script and style and nothing else.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import hashlib
import html
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from realign.data.entries import Entry, entry_of
from realign.data.errors import Malformed
from realign.data.pictures import PictureError, StoredImage
from realign.files import check_file
from realign.pairs.io.pictures import load_picture

_TEMPLATE = Path(__file__).with_name("gallery.html")
_SMALL = 128  # pixels; smaller pictures are kept as they are and shown with hard edges
_ROWS = 32  # read at once
_COMPARED = 16_000_000  # tokens of one times tokens of the other; some seconds
_FACTS = (
    "neighbour", "masked", "masker", "answer_model", "refill_model", "embed_model",
    "negative_record", "seed",
)  # fmt: skip
_NUMBERS = ("neighbour_rank", "similarity", "text_similarity", "visual_margin")
_WRITTEN = ("id", "prompt", "chosen", "rejected", "images", "image")
_WRITTEN += ("retrieved_images", "retrieved_image", "judge", "negative")
# A word; a letter of a script written without spaces; white space; any other character.
_TOKENS = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+|\s+|.", re.DOTALL)

Segments = list[tuple[str, bool]]  # text, and whether it is in one response only


def difference(chosen: str, rejected: str) -> tuple[Segments, Segments]:
    """Both responses in segments that tell which words they do not share.

    Joined, the segments are the responses again. Neighbouring changed words make one segment.
    Responses of some thousand words are not compared and count as changed throughout.
    """
    a, b = _TOKENS.findall(chosen), _TOKENS.findall(rejected)
    if len(a) * len(b) > _COMPARED:
        return [(chosen, True)], [(rejected, True)]
    sides: tuple[list, list] = ([], [])
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for kind, *edges in matcher.get_opcodes():
        for side, tokens, start, stop in zip(sides, (a, b), edges[::2], edges[1::2], strict=True):
            side += [(token, kind != "equal") for token in tokens[start:stop]]
    return _joined(sides[0]), _joined(sides[1])


def count_words(text: str) -> int:
    """Words of a text; of a script that is written without spaces, letters."""
    return sum(token[0].isalnum() for token in _TOKENS.findall(text))


def changed_words(segments: Segments) -> int:
    """How many words of a response the other one does not share."""
    return sum(count_words(text) for text, changed in segments if changed)


def write_gallery(
    pairs: str | Path, output: str | Path, *, most: int = 500, side: int = 320
) -> tuple[int, int]:
    """Write the page.

    Args:
        pairs: a Parquet file of preference pairs, or a folder of them.
        output: HTML file to write.
        most: pairs shown, evenly sampled over the file; 0 shows all.
        side: pixels of the longer side of a thumbnail.

    Returns:
        How many pairs are shown, and how many there are.

    Raises:
        FileNotFoundError: when there is nothing at `pairs`.
        ValueError: for a file without pairs, or a number out of range.
    """
    for name, value, least in (("most", most, 0), ("side", side, 16)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    files = pair_files(pairs)
    total = sum(pq.read_metadata(file).num_rows for file in files)
    if not total:
        raise ValueError(f"{pairs} holds no pairs.")
    wanted = range(total)
    if most and most < total:
        wanted = sorted(set(np.linspace(0, total - 1, most).round().astype(int).tolist()))
    album = _Album(side)
    shown = [_shown(row, file, place, album) for file, place, row in pair_rows(files, set(wanted))]
    name = Path(pairs).name
    count = f"{total:,} pairs" if len(shown) == total else f"{len(shown):,} of {total:,} pairs"
    data = {"about": f"{count} in {name}", "pairs": shown, "pictures": album.pictures}
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_page(name, data), encoding="utf-8")
    return len(shown), total


def pair_files(pairs: str | Path) -> list[Path]:
    """The Parquet files of a data set.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: for one that cannot be read.
    """
    path = Path(pairs)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise FileNotFoundError(
            f"there is no Parquet file at {pairs}; `python -m realign.pairs` writes one."
        )
    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is not a readable Parquet file ({error}).") from error
        if not {"chosen", "rejected"} <= set(names):
            raise ValueError(f"{file} has no columns chosen and rejected; it holds no pairs.")
    return files


def pair_rows(
    files: Sequence[Path], wanted: set[int] | None = None
) -> Iterator[tuple[Path, int, dict]]:
    """(file, place in it, row) of all rows, or of the wanted ones, counted over all files."""
    start = 0
    for file in files:
        with pq.ParquetFile(file) as parquet:
            columns = [*_WRITTEN, *_FACTS, *_NUMBERS]
            columns = [name for name in parquet.schema_arrow.names if name in columns]
            first = start
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if wanted is not None and wanted.isdisjoint(range(start, start + count)):
                    start += count
                    continue
                for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=columns):
                    for i in range(batch.num_rows):
                        if wanted is None or start in wanted:
                            yield file, start - first, batch.slice(i, 1).to_pylist()[0]
                        start += 1


def _shown(row: dict, file: Path, place: int, album: _Album) -> dict[str, Any]:
    """A row as the page shows it."""
    name = str(row["id"]) if row.get("id") is not None else f"{file.name}:{place}"
    try:
        entry = entry_of(row)
    except Malformed as error:
        entry = Entry(name, [], f"({error})", None, [], [])
    chosen, rejected = difference(entry.chosen or "", entry.rejected or "")
    images, retrieved = (
        [album.place_of(value, file.parent) for value in group]
        for group in (entry.images, entry.retrieved)
    )
    verdicts, labels = _verdicts(row, same=bool(images) and images == retrieved)
    facts = [(key.replace("_", " "), str(row[key])) for key in _FACTS if row.get(key) is not None]
    negative = row.get("negative") or "retrieved"
    # Another negative than the neighbour has no similarity; the neighbour's is said in words.
    near = {"similarity": _finite(row.get("similarity")), "rank": row.get("neighbour_rank")}
    if negative != "retrieved" and near["similarity"] is not None:
        said = {
            "name": "completed on a neighbour",
            "value": f"{near['similarity']:.3f}",
            "tone": "",
        }
        verdicts.insert(0, said)
    return {
        "id": name,
        "prompt": [(m["role"], _text(m["content"])) for m in entry.prompt],
        "chosen": chosen,
        "rejected": rejected,
        "changed": changed_words(rejected),
        "images": images,
        "retrieved": retrieved,
        "negative": negative,
        **near,
        "verdicts": verdicts,
        "labels": labels,
        "facts": facts,
    }


def _verdicts(row: dict, same: bool) -> tuple[list[dict], list[str]]:
    """What the filters said, to show and to choose by."""
    found: list[tuple[str, str, str, str | None]] = []  # name, value, tone, label
    if (value := _finite(row.get("text_similarity"))) is not None:
        found.append(("text similarity", f"{value:.2f}", "", None))
    if (value := _finite(row.get("visual_margin"))) is not None:
        tone = "good" if value > 0 else "bad"
        label = f"visual margin {'above' if value > 0 else 'not above'} 0"
        found.append(("visual margin", f"{value:+.2f}", tone, label))
    if row.get("judge"):
        for what, said in _judged(row["judge"]).items():
            tone = {"false": "good", "true": "bad"}.get(said, "")
            found.append((f"judge: {what}", said, tone, f"judge: {what} {said}"))
    if same:
        found.append(("both pictures", "the same", "bad", "both pictures the same"))
    verdicts = [{"name": n, "value": v, "tone": tone} for n, v, tone, _ in found]
    return verdicts, [label for *_, label in found if label]


def _judged(text: str) -> dict[str, str]:
    """What a judge said of what: "true", "false" or "no verdict"."""
    try:
        said = json.loads(text)
    except ValueError:
        said = text
    said = said if isinstance(said, dict) else {"said": said}
    words = {True: "true", False: "false", None: "no verdict"}
    return {
        str(key): words[value] if value is None or isinstance(value, bool) else str(value)
        for key, value in said.items()
    }


class _Album:
    """Thumbnails as data URIs; equal pictures have one."""

    def __init__(self, side: int) -> None:
        self._side = side
        self._places: dict[bytes, int] = {}
        self.pictures: list[dict[str, Any]] = []

    def place_of(self, image: StoredImage, folder: Path) -> int:
        """The number of an image of a row; paths are relative to the `folder` of its file."""
        if image.data is None:
            image = StoredImage(path=str(folder / image.path))
        key = hashlib.blake2b(image.data or image.path.encode("utf-8", "replace"))
        if key.digest() not in self._places:
            self._places[key.digest()] = len(self.pictures)
            self.pictures.append(self._picture(image))
        return self._places[key.digest()]

    def _picture(self, stored: StoredImage) -> dict[str, Any]:
        try:
            image = load_picture(stored)
        except PictureError as error:
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
    """The template with the data in it and a policy of its own script and style."""
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
    # Without `<` nothing in the block can end it, or begin a tag or comment in it.
    text = text.replace("<", "\\u003c").encode("utf-8", "replace").decode()
    title = html.escape(f"Preference pairs: {name}")
    parts = {"%POLICY%": policy, "%TITLE%": title, "%DATA%": text}
    return re.sub("|".join(parts), lambda found: parts[found[0]], page)


def _joined(tokens: Segments) -> Segments:
    """Runs of tokens as segments; white space counts as changed between changed words alone."""
    flags = [changed for _, changed in tokens]
    for i, (text, _) in enumerate(tokens):
        if text.isspace():
            flags[i] = 0 < i < len(tokens) - 1 and flags[i - 1] and flags[i + 1]
    segments: Segments = []
    for (text, _), changed in zip(tokens, flags, strict=True):
        if segments and segments[-1][1] == changed:
            segments[-1] = (segments[-1][0] + text, changed)
        else:
            segments.append((text, changed))
    return segments


def _text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part["type"] == "text" else "[image]" for part in content)


def _finite(value: Any) -> float | None:
    """A number that JSON has."""
    return float(value) if value is not None and np.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, report; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m realign.pairs gallery",
        description="Write one HTML file that shows preference pairs; it needs no network.",
    )
    parser.add_argument("pairs", metavar="PAIRS.parquet", help="pairs, or a folder of such files")
    parser.add_argument("--output", default="gallery.html", help="file to write (%(default)s)")
    parser.add_argument(
        "--most", type=int, default=500, help="pairs shown, evenly sampled; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--side", type=int, default=320, help="longer side of a thumbnail (%(default)s pixels)"
    )
    given = parser.parse_args(arguments)
    try:
        check_file("--output", given.output)
        shown, total = write_gallery(given.pairs, given.output, most=given.most, side=given.side)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = Path(given.output).stat().st_size / 1e6
    print(f"wrote {given.output}: {shown} of {total} pairs, {size:.1f} MB")
    return 0
