"""Text table of the GPU check in at most 100 lines: results, and missing parts with reasons."""

from collections.abc import Iterable, Sequence

from benchmarks.gpu.record import Line, failed, latest

MOST_LINES = 100
WIDEST = 200
"""Most characters of a shown error."""
OTHERS = ("part", "case", "call", "after_s")


def table(lines: Sequence[Line], parts: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """Lines of the table: the end, failed cases and figures of each part.

    If there are more than `most`, the longest parts are cut, and the number of cut lines is shown.
    """
    blocks = [_block(part, [line for line in lines if line["part"] == part]) for part in parts]
    longest = max(map(len, blocks))
    while sum(min(len(block), longest) for block in blocks) > most:
        longest -= 1
    return [line for block in blocks for line in _cut(block, longest)]


def _cut(block: list[str], longest: int) -> list[str]:
    if len(block) <= longest:
        return block
    kept = block[: longest - 1]
    return [*kept, f"  ... {len(block) - len(kept)} more lines in results.jsonl"]


def _block(part: str, lines: list[Line]) -> list[str]:
    cases = latest(lines).values()
    bad = [line for line in cases if failed(line)]
    fine = [line for line in cases if not failed(line)]
    ends = [line for line in lines if "case" not in line]
    head = "missing: not run"
    if ends:
        why = f"missing: {ends[-1]['failed']}" if "failed" in ends[-1] else "done"
        head = f"{why}, {ends[-1]['seconds']} s, {len(fine)} cases"
        head += f", {len(bad)} FAILED" if bad else ""
    found = [f"{part}: {head}"]
    for line in bad:
        why = line["error"].strip().splitlines()[-1]
        found.append(f"  {line['case']}  missing: {why}"[:WIDEST])
    return found + list(_figures(fine))


def _figures(lines: Iterable[Line]) -> Iterable[str]:
    """A line per group of cases "group/name", or per other case."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        figures = {name: _text(value) for name, value in line.items() if name not in OTHERS}
        group, slash, name = line["case"].partition("/")
        cells = [f"{key}={text}" for key, text in figures.items()]
        if slash:
            key, text = next(iter(figures.items()), ("", ""))
            cells = [f"{name} {text}{key}" if key == "u" else f"{name} {key}={text}"]
        groups.setdefault(group, []).extend(cells)
    return (f"  {group}  {'  '.join(cells)}" for group, cells in groups.items())


def _text(value: object) -> str:
    if isinstance(value, dict) and len(str(value)) > WIDEST:
        return f"{len(value)} in results.jsonl"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
