"""Record table: preference records on disk, as text and facts of their images.

    table = open_table("pairs.parquet")  # converted once, then opened in milliseconds
    table[3].chosen, table[3].images[0].width
    table.image(table[3].images[0]).decode()

A table consists of two files. `records.arrow` is memory-mapped, so all ranks of a machine share its
pages. `images.bin` holds the embedded images, each distinct image once. It is read and not mapped,
because pages of a mapped file count as memory of the process. Image files are not copied.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from realign.data.errors import RecordError, RecordErrors, shorten
from realign.data.images import ImageError, StoredImage, digest_of_bytes
from realign.data.records import Record, stream_pairs
from realign.data.sources import identity
from realign.files import open_lock, open_regular, read_limited, replacing, write_whole
from realign.terminal import show

_VERSION = 1
"""Version of the files; changed when they would be read as something else."""
_IMAGE = pa.struct(
    [
        ("key", pa.binary(16)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("changed", pa.int64()),
        ("path", pa.binary()),
        ("given", pa.binary()),
    ]
)
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "texts": pa.string(),  # JSON, since Arrow accepts no lone surrogates
        "images": pa.list_(_IMAGE),
        "retrieved_images": pa.list_(_IMAGE),
    }
)
_OF_FILES = ("offset", "path", "given", "size", "changed")
_COLUMNS = ("images", "retrieved_images")
_PATHS = ("path", "given")
_ABOUT = "about"
"""Key of the metadata of the last batch: `RecordTable.digest` and `skipped`."""
_LOCK, _LAST = "lock", "last"
"""Names of the lock of a conversion, and of the file with the content that was converted last."""
_DAY = 24 * 3600  # seconds
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_BATCH = 256
"""Records whose embedded images are in memory at once."""
_GROUP = 4096
"""Rows of a batch in the Arrow file."""
_THREADS = 4
"""Threads that hash images and read their headers."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Everything about an image except its pixels.

    Attributes:
        key: digest of the encoded bytes.
        width: width of the upright image.
        height: its height.
        offset: place in the table's images, -1 for an image file.
        size: encoded bytes.
        changed: time of the last change of an image file in ns, 0 for an embedded image.
        path: path of an image file, or the name of an embedded image.
        given: path with links that leads to `path`, if there are links.
    """

    key: bytes
    width: int
    height: int
    offset: int
    size: int
    changed: int
    path: str | None
    given: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A record, with facts in place of images."""

    name: str
    prompt: tuple[dict[str, Any], ...]
    chosen: str
    rejected: str
    retrieved_chosen: str
    images: tuple[ImageFacts, ...]
    retrieved_images: tuple[ImageFacts, ...]


