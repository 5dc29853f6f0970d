"""Manifests of data: the meta file of InternVL and MMPR, and LLaMA-Factory's dataset_info.json.

A meta file names the annotations and the image folder of each of its data sets. A description in
`dataset_info.json` names the columns of a file, and the roles in its messages. Manifests may come
from strangers, so the files that they name must be in their folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from realign.data.columns import is_empty
from realign.data.errors import short_error, short_repr
from realign.data.images import DataFolder, ImageError
from realign.files import MOST_JSON, open_regular, read_json
from realign.terminal import show

_DESCRIPTIONS = "dataset_info.json"
_DEFAULTS = {  # field -> LLaMA-Factory's default column of the two formats
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
_FIELDS = {  # field -> key that `entries_of` reads
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
    "chosen": "chosen",
    "rejected": "rejected",
}
_TEXTS = {"instruction", "input", "output", "history", "system"}
_TEXTS |= {"prompt", "query", "response", "question", "text", "conversations", "messages"}
"""Columns with texts, which a list of columns leaves out unless it names them."""
_ROLES = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
_READ = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}


def meta_of(path: Path) -> dict[str, Any]:
    """The data sets of a meta file, by name, or {} for another file.

    Raises:
        OSError: for a file that cannot be read, such as a pipe.
    """
    if path.suffix != ".json":
        return {}
    with open_regular(path) as file:
        if not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return {}
        if file.seek(0, 2) > MOST_JSON:
            return {}
    try:
        content = read_json(path)
    except ValueError:
        return {}
    sets = content.values()
    named = all(isinstance(s, dict) and isinstance(s.get("annotation"), str) for s in sets)
    return content if named else {}


def annotations_of(
    path: Path, meta: Mapping[str, Any], images: DataFolder | None = None
) -> list[tuple[Path, str]]:
    """The annotation file and the image folder of each data set of a meta file.

    Args:
        path: the meta file.
        meta: its content.
        images: folder that the image folders are in. None means the folder of the meta file.

    Raises:
        ValueError: for a file outside the folder of the meta file, or one that is absent.
    """
    folder, found = DataFolder(path.parent), []
    for name, entry in meta.items():
        try:
            annotation = Path(_within(folder, entry["annotation"]))
        except ImageError as error:
            raise ValueError(f"{path}: the annotation of {short_repr(name)} is {error}.") from error
        if not annotation.is_file():
            raise ValueError(
                f"{path}: the annotation {short_repr(entry['annotation'])} of {short_repr(name)} "
                "is missing. Unpack the annotations beside the meta file."
            )
        try:
            root = _within(folder if images is None else images, str(entry.get("root") or ""))
        except ImageError as error:
            raise ValueError(f"{path}: the root of {short_repr(name)} is {error}.") from error
        found.append((annotation, root))
    repeated = [name for name, entry in meta.items() if entry.get("repeat_time", 1) != 1]
    if repeated:
        _note(str(path), len(repeated))
    return found


@lru_cache
def _note(path: str, count: int) -> None:
    """Prints once per process and file that its `repeat_time` is not applied."""
    if os.environ.get("RANK", "0") == "0":
        show(f"{path}: repeat_time of {count} data set(s) is not applied. Records are read once.")


def with_root(item: Any, root: str) -> Any:
    """An item with its image paths in the image folder of its data set."""
    if not isinstance(item, Mapping):
        return item
    item = dict(item)
    for key in ("image", "images"):
        value = item.get(key)
        if isinstance(value, str) and value:
            item[key] = os.path.join(root, value)
        elif isinstance(value, list):
            item[key] = [os.path.join(root, v) if isinstance(v, str) else v for v in value]
    return item


def _within(folder: DataFolder, path: str) -> str:
    """A path in a folder. It may begin with the folder's own name, as in MMPR/images."""
    file = folder.file(path)
    first, _, rest = path.partition("/")
    if first == os.path.basename(folder.path) and not os.path.exists(file):
        return folder.file(rest)
    return file


def description_of(path: Path) -> dict[str, Any]:
    """The description of a file in the `dataset_info.json` beside it, or {} if there is none.

    Raises:
        ValueError: for several descriptions that differ.
    """
    info = path.parent / _DESCRIPTIONS
    if not info.exists():
        return {}
    try:
        content = read_json(info)
    except (OSError, ValueError) as error:
        raise ValueError(f"{info} cannot be read ({short_error(error)}).") from error
    entries = [
        e for e in content.values() if isinstance(e, dict) and e.get("file_name") == path.name
    ]
    entries = [entry for entry in entries if entry.get("ranking")] or entries
    found = [{k: e.get(k) for k in ("formatting", "columns", "tags") if e.get(k)} for e in entries]
    if any(other != found[0] for other in found):
        raise ValueError(f"{info} describes {path.name} several times. Keep one description.")
    description = found[0] if found else {}
    for part in (description.get("columns", {}), description.get("tags", {})):
        if not isinstance(part, dict) or not all(isinstance(v, str) for v in part.values()):
            raise ValueError(f"{info}: columns and tags of {path.name} must be objects with texts.")
    return description if description.get("columns") or description.get("tags") else {}


def described_columns(description: Mapping[str, Any]) -> list[str]:
    """The names of the columns in a description."""
    return list(description.get("columns", {}).values())


def renamed(item: Any, description: Mapping[str, Any]) -> Any:
    """An item with the keys of LLaMA-Factory's defaults, for `entries_of`."""
    if not isinstance(item, Mapping):
        return item
    formatting = description.get("formatting", "alpaca")
    # As in LLaMA-Factory: a list of columns replaces the defaults, and others are not read.
    columns = description.get("columns") or _DEFAULTS.get(formatting, {})
    used = {column for field, column in columns.items() if field in _FIELDS}
    others = _TEXTS if description.get("columns") else set()
    row = {key: value for key, value in item.items() if key not in used | others}
    for name, column in columns.items():
        if name in _FIELDS and not is_empty(value := item.get(column)):
            key = _FIELDS[name]
            if formatting == "sharegpt" and name in ("messages", "chosen", "rejected"):
                value = _messages(value, description.get("tags", {}))
            row[key] = value
    return row


def _messages(value: Any, tags: Mapping[str, Any]) -> Any:
    """Messages with the roles and keys that every reader knows."""
    if isinstance(value, list):
        return [_messages(message, tags) for message in value]
    if not isinstance(value, Mapping):
        return value
    role_key, content_key = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    roles = {tags.get(tag, default): _READ[tag] for tag, default in _ROLES.items()}
    role = value.get(role_key)
    rest = {key: v for key, v in value.items() if key not in (role_key, content_key)}
    known = roles.get(role, role) if isinstance(role, str) else role
    return rest | {"role": known, "content": value.get(content_key)}
