"""Sources of records: files, folders, folders saved by `datasets`, and names of Hub data sets.

    source = open_source("openbmb/RLAIF-V-Dataset", split="train")
    for place, item in source.items: ...

All readers open their data here: training, `RDPOTrainer`, `realign.pairs` and its `import`. An
existing path always wins over a name on the Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from realign.data import hub
from realign.data.entries import json_object
from realign.data.errors import Malformed, short_error, short_repr, shorten
from realign.data.formats import ALL_KEYS, FORMATS, format_of, format_with, nearest
from realign.data.images import DataFolder
from realign.data.manifests import (
    annotations_of,
    described_columns,
    description_of,
    meta_of,
    renamed,
    with_root,
)
from realign.data.tables import columns_of, rows_of
from realign.files import MOST_JSON, open_regular, read_json, read_limited

VERSION = 2
"""Version of the reader in `identity`. Raise it when records of the same files change."""
_MOST_JSON = 2 << 30
"""Limit on a JSON file, in bytes: twice LLaVA's llava_v1_5_mix665k.json. JSON lines have none."""
_TABLES = (".parquet", ".arrow")
_DATA = (*_TABLES, ".json", ".jsonl", ".csv", ".tsv")
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "testmini", "testdev", "testa", "testb"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "minival"),
    "held out": ("heldout", "holdout"),
    "trainval": ("trainval",),
}
_KINDS = {word: kind for kind, words in _SPLITS.items() for word in words}
"""First or last word of a split's name -> its kind. Records of two kinds are not mixed silently."""
_WHOLE = ("completions", "completions:all", "llava-rlhf", "sentinel", "opa-dpo")
"""Formats with columns that are not those of TRL."""
Items = Iterator[tuple[str, Any]]
"""Items of a source, each with its place."""


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        items: (place, item) pairs. An item that cannot be decoded is a `Malformed`.
        folder: the folder that image paths are relative to and must be in.
        format: the format for `entries_of`: the given one, or "auto".
        first: the format of the first item, and of items that are not recognized.
    """

    items: Items
    folder: DataFolder
    format: str
    first: str


@dataclass(frozen=True)
class _Files:
    """The files of a local source. `rows` is True for tables, and False for JSON."""

    rows: bool
    files: list[Path]
    description: dict[str, Any] = field(default_factory=dict)


def open_source(
    data: str | Path,
    image_folder: str | Path | None = None,
    *,
    split: str | None = None,
    format: str = "auto",
    pairs: bool = False,
    more: Sequence[str] = (),
) -> Source:
    """Open a source of records.

    Args:
        data: a file, a folder, or the name of a data set on the Hub, as OWNER/NAME.
        image_folder: folder that contains the images and that their paths are relative to. None
            means the folder of the data.
        split: the split of a Hub data set or of a folder with several, or several joined by "+".
        format: a key of `FORMATS`, or "auto" to detect it by the keys of each item.
        pairs: whether rejected responses are needed.
        more: further columns to read from tables.

    Raises:
        FileNotFoundError: when there is nothing at a path, and it is no name.
        ValueError: for an unknown format or split, a file that cannot be read, or data without
            rejected responses if `pairs` is set.
    """
    if format not in ("auto", *FORMATS):
        raise ValueError(f"format is {format!r}; use one of auto, {', '.join(FORMATS)}.")
    path = Path(data)
    if not os.path.exists(path):
        if not hub.is_name(str(data)) or path.suffix in _DATA:
            raise FileNotFoundError(
                f"there is nothing at {short_repr(str(path))}. Pass an existing file or folder, or "
                "the name of a data set on the Hub, as OWNER/NAME. `python -m realign.pairs` "
                "writes preference pairs."
            )
        columns, items = hub.open_name(str(data), split)
        found = format_with(frozenset(columns)) or "parquet"
        _check_pairs(str(data), format if format != "auto" else found, pairs)
        images = hub.NO_FOLDER if image_folder is None else DataFolder.of_images(path, image_folder)
        return Source(items, images, format, found)
    folder = DataFolder.of_images(path, image_folder)
    found = _files_of(path, split)
    if found.rows:
        return _open_tables(found, folder, format, pairs, more)
    return _open_json(found, folder, format, pairs)


def identity(
    data: str | Path,
    image_folder: str | Path | None = None,
    *,
    split: str | None = None,
    format: str = "auto",
) -> str:
    """A digest of everything that the records of a source depend on, except image files.

    It covers paths, sizes and modification times of the files, or the revision of a Hub data set.

    Raises:
        FileNotFoundError: like `open_source`.
        ValueError: like `open_source`.
    """
    path = Path(data)
    facts: list[Any] = [VERSION, split, format]
    facts.append(None if image_folder is None else os.path.realpath(image_folder))
    if not os.path.exists(path) and hub.is_name(str(data)) and path.suffix not in _DATA:
        facts += ["hub", str(data), hub.revision(str(data))]
    else:
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is nothing at {short_repr(str(path))}.")
        found = _files_of(path, split)
        files = list(found.files)
        if not found.rows and (meta := meta_of(files[0])):
            files += [annotation for annotation, _ in annotations_of(files[0], meta)]
        start = path if path.is_dir() else path.parent  # of relative image paths
        facts += [os.path.realpath(path), os.path.realpath(start), found.description]
        for file in files:
            status = os.stat(file)
            times = status.st_mtime_ns, status.st_ctime_ns  # copies may keep the first
            facts.append([os.path.realpath(file), status.st_size, times])
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _files_of(path: Path, split: str | None) -> _Files:
    """The data files of a path."""
    if path.is_dir():
        lines = sorted(path.glob("*.jsonl"))
        tables = _saved(path, split)
        if not tables and (found := sorted(path.glob("*.parquet"))):
            tables = _of_split(path, found, split)
        elif not tables and len(lines) != 1 and (found := sorted(path.glob("*/*.parquet"))):
            tables = _of_split(path, found, split)  # as on the Hub, in `data`
        if tables:
            return _Files(True, tables)
        if len(lines) != 1:
            raise ValueError(
                f"{path} holds {len(lines)} JSON-lines files and no Parquet file. Keep one *.jsonl "
                "file next to the images, or pass the file itself and --image-folder."
            )
        path = lines[0]
    if split is not None:
        raise ValueError(
            f"--split {split} would have no effect: {path} is one file. Leave it out, or pass a "
            "folder or a name on the Hub."
        )
    if path.suffix in (".csv", ".tsv"):
        raise ValueError(f"{path} is not read. Write it as JSON lines or Parquet.")
    return _Files(path.suffix in _TABLES or _is_parquet(path), [path], description_of(path))


def _is_parquet(path: Path) -> bool:
    if path.suffix in _DATA:
        return False
    try:
        with open_regular(path) as file:
            return file.read(4) == b"PAR1"
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({short_error(error)}).") from error


def _of_split(path: Path, tables: list[Path], split: str | None) -> list[Path]:
    """The Parquet files of a split. Their names, or their folder's, begin with its name."""

    def names_of(file: Path) -> tuple[str, str]:
        begin = re.match(r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*?(?=[-.]|_\d)", file.name)
        return file.parent.name if file.parent != path else "", begin[0] if begin else ""

    if split is None:
        found = {next(filter(_kind, names_of(file)), "") for file in tables}
        names = [name for name in found if name]
        if len(set(map(_kind, names))) > 1:
            raise ValueError(
                f"{path} holds files of the splits {', '.join(sorted(names))}. Add --split, or "
                "load one with `datasets`."
            )
        return tables
    chosen = []
    for name in split.split("+"):
        files = [file for file in tables if name in names_of(file)]
        if not files:
            raise ValueError(
                f"{path} has no Parquet file of the split {short_repr(name)}. It has "
                f"{shorten(', '.join(file.name for file in tables))}."
            )
        chosen += files
    return chosen


def _kind(name: str) -> str | None:
    """The kind of a split by its name, such as test for test_prefs, testmini or val2017."""
    words = re.sub(r"(held|hold)_out", r"\1out", name.lower()).split("_")
    ends = (words[0].rstrip("0123456789"), words[-1].rstrip("0123456789"))
    return next((_KINDS[word] for word in ends if word in _KINDS), None)


def _saved(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a data set saved by `datasets`."""
    try:
        if not (folder / "dataset_dict.json").exists():
            return _saved_split(folder, split)
        splits = read_json(folder / "dataset_dict.json")["splits"]
        folders = {str(name): Path(DataFolder(folder).file(name)) for name in splits}
    except (ValueError, KeyError, TypeError) as error:
        raise _not_saved(folder, error) from error
    names = hub.chosen_splits(str(folder), list(folders), split)
    return [file for name in names for file in _saved_split(folders[name], None)]


def _saved_split(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of one saved split."""
    if not (folder / "state.json").exists():
        return []
    try:
        state = read_json(folder / "state.json")
        files = [Path(DataFolder(folder).file(entry["filename"])) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _not_saved(folder, error) from error
    if split is not None:
        hub.chosen_splits(str(folder), [str(state.get("_split"))], split)
    return files


def _not_saved(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} is not a data set that `datasets` saved ({short_error(error)}). "
        "Save it again with save_to_disk."
    )


def _open_tables(
    found: _Files, folder: DataFolder, format: str, pairs: bool, more: Sequence[str]
) -> Source:
    columns = columns_of(found.files[0])
    first = format_with(frozenset(columns)) or "parquet"
    name = first if format == "auto" else format
    if name.startswith("coco"):
        raise ValueError(f"format is {name!r}, but {found.files[0]} looks like {first!r}.")
    described = described_columns(found.description)
    if described or name in _WHOLE:
        _check_pairs(str(found.files[0]), name, pairs and not described)
        needed: tuple[str, ...] = ()
    else:
        needed = ("prompt", "chosen", "rejected", "images") if pairs else ("prompt", "images")
    rows = rows_of(found.files, needed, (*ALL_KEYS, *described, *more))
    return Source(_described(rows, found.description), folder, format, first)


def _open_json(found: _Files, folder: DataFolder, format: str, pairs: bool) -> Source:
    (path,) = found.files
    if meta := meta_of(path):
        items = _annotated(annotations_of(path, meta, folder))
    elif path.suffix == ".jsonl" or _has_lines(path):
        items = _numbered(path, json_lines(path))
    else:
        content = _json(path)
        if isinstance(content, dict):
            if not isinstance(content.get("images"), list):
                raise ValueError(
                    f"{path} holds one JSON object with the keys {short_repr(list(content))}. It "
                    "is neither COCO's captions, which have `images`, nor a meta file of InternVL, "
                    "which names an `annotation` of each data set. Write records as a list, or as "
                    f"lines of a .jsonl file. {nearest(map(str, content))}"
                )
            if format.partition(":")[0] not in ("auto", "coco"):
                raise ValueError(f"format is {format!r}, but {path} looks like 'coco'.")
            _check_pairs(str(path), "coco", pairs)
            images = _numbered(path, iter(coco_items(content, path)))
            return Source(images, folder, "coco" if format == "auto" else format, "coco")
        if not isinstance(content, list):
            raise ValueError(f"{path} holds {short_repr(content)}, not a list of records.")
        items = _numbered(path, iter(content))
    items = _described(items, found.description)
    checked = []
    for place, item in items:  # up to the first item of a known format
        checked.append((place, item))
        if first := _format_in_file(item):
            break
    else:
        return _unrecognized(path, checked, folder, format)
    if format.partition(":")[0] == "coco":
        raise ValueError(f"format is {format!r}, but {path} looks like {first!r}.")
    _check_pairs(str(path), first if format == "auto" else format, pairs)
    if (
        first == "realign" and format == "auto"
    ):  # a later item may lack the image, which is an error
        format = first
    return Source(chain(checked, items), folder, format, first)


def _format_in_file(item: Any) -> str | None:
    """The format of a JSON object. A null `retrieved_image` is a missing one, unlike in a table."""
    if isinstance(item, dict) and "retrieved_image" in item:
        return format_of({**item, "retrieved_image": True})
    return format_of(item)


def _unrecognized(path: Path, checked: list, folder: DataFolder, format: str) -> Source:
    if format == "auto":
        keys = sorted({str(key) for _, item in checked if isinstance(item, dict) for key in item})
        raise ValueError(
            f"{path} holds no record of a known format. Its records have the keys "
            f"{short_repr(keys)}. {nearest(keys)} Pass --format, or rename the keys."
        )
    return Source(iter(checked), folder, format, format)


def _check_pairs(data: str, format: str, pairs: bool) -> None:
    """Refuse a format without rejected responses if they are needed."""
    if pairs and not FORMATS[format].pairs:
        raise ValueError(
            f"{data} is in the format {format}, which has no rejected response. Make pairs with "
            f"`python -m realign.pairs --data {data} --output pairs.parquet`, and train on these."
        )


def _annotated(annotations: list[tuple[Path, str]]) -> Items:
    """The items of all annotation files of a meta file."""
    for path, root in annotations:
        lines = iter(_json(path)) if path.suffix == ".json" else json_lines(path)
        yield from _numbered(path, (with_root(item, root) for item in lines))


def _described(items: Items, description: dict[str, Any]) -> Items:
    if not description:
        return items
    return ((place, renamed(item, description)) for place, item in items)


def _json(path: Path) -> Any:
    try:
        text = read_limited(path, _MOST_JSON)
        return json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a JSON file ({shorten(str(error))}). JSON lines need the suffix .jsonl."
        ) from error


def _has_lines(path: Path) -> bool:
    """Whether a file is JSON lines under another suffix: its first line is an object of several."""
    with open_regular(path) as file:
        first, second = file.readline(MOST_JSON), file.readline(MOST_JSON)
    if not first.lstrip().startswith(b"{") or not second.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def json_lines(file: Path) -> Iterator[Any]:
    """Yields the objects of a JSON-lines file, and a `Malformed` for an invalid line.

    Raises:
        OSError: for a file that cannot be read, such as a pipe.
    """
    with open_regular(file) as lines:
        while line := lines.readline(MOST_JSON):
            if len(line) == MOST_JSON and not line.endswith(b"\n"):
                while (rest := lines.readline(MOST_JSON)) and not rest.endswith(b"\n"):
                    pass
                yield Malformed(f"it is longer than {MOST_JSON:,} bytes.", "", "too long")
                continue
            if not line.strip():
                continue
            try:
                yield json.loads(line, object_pairs_hook=json_object)
            except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or too deep
                why = shorten(str(error))
                yield Malformed(f"it is not JSON ({why}).", "Write one object per line.")


def coco_items(content: Any, file: Path) -> list[dict]:
    """The images of a COCO captions file, each with its captions.

    Raises:
        ValueError: for a file without COCO captions.
    """
    captions = defaultdict(list)
    annotations = content.get("annotations") or []
    if not isinstance(annotations, list):
        raise ValueError(f"{file}: `annotations` is {short_repr(annotations)}, not a list.")
    for annotation in annotations:
        if not isinstance(annotation, dict) or not {"caption", "image_id"} <= set(annotation):
            raise ValueError(
                f"{file} has the annotation {short_repr(annotation)}, which is not a caption of an "
                "image. COCO's captions are in files such as captions_train2014.json."
            )
        captions[str(annotation["image_id"])].append(annotation)
    return [
        {"image": i, "captions": captions[str(i.get("id"))] if isinstance(i, dict) else []}
        for i in content["images"]
    ]


def _numbered(path: Path, items: Iterator[Any]) -> Items:
    return ((f"{path.name}:{i}", item) for i, item in enumerate(items))
