"""Files of a command: output paths checked before a model is loaded, files written whole, JSONL."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
import uuid
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any


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
    """The mode of the file at a path; None where there is none."""
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


class JsonlLog:
    """One JSON object per line, on the disk as soon as it takes it.

    While the disk is full entries wait in memory, which is said once; no line is torn for good.

    Args:
        path: the file; made with its folder.
        keep_steps: lines of later steps are dropped first, as a resumed run writes them anew.
    """

    def __init__(self, path: Path, keep_steps: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [e for e in read_jsonl(path) if e["step"] <= keep_steps] if path.exists() else []
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._warned = False

    def write(self, entry: dict[str, Any]) -> None:
        self._waiting += json.dumps(entry).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                print(
                    f"warning: {self._file.name} takes no more ({error}); its next lines wait in "
                    "memory. Make room.",
                    file=sys.stderr,
                )
            self._warned = True

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, kind, *_) -> None:
        """Write waiting lines; a failure raises OSError, unless another error ends the run.

        A resumed run writes the lines after its checkpoint anew.
        """
        with self._file, nullcontext() if kind is None else suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        while self._waiting:  # a disk may take a part
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # others may write it, too
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line cut short by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
