"""Records from the formats they come in, and the list of those that cannot be used.

    for record in read_any("llava_instruct_150k.json", images="train2014"): ...

gives a `Record` or a `Bad` for every record of a file. A picture is looked up, not decoded; names
are made unique, and a record that says what another said is bad.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from realign.outputs import check_file
from realign.pairs import formats
from realign.pairs.formats import Entry, Malformed, Options
from realign.pairs.pictures import MAX_PIXELS, PictureError, inside, plain_picture
from realign.pairs.shards import LEFT_OUT, write_table
from realign.pairs.stage import Bad
from realign.pairs.texts import printable, problem_of, without_placeholder
from realign.records import Record, StoredImage, has_parts, write_pairs

FORMATS = ("auto", *formats.PARSERS)
_ALL = ("llava:all", "coco:all")


def read_any(
    data: str,
    *,
    format: str = "auto",
    images: str | None = None,
    turns: str = "first",
    captions: str = "first",
    caption_prompt: str = formats.CAPTION_PROMPT,
) -> Iterator[Record | Bad]:
    """Read records in any of the formats.

    Args:
        data: a file or folder. parquet: Parquet files with TRL's vision preference columns, or a
            folder that `datasets` saved; realign: the authors' JSON; llava: LLaVA's instruction
            JSON; coco: COCO's captions JSON; folder: a folder of pictures with one JSON-lines file.
        format: one of FORMATS; "auto" looks. "llava:all" and "coco:all" ask for all turns and all
            captions.
        images: the folder that picture paths are relative to and may not leave; that of the data
            when absent.
        turns: llava: "first" or "all" answers of a dialogue.
        captions: coco: the "first" or "all" captions of a picture.
        caption_prompt: coco: the question to which a caption is the answer.

    Returns:
        For each record a `Record`, `chosen` and `rejected` empty where the data has none, or a
        `Bad` that says why it cannot be used.

    Raises:
        FileNotFoundError: when there is nothing at `data`.
        ValueError: for an unknown format, option or file.
    """
    for name, value in (("turns", turns), ("captions", captions)):
        if value not in ("first", "all"):
            raise ValueError(f"{name} is {value!r}; use 'first' or 'all'.")
    if format in _ALL:
        format, turns, captions = format.removesuffix(":all"), "all", "all"
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; use one of {', '.join((*FORMATS, *_ALL))}.")
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {data}. Name an existing file or folder.")
    kind, items = _open(path, format)
    folder = Path(images) if images is not None else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise ValueError(f"--image-folder {images} is no folder; name the one of the pictures.")
    return _read(items, kind, folder, Options(turns, captions, caption_prompt))


def import_pairs(
    data: str,
    images: str | None,
    output: str,
    *,
    format: str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> dict[str, int]:
    """Write the pairs that a data set already has, every picture of them decoded once.

    Pictures in the output are paths, or bytes where the data has bytes or a picture had to be
    converted (`plain_picture`). Bad records go to rejected_records.parquet in a folder beside it,
    named after it with the suffix .work.

    Args:
        data: see `read_any`.
        images: see `read_any`.
        output: Parquet file to write.
        format: see `read_any`.
        max_pixels: larger pictures are refused.

    Returns:
        How many "pairs" were written, and how many records were left out by reason.

    Raises:
        ValueError: when no pair is left; see also `read_any`.
    """
    listed = Path(output).with_suffix(".work") / "rejected_records.parquet"
    check_file("--output", output)
    check_file("--output", listed)
    bad: list[Bad] = []
    known: dict[str, StoredImage | PictureError] = {}

    def pairs() -> Iterator[Record]:
        for entry in read_any(data, format=format, images=images):
            if isinstance(entry, Record):
                entry = _complete(entry, known, max_pixels)
            if isinstance(entry, Bad):
                bad.append(entry)
            else:
                yield entry

    looked = read_any(data, format=format, images=images)  # nothing is decoded
    typed = any(has_parts(entry.prompt) for entry in looked if isinstance(entry, Record))
    made = pairs()
    first = next(made, None)
    written = write_pairs(output, chain([first], made), typed=typed) if first else 0
    write_table(listed, pa.Table.from_pylist([vars(b) for b in bad], schema=LEFT_OUT))
    counts = Counter(b.reason for b in bad)
    if not written:
        raise ValueError(f"{data} gave no pair ({dict(counts)}); {listed} lists every record.")
    return {"pairs": written, **dict(sorted(counts.items()))}


def _complete(
    record: Record, known: dict[str, StoredImage | PictureError], max_pixels: int
) -> Record | Bad:
    if not record.chosen or not record.rejected:
        missing = "rejected" if record.chosen else "chosen"
        return Bad(record.name, "read", "no response", f"it has no {missing} response")

    def plain(stored: StoredImage) -> StoredImage:
        if stored.data is not None:
            return plain_picture(stored, max_pixels=max_pixels)
        if stored.path not in known:
            try:
                known[stored.path] = plain_picture(stored, max_pixels=max_pixels)
            except PictureError as error:
                known[stored.path] = error
        found = known[stored.path]
        if isinstance(found, PictureError):
            raise found
        return found

    try:
        pictures, retrieved = (
            tuple(map(plain, group)) for group in (record.images, record.retrieved_images)
        )
    except PictureError as error:
        return Bad(record.name, "read", error.reason, error.detail)
    return Record(record.name, record.prompt, record.chosen, record.rejected, pictures, retrieved)


def _open(path: Path, format: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The format, and (place, item) of every item."""
    if path.is_dir():
        if files := _saved(path) or sorted(path.glob("*.parquet")):
            return _agree(format, "parquet", path), formats.rows_of(files)
        lines = sorted(path.glob("*.jsonl"))
        if len(lines) != 1:
            raise ValueError(
                f"{path} holds {len(lines)} JSON-lines files and no Parquet file. Keep one *.jsonl "
                "beside the pictures, or pass the file itself and --image-folder."
            )
        return _open(lines[0], format)
    if path.suffix in (".parquet", ".arrow"):
        return _agree(format, "parquet", path), formats.rows_of([path])
    if path.suffix == ".jsonl":
        content: Any = formats.json_lines(path)
    else:
        try:
            with path.open("rb") as file:
                content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON file ({error}).") from error
    if isinstance(content, dict):
        if not isinstance(content.get("images"), list):
            raise ValueError(f"{path} is a JSON object without `images`; it is no COCO file.")
        items: Iterator[Any] = iter(formats.coco_items(content, path))
        return _agree(format, "coco", path), _placed(path, items)
    items = iter(content)
    seen = []
    for item in items:  # up to the first that tells
        seen.append(item)
        if found := formats.format_of(item):
            return _agree(format, found, path), _placed(path, chain(seen, items))
    if format == "auto":
        raise ValueError(f"{path} holds no record of a known format; pass --format.")
    return format, _placed(path, iter(seen))


