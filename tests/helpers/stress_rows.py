"""Rows of valid preference records in every format, with their texts and pixels."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from stress_images import Encoded, colours, encode

from realign.digits.scenes import PLACES, WORDS

READERS = {
    "TRL, text": ("pairs", "train", "hf"),
    "TRL, messages": ("pairs", "train", "hf"),
    "TRL, parts": ("pairs", "train", "hf"),
    "datasets": ("pairs", "hf"),
    "RLAIF-V": ("pairs", "train", "hf"),
    "authors": ("pairs", "hf"),
    "ShareGPT": ("pairs", "hf"),
    "LLaVA": ("sources",),
    "folder": ("sources",),
}
"""Format -> who reads it: `realign.pairs import`, `read_any`, `realign.train`, `RDPOTrainer`."""

OTHERS = ("RLAIF-V", "authors", "ShareGPT")  # formats that only realign.pairs must read
JSON = ("authors", "ShareGPT", "LLaVA")
MISSING = object()


@dataclass
class Truth:
    """The expected result of a reader."""

    prompt: list[tuple[str, str]]  # role and text of each message
    chosen: str
    rejected: str
    images: list[Encoded]
    retrieved: list[Encoded]
    retrieved_chosen: str = ""


@dataclass
class Case:
    """A record with at most one fault."""

    number: int
    format: str
    kind: str
    fault: str
    row: dict[str, Any]
    truth: Truth
    verdicts: dict[str, str]
    encoding: str = ""  # fault in the encoding of the file
    neighbours: list[dict[str, Any]] = field(default_factory=list)

    @property
    def id(self) -> Any:
        """The id in the row."""
        return self.row.get("id") if isinstance(self.row, dict) else None

    @property
    def name(self) -> str:
        """The id of the record without a fault."""
        return f"kitchen-{self.number}"


def base(format: str, number: int, folder: Path) -> tuple[dict[str, Any], Truth]:
    """A valid record of a format."""
    digits = [number // 10**place % 10 for place in range(6)]
    named = [f"{place} {WORDS[d]}" for place, d in zip(PLACES, digits, strict=False)]
    prompt = f"what is {named[0]} {WORDS[digits[4]]} {WORDS[digits[5]]} ?"
    chosen, rejected = f"{named[1]} , yes .", f"{named[2]} , no ."
    images = [Encoded(encode(Image.fromarray(colours(seed))), colours(seed)) for seed in (31, 32)]
    truth = Truth([("user", prompt)], chosen, rejected, images[:1], images[1:])
    first, second = ({"bytes": image.data, "path": None} for image in images)
    user, reply = message("user", prompt), lambda text: [message("assistant", text)]
    row: dict[str, Any] = {"id": f"kitchen-{number}"}
    if format == "TRL, text":
        row |= {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        row |= {"images": [first], "retrieved_images": [second]}
    elif format in ("TRL, messages", "datasets"):
        row |= {"prompt": [user], "chosen": reply(chosen), "rejected": reply(rejected)}
        row |= {"images": [first], "retrieved_images": [second]}
    elif format == "TRL, parts":
        parts = [{"type": "image", "text": None}, {"type": "text", "text": prompt}]
        row |= {"prompt": [message("user", parts)]}
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            row[name] = reply([{"type": "text", "text": text}])
        row |= {"images": [first], "retrieved_images": [second]}
    elif format == "RLAIF-V":
        row |= {"idx": number, "image": first, "question": prompt, "chosen": chosen}
        row |= {"rejected": rejected, "origin_dataset": "kitchens", "image_path": "a/kitchen.png"}
        truth.retrieved = []
    elif format == "authors":
        row |= {"chosen": [user, *reply(chosen)], "rejected": [user, *reply(rejected)]}
        row |= {"image": _file(folder, images[0]), "retrieved_image": _file(folder, images[1])}
    elif format == "ShareGPT":
        past = [{"from": "human", "value": f"<image>{prompt}"}]
        row |= {"conversations": past, "images": [_file(folder, images[0])]}
        row |= {"chosen": {"from": "gpt", "value": chosen}}
        row |= {"rejected": {"from": "gpt", "value": rejected}}
        truth.retrieved = []
    else:
        truth.rejected, truth.retrieved = "", []
        row |= {"image": _file(folder, images[0])}
        if format == "LLaVA":
            row["conversations"] = [
                {"from": "human", "value": f"<image>\n{prompt}"},
                {"from": "gpt", "value": chosen},
            ]
        else:
            row |= {"question": prompt, "answer": chosen}
    return copy.deepcopy(row), truth


PATHS = {
    "TRL, text": {"prompt": ("prompt",), "chosen": ("chosen",), "rejected": ("rejected",)},
    "TRL, messages": {n: (n, 0, "content") for n in ("prompt", "chosen", "rejected")},
    "datasets": {n: (n, 0, "content") for n in ("prompt", "chosen", "rejected")},
    "TRL, parts": {
        "prompt": ("prompt", 0, "content", 1, "text"),
        "chosen": ("chosen", 0, "content", 0, "text"),
        "rejected": ("rejected", 0, "content", 0, "text"),
    },
    "RLAIF-V": {"prompt": ("question",), "chosen": ("chosen",), "rejected": ("rejected",)},
    "authors": {"chosen": ("chosen", 1, "content"), "rejected": ("rejected", 1, "content")},
    "ShareGPT": {
        "prompt": ("conversations", 0, "value"),
        "chosen": ("chosen", "value"),
        "rejected": ("rejected", "value"),
    },
    "LLaVA": {"prompt": ("conversations", 0, "value"), "chosen": ("conversations", 1, "value")},
    "folder": {"prompt": ("question",), "chosen": ("answer",)},
}
"""Format -> field -> where its text is in a row."""


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _file(folder: Path, image: Encoded) -> str:
    """Writes the image to the folder of the data, and returns the file name."""
    file = folder / f"base-{len(image.data)}-{image.pixels[0, 0, 0]}.png"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image.data)
    return file.name


def get(row: Any, path: tuple) -> Any:
    """The value at a path."""
    for key in path:
        row = row[key]
    return row


def put(row: dict[str, Any], path: tuple, value: Any, whole: bool = False) -> None:
    """Sets a copy of the value, or with `whole` the value itself, at a path. MISSING removes it."""
    for key in path[:-1]:
        row = row[key]
    if value is MISSING:
        del row[path[-1]]
    else:
        row[path[-1]] = value if whole else copy.copy(value)