class RecordTable(Sequence[Row]):
    """Preference records on disk.

    Args:
        stream: the Arrow file.
        blob: open file of the embedded images.
        folder: folder for files that depend on this table; None for records of a program.

    Attributes:
        digest: 128-bit digest of names, texts and image keys.
        skipped: number of rows of the source that gave no record, by reason.

    Raises:
        pa.ArrowInvalid: for a file of another version.
    """

    def __init__(
        self, stream: pa.NativeFile | BinaryIO, blob: BinaryIO, folder: Path | None
    ) -> None:
        self._blob, self.folder = blob, folder
        batches, about = [], None
        with pa.ipc.open_stream(stream) as reader:
            if reader.schema != _SCHEMA:
                raise pa.ArrowInvalid("the schema differs")
            with suppress(StopIteration):
                while True:
                    batch, metadata = reader.read_next_batch_with_custom_metadata()
                    batches.append(batch)
                    about = (metadata or {}).get(_ABOUT.encode(), about)
        if about is None:
            raise pa.ArrowInvalid("the last batch is missing")
        self._table = pa.Table.from_batches(batches, _SCHEMA)
        self.digest: str
        self.skipped: dict[str, int]
        self.digest, self.skipped, size = json.loads(about)
        if os.fstat(blob.fileno()).st_size != size:
            raise pa.ArrowInvalid("the file of images is truncated")

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return list(self.rows(start, stop))
        return next(self.rows(range(len(self))[index], None))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _GROUP):
            yield from self.rows(start, start + _GROUP)

    def rows(self, start: int, stop: int | None) -> Iterator[Row]:
        """The rows from `start` to before `stop`; one row if it is None."""
        for row in self._table.slice(start, 1 if stop is None else stop - start).to_pylist():
            prompt, *responses = json.loads(row["texts"])
            images = (map(_from_fields, row[name]) for name in _COLUMNS)
            yield Row(row["id"], tuple(prompt), *responses, *map(tuple, images))

    @property
    def skipped_text(self) -> str:
        """The numbers of skipped rows and their reasons."""
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))

    def beside(self, settings: str) -> Path | None:
        """The folder for files that depend on this table and on settings, if it is on disk."""
        return None if self.folder is None else self.folder / f"{self.digest}-{settings}"

    def name(self, index: int) -> str:
        """Name of a record."""
        return self._table["id"][index].as_py()

    def counts(self, column: str) -> np.ndarray:
        """Number of images of each record in a column, (records,) int64."""
        parts = [np.diff(chunk.offsets.to_numpy()) for chunk in self._table[column].chunks]
        return np.concatenate([*parts, np.zeros(0)]).astype(np.int64)

    def image_keys(self, column: str) -> np.ndarray:
        """Digests of the images of a column, in the order of the records, (images,) S16."""
        parts = [chunk.flatten().field("key") for chunk in self._table[column].chunks]
        views = [np.frombuffer(p.buffers()[1], "S16", len(p), 16 * p.offset) for p in parts]
        return np.concatenate([*views, np.zeros(0, "S16")])

    def prompts(self, rows: np.ndarray) -> list[str]:
        """The prompts of records as JSON."""
        texts = self._table["texts"].take(pa.array(rows, pa.int64())).to_pylist()
        return [json.dumps(json.loads(text)[0]) for text in texts]

    def image(self, facts: ImageFacts) -> StoredImage:
        """The encoded image.

        Raises:
            ImageError: when the file is missing or has changed.
        """
        stored = StoredImage(path=facts.path)
        if facts.offset < 0:
            data = stored.read()
        else:
            data = os.pread(self._blob.fileno(), facts.size, facts.offset)
        if digest_of_bytes(data) != facts.key:
            raise ImageError("changed", "its bytes have changed")
        return StoredImage(data, facts.path)

    def files_changed(self) -> bool:
        """Whether an image file or a link to it has changed, by size, time and target."""
        seen: set[tuple[bytes, bytes | None]] = set()
        for column in _COLUMNS:
            for chunk in self._table[column].chunks:
                facts = chunk.flatten()
                values = (facts.field(name).to_pylist() for name in _OF_FILES)
                for offset, path, given, size, changed in zip(*values, strict=True):
                    if offset < 0 and (path, given) not in seen:
                        seen.add((path, given))
                        if _size_and_time(path) != (size, changed):
                            return True
                        if given is not None and os.path.realpath(given) != path:
                            return True
        return False


def default_directory() -> Path:
    """Default folder of converted records: $REALIGN_CACHE/data, or ~/.cache/realign/data."""
    root = os.environ.get("REALIGN_CACHE") or Path.home() / ".cache" / "realign"
    return Path(root) / "data"


def open_table(
    source: str | Path,
    image_folder: str | Path | None = None,
    *,
    split: str | None = None,
    progress: Callable[[Iterable[Record]], Iterable[Record]] = iter,
) -> RecordTable:
    """Open the table of a source, which is converted if it is new or has changed.

    The table replaces that of earlier contents of the source. Only files of this user are opened.

    Args:
        source: see `stream_pairs`.
        image_folder: see `stream_pairs`.
        split: see `stream_pairs`.
        progress: wraps the records of a conversion.

    Raises:
        FileNotFoundError: like `stream_pairs`.
        ValueError: like `stream_pairs`.
        RecordError: for a record that is invalid, or has an image with an invalid header.
        OSError: when the table cannot be written.
    """
    local = os.path.exists(source)
    images = None if image_folder is None else os.path.abspath(image_folder)
    place = repr((os.path.abspath(source) if local else str(source), images, split))
    try:
        content = identity(source, image_folder, split=split)
    except ValueError:  # the Hub cannot be reached
        if local or (known := _last_content(place)) is None:
            raise
        show(f"the Hub cannot be asked about {source}. Its last converted version is used.")
        content = known
    return open_converted(
        place,
        content,
        lambda skipped: progress(stream_pairs(source, image_folder, split=split, skipped=skipped)),
    )


