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
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from realign.data.entries import Entry, Names, name_of
from realign.data.errors import Malformed, short_repr
from realign.data.pictures import MAX_PIXELS, PictureError, StoredImage
from realign.data.records import Record, has_parts, write_pairs
from realign.data.tables import rows_of
from realign.files import check_file
from realign.pairs.io import formats
from realign.pairs.io.formats import Options
from realign.pairs.io.pictures import inside, plain_picture
from realign.pairs.io.shards import LEFT_OUT, write_table
from realign.pairs.io.texts import placed, printable, problem_of
from realign.pairs.stages.base import Bad

FORMATS = ("auto", *formats.PARSERS)
_ALL = ("llava:all", "coco:all")
_NEEDED = ("prompt", "images")  # of a table: responses may be written by the pipeline


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
    check_file("--output", output, device=False)
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

    typed = preferred = False
    for entry in read_any(data, format=format, images=images):  # nothing is decoded
        if isinstance(entry, Record):
            typed = typed or has_parts(entry.prompt)
            preferred = preferred or bool(entry.retrieved_chosen)
    made = pairs()
    first = next(made, None)
    written = 0
    if first:
        written = write_pairs(output, chain([first], made), typed=typed, preferred=preferred)
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
    return replace(record, images=pictures, retrieved_images=retrieved)


def _open(path: Path, format: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The format, and (place, item) of every item."""
    if path.is_dir():
        if files := _saved(path) or sorted(path.glob("*.parquet")):
            return _agree(format, "parquet", path), rows_of(files, _NEEDED)
        lines = sorted(path.glob("*.jsonl"))
        if len(lines) != 1:
            raise ValueError(
                f"{path} holds {len(lines)} JSON-lines files and no Parquet file. Keep one *.jsonl "
                "beside the pictures, or pass the file itself and --image-folder."
            )
        return _open(lines[0], format)
    if path.suffix in (".parquet", ".arrow"):
        return _agree(format, "parquet", path), rows_of([path], _NEEDED)
    if path.suffix == ".jsonl":
        content: Any = formats.json_lines(path)
    else:
        try:
            with path.open("rb") as file:
                content = json.load(file, object_pairs_hook=formats.json_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is no JSON file ({error}). Name a file of JSON lines *.jsonl."
            ) from error
    if isinstance(content, dict):
        if not isinstance(content.get("images"), list):
            raise ValueError(f"{path} is a JSON object without `images`; it is no COCO file.")
        items: Iterator[Any] = iter(formats.coco_items(content, path))
        return _agree(format, "coco", path), _placed(path, items)
    if path.suffix != ".jsonl" and not isinstance(content, list):
        raise ValueError(f"{path} holds {short_repr(content)}, no list of records.")
    items = iter(content)
    seen = []
    for item in items:  # up to the first that tells
        seen.append(item)
        if found := formats.format_of(item):
            return _agree(format, found, path), _placed(path, chain(seen, items))
    if format == "auto":
        keys = sorted({str(key) for item in seen if isinstance(item, dict) for key in item})
        raise ValueError(
            f"{path} holds no record of a known format; pass --format. Its records have the keys "
            f"{short_repr(keys)}; docs/pairs.md lists those that are read."
        )
    return format, _placed(path, iter(seen))


def _agree(format: str, found: str, path: Path) -> str:
    """The format asked for, unless the file is of another kind altogether."""
    tables = ("parquet", "coco")
    if format not in ("auto", found) and (found in tables or format in tables):
        raise ValueError(f"format is {format!r}, but {path} looks like {found!r}.")
    return found if format == "auto" else format


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set saved by `datasets`, of all its splits."""
    try:
        if (folder / "dataset_dict.json").exists():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            return [file for split in splits for file in _saved(folder / split)]
        if not (folder / "state.json").exists():
            return []
        listed = json.loads((folder / "state.json").read_text())["_data_files"]
        return [folder / entry["filename"] for entry in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no data set that `datasets` saved ({type(error).__name__}: {error}). "
            "Save it again with save_to_disk."
        ) from error


def _placed(path: Path, items: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path.name}:{i}", item) for i, item in enumerate(items))


def _read(
    items: Iterator[tuple[str, Any]], kind: str, folder: Path, options: Options
) -> Iterator[Record | Bad]:
    names = Names()
    said: dict[bytes, str] = {}
    for place, item in items:
        name = place
        try:
            if isinstance(item, Malformed):
                raise item
            if not isinstance(item, dict):
                raise Malformed(
                    f"it is {short_repr(item)}, no object.", "Write one object a record."
                )
            name = name_of(item) or place
            entries = formats.PARSERS[kind](item, options)
        except Malformed as error:
            yield Bad(names.unique(name), "read", error.reason, printable(str(error)))
            continue
        for number, entry in enumerate(entries):
            name = entry.name or (f"{place}#{number + 1}" if len(entries) > 1 else place)
            yield _record(names.unique(name), entry, kind, folder, said)


def _record(
    name: str, entry: Entry, kind: str, folder: Path, said: dict[bytes, str]
) -> Record | Bad:
    if not entry.images:
        return Bad(name, "read", "no image", "it names no picture")
    try:
        prompt = placed(entry.prompt, len(entry.images))
    except Malformed as error:
        return Bad(name, "read", "image token", str(error))
    try:
        images, retrieved = (
            tuple(_found(image, kind, folder) for image in group)
            for group in (entry.images, entry.retrieved)
        )
    except PictureError as error:
        return Bad(name, "read", error.reason, printable(error.detail))
    responses = (entry.chosen, entry.rejected, entry.retrieved_chosen or None)
    texts = [text for text in responses if text is not None]
    for message in prompt:
        parts = message["content"]
        texts.append(parts if isinstance(parts, str) else _text_of(parts))
    for text in texts:
        if problem := problem_of(text):
            return Bad(name, "read", *problem)
    record = Record(
        name,
        tuple(prompt),
        entry.chosen or "",
        entry.rejected or "",
        images,
        retrieved,
        retrieved_chosen=entry.retrieved_chosen,
    )
    key = _digest(record)
    if key in said:
        return Bad(name, "read", "duplicate", f"it is the same as {said[key]}")
    said[key] = name
    return record


def _text_of(parts: list[dict]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _found(image: StoredImage, kind: str, folder: Path) -> StoredImage:
    """The image with the path of its file, which must lie in the folder."""
    if image.data is not None:
        return image
    found = inside(folder, image.path)
    if not os.path.isfile(found) and kind == "llava":
        # LLaVA names pictures as COCO 2017 does; 2014 puts the split before the number.
        other = Path(image.path).with_name(f"COCO_{folder.name}_{Path(image.path).name}")
        found = inside(folder, str(other))
    if not os.path.isfile(found):
        raise PictureError("missing", f"{short_repr(image.path)} is not in {folder}")
    if printable(found) != found:
        raise PictureError(
            "malformed", f"the name of the file {short_repr(image.path)} is not UTF-8"
        )
    return StoredImage(path=found)


def _digest(record: Record) -> bytes:
    """Of everything but the name."""
    digest = hashlib.blake2b(digest_size=16)
    for stored in (*record.images, None, *record.retrieved_images):
        data = b"" if stored is None else stored.data or stored.path.encode()
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    texts = [record.prompt, record.chosen, record.rejected, record.retrieved_chosen]
    digest.update(json.dumps(texts).encode())
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
