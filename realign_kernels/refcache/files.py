"""Files in a shared cache, which other users may have put there: no links, pipes or large files."""

from __future__ import annotations

import errno
import json
import os
import stat
import uuid
from pathlib import Path
from typing import BinaryIO

_MOST_DESCRIPTION = 64 << 10  # bytes. Those of `realign.train` have 600.


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. It follows no link at this name, and never waits.

    Raises:
        FileNotFoundError: there is no file.
        OSError: it is a link, a folder, a pipe, a socket or a device, or cannot be read.
    """
    # Opening a device can have effects, so the kind of file is checked before and after opening.
    if stat.S_ISREG(os.lstat(path).st_mode):
        file = open(path, "rb", opener=_open_carefully)  # noqa: SIM115
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.EINVAL, "this is not a regular file", os.fspath(path))


def _open_carefully(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder of a table that is a symbolic link. Its parents may be links.

    Raises:
        NotADirectoryError: another user may have put the link there, to any folder of this user.
    """
    if os.path.islink(folder):
        what = "the folder of a table is a symbolic link, which may lead anywhere. Remove it"
        raise NotADirectoryError(errno.ENOTDIR, what, os.fspath(folder))


def read_description(path: Path) -> dict[str, str]:
    """The strings in a small JSON object, by name. Empty for any other file, and without a file.

    Names and values are printed, so an object with control characters counts as another file.
    """
    try:
        with open_plain(path) as file:
            content = file.read(_MOST_DESCRIPTION + 1)
        parts = json.loads(content) if len(content) <= _MOST_DESCRIPTION else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(parts, dict):
        return {}
    texts = (*parts.keys(), *parts.values())
    return parts if all(isinstance(text, str) and text.isprintable() for text in texts) else {}


def write_description(path: Path, parts: dict[str, str]) -> None:
    """Write the file of `read_description` atomically, in place of a link or damaged file.

    A folder of this name stays, and in a sticky folder a file of another user. The table is
    complete without a description.

    Raises:
        OSError: the disk is full or fails.
    """
    # Unpredictable, so that no link waits there. Threads and machines may write at the same time.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(json.dumps(parts, indent=2) + "\n")
        partial.replace(path)
    except (IsADirectoryError, PermissionError):
        partial.unlink(missing_ok=True)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
