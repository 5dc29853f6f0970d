"""Markdown tables, formatted numbers, and generated blocks of a page."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """Duration with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e9 * seconds:.3g} ns"


def quantity(value: float) -> str:
    """Number with three digits; from 100,000 on in millions (M)."""
    return f"{value / 1e6:.3g} M" if value >= 1e5 else f"{float(f'{value:.3g}'):,g}"


def number(value: float | None) -> str:
    """Number with three digits, or a dash for None."""
    return "-" if value is None else f"{value:.3g}"


def factor(quartiles: Sequence[float]) -> str:
    """Median of a ratio, and its quartiles in brackets: "1.30x [1.29, 1.31]"."""
    low, middle, high = quartiles
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"


def bytes_of(count: int) -> str:
    """Size in MiB, or in GiB if it is at least 1 GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def span(ratios: Sequence[float]) -> str:
    """Smallest and largest ratio: "1.20x to 1.30x", or one of them if they are equal."""
    return " to ".join(dict.fromkeys(f"{part(ratios):.2f}x" for part in (min, max)))


def ratio_range(values: Sequence[float], better: str, worse: str) -> str:
    """Range of theirs / ours: "1.2x - 1.3x faster", or "0.9x, slower" below 1."""
    shown = " - ".join(dict.fromkeys(f"{part(values):.1f}x" for part in (min, max)))
    if min(values) >= 1:
        return f"{shown} {better}"
    return f"{shown}, {worse}" if max(values) < 1 else f"{shown}, {worse} to {better}"


def put(path: Path, blocks: dict[str, str]) -> None:
    """Replaces the lines from `<!-- NAME: generated -->` to `<!-- /NAME -->` of a page.

    Raises:
        ValueError: The page lacks the two marker lines of a block.
    """
    text = path.read_text()
    for name, new in blocks.items():
        lines = f"<!-- {name}: generated -->\n", f"<!-- /{name} -->"
        if not all(line in text for line in lines):
            raise ValueError(
                f"{path.name} has no block {name!r}. Add {lines[0].strip()!r} and {lines[1]!r} on "
                "separate lines."
            )
        before, _, rest = text.partition(lines[0])
        after = rest.partition(lines[1])[2]
        text = f"{before}{lines[0]}{new}\n{lines[1]}{after}"
    path.write_text(text)
