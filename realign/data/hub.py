"""Data sets on the Hub: rows of a split, streamed by `datasets`. No code of a data set runs.

Rows are read as stored, without decoding their images, and have the limits of rows in files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa

from realign.data.errors import Malformed, short_error, short_repr, shorten
from realign.data.images import DataFolder, ImageError
from realign.data.tables import SMALL, pieces, python_rows

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_BATCH = 64
"""Rows asked for at once. `datasets` streams a Parquet file by row groups in any case."""


class _NoFolder(DataFolder):
    """The folder of Hub data, whose images are in its rows."""

    def __init__(self) -> None:
        self.path = ""

    def file(self, path: str) -> str:
        raise ImageError(
            "missing",
            f"{shorten(repr(path))} is a path, and a data set of the Hub has no folder. Download "
            "it with `hf download` and pass its folder, or --image-folder",
        )


NO_FOLDER = _NoFolder()


def is_name(source: str) -> bool:
    """Whether a text can be the name of a data set on the Hub, as OWNER/NAME."""
    return _NAME.fullmatch(source) is not None


def open_name(
    name: str, split: str | None
) -> tuple[list[str], Iterator[tuple[str, dict[str, Any] | Malformed]]]:
    """The columns of a Hub data set, and (place, row) of every row, streamed.

    Raises:
        FileNotFoundError: for a name that is no data set.
        ValueError: for a split that is absent, several splits without `split`, or a gated data set.
            Also for a data set with its own code, or when the Hub cannot be reached.
    """
    datasets, commit = _datasets(), revision(name)
    try:
        found = datasets.load_dataset(name, revision=commit, streaming=True)
    except _failures() as error:
        raise _refused(name, error) from error
    names = chosen_splits(name, list(found), split)
    parts = [(part, found[part].with_format("arrow")) for part in names]
    try:
        columns = parts[0][1].column_names or list(next(iter(found[names[0]].take(1)), {}))
    except _failures() as error:
        raise _refused(name, error) from error
    return columns, _rows(name, parts)


def _rows(
    name: str, parts: Sequence[tuple[str, Any]]
) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
    for part, rows in parts:
        place = 0
        for piece, size in _pieces(name, rows):
            if size > SMALL:
                raise ValueError(
                    f"{name}: row {place} of {part} decodes to {size:,} bytes. The limit is "
                    f"{SMALL:,}, like for the rows of a file."
                )
            for row in python_rows(piece):
                yield f"{part}:{place}", row
                place += 1


def _pieces(name: str, rows: Any) -> Iterator[tuple[pa.RecordBatch, int]]:
    try:
        for table in rows.iter(_BATCH):
            for batch in table.to_batches():
                yield from pieces(batch)
    except _failures() as error:
        raise _refused(name, error) from error


def _failures() -> tuple[type[Exception], ...]:
    """Errors of `datasets`, of the Hub and of the connection."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases have the errors of the HTTP client, which differs between versions.
    bases = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    return OSError, RuntimeError, ValueError, pa.ArrowException, *bases


def chosen_splits(source: str, names: list[str], split: str | None) -> list[str]:
    """The splits to read: the only one, or those that `split` names, joined by "+".

    Raises:
        ValueError: for several splits without `split`, or a split that is absent.
    """
    if split is None:
        if len(names) > 1:
            raise ValueError(
                f"{source} has the splits {shorten(', '.join(names))}. Add --split with one of "
                'them, or several joined by "+".'
            )
        return names
    chosen = split.split("+")
    if absent := [name for name in chosen if name not in names]:
        raise ValueError(
            f"{source} has no split {short_repr(absent[0])}. It has {shorten(', '.join(names))}."
        )
    return chosen


@lru_cache(32)
def revision(name: str) -> str:
    """The commit of a data set's newest version on the Hub. Asked once per process.

    Raises:
        FileNotFoundError: like `open_name`.
        ValueError: like `open_name`.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha or ""
    except _failures() as error:
        raise _refused(name, error) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data sets of the Hub need the package datasets. Run `pip install datasets`, or pass a "
            "file or folder."
        ) from error
    return datasets


def _refused(name: str, error: Exception) -> FileNotFoundError | ValueError:
    """An error of the Hub in words, by the status of its answer."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    kinds = {type(cause).__name__ for cause in causes}
    answers = [getattr(cause, "response", None) or SimpleNamespace() for cause in causes]
    codes = {getattr(answer, "status_code", None) for answer in answers}
    if "GatedRepoError" in kinds or codes & {403}:
        return ValueError(
            f"{name} is gated on the Hub. Accept its terms on its page, and log in with "
            "`hf auth login`."
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} or codes & {401, 404}:
        return FileNotFoundError(
            f"there is nothing at {short_repr(name)}: neither a file or folder, nor a public data "
            "set of this name on the Hub. Check the name, or log in with `hf auth login`."
        )
    if "scripts are no longer supported" in str(error):
        return ValueError(f"{name} needs its own code, which never runs here. Download its files.")
    return ValueError(
        f"{name} cannot be read from the Hub ({short_error(error)}). There is no file or folder of "
        "this name. Check the connection, or download the data and pass its folder."
    )