def _agree(format: str, found: str, path: Path) -> str:
    """The format asked for, unless the file is of another kind altogether."""
    tables = ("parquet", "coco")
    if format not in ("auto", found) and (found in tables or format in tables):
        raise ValueError(f"format is {format!r}, but {path} looks like {found!r}.")
    return found if format == "auto" else format


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set saved by `datasets`, of all its splits."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return [file for split in splits for file in _saved(folder / split)]
    if not (folder / "state.json").exists():
        return []
    listed = json.loads((folder / "state.json").read_text())["_data_files"]
    return [folder / entry["filename"] for entry in listed]


def _placed(path: Path, items: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path.name}:{i}", item) for i, item in enumerate(items))


def _read(
    items: Iterator[tuple[str, Any]], kind: str, folder: Path, options: Options
) -> Iterator[Record | Bad]:
    names: dict[str, int] = {}
    said: dict[bytes, str] = {}
    for place, item in items:
        try:
            if isinstance(item, Malformed):
                raise item
            if not isinstance(item, dict):
                raise Malformed(f"{str(item)[:80]!r} is no object")
            entries = formats.PARSERS[kind](item, options)
        except Malformed as error:
            name = _unique(formats.name_of(item) or place, names)
            yield Bad(name, "read", "malformed", printable(str(error)))
            continue
        for number, entry in enumerate(entries):
            name = entry.name or (f"{place}#{number + 1}" if len(entries) > 1 else place)
            yield _record(_unique(name, names), entry, kind, folder, said)


