"""Benchmark files: questions, COCO annotations and synonyms, checked before a model is loaded.

Files are UTF-8, with or without a byte order mark. Errors name the file, the item and the file to
give instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from realign.data.errors import short_repr, shorten
from realign.files import read_limited

Field = tuple[Callable[[Any], bool], str]
"""Predicate of valid values, and their description for the error."""

_MOST = 1 << 30
"""Limit on a file, in bytes. COCO's largest, instances_train2017.json, has half as many."""
_MARKUP = set('{}[]":')  # not part of any object name


def is_text(value: Any) -> bool:
    """Whether a value is text that a tokenizer accepts: not empty, and without surrogates."""
    return isinstance(value, str) and bool(value.strip()) and not any(map(_surrogate, value))


def is_key(value: Any) -> bool:
    """Whether a value is an id: a number or text."""
    return _is_int(value) or is_text(value)


TEXT: Field = (is_text, "text")
KEY: Field = (is_key, "a number or text")


def read_text(file: str | Path) -> str:
    """Text of a UTF-8 file, without its byte order mark.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: for a pipe or a device.
        ValueError: for a folder, an empty or giant file, or one that is not UTF-8 text.
    """
    if Path(file).is_dir():
        raise ValueError(f"{file} is a folder. Name a file.")
    try:
        text = read_limited(file, _MOST).decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}. Check the name.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{file} is not UTF-8 text (it has null bytes). Save it as UTF-8.")
    if not text.strip():
        raise ValueError(f"{file} is empty.")
    return text


def read_rows(
    file: str | Path, fields: Mapping[str, Field], remedy: str, limit: int = 0
) -> list[dict[str, Any]]:
    """Read the objects of a JSON array or of JSON lines, and check their fields.

    Args:
        file: the file.
        fields: name of a field -> `Field`.
        remedy: end of each error message, with the file to give.
        limit: number of objects to return; 0 returns all.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file without objects, or an object with a missing or invalid field.
    """
    text = read_text(file)
    number = 0
    try:
        if text.lstrip()[0] == "[":
            items = json.loads(text)
        else:
            items = []
            for line in text.split("\n"):
                number += 1
                items += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        why = shorten(str(error))
        place = f"line {number} of {file}" if number else file
        raise ValueError(f"{place} is neither JSON nor JSON lines ({why}). {remedy}") from None
    for number, item in enumerate(items, 1):
        check_row(item, fields, f"question {number} of {file}", remedy)
    if not items:
        raise ValueError(f"{file} holds no questions. {remedy}")
    return items[:limit] if limit else items


def read_object(file: str | Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file of another kind.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4,301 digits
        raise ValueError(f"{file} is not JSON ({shorten(str(error))}). {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {short_repr(content)}, not an object. {remedy}")
    return content


def check_row(item: Any, fields: Mapping[str, Field], place: str, remedy: str) -> None:
    """Check that an object of a file has the required fields.

    Raises:
        ValueError: for another value, or a missing or invalid field.
    """
    if not isinstance(item, dict):
        raise ValueError(f"{place} is {short_repr(item)}, not an object. {remedy}")
    if missing := [name for name in fields if name not in item]:
        raise ValueError(f"{place} has no {', '.join(missing)}. {remedy}")
    for name, (is_good, kind) in fields.items():
        if not is_good(item[name]):
            raise ValueError(f"{place}: {name} is {short_repr(item[name])}; it must be {kind}.")


def read_instances(file: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Read COCO's instances: `images`, `categories`, and `annotations` that link them.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for another file, such as COCO's captions.
    """
    content = _coco(
        file,
        {
            "images": {"id": _is_int},
            "categories": {"id": _is_int, "name": is_text},
            "annotations": {"image_id": _is_int, "category_id": _is_int},
        },
        "Give COCO's instances, such as instances_val2014.json, to --instances.",
    )
    category_ids = {category["id"] for category in content["categories"]}
    for note in content["annotations"]:
        if note["category_id"] not in category_ids:
            raise ValueError(
                f"{file} has no category {note['category_id']}, but an annotation uses it."
            )
    return content


def read_captions(file: str | Path) -> list[dict[str, Any]]:
    """Read the annotations of COCO's captions.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for another file, such as COCO's instances.
    """
    remedy = "Give COCO's captions, such as captions_val2014.json, to --reference."
    fields = {"annotations": {"image_id": _is_int, "caption": lambda v: isinstance(v, str)}}
    return _coco(file, fields, remedy)["annotations"]


def read_synonyms(file: str | Path) -> list[list[str]]:
    """Read the names of each object in a list of synonyms: one line each, separated by commas.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file of another kind.
    """
    lines = read_text(file).splitlines()
    for number, line in enumerate(lines, 1):
        if _MARKUP & set(line):
            raise ValueError(
                f"{file} is not a list of synonyms: line {number} is {short_repr(line)}. Give a "
                "line for each object, with name and synonyms separated by commas, to --synonyms."
            )
    named = ([name.strip().lower() for name in line.split(",") if name.strip()] for line in lines)
    return [names for names in named if names]


def _coco(
    file: str | Path, schema: Mapping[str, Mapping[str, Callable[[Any], bool]]], remedy: str
) -> dict[str, list[dict[str, Any]]]:
    content = read_object(file, remedy)
    for name, fields in schema.items():
        items = content.get(name)
        if not isinstance(items, list):
            raise ValueError(f"{file} has no list `{name}`. {remedy}")
        for item in items:
            if not isinstance(item, dict) or not all(
                is_good(item.get(field)) for field, is_good in fields.items()
            ):
                raise ValueError(
                    f"{file} has {short_repr(item)} in `{name}`, which lacks {', '.join(fields)}. "
                    f"{remedy}"
                )
    return content


def _is_int(value: Any) -> bool:
    """Whether a value is an id. Larger numbers could all have one hash, as keys of a dict."""
    return type(value) is int and abs(value) < 1 << 60


def _surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"
