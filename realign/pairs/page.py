"""Page of a gallery: one HTML file of cards with images, prompts and marked answers.

The galleries of preference pairs and of evaluation answers fill this page. Images are data URIs.
Texts are in a JSON block, and the script inserts them as text, not markup. A
Content-Security-Policy allows only the page's own script and style.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realign.data.images import DataFolder, ImageError, StoredImage
from realign.pairs.io.images import load_image
from realign.pairs.stats import Segments, image_digest

_TEMPLATE = Path(__file__).with_name("page.html")
_SMALL = 128  # pixels; images up to this size are not reduced, and are shown with sharp pixels

_INVISIBLE = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0001-\U000e007f]"
)
"""Controls of the text direction, and characters without a shape. They hide or reorder a text."""
_ESCAPE = re.compile(r"\\(?:(u00[01][0-9a-f]|[bf])|.)")
"""An escape of JSON. Group 1 is that of a control character without a short escape, or of a
backspace or form feed. A page shows none of these."""

Verdicts = dict[str, tuple[str, str]]
"""Rule -> (tone, word). A tone is a class of the style: good, bad, part, low, high or "".

The entry "" is for cards that do not have the rule that the reader chose.
"""
Order = tuple[str, str, str, int]
"""Sort order: its id, its name, the key in `Card.sort` ("place" for the file's order), and 1 or -1
for rising or falling values. Cards with None come last.
"""


@dataclass
class Figure:
    """Images with a caption.

    Attributes:
        caption: its name, such as "Image".
        images: places in `Album.images`.
        note: text beside the caption.
        bar: length of a bar under the caption in [0, 1]. None shows no bar.
    """

    caption: str
    images: list[int]
    note: str = ""
    bar: float | None = None


@dataclass
class Answer:
    """A text with a title and marked words.

    Attributes:
        title: its name, such as "Chosen" or the name of a model.
        segments: the text in parts, and whether a part is marked.
        verdicts: rule -> colour of the answer, and a word after the title.
        note: line below the text.
    """

    title: str
    segments: Segments
    verdicts: Verdicts
    note: str = ""


@dataclass
class Turn:
    """A prompt as (role, text) lines, and the answers to it. An empty role is not shown."""

    prompt: list[tuple[str, str]]
    answers: list[Answer]


@dataclass
class Card:
    """One card of a page.

    Attributes:
        id: name of the card.
        figures: its images.
        turns: its texts.
        labels: rule -> labels that the reader can filter by.
        sort: key of an order -> number, or None for a card that comes last.
        states: rule -> badge above the texts. Empty shows no badge.
        chips: (name, value, tone) of the results below the texts.
        facts: (name, value) of the folded list.
        group: file of the card, for a page of several files.
    """

    id: str
    figures: list[Figure]
    turns: list[Turn]
    labels: dict[str, list[str]]
    sort: dict[str, float | None]
    states: Verdicts = field(default_factory=dict)
    chips: list[dict[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    group: str = ""


@dataclass
class Page:
    """The content of a page.

    Attributes:
        heading: title above the cards.
        about: number of cards, and their source.
        figures: (summary, text) of the folded statistics.
        thing: noun for a card, such as "pair".
        all: option that shows every label.
        cards: the cards in the order of the file.
        images: `Album.images`.
        orders: sort orders; the first is the default.
        labels: labels in their order in the filter. Further labels of the cards are sorted.
        rules: file -> rules to choose from, the default first. The file "" has those of all files.
            Without any, the cards use the rule "".
        groups: files to choose from.
        totals: file -> rule -> (label, number, tone) of all its items, also of those that are not
            shown. The file "" has the totals of all files.
        notes: sentences above the cards, such as how they were selected.
    """

    heading: str
    about: str
    figures: tuple[str, str]
    thing: str
    all: str
    cards: list[Card]
    images: list[dict[str, Any]]
    orders: Sequence[Order]
    labels: Sequence[str] = ()
    rules: dict[str, list[str]] = field(default_factory=dict)
    groups: Sequence[str] = ()
    totals: dict[str, dict[str, list[tuple[str, int, str]]]] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Album:
    """Thumbnails as data URIs. Equal images share one.

    Args:
        side: longer side of a thumbnail, in pixels.
        folder: folder that contains the images. Others are not read, because the page holds them.
    """

    def __init__(self, side: int, folder: DataFolder) -> None:
        self._side = side
        self._folder = folder
        self._places: dict[bytes, int] = {}
        self.images: list[dict[str, Any]] = []

    def places_of(self, images: Iterable[StoredImage]) -> list[int]:
        """The indices of images in `images`."""
        places = []
        for image in images:
            key = image_digest(image, Path(self._folder.path))
            if key not in self._places:
                self._places[key] = len(self.images)
                self.images.append(self._thumbnail(image))
            places.append(self._places[key])
        return places

    def report(self) -> str:
        """The number of images that are not shown, by reason. Empty if all are shown."""
        problems = Counter(image["problem"] for image in self.images if "problem" in image)
        if not problems:
            return ""
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in problems.most_common())
        return f"Images that are not shown: {reasons}. Check --image-folder."

    def _thumbnail(self, stored: StoredImage) -> dict[str, Any]:
        try:
            if stored.data is None and stored.path is not None:
                stored = StoredImage(path=self._folder.file(stored.path))
            image = load_image(stored)
        except ImageError as error:
            return {"problem": error.reason}
        small = max(image.size) <= _SMALL
        if not small:
            image.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if small else "JPEG", quality=82, optimize=True)
        kind = "png" if small else "jpeg"
        text = base64.b64encode(buffer.getvalue()).decode()
        return {"source": f"data:image/{kind};base64,{text}", "small": small}


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, sampled evenly, in order."""
    if most >= count:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


def check_numbers(**numbers: int) -> None:
    """Check the options `most` and `side`.

    Raises:
        ValueError: for a number out of range.
    """
    for name, value in numbers.items():
        if value < (least := {"most": 0, "side": 16}[name]):
            raise ValueError(f"{name} is {value}; it must be at least {least}.")


def write_page(output: str | Path, title: str, page: Page) -> None:
    """Write the template, filled with the page and a policy for only its own script and style."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = hashlib.sha256(text.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; img-src data:; style-src {hashes['style']}; "
        f"script-src {hashes['script']}; base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(asdict(page), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = _ESCAPE.sub(_visible_control, text)
    # Without `<`, no text in the block can end the block, or begin a tag or comment.
    text = _visible(text.replace("<", "\\u003c"))
    parts = {"%POLICY%": policy, "%TITLE%": html.escape(_visible(title)), "%DATA%": text}
    filled = re.sub("|".join(parts), lambda match: parts[match[0]], template)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(filled.encode("utf-8", "replace"))


def _visible_control(escape: re.Match[str]) -> str:
    """A code such as ⟨U+0007⟩ for a control character, and other escapes unchanged."""
    if not escape[1]:
        return escape[0]
    return _code(json.loads(f'"{escape[0]}"'))


def _visible(text: str) -> str:
    """Text with invisible characters as escapes, such as ⟨U+202E⟩, because the rules read them."""
    return _INVISIBLE.sub(lambda match: _code(match[0]), text)


def _code(letter: str) -> str:
    return f"⟨U+{ord(letter):04X}⟩"
