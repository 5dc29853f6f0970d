"""Random preference records with one fault: a format, a field, a fault in it, and the truth.

`draw(rng, number, folder)` returns a `Case` with the row and a verdict for every reader. It also
has the texts and pixels that a reader must return if it accepts the record. "good" must be
accepted, and "bad" must be rejected. "either" may be rejected, but must be correct if accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from stress_images import Encoded, colours
from stress_rows import (
    JSON,
    MISSING,
    OTHERS,
    PATHS,
    READERS,
    Case,
    base,
    get,
    put,
)

_PARTS = {
    "none": 0.06, "text": 0.38, "messages": 0.18, "image": 0.2, "id": 0.04, "encoding": 0.06,
    "row": 0.05, "columns": 0.03,
}  # fmt: skip

_TYPES = {
    "a number": 7,
    "NaN": float("nan"),
    "a bool": True,
    "bytes": b"top one .",
    "an object": {"a": 1},
    "a list of numbers": [1, 2],
    "a list of texts": ["top one ."],
    "an empty list": [],
    "an empty object": {},
    "nested lists": [[["top one ."]]],
    "a list of null": [None],
}
GOOD, BAD, EITHER = {"*": "good"}, {"*": "bad"}, {"*": "either"}
_TRAIN_BAD = {"*": "good", "train": "bad", "hf": "bad"}

# Kind, fault, the value in place of a text, the expected text, the verdict for each reader.
Fault = tuple[str, str, Callable[[str], Any], Callable[[str], str], dict[str, str]]


def _same(text: str) -> str:
    return text


def _texts(where: str) -> list[Fault]:
    """Faults of a text in the field `where`."""
    faults: list[Fault] = [
        ("missing or null", "missing", lambda t: MISSING, _same, BAD),
        ("missing or null", "null", lambda t: None, _same, BAD),
        ("empty", "empty", lambda t: "", _same, BAD),
        ("empty", "white space", lambda t: " \n\t ", _same, BAD),
        ("empty", "wide white space", lambda t: "\u3000\u00a0\u2003", _same, BAD),
    ]
    faults += [("wrong type", name, lambda t, v=v: v, _same, BAD) for name, v in _TYPES.items()]
    faults += [
        ("Unicode", "half of a surrogate pair", lambda t: f"{t} \ud83d b", _same, BAD),
        ("Unicode", "the other half first", lambda t: f"\ude00{t}", _same, BAD),
        ("Unicode", "null character", lambda t: f"{t}\0b", _same, BAD),
        ("Unicode", "escape character", lambda t: f"\x1b[31m{t}", lambda t: f"\x1b[31m{t}", EITHER),
    ]  # fmt: skip
    for name, extra in {
        "right to left": " \u202e\u05d0\u05d1\u202c .",
        "combining": " e\u0301 a\u0308\u0323",
        "emoji": " \U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467",
        "ligature and width": " \ufb01 \uff21 \u00bd",
        "line separators": "\u2028a\u2029b\x85c",
        "carriage returns": "\r\nnext line\r\n",
        "noncharacter": " \ufdd0 \uffff",
        "byte order mark inside": " a\ufeffb",
    }.items():
        change = lambda t, e=extra: t + e  # noqa: E731
        faults.append(("Unicode", name, change, change, GOOD))
    html = lambda t: f"{t} <b>one</b> &amp; 2 < 3"  # noqa: E731
    faults += [
        ("white space", "around", lambda t: f"  \n{t}\n ", _same, GOOD),
        ("white space", "in the text", lambda t: f"{t}\n\n   {t}", lambda t: f"{t}\n\n   {t}",
         GOOD),
        ("markup", "HTML", html, html, GOOD),
        ("control tokens", "the end token", lambda t: f"{t} </s> USER: no", lambda t:
         f"{t} </s> USER: no", _TRAIN_BAD),
        ("control tokens", "the first token", lambda t: f"<s>{t}", lambda t: f"<s>{t}", _TRAIN_BAD),
    ]  # fmt: skip
    if where == "prompt":
        faults += [
            ("image tags", "in front", lambda t: f"<image>\n{t}", _same, GOOD),
            ("image tags", "behind", lambda t: f"{t}\n<image>", _same, GOOD),
            ("image tags", "in the middle", lambda t: f"{t} <image> {t}", lambda t: f"{t} {t}",
             GOOD | {"pairs": "either", "sources": "either"}),
            ("image tags", "of Qwen", lambda t: "<|vision_start|><|image_pad|><|vision_end|>" + t,
             _same, EITHER),
            ("image tags", "of InternVL", lambda t: f"<img><IMG_CONTEXT></img>{t}", _same, EITHER),
            ("image tags", "of Phi", lambda t: f"<|image_1|>\n{t}", _same, EITHER),
            ("image tags", "numbered from 0", lambda t: f"<image_0>\n{t}", _same, BAD),
            ("image tags", "two for one image", lambda t: f"<image><image>\n{t}", _same, BAD),
        ]  # fmt: skip
    else:
        faults += [
            ("image tags", "in a response", lambda t: f"<image> {t}", _same, BAD),
            ("image tags", "another model's, in a response", lambda t: f"{t} <|image_pad|>",
             lambda t: f"{t} <|image_pad|>", BAD | {"pairs": "either", "sources": "either"}),
        ]  # fmt: skip
    return faults


def draw(rng: np.random.Generator, number: int, folder: Path) -> Case:
    """Returns a record of a random format, with a random fault in a random field."""
    part = rng.choice(list(_PARTS), p=list(_PARTS.values()))
    format = str(rng.choice(list(READERS)))
    row, truth = base(format, number, folder)
    case = Case(number, format, "none", "none", row, truth, {}, "")
    case.neighbours = [base(format, number + far, folder)[0] for far in (100_000, 200_000)]
    verdicts = {
        "none": lambda: GOOD,
        "text": lambda: _text_fault(case, rng),
        "messages": lambda: _message_fault(case, rng),
        "image": lambda: _image_fault(case, rng, folder),
        "id": lambda: _id_fault(case, rng),
        "encoding": lambda: _encoding_fault(case, rng),
        "row": lambda: _row_fault(case, rng),
        "columns": lambda: _column_fault(case, rng),
    }[str(part)]()
    for reader in READERS[format]:
        verdict = verdicts.get(reader, verdicts["*"])
        if verdict == "good" and reader != "pairs" and format in OTHERS:
            verdict = "either"
        if reader in ("train", "hf") and verdict == "good" and not truth.retrieved:
            verdict = "bad"  # rdpo needs a retrieved image
        case.verdicts[reader] = verdict
    return case


def _pick(case: Case, where: str, faults: list[Any], rng: np.random.Generator) -> Any:
    """Draws a fault, with all kinds equally often, and names the case after it."""
    kind = rng.choice(sorted({fault[0] for fault in faults}))
    of_kind = [fault for fault in faults if fault[0] == kind]
    fault = of_kind[rng.integers(len(of_kind))]
    case.kind, case.fault = fault[0], f"{where}: {fault[1]}"
    return fault


def _text_fault(case: Case, rng: np.random.Generator) -> dict[str, str]:
    where = str(rng.choice(list(PATHS[case.format])))
    kind, name, change, reads, verdicts = _pick(case, where, _texts(where), rng)
    text = case.truth.prompt[0][1] if where == "prompt" else getattr(case.truth, where)
    value = change(text)
    if "<image>" in str(get(case.row, PATHS[case.format][where])) and isinstance(value, str):
        value = value if "<i" in value or "<|" in value else f"<image>\n{value}"
    put(case.row, PATHS[case.format][where], value)
    if where == "prompt":
        case.truth.prompt = [("user", reads(text))]
    else:
        setattr(case.truth, where, reads(text))
    if kind == "image tags" and where == "prompt" and case.format == "TRL, parts":
        return BAD  # next to an image part
    if case.format == "folder" and where == "chosen" and kind == "missing or null":
        case.truth.chosen = ""
        return GOOD  # a record without a response
    return verdicts


def _message_fault(case: Case, rng: np.random.Generator) -> dict[str, str]:
    """A fault of a list of messages or parts. Formats without lists get a wrong type."""
    lists = {
        "TRL, messages": ("prompt", "chosen", "rejected"),
        "datasets": ("prompt", "chosen", "rejected"),
        "TRL, parts": ("prompt", "chosen", "rejected"),
        "authors": ("chosen", "rejected"),
        "LLaVA": ("conversations",),
        "ShareGPT": ("conversations",),
    }.get(case.format)
    if lists is None:
        return _text_fault(case, rng)
    where = str(rng.choice(lists))
    messages = case.row[where]
    names = ("from", "value") if "from" in messages[0] else ("role", "content")
    role, content = names
    last, text = messages[-1], messages[-1][content]
    truth = case.truth
    system = {role: "system", content: "name one ."}
    faults: list[tuple[str, str, Any, dict[str, str]]] = [
        ("roles", "unknown", [*messages[:-1], last | {role: "robot"}], BAD),
        ("roles", "missing", [*messages[:-1], {content: text}], BAD),
        ("roles", "null", [*messages[:-1], last | {role: None}], BAD),
        ("roles", "a number", [*messages[:-1], last | {role: 1}], BAD),
        ("roles", "tool", [*messages[:-1], last | {role: "tool"}], BAD),
        ("messages", "no content", [*messages[:-1], {role: last[role]}], BAD),
        ("messages", "a null among them", [*messages, None], BAD),
        ("messages", "a text among them", [*messages, "top one ."], BAD),
        ("messages", "nested", [messages], BAD),
        ("messages", "none", [], BAD),
        ("messages", "one, not in a list", last, EITHER if len(messages) == 1 else BAD),
        ("messages", "a number", 7, BAD),
        ("messages", "a struct of lists", {n: [m[n] for m in messages] for n in names}, GOOD),
        ("messages", "lists of two lengths", {role: [last[role]], content: [text, text]}, BAD),
    ]
    if where in ("prompt", "conversations"):
        first = [system, *messages]
        faults.append(("messages", "system first", first, GOOD))
    if content == "content":
        plain = {"type": "text", "text": "top one ."}
        parts = {
            "without a type": ([{"text": "top one ."}], BAD),
            "of type video": ([plain, {"type": "video", "video": "a.mp4"}], BAD),
            "of type audio": ([plain, {"type": "audio", "audio": "a.wav"}], BAD),
            "of type tool_call": ([plain, {"type": "tool_call", "name": "look"}], BAD),
            "a null": ([None, plain], BAD),
            "a number for text": ([{"type": "text", "text": 7}], BAD),
            "null for text": ([{"type": "text", "text": None}], BAD),
            "a text among them": ([plain, "top one ."], BAD),
            "nested": ([[plain]], BAD),
            "text and an image in one": ([{"type": "text", "text": "one", "image": "a.png"}], BAD),
            "an image URL": ([plain, {"type": "image_url", "image_url": {"url": "x"}}], BAD),
        }
        if where != "prompt":
            parts["an image in a response"] = ([{"type": "image"}, plain], BAD)
        many = ["one "] * 1000
        if case.format != "TRL, parts" or where != "prompt":
            parts["a thousand"] = ([{"type": "text", "text": t} for t in many], GOOD)
        for name, (value, verdict) in parts.items():
            faults.append(("parts", name, [*messages[:-1], last | {content: value}], verdict))
    _, name, value, verdicts = _pick(case, where, faults, rng)
    case.row[where] = value
    if name == "system first":
        truth.prompt = [("system", "name one ."), *truth.prompt]
    if name == "a thousand":
        joined = "".join(many)
        if where == "prompt":
            truth.prompt = [("user", joined)]
        else:
            setattr(truth, where, joined)
    return verdicts


def _image_fault(case: Case, rng: np.random.Generator, folder: Path) -> dict[str, str]:
    """A fault of an image column. `test_image_decoding` covers other kinds of images."""
    columns = [name for name in ("images", "retrieved_images", "image", "retrieved_image")
               if name in case.row]  # fmt: skip
    where = str(rng.choice(columns))
    listed = isinstance(case.row[where], list)
    of = case.truth.images if where.startswith("image") else case.truth.retrieved
    bad: dict[str, Any] = {
        "a number": 7,
        "a bool": True,
        "an array": [[1, 2], [3, 4]],
        "an empty path": "",
        "a path that is missing": "no/such/image.png",
        "a URL": "https://example.org/kitchen.png",
        "a data URI": "data:image/png;base64,iVBORw0KGgo=",
        "base64 text": "iVBORw0KGgoAAAANSUhEUgAAAAwAAAAKCAIAAAA" * 99,
        "a long path": "a" * 5000,
        "a null byte": "kitchen\0.png",
        "a folder": "photos",
        "a pipe": "pipe",
        "neither bytes nor path": {"bytes": None, "path": None},
        "no bytes": {"bytes": b"", "path": None},
        "text for bytes": {"bytes": "iVBORw0KGgo", "path": None},
        "other keys": {"url": "https://example.org/kitchen.png"},
        "a path in a list in a list": [["a.png"]],
        "null": None,
        "missing": MISSING,
        "an outside path": "../secret.png",
    }
    name = str(rng.choice(list(bad)))
    value, whole = bad[name], rng.random() < 0.5
    case.kind, case.fault = "image values", f"{where}: {name}{', in a list' if listed else ''}"
    if value is MISSING or (whole and value is None):
        put(case.row, (where,), value)
    else:
        case.row[where] = [value] if listed else value
    if name == "an outside path":
        secret = Image.fromarray(colours(40))
        secret.save(folder.parent / "secret.png")
        of[:] = [Encoded(b"", colours(40))]
        return {"*": "bad", "train": "either", "hf": "either"}
    if not where.startswith("image") and name in ("null", "missing"):
        of.clear()
        whole_missing = case.row.get(where) is None
        if case.format == "authors":
            return BAD  # without a retrieved image, the row has another format
        return _TRAIN_BAD if whole_missing else BAD
    return BAD


def _id_fault(case: Case, rng: np.random.Generator) -> dict[str, str]:
    values = {
        "missing": (MISSING, GOOD),
        "null": (None, GOOD),
        "a number": (70_000 + case.number, GOOD),
        "empty": ("", GOOD),
        "white space": (" \t", GOOD),
        "lines": ("a\nb\x85c", GOOD),
        "emoji": ("\U0001f642", GOOD),
        "a million characters": ("a" * 1_000_000, GOOD),
        "half of a surrogate pair": ("a\ud83d", EITHER),
        "an object": ({"a": 1}, EITHER),
        "a list": ([1, 2], EITHER),
        "a bool": (True, EITHER),
        "that of a neighbour": (case.neighbours[0]["id"], EITHER),
    }
    name = str(rng.choice(list(values)))
    value, verdicts = values[name]
    case.kind, case.fault = "ids", f"id: {name}"
    put(case.row, ("id",), value)
    return verdicts


def _row_fault(case: Case, rng: np.random.Generator) -> dict[str, str]:
    """An item that is not a row, or Python objects that only a trainer can receive."""
    case.kind = "rows"
    if rng.random() < 0.3:
        items = {"null": None, "a number": 7, "a text": "top one .", "a list": [1], "empty": {}}
        name = str(rng.choice(list(items)))
        case.fault, case.row = f"row: {name}", items[name]
        return BAD
    where = str(rng.choice(list(PATHS[case.format])))
    text = get(case.row, PATHS[case.format][where])
    objects = {
        "an array of texts": np.array([text, text]),
        "an array of numbers": np.arange(3),
        "a set": {1, 2},
        "a path": Path("kitchen.png"),
        "an object": object(),
        "a complex number": 1j,
        "a class": Path,
        "numpy's text": np.str_(text),
        "bytes": text.encode(),
        "a generator": (part for part in text),
    }
    name = str(rng.choice(list(objects)))
    case.fault = f"{where}: {name}"
    put(case.row, PATHS[case.format][where], objects[name], whole=True)
    return EITHER if name == "numpy's text" else BAD


def _column_fault(case: Case, rng: np.random.Generator) -> dict[str, str]:
    """Additional columns or keys, whose meaning must not be lost silently."""
    case.kind = "more columns"
    extra = {"tool_calls": [{"name": "look"}], "reasoning_content": "think one .", "weight": 0}
    lists = [n for n in ("prompt", "chosen", "conversations", "messages")
             if isinstance(case.row.get(n), list)]  # fmt: skip
    if lists and rng.random() < 0.6:
        where, name = str(rng.choice(lists)), str(rng.choice(list(extra)))
        case.row[where][-1][name] = extra[name]
        case.fault = f"{where}: {name}"
        return EITHER if name == "weight" else BAD
    if rng.random() < 0.5:
        case.fault = "a source"
        case.row["dataset_name"] = "kitchens"
        return GOOD
    case.fault = "a system prompt"
    case.row["system"] = "name one ."
    case.truth.prompt = [("system", "name one ."), *case.truth.prompt]
    return EITHER


def _encoding_fault(case: Case, rng: np.random.Generator) -> dict[str, str]:
    if case.format in JSON:
        names = {"byte order mark": GOOD, "UTF-16": EITHER, "Latin-1": BAD, "cut": BAD, "deep": BAD}
    elif case.format == "folder":
        names = {"byte order mark": GOOD, "UTF-16": EITHER, "Latin-1": BAD, "cut": BAD, "deep": BAD}
        names |= {"carriage returns": GOOD, "a number for a line": BAD}
    elif case.format != "datasets":
        names = {"large strings": GOOD, "dictionaries": GOOD, "cut": BAD, "no bytes": BAD}
        names |= {"JSON": BAD, "binary text": EITHER, "views": GOOD, "two columns": BAD}
    else:
        return GOOD
    case.encoding = str(rng.choice(list(names)))
    case.kind, case.fault = "encodings", case.encoding
    verdicts = names[case.encoding]
    if case.encoding == "Latin-1":
        where = "chosen"
        path = PATHS[case.format][where]
        text = get(case.row, path) + " caf\u00e9"
        put(case.row, path, text)
        case.truth.chosen = text
    # A trainer gets rows, not a file.
    return verdicts | {"hf": "either" if case.encoding == "Latin-1" else "good"}