def open_converted(
    place: str, content: str, records: Callable[[Counter[str]], Iterable[Record]]
) -> RecordTable:
    """Open the table of a place, which is converted if its content is new.

    Args:
        place: identifies the source. A new content replaces the former one.
        content: identifies the records.
        records: returns the records, and counts skipped rows in its argument while they are read.

    Raises:
        RecordError: for a record with an invalid image.
        OSError: when the table cannot be written.
    """
    folder, name = _folder_of(place), _hex(f"{_VERSION} {content}")
    if (table := _opened(folder, name)) is not None:
        return table
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)  # others could plant links in it
        _check_own(folder)
        with open_lock(folder / _LOCK) as lock:  # other runs may start at the same time
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (table := _opened(folder, name)) is not None:
                return table
            skipped: Counter[str] = Counter()
            _remove_others(folder)
            _convert(records(skipped), folder, name, skipped)
            write_whole(folder / _LAST, content)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise OSError(
            f"the records cannot be converted in {folder} ({error}). Embedded images are copied "
            "there once. Set $REALIGN_CACHE to a folder with more space."
        ) from error
    if (table := _opened(folder, name)) is None:
        raise OSError(f"{folder} was changed by another process. Start the run again.")
    return table


def _folder_of(place: str) -> Path:
    return default_directory() / _hex(f"{os.getuid()} {place}")


def _last_content(place: str) -> str | None:
    """The content of the table that was converted last, for a source that cannot be asked."""
    try:
        return read_limited(_folder_of(place) / _LAST, 4096).decode()
    except FileNotFoundError:
        return None


def table_of(
    records: Iterable[Record], on_bad: Callable[[Record, RecordError], None] | None = None
) -> RecordTable:
    """A temporary table of records of a program.

    Args:
        records: preference records.
        on_bad: called with each record with an invalid image. The record is then skipped.

    Raises:
        RecordError: without `on_bad`, for a record with an invalid image.
    """
    with ExitStack() as stack:
        arrow = stack.enter_context(tempfile.TemporaryFile())
        blob = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the table
        _write(records, arrow, blob, on_bad, {})
        blob.flush()
        arrow.seek(0)
        return RecordTable(arrow, blob, None)


def _opened(folder: Path, name: str) -> RecordTable | None:
    """The table in a folder; None if there is none, or if an image file has changed."""
    try:
        with open_regular(folder / f"{name}.arrow") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
        blob = open_regular(folder / f"{name}.images")
        if os.fstat(blob.fileno()).st_uid != os.getuid():
            return None
        table = RecordTable(pa.memory_map(str(folder / f"{name}.arrow")), blob, folder)
    except (FileNotFoundError, pa.ArrowException):
        return None
    return None if table.files_changed() else table


def _convert(records: Iterable[Record], folder: Path, name: str, skipped: Counter[str]) -> None:
    # The Arrow file replaces its predecessor last, since it names places in the other file.
    with (
        replacing(folder / f"{name}.arrow") as arrow,
        replacing(folder / f"{name}.images", sync=True) as blob,
    ):
        _write(records, arrow, blob, None, skipped)


def _check_own(folder: Path) -> None:
    """Refuse a folder that others have made, for example as a link to a folder of this user.

    Raises:
        ValueError: for a link, or a folder of another user.
    """
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ValueError(
            f"{folder} is not a folder of yours. Remove it, or set $REALIGN_CACHE to another "
            "folder."
        )


