"""Output paths, checked before any model is loaded: `check_file`, `check_folder`."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def check_file(flag: str, path: str | Path, *, device: bool = True) -> None:
    """Check that a file can be written, by an empty one beside it that is removed again.

    Missing folders are not made, so that a command that fails later leaves nothing behind.

    Args:
        flag: that names the file, for the message.
        path: the file.
        device: whether a device or a pipe will do. It does not for a file that a finished one
            replaces: the superuser would replace `/dev/null`.

    Raises:
        ValueError: when it is a folder, lies below a file, or cannot be written.
    """
    path = Path(path)
    kind = _kind(flag, path)
    if kind is not None and stat.S_ISDIR(kind):
        raise ValueError(f"{flag} {path} is a folder; name the file to write.")
    if kind is not None and not stat.S_ISREG(kind) and not device:
        raise ValueError(f"{flag} {path} is a device or a pipe; name the file to write.")
    if kind is None or stat.S_ISREG(kind):
        _create_in(path.parent, flag, path)
    if kind is not None and not os.access(path, os.W_OK):
        raise ValueError(f"{flag} {path} is read-only; name another file.")


def check_folder(flag: str, path: str | Path) -> None:
    """Check that a folder can be made or written to; see `check_file`.

    Raises:
        ValueError: when it is a file, lies below a file, or cannot be written.
    """
    path = Path(path)
    kind = _kind(flag, path)
    if kind is not None and not stat.S_ISDIR(kind):
        raise ValueError(f"{flag} {path} is a file; name the folder to write.")
    _create_in(path, flag, path)


def _kind(flag: str, path: Path) -> int | None:
    """The mode of what is at a path; None where there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise _refused(flag, path, error) from error


def _create_in(folder: Path, flag: str, path: Path) -> None:
    """Create and remove a file in the nearest folder that exists.

    Its name is longer than that of `path` by the suffix that files being written have.
    """
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.NamedTemporaryFile(
            dir=there, prefix=f".{path.name}.", suffix=f"{'x' * 24}.partial"
        ):
            pass
    except OSError as error:
        raise _refused(flag, path, error, f"{there}: ") from error


def _refused(flag: str, path: Path, error: Exception, where: str = "") -> ValueError:
    why = getattr(error, "strerror", None) or str(error)
    return ValueError(f"{flag} {str(path)!r} cannot be written ({where}{why}). Name another place.")