def _unique(name: str, names: dict[str, int]) -> str:
    """The name, with a number behind it where it is taken: rows are joined by it."""
    found, count = name, names.get(name, 0)
    while found in names:
        count += 1
        found = f"{name}-{count}"
    names[name] = max(count, 1)
    names.setdefault(found, 1)
    return found


def _record(
    name: str, entry: Entry, kind: str, folder: Path, said: dict[bytes, str]
) -> Record | Bad:
    texts = [entry.chosen, entry.rejected or None]  # `write_pairs` writes "" where there is none
    prompt = [m | {"content": without_placeholder(m)} for m in entry.prompt]
    for message in prompt:
        parts = message["content"]
        texts += [parts] if isinstance(parts, str) else [_text_of(parts)]
    for text in texts:
        if text is not None and (problem := problem_of(text)):
            return Bad(name, "read", *problem)
    if not entry.images:
        return Bad(name, "read", "no image", "it names no picture")
    try:
        images = tuple(_stored(value, kind, folder) for value in entry.images)
        retrieved = tuple(_stored(value, kind, folder) for value in entry.retrieved)
    except PictureError as error:
        return Bad(name, "read", error.reason, printable(error.detail))
    record = Record(
        name, tuple(prompt), entry.chosen or "", entry.rejected or "", images, retrieved
    )
    key = _digest(record)
    if key in said:
        return Bad(name, "read", "duplicate", f"it is the same as {said[key]}")
    said[key] = name
    return record


def _text_of(parts: list[dict]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _stored(value: Any, kind: str, folder: Path) -> StoredImage:
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
    else:
        data, path = (value, None) if isinstance(value, bytes) else (None, value)
    if data is not None:
        if not isinstance(data, bytes):
            raise PictureError("malformed", f"{str(data)[:80]!r} is no picture's bytes")
        if not data:
            raise PictureError("corrupt", "it has no bytes")
        return StoredImage(data, path if isinstance(path, str) else None)
    if not isinstance(path, str) or not path:
        raise PictureError("no image", f"{value!r} is no path")
    found = inside(folder, path)
    if not os.path.isfile(found) and kind == "llava":
        # LLaVA names pictures as COCO 2017 does; 2014 puts the split before the number.
        other = Path(path).with_name(f"COCO_{folder.name}_{Path(path).name}")
        found = inside(folder, str(other))
    if not os.path.isfile(found):
        raise PictureError("missing", f"{path!r} is not in {folder}")
    if printable(found) != found:
        raise PictureError("malformed", f"the name of the file {path!r} is not UTF-8")
    return StoredImage(path=found)


def _digest(record: Record) -> bytes:
    """Of everything but the name."""
    digest = hashlib.blake2b(digest_size=16)
    for stored in (*record.images, None, *record.retrieved_images):
        data = b"" if stored is None else stored.data or stored.path.encode()
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    digest.update(json.dumps([record.prompt, record.chosen, record.rejected]).encode())
    return digest.digest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, import, report; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m realign.pairs import",
        description="Write the pairs that a data set already has: the authors' JSON, or a TRL set.",
    )
    parser.add_argument("data", metavar="DATA", help="file or folder of pairs")
    parser.add_argument("--image-folder", help="that image paths are relative to (that of DATA)")
    parser.add_argument("--output", default="pairs.parquet", help="file to write (%(default)s)")
    parser.add_argument("--format", default="auto", help="realign or parquet (auto looks)")
    given = parser.parse_args(arguments)
    try:
        counts = import_pairs(given.data, given.image_folder, given.output, format=given.format)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    left_out = ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason != "pairs")
    print(f"wrote {given.output}: {counts['pairs']} pairs; left out: {left_out or 'none'}")
    return 0
