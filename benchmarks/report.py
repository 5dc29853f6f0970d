"""Report of all results: `python -m benchmarks.report` writes the generated blocks of the pages.

Reads every run in benchmarks/results/: `full` ones first, then what `slow` ones add, then
`default`. GPU figures come from `gpu` (`make bench-gpu`) and gpu-check.jsonl
(`python -m benchmarks.gpu`). Blocks of docs/benchmarks.md, docs/gpu.md, docs/kernels.md and the
README are between `<!-- NAME: generated -->` and `<!-- /NAME -->`; the prose around them is not.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import compare, readme, results, targets
from benchmarks.gpu import pages as gpu_pages
from benchmarks.gpu.check import load
from benchmarks.results import Entry, Groups, Run, groups_of, over_limit
from benchmarks.tables import bytes_of, duration, factor, put, quantity, span, table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PICTURES = DOCS / "benchmarks"
SUITES = ("head", "memory", "loss", "step", "cache", "pairs", "scaling")


def read_runs(folder: Path = results.FOLDER) -> list[Run]:
    """Runs on a CPU, those with more first.

    Raises:
        ValueError: when there is none.
    """
    names = ("full*.json", "slow*.json", "default.json")
    runs = [results.read(file) for name in names for file in sorted(folder.glob(name))]
    if not runs:
        raise ValueError(f"{folder} holds no results; run `make bench` first.")
    return runs


def blocks(runs: list[Run], earlier: Run | None = None, gpu: Run | None = None) -> dict[str, str]:
    """Blocks of docs/benchmarks.md.

    Args:
        runs: on a CPU, those with more first; the last is `default`.
        earlier: the default run once more, at another time, to compare two runs of one machine.
        gpu: the run on a GPU, if there is one.
    """
    found = {"machines": _machines([*runs, gpu] if gpu else runs), "targets": targets_block(runs)}
    if earlier is not None:
        found["again"] = f"```text\n{compare.report(earlier, runs[-1])[0]}\n```"
    for suite in SUITES:
        groups = groups_of(runs, suite)
        found[suite] = suite_block(suite, groups) if groups else "Not measured."
    if gpu is not None:
        parts = {suite: groups_of([gpu], suite) for suite in SUITES}
        found["gpu"] = "\n\n".join(suite_block(s, groups) for s, groups in parts.items() if groups)
    return found | {"skipped": _skipped(runs)}


def suite_block(suite: str, groups: Groups) -> str:
    """Sentences and tables of a suite."""
    sentences = SENTENCES.get(suite, lambda _: [])(groups)
    return "\n\n".join([*sentences, _losses(groups), tables_of(suite, groups)])


def tables_of(suite: str, groups: Groups) -> str:
    """Tables of a suite."""
    if of_suite := {"memory": _memory_table, "scaling": _scaling_table}.get(suite):
        return of_suite(groups)
    return "\n\n".join(_group_table(name, entries) for name, entries in groups.items())


def _machines(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        machine = run.machine
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
        load = f", load {machine['load']:.1f} when it began" if "load" in machine else ""
        device = machine["gpu"] or (
            f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads of "
            f"{machine['cores']} cores{load}, no GPU"
        )
        about = f"- `{run.name}`, {run.date} UTC, commit {run.commit}: {device}; Python "
        lines.append(f"{about}{machine['python']}, {versions}.")
    return "\n".join(lines)


def targets_block(runs: list[Run], measured: bool = False) -> str:
    """Table of all targets, or of the measured ones."""
    rows, verdicts = [], []
    for target in targets.read()[0]:
        if (value := target.value(runs)) is None and measured:
            continue
        verdicts.append(targets.verdict(target, value))
        shown = "-" if value is None else quantity(value)
        rows.append((target.name, target.bound, shown, f"**{verdicts[-1]}**", target.reason))
    columns = ("target", "bound", "measured", "", "why this bound")
    if not rows:
        return "No target was measured."
    return f"{targets.counts(verdicts)}.\n\n{table(columns, rows)}"


def _losses(groups: Groups) -> str:
    """Where a peer is faster than ours, by its median."""
    faster = [
        f"{entry.contestant} takes {entry.ratio[1]:.2f} of ours in *{group}*"
        for group, entries in groups.items()
        for entry in entries
        if entry.is_peer and entry.ratio and round(entry.ratio[1], 2) < 1
    ]
    if not faster:
        return "No other contestant is faster than ours in any of them."
    return "Where we lose: " + "; ".join(faster) + "."


def _head_sentence(groups: Groups) -> list[str]:
    ours: dict[str, list[float]] = {}
    best = []
    for entries in groups.values():
        if limits := over_limit(entries):
            ours.setdefault(entries[0].case["dtype"], []).append(limits["ours"][1])
            best.append(min(e.ratio[1] for e in entries if e.is_peer))
    spans = " and ".join(f"{span(values)} times in {dtype}" for dtype, values in ours.items())
    return [
        f"Over these {len(best)} cases ours takes {spans} as long as torch's GEMMs alone; the best "
        f"of the other libraries takes {span(best)} times as long as ours."
    ]


def _step_sentence(groups: Groups) -> list[str]:
    peers: dict[str, list[float]] = {}
    for entry in (e for entries in groups.values() for e in entries if e.is_peer and e.ratio):
        peers.setdefault(entry.contestant, []).append(entry.ratio[1])
    shown = "; ".join(f"{name} {span(values)}" for name, values in peers.items())
    return [f"In units of ours, in {len(groups)} settings: {shown}."]


SENTENCES = {"head": _head_sentence, "step": _step_sentence}


def _bold(entry: Entry) -> str:
    return f"**{entry.contestant}**" if entry.role == "ours" else entry.contestant


def _group_table(name: str, entries: list[Entry]) -> str:
    """One group: a row a contestant, columns as it has them."""
    limits = over_limit(entries)
    rows = []
    for entry in entries:
        row = {
            "": _bold(entry) + (" (limit)" if entry.role == "limit" else ""),
            "median": duration(entry.median),
            "rounds": str(len(entry.seconds)),
            "over ours": factor(entry.ratio) if entry.ratio else "1",
        }
        if limits:
            over = limits.get(entry.contestant)
            row["over the limit"] = factor(over) if over else "1"
        row |= {f"error of {what}": f"{error:.1e}" for what, error in entry.error.items()}
        if entry.bytes is not None:
            row["peak"] = bytes_of(entry.bytes)
        if "rate" in entry.extra:
            row["rate"] = f"{quantity(entry.extra['rate'])} {entry.extra['unit']}/s"
        if "filled" in entry.extra:
            row["filled"] = f"{100 * entry.extra['filled']:.2f} %"
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [tuple(row.get(column, "-") for column in columns) for row in rows]
    case = entries[0].case
    size = f" (N = {case['N']})" if "N" in case and case.get("rows") else ""
    return f"**{name}**{size}\n\n{table(columns, cells)}"


def _pivot(groups: Groups, title, key) -> Iterator[tuple[str, list[int], dict[str, dict]]]:
    """Title, values of `key` in the cases, and entries by contestant as shown and that value."""
    found: dict[str, dict[str, dict[int, Entry]]] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        part = found.setdefault(title(entry), {}).setdefault(_bold(entry), {})
        part[entry.case[key]] = entry
    for name, rows in found.items():
        yield name, sorted({value for row in rows.values() for value in row}), rows


def _memory_table(groups: Groups) -> str:
    tables = []
    parts = _pivot(groups, lambda e: "{head}, {dtype}".format(**e.case), "image_tokens")
    for title, tokens, rows in parts:
        cells = [
            (name, *(f"{row[t].bytes / 2**20:,.1f}" if t in row else "-" for t in tokens))
            for name, row in rows.items()
        ]
        columns = (f"{title}, MiB at image tokens", *(f"{t:,}" for t in tokens))
        tables.append(table(columns, cells))
    return "\n\n".join(tables)


def _scaling_table(groups: Groups) -> str:
    def title(entry: Entry) -> str:
        axis = entry.case["axis"]
        return f"{axis}, head {entry.case['head']}" if axis == "ranks" else axis

    tables = []
    for name, values, rows in _pivot(groups, title, "value"):
        ranks = name.startswith("ranks")
        tail = ("speed-up",) if ranks else ("slope of memory", "peak memory")
        columns = (name, *(f"{v:,}" for v in values), "slope of time", *tail)
        cells = []
        for contestant, row in rows.items():
            last = row[max(row)].extra
            slopes = {what: f"{value:.2f}" for what, value in last.get("slope", {}).items()}
            peaks = [row[v].bytes for v in sorted(row) if row[v].bytes]
            ends = f"{bytes_of(peaks[0])} to {bytes_of(peaks[-1])}" if peaks else "-"
            speedup = factor(last["speedup"]) if "speedup" in last else "-"
            times = (duration(row[v].median) if v in row else "-" for v in values)
            tail = (speedup,) if ranks else (slopes.get("memory", "-"), ends)
            cells.append((contestant, *times, slopes.get("time", "-"), *tail))
        tables.append(table(columns, cells))
    return "\n\n".join(tables)


def _skipped(runs: list[Run]) -> str:
    found = Counter((run.name, one["reason"]) for run in runs for one in run.skipped)
    if not found:
        return "Nothing: every contestant was installed."
    rows = [(f"`{run}`", str(count), reason) for (run, reason), count in found.items()]
    return table(("run", "benchmarks", "reason"), rows)


def pages(folder: Path = results.FOLDER) -> dict[Path, dict[str, str]]:
    """Generated blocks by page, relative to the root.

    Raises:
        ValueError: when results are missing.
    """
    runs, check = read_runs(folder), load(folder)
    earlier, gpu = (
        results.read(path) if (path := folder / f"{name}.json").exists() else None
        for name in ("earlier", "gpu")
    )
    stepped = next(filter(readme.step_ratios, runs), runs[0])
    own = {"step": readme.step_block(stepped) or "Not measured."}
    own["measured"] = readme.measured_line(stepped, check)
    return {
        Path("docs/benchmarks.md"): blocks(runs, earlier, gpu),
        Path("docs/gpu.md"): gpu_pages.blocks(check),
        Path("docs/kernels.md"): {"gpu": gpu_pages.kernels_sentence(check)},
        Path("README.md"): own,
    }


def charts(folder: Path = results.FOLDER) -> dict[Path, str]:
    """Charts of the README, as SVG by path relative to the root.

    Raises:
        ValueError: when results are missing.
    """
    stepped = next(filter(readme.step_ratios, read_runs(folder)), None)
    if stepped is None:
        return {}
    return {Path(path): readme.chart(stepped, theme) for theme, path in readme.CHARTS.items()}


def main() -> int:
    """Writes the pages and images; returns an exit code."""
    try:
        for page, found in pages().items():
            put(ROOT / page, found)
        for path, text in charts().items():
            (ROOT / path).parent.mkdir(exist_ok=True)
            (ROOT / path).write_text(text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from benchmarks import plots  # matplotlib, which a run of the benchmarks does not need

    runs = read_runs()
    for suite, draw in plots.DRAW.items():
        if groups := groups_of(runs, suite):
            draw(groups, PICTURES)
    verdicts = [targets.verdict(t, t.value(runs)) for t in targets.read()[0]]
    print(f"wrote docs/, README.md; targets on a CPU: {targets.counts(verdicts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
