"""Reader for all record formats, and the command `import`, which converts existing pairs.

    for record in read_any("llava_instruct_150k.json", images="train2014"): ...

yields a `Record` or an `InvalidRecord` for every record of a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pyarrow as pa

from realign.cli import CommandParser, one_line_errors
from realign.data.entries import Entry, Names, name_of
from realign.data.errors import Malformed, Skipped, short_repr
from realign.data.formats import entries_of
from realign.data.images import DataFolder, ImageError, StoredImage
from realign.data.messages import texts_of
from realign.data.records import Record, has_parts, write_pairs
from realign.data.sources import Source, open_source
from realign.files import check_apart, check_file
from realign.pairs.io.images import ImagePaths, plain_image
from realign.pairs.io.rows import FilteredRecord, InvalidRecord
from realign.pairs.io.shards import LEFT_OUT, write_table
from realign.pairs.io.texts import placed, printable, problem_of
from realign.terminal import show

_MOST_INVALID = 1_000_000


def read_any(
    data: str, *, format: str = "auto", images: str | None = None, split: str | None = None
) -> Iterator[Record | InvalidRecord]:
    """Read records in any format of `FORMATS`.

    Args:
        data: a file, a folder, or the name of a data set on the Hub.
        format: a key of `FORMATS` (docs/data.md), or "auto" to detect it by each record's keys.
            "llava:all" and "coco:all" make a record of each answer of a dialogue, or of each
            caption of an image.
        images: folder that contains the images and that their paths are relative to. None means
            the folder of the data.
        split: see `open_source`.

    Returns:
        For each record, a `Record` or an `InvalidRecord` with the reason. Missing `chosen` and
        `rejected` responses are empty. Image files are checked for existence but not decoded.
        Names are made unique. A record that repeats another is invalid. A record without an image
        or with equal ratings is a `FilteredRecord`.

    Raises:
        FileNotFoundError: when `data` does not exist.
        ValueError: for an unknown format, or a file that cannot be read.
    """
    source = open_source(data, images, split=split, format=format)
    return _read(source)


def import_pairs(
    data: str,
    images: str | None,
    output: str,
    *,
    format: str = "auto",
    split: str | None = None,
) -> dict[str, int]:
    """Write the pairs of an existing data set, and decode each of their images once.

    The output holds paths of images. It holds bytes if the data does, or if an image had to be
    converted (`plain_image`). Invalid records are listed in rejected_records.parquet, in a folder
    next to the output with the same name and the suffix .work.

    Args:
        data: see `read_any`.
        images: see `read_any`.
        output: Parquet file to write.
        format: see `read_any`.
        split: see `read_any`.

    Returns:
        "pairs" -> number of pairs written, and reason -> number of invalid records.

    Raises:
        ValueError: when no pair is left, the output is `data` or in its folder, or `read_any`
            raises it.
    """
    return _import_pairs(data, images, output, format, split)[0]


def _import_pairs(
    data: str, images: str | None, output: str, format: str, split: str | None
) -> tuple[dict[str, int], str]:
    """The numbers of `import_pairs`, and the note of `ImagePaths`."""
    rejected = Path(output).with_suffix(".work") / "rejected_records.parquet"
    check_file("--output", output, device=False)
    check_apart("--output", output, data)
    check_file("--output", rejected)
    invalid: list[InvalidRecord] = []
    cached_plain = functools.cache(_plain)
    options = {"format": format, "images": images, "split": split}

    def pairs() -> Iterator[Record]:
        for entry in read_any(data, **options):
            result = _complete(entry, cached_plain) if isinstance(entry, Record) else entry
            if isinstance(result, Record):
                yield result
            else:
                invalid.append(result)
            if len(invalid) > _MOST_INVALID:  # each takes 730 bytes
                raise ValueError(
                    f"{data} has more than {_MOST_INVALID:,} invalid records. One is "
                    f"{short_repr(invalid[-1].record)}: {invalid[-1].reason} "
                    f"({invalid[-1].detail}). Check --format and --image-folder."
                )

    typed = preferred = False
    for entry in read_any(data, **options):  # nothing is decoded
        if isinstance(entry, Record):
            typed = typed or has_parts(entry.prompt)
            preferred = preferred or bool(entry.retrieved_chosen)
    records = pairs()
    first = next(records, None)
    written, paths = 0, ImagePaths()
    if first:
        noted = paths.of(chain([first], records))
        written = write_pairs(output, noted, typed=typed, preferred=preferred)
    write_table(rejected, pa.Table.from_pylist([vars(record) for record in invalid], LEFT_OUT))
    counts = Counter(record.reason for record in invalid)
    if not written:
        raise ValueError(f"{data} gave no pair ({dict(counts)}). {rejected} lists every record.")
    note = paths.note(output, DataFolder.of_images(Path(data), images))
    return {"pairs": written, **dict(sorted(counts.items()))}, note


def _plain(stored: StoredImage) -> StoredImage | ImageError:
    try:
        return plain_image(stored)
    except ImageError as error:
        return error


def _complete(
    record: Record, cached_plain: Callable[[StoredImage], StoredImage | ImageError]
) -> Record | InvalidRecord:
    """Checks both responses and converts the images. `cached_plain` converts image files."""
    for name in ("chosen", "rejected"):
        if not getattr(record, name):
            return InvalidRecord(record.name, "read", "no response", f"it has no {name} response")
    images: list[StoredImage] = []
    for stored in (*record.images, *record.retrieved_images):
        image = cached_plain(stored) if stored.data is None else _plain(stored)
        if isinstance(image, ImageError):
            return InvalidRecord(record.name, "read", image.reason, image.detail)
        images.append(image)
    count = len(record.images)
    return replace(record, images=tuple(images[:count]), retrieved_images=tuple(images[count:]))


def _read(source: Source) -> Iterator[Record | InvalidRecord]:
    names = Names()
    digests: dict[bytes, str] = {}  # digest of a record -> its name
    for place, item in source.items:
        name = place
        try:
            if not isinstance(item, Malformed):
                name = name_of(item) or place
            entries = entries_of(item, source.format, source.first)
        except Malformed as error:
            kind = FilteredRecord if isinstance(error, Skipped) else InvalidRecord
            yield kind(names.unique(name), "read", error.reason, printable(str(error)))
            continue
        for number, entry in enumerate(entries):
            name = entry.name or (f"{place}#{number + 1}" if len(entries) > 1 else place)
            record = _record(names.unique(name), entry, source.folder)
            if isinstance(record, Record):
                first = digests.setdefault(_digest(record), record.name)
                if first != record.name:
                    record = InvalidRecord(
                        record.name, "read", "duplicate", f"it is the same as {first}"
                    )
            yield record


def _record(name: str, entry: Entry, folder: DataFolder) -> Record | InvalidRecord:
    try:
        prompt = placed(entry.prompt, len(entry.images))
        images = tuple(_located(image, folder) for image in entry.images)
        retrieved = tuple(_located(image, folder) for image in entry.retrieved)
    except Malformed as error:
        return InvalidRecord(name, "read", "image token", str(error))
    except ImageError as error:
        return InvalidRecord(name, "read", error.reason, printable(error.detail))
    responses = (entry.chosen, entry.rejected, entry.retrieved_chosen or None)
    texts = [text for text in responses if text is not None]
    for message in prompt:
        content = message["content"]
        texts.append(content if isinstance(content, str) else " ".join(texts_of(message)))
    for text in texts:
        if problem := problem_of(text):
            return InvalidRecord(name, "read", *problem)
    return Record(
        name,
        tuple(prompt),
        entry.chosen or "",
        entry.rejected or "",
        images,
        retrieved,
        retrieved_chosen=entry.retrieved_chosen,
    )


def _located(image: StoredImage, folder: DataFolder) -> StoredImage:
    """The image with the absolute path of its file, which must be in the folder."""
    if image.path is None or image.data is not None:
        return image
    file = folder.file(image.path)
    if not os.path.isfile(file):
        # LLaVA uses the file names of COCO 2017. In COCO 2014, they begin with the split.
        name = f"COCO_{Path(folder.path).name}_{Path(image.path).name}"
        file = folder.file(str(Path(image.path).parent / name))
    if not os.path.isfile(file):
        raise ImageError("missing", f"{short_repr(image.path)} is not in {folder.path}")
    if printable(file) != file:
        raise ImageError("malformed", f"the name of the file {short_repr(image.path)} is not UTF-8")
    return StoredImage(path=file)


def _digest(record: Record) -> bytes:
    """Digest of all fields of a record except the name."""
    digest = hashlib.blake2b(digest_size=16)
    for stored in (*record.images, StoredImage(), *record.retrieved_images):
        data = stored.data or (stored.path or "").encode()
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    texts = [record.prompt, record.chosen, record.rejected, record.retrieved_chosen]
    digest.update(json.dumps(texts).encode())
    return digest.digest()


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and imports the pairs. Returns an exit code."""
    parser = CommandParser(
        prog="python -m realign.pairs import",
        description="Convert existing pairs, in any format of docs/data.md.",
        example="python -m realign.pairs import data.json --image-folder images",
    )
    parser.add_argument(
        "data", metavar="DATA", help="File or folder of pairs, or OWNER/NAME on the Hub."
    )
    parser.add_argument(
        "--image-folder",
        metavar="FOLDER",
        help="Folder that image paths are relative to. Without it, the folder of DATA.",
    )
    parser.add_argument(
        "--output", default="pairs.parquet", metavar="FILE", help="Parquet file to write."
    )
    parser.add_argument(
        "--format",
        default="auto",
        metavar="NAME",
        help="Format of DATA, such as parquet or realign (docs/data.md). auto detects it.",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="Split of DATA, if it has several, such as train."
    )
    args = parser.parse_args(arguments)
    counts, note = _import_pairs(args.data, args.image_folder, args.output, args.format, args.split)
    left_out = ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason != "pairs")
    show(f"wrote {args.output}: {counts['pairs']} pairs; left out: {left_out or 'none'}{note}")
    return 0
