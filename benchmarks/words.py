"""Tables and sentences of the report, from numbers."""

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.results import Entry, over_limit

PAGES = tomllib.loads(Path(__file__).with_name("pages.toml").read_text())
"""The prose of the pages."""
Groups = dict[str, list[Entry]]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{1e9 * seconds:.3g} ns"


def quantity(value: float) -> str:
    """Three digits; millions as such."""
    return f"{value / 1e6:.3g} M" if value >= 1e5 else f"{float(f'{value:.3g}'):,g}"


def factor(three: Sequence[float]) -> str:
    """Median and quartiles of a ratio."""
    low, middle, high = three
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def bytes_of(count: int) -> str:
    """MiB, or GiB from 1,024 MiB on."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def span(values: Sequence[float]) -> str:
    """Least and most, or the one value."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _is_other(entry: Entry) -> bool:
    """Neither ours in another form nor a limit."""
    return entry.role == "peer" and not entry.contestant.startswith("ours")


def against_ours(groups: Groups) -> str:
    """Where a peer is faster than ours, by its median; says so where none is."""
    faster = [
        f"{entry.contestant} takes {entry.ratio[1]:.2f} of ours in *{group}*"
        for group, entries in groups.items()
        for entry in entries
        if _is_other(entry) and entry.ratio and round(entry.ratio[1], 2) < 1
    ]
    if not faster:
        return "No other contestant is faster than ours in any of them."
    return "Where we lose: " + "; ".join(faster) + "."


def head_sentence(groups: Groups) -> str:
    """What the bars over the limit show."""
    found: dict[str, list[float]] = {}
    best = []
    for entries in groups.values():
        limits = over_limit(entries)
        if limits:
            dtype = entries[0].case["dtype"]
            found.setdefault(dtype, []).append(limits["ours"][1])
            peers = [e.ratio[1] for e in entries if e.role == "peer" and "ours" not in e.contestant]
            best += [min(peers)] if peers else []
    ours = " and ".join(f"{span(values)} times in {dtype}" for dtype, values in found.items())
    below = min(found.get("fp32", [1.0])) < 0.97
    why = " (below 1: ours has a GEMM of its own)" if below else ""
    return (
        f"Over these {sum(map(len, found.values()))} cases ours takes {ours} as long as torch's "
        f"GEMMs alone{why}; the best of the other libraries takes {span(best)} times as long as "
        f"ours. The whiskers are quartiles. {against_ours(groups)}"
    )


def memory_sentence(groups: Groups) -> str:
    """What the lines of memory show."""
    peaks: dict[tuple[str, str], dict[int, int]] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        key = "{head}, {dtype}".format(**entry.case), entry.contestant
        peaks.setdefault(key, {})[entry.case["image_tokens"]] = entry.bytes
    found, lower = [], []
    for (setting, name), values in peaks.items():
        least, most = min(values), max(values)
        if name == "ours":
            grown = (values[most] - values[least]) / 2**20
            found.append(
                f"{setting}: {values[least] / 2**20:.1f} MiB at {least:,} image tokens and "
                f"{grown:+.1f} MiB at {most:,}"
            )
        elif not name.startswith("ours"):
            ours = peaks[setting, "ours"]
            lower += [name for t in values if values[t] < ours[t]]
    where = f" Less than ours: {', '.join(sorted(set(lower)))}." if lower else ""
    return (
        f"Of ours labels and masks alone grow with the image tokens ({'; '.join(found)}). "
        f"Lines that rise project every row, or keep something for it.{where}"
    )


def step_sentence(groups: Groups) -> str:
    """What the bars of a step show."""
    found: dict[str, list[float]] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        if entry.role == "peer" and entry.ratio:
            found.setdefault(entry.contestant, []).append(entry.ratio[1])
    parts = "; ".join(f"{name} {span(values)}" for name, values in found.items())
    plural = "s" if len(groups) > 1 else ""
    return f"In units of ours, in {len(groups)} setting{plural}: {parts}. {against_ours(groups)}"


def scaling_sentence(groups: Groups) -> str:
    """What the lines of growth show."""
    found = []
    for entry in (entry for entries in groups.values() for entry in entries):
        if entry.contestant == "ours" and "slope" in entry.extra:
            slope = entry.extra["slope"]["time"]
            found.append(f"{slope:.2f} in {entry.case['axis']}")
    return (
        f"Slopes of ours: {', '.join(found)}. T counts image and prompt rows, which of ours never "
        f"meet the vocabulary. {against_ours(groups)}"
    )
