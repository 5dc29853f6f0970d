"""Files: checked opening and small JSON files, atomic writes, checks of output paths, JSONL logs.

Other users may have written the files that are read here, for example in a shared cache or in a
downloaded data set. So a reader accepts only regular files, because a pipe would block for ever.
Small files have a limit on their size.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from realign.terminal import show

MOST_JSON = 16 << 20
"""Default limit of `read_json`, in bytes. The largest real file is an index of weights, 5 MB."""


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading, through symbolic links. It never blocks.

    Raises:
        FileNotFoundError: when there is no file.
        OSError: for a folder, pipe, socket or device, or a file that cannot be read.
    """
    # Opening a device can have effects, so the kind of file is checked before and after opening.
    if stat.S_ISREG(os.stat(path).st_mode):
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.EINVAL, "This is not a regular file", str(path))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def open_lock(path: str | Path) -> BinaryIO:
    """Open a lock file for writing, created if it is absent. Its content is never changed.

    Raises:
        OSError: for a symbolic link, which could name any file, or for anything but a file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        file = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "This is a symbolic link. Remove it", str(path)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "This is not a regular file", str(path))
    return file


def read_limited(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: like `open_regular`.
        ValueError: for a larger file.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes. Check whether it is another file.")
    return content


def read_json(path: str | Path, kind: type = dict, *, most: int = MOST_JSON) -> Any:
    """The value in a small JSON file, which other users may have written.

    Args:
        path: the file.
        kind: type of the value, dict or list.
        most: limit on the size, in bytes.

    Raises:
        OSError: like `open_regular`.
        ValueError: for a file that is too large, is not JSON, or holds another kind of value.
    """
    content = read_limited(path, most)
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} nests its JSON too deeply. Write it again.") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of 4,300 digits
        raise ValueError(f"{path} is not JSON ({error}). Write it again.") from None
    if type(value) is not kind:
        names = {dict: "object", list: "array"}
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}, not an {names[kind]}. Write it again."
        )
    return value


def check_file(flag: str, path: str | Path, *, device: bool = True) -> None:
    """Check that a file can be written, by creating and removing an empty file beside it.

    Missing folders are not created, so a command that fails later leaves no folders.

    Args:
        flag: the flag that names the file, for the message.
        path: the file.
        device: whether a device or a pipe is accepted. Writers that replace the old file pass
            False, since the superuser would replace `/dev/null`.

    Raises:
        ValueError: if the path is a folder, is inside a file, or cannot be written.
    """
    path = Path(path)
    kind = _kind(flag, path)
    if kind is not None and stat.S_ISDIR(kind):
        raise ValueError(f"{flag} {path} is a folder. Name the file to write.")
    if kind is not None and not stat.S_ISREG(kind) and not device:
        raise ValueError(f"{flag} {path} is a device or a pipe. Name the file to write.")
    if kind is None or stat.S_ISREG(kind):
        _create_in(path.parent, flag, path)
    if kind is not None and not os.access(path, os.W_OK):
        raise ValueError(f"{flag} {path} is read-only. Name another file.")


def check_folder(flag: str, path: str | Path) -> None:
    """Check that a folder can be created or written to; see `check_file`.

    Raises:
        ValueError: if the path is a file, is inside a file, or cannot be written.
    """
    path = Path(path)
    kind = _kind(flag, path)
    if kind is not None and not stat.S_ISDIR(kind):
        raise ValueError(f"{flag} {path} is a file. Name the folder to write.")
    _create_in(path, flag, path)


def check_apart(flag: str, path: str | Path, data: str | Path) -> None:
    """Check that an output is neither the data that a command reads nor in their folder.

    Args:
        flag: the flag that names the output, for the message.
        path: the output.
        data: a file, a folder, or another name, which is not checked.

    Raises:
        ValueError: for such an output.
    """
    path, data = Path(path), Path(data)
    if data.is_dir() and path.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"{flag} {path} is in the folder of the data, which would change. Name a path outside "
            "of it."
        )
    if data.is_file() and path.exists() and path.samefile(data):
        raise ValueError(f"{flag} {path} is the data that is read. Name another file.")


def check_overwritten(
    flag: str, path: str | Path, inputs: Iterable[Path], suffixes: Collection[str]
) -> None:
    """Check that an output replaces no input, and no other file in the folder of an input.

    Args:
        flag: the flag that names the output, for the message.
        path: the output.
        inputs: files and folders that are read.
        suffixes: suffixes of earlier outputs in those folders, which may be replaced.

    Raises:
        ValueError: for an output that would replace such a file.
    """
    path = Path(path)
    if not path.exists():
        return
    own = path.suffix.lower() in suffixes
    for one in filter(Path.exists, inputs):
        folder = one if one.is_dir() else one.parent
        # A link may have another name than the input.
        files = [file for file in folder.iterdir() if file.suffix.lower() not in suffixes]
        same = any(path.samefile(file) for file in (one, *files) if file.exists())
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
        if same or (inside and not own):
            raise ValueError(
                f"{flag} {path} is an input, or is in the folder of one. Name another file."
            )


def _kind(flag: str, path: Path) -> int | None:
    """The mode of the file at a path; None if there is no file."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise _refused(flag, path, error) from error


def _create_in(folder: Path, flag: str, path: Path) -> None:
    """Create and remove a file in the nearest existing folder.

    The name has the suffix of partial files, so names that are too long are found, too.
    """
    folder = folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    try:
        with tempfile.NamedTemporaryFile(
            dir=existing, prefix=f".{path.name}.", suffix=f"{'x' * 24}.partial"
        ):
            pass
    except OSError as error:
        raise _refused(flag, path, error, f"{existing}: ") from error


def _refused(flag: str, path: Path, error: Exception, where: str = "") -> ValueError:
    why = getattr(error, "strerror", None) or str(error)
    return ValueError(f"{flag} {str(path)!r} cannot be written ({where}{why}). Name another place.")


class JsonlLog:
    """A JSONL file: one JSON object per line, written immediately.

    While the disk is full, entries wait in memory, and one warning is printed. Lines stay complete.

    Args:
        path: the file, which is created with its folder.
        keep_steps: last step to keep. A resumed run writes the lines of later steps again.
    """

    def __init__(self, path: Path, keep_steps: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [e for e in read_jsonl(path) if e["step"] <= keep_steps] if path.exists() else []
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._warned = False

    def write(self, entry: dict[str, Any]) -> None:
        self._waiting += json.dumps(entry).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                show(
                    f"warning: {self._file.name} cannot be written ({error}). Its next lines wait "
                    "in memory. Free some disk space.",
                    error=True,
                )
            self._warned = True

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, kind, *_) -> None:
        """Write waiting lines. A failure raises OSError, unless another error ends the run.

        A resumed run writes the lines after its checkpoint again.
        """
        with self._file, nullcontext() if kind is None else suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        while self._waiting:  # the disk may accept a part
            self._waiting = self._waiting[self._file.write(self._waiting) :]


@contextmanager
def replacing(path: str | Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` at the end. After an error nothing is replaced.

    The file beside `path` has a new, unpredictable name, so no link can be waiting there. It gets
    the permissions of the process's umask.

    Args:
        path: the file to replace. Several processes may do so at once.
        sync: whether to flush the file to the disk before it replaces `path`.

    Yields:
        The open file. Its `name` is the path of the partial file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically: in full or not at all. See `replacing`."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a log. An incomplete last line, left by a crash, is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
