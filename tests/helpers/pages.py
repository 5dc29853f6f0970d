"""The Markdown pages of the repository: fenced blocks, inline code, links and anchors."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "CONTRIBUTING.md",
]
HISTORY = ROOT / "CHANGELOG.md", ROOT / "docs" / "decisions.md"
"""Pages that also name removed files and commands."""

_FENCE = re.compile(
    r"(?ms)(?:^ *<!-- not run: (?P<reason>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)(?P<ticks>```+|~~~+)(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)"
    r"^(?P=indent)(?P=ticks) *$"
)


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason` is why it cannot run here, from the comment before it."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """The path of a page relative to the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        line = text[: found.start("ticks")].count("\n") + 1
        code = re.sub(rf"(?m)^{found['indent']}", "", found["code"])
        yield Block(page, line, found["language"], code, found["reason"])


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks and comments."""
    return re.sub(r"(?s)<!--.*?-->", "", _FENCE.sub("", page.read_text()))


def inline_code(page: Path) -> list[str]:
    """The inline code of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, anchor) of each relative link; the file is "" for a link within the page."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="(.*?)"', text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ +(.*?) *#*$", prose(page)):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = original = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        number = 0
        while slug in found:
            number += 1
            slug = f"{original}-{number}"
        found.add(slug)
    return found
