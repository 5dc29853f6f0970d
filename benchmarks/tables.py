"""Markdown tables, numbers with units, and generated blocks of a page."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e9 * seconds:.3g} ns"


def quantity(value: float) -> str:
    """Three digits; millions as such."""
    return f"{value / 1e6:.3g} M" if value >= 1e5 else f"{float(f'{value:.3g}'):,g}"


def number(value: float | None) -> str:
    """Three digits; a dash for None."""
    return "-" if value is None else f"{value:.3g}"


def factor(quartiles: Sequence[float]) -> str:
    """Median of a ratio, and its quartiles in brackets."""
    low, middle, high = quartiles
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def bytes_of(count: int) -> str:
    """MiB, or GiB from 1,024 MiB on."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def span(values: Sequence[float], between: str = " to ") -> str:
    """Least and most, or the one value."""
    return between.join(dict.fromkeys(f"{part(values):.2f}" for part in (min, max)))


def ratio_range(values: Sequence[float], better: str, worse: str) -> str:
    """Least and most of theirs over ours: "1.2x - 1.3x faster", or "0.9x, slower" below 1."""
    shown = " - ".join(dict.fromkeys(f"{part(values):.1f}x" for part in (min, max)))
    if min(values) >= 1:
        return f"{shown} {better}"
    return f"{shown}, {worse}" if max(values) < 1 else f"{shown}, {worse} to {better}"


def put(path: Path, blocks: dict[str, str]) -> None:
    """Replaces the lines from `<!-- NAME: generated -->` to `<!-- /NAME -->` of a page.

    Raises:
        ValueError: when the page lacks the lines of a block.
    """
    text = path.read_text()
    for name, new in blocks.items():
        lines = f"<!-- {name}: generated -->\n", f"<!-- /{name} -->"
        if not all(line in text for line in lines):
            raise ValueError(
                f"{path.name} has no block {name!r}: put {lines[0].strip()!r} and {lines[1]!r} on "
                "lines of their own."
            )
        before, _, rest = text.partition(lines[0])
        after = rest.partition(lines[1])[2]
        text = f"{before}{lines[0]}{new}\n{lines[1]}{after}"
    path.write_text(text)