def _remove_others(folder: Path) -> None:
    """Remove earlier tables and partial files. Processes that have opened a table keep it.

    Encoded records stay until the table has not been used for a day. A run may be writing them.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path.stat().st_mtime < time.time() - _DAY:
                shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (_LOCK, _LAST):
            path.unlink(missing_ok=True)


def _write(
    records: Iterable[Record],
    arrow: BinaryIO,
    blob: BinaryIO,
    on_bad: Callable[[Record, RecordError], None] | None,
    skipped: Mapping[str, int],
) -> None:
    """Write the rows and embedded images of records.

    Raises:
        RecordError: without `on_bad`, for the first invalid image. The message counts the others.
    """
    known: dict[bytes | str, ImageFacts | ImageError] = {}  # of digests, and of paths
    errors, digest = RecordErrors(), hashlib.blake2b(digest_size=16)
    remaining, rows = iter(records), []
    with (
        ThreadPoolExecutor(_THREADS, "images") as pool,
        pa.ipc.new_stream(arrow, _SCHEMA) as writer,
    ):

        def flush(metadata: dict[str, str] | None = None) -> None:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA), metadata)
            rows.clear()

        while batch := list(islice(remaining, _BATCH)):
            stored = [image for r in batch for image in (*r.images, *r.retrieved_images)]
            keys = list(pool.map(_key, stored))
            fresh = {k: image for k, image in zip(keys, stored, strict=True) if k not in known}
            for key, facts in zip(fresh, pool.map(_facts, fresh, fresh.values()), strict=True):
                if isinstance(facts, ImageFacts) and isinstance(key, bytes):
                    facts = _placed(facts, fresh[key], blob)
                known[key] = facts
            at = iter(zip(keys, stored, strict=True))
            for record in batch:
                images = list(islice(at, len(record.images) + len(record.retrieved_images)))
                bad = [(i, known[k]) for k, i in images if isinstance(known[k], ImageError)]
                if bad:
                    image, problem = bad[0]
                    assert isinstance(problem, ImageError)
                    error = image.named(problem, record.name)
                    if on_bad is None:
                        errors.add(error)
                    else:
                        on_bad(record, error)
                    continue
                row = _to_row(record, [known[key] for key, _ in images])
                keys_of_row = [[i["key"] for i in row[name]] for name in _COLUMNS]
                digest.update(repr((row["id"], row["texts"], keys_of_row)).encode())
                rows.append(row)
                if len(rows) == _GROUP:
                    flush()
        errors.check()
        size = blob.tell()  # codespell:ignore
        flush({_ABOUT: json.dumps([digest.hexdigest(), skipped, size])})


def _key(stored: StoredImage) -> bytes | str:
    """The digest of an embedded image, or the path of an image file."""
    return digest_of_bytes(stored.data) if stored.data is not None else str(stored.path)


def _facts(key: bytes | str, stored: StoredImage) -> ImageFacts | ImageError:
    """Facts of an image, with 0 as the place of an embedded image."""
    try:
        if isinstance(key, bytes):
            assert stored.data is not None
            return ImageFacts(key, *stored.size(), 0, len(stored.data), 0, stored.path)
        before = _size_and_time(key)
        data = stored.read()
        width, height = StoredImage(data).size()
        if (len(data), before[1]) != before:
            raise ImageError("changed", f"{shorten(key)} is being written")
        return ImageFacts(digest_of_bytes(data), width, height, -1, *before, key, stored.given)
    except ImageError as error:
        return error


def _placed(facts: ImageFacts, stored: StoredImage, blob: BinaryIO) -> ImageFacts:
    assert stored.data is not None
    place = blob.tell()  # codespell:ignore
    blob.write(stored.data)
    return ImageFacts(facts.key, facts.width, facts.height, place, facts.size, 0, facts.path)


def _size_and_time(path: str | bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_ctime_ns  # copies may keep the time of modification


def _to_row(record: Record, facts: Sequence[Any]) -> dict[str, Any]:
    fields = [{name: getattr(one, name) for name in ImageFacts.__slots__} for one in facts]
    for one in fields:
        for name in _PATHS:
            one[name] = None if one[name] is None else os.fsencode(one[name])
    texts = [record.prompt, record.chosen, record.rejected, record.retrieved_chosen]
    return {
        "id": record.name.encode("utf-8", "replace").decode(),
        "texts": json.dumps(texts),
        "images": fields[: len(record.images)],
        "retrieved_images": fields[len(record.images) :],
    }


def _from_fields(fields: dict[str, Any]) -> ImageFacts:
    for name in _PATHS:
        fields[name] = None if fields[name] is None else os.fsdecode(fields[name])
    return ImageFacts(**fields)


def _hex(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
