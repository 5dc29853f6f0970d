"""Report of all results: `python -m benchmarks.report` writes the generated blocks and charts.

Reads the CPU runs in benchmarks/results/ in this order: `full`, `slow`, `default`. An entry comes
from the first run that has it. GPU figures come from `gpu` (`make bench-gpu`) and gpu-check.jsonl
(`python -m benchmarks.gpu`). The generated blocks of docs/benchmarks.md, docs/gpu.md,
docs/kernels.md and README.md are between `<!-- NAME: generated -->` and `<!-- /NAME -->`.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import compare, readme, results, targets
from benchmarks.gpu import pages as gpu_pages
from benchmarks.gpu.check import load
from benchmarks.results import LIMIT, Entry, Groups, Run, groups_of
from benchmarks.tables import bytes_of, duration, factor, put, quantity, span, table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CHARTS = DOCS / "benchmarks"
SUITES = ("head", "memory", "loss", "step", "cache", "pairs", "scaling")


def read_runs(folder: Path = results.FOLDER) -> list[Run]:
    """CPU runs; those with more benchmarks are first.

    Raises:
        ValueError: There is no run.
    """
    names = ("full*.json", "slow*.json", "default.json")
    runs = [results.read(file) for name in names for file in sorted(folder.glob(name))]
    if not runs:
        raise ValueError(f"{folder} holds no results. Run `make bench` first.")
    return runs


def blocks(runs: list[Run], earlier: Run | None = None, gpu: Run | None = None) -> dict[str, str]:
    """Generated blocks of docs/benchmarks.md.

    Args:
        runs: CPU runs, as `read_runs` returns them. The last is `default`.
        earlier: An earlier default run on the same machine, for a comparison.
        gpu: The GPU run, if there is one.
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
    heads = next(filter(None, map(head_summary, runs)), "Not measured.")
    return found | {"skipped": _skipped(runs), "head-summary": heads}


def suite_block(suite: str, groups: Groups) -> str:
    """Summary and tables of a suite."""
    summary = SUMMARIES.get(suite, lambda _: [])(groups)
    lost = _larger(groups) if suite == "memory" else _losses(groups)
    return "\n\n".join([*summary, lost, tables_of(suite, groups)])


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
        load = f", load {machine['load']:.1f} at the start" if "load" in machine else ""
        device = machine["gpu"] or (
            f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads of "
            f"{machine['cores']} cores{load}, no GPU"
        )
        about = f"- `{run.name}`, {run.date} UTC, commit {run.commit}: {device}. Python "
        lines.append(f"{about}{machine['python']}, {versions}.")
    return "\n".join(lines)


def targets_block(runs: list[Run], measured: bool = False) -> str:
    """Table of all targets; with `measured`, only of those with a value."""
    rows, verdicts = [], []
    for target in targets.read()[0]:
        if (value := target.value(runs)) is None and measured:
            continue
        verdicts.append(targets.verdict(target, value))
        shown = "-" if value is None else target.shown(value)
        rows.append((target.name, target.bound, shown, f"**{verdicts[-1]}**", target.reason))
    columns = ("target", "bound", "measured", "", "reason for the bound")
    if not rows:
        return "No target was measured."
    return f"{targets.counts(verdicts)}.\n\n{table(columns, rows)}"


def _losses(groups: Groups) -> str:
    """Cases in which a peer's median ratio is below 1."""
    faster = [
        f"- {entry.contestant}: {entry.ratio[1]:.2f}x in *{group}*"
        for group, entries in groups.items()
        for entry in entries
        if entry.is_peer and entry.ratio and round(entry.ratio[1], 2) < 1
    ]
    if not faster:
        return "No other contestant is faster than ours in these cases."
    return "\n".join(["**Ours is slower** in these cases (theirs / ours):", "", *faster])


def _larger(groups: Groups) -> str:
    """Peers that need less memory than ours, with the range of theirs / ours."""
    found: dict[str, list[float]] = {}
    for entries in groups.values():
        ours = next(entry.bytes for entry in entries if entry.contestant == "ours")
        for entry in entries:
            if entry.is_peer and entry.bytes < ours:
                found.setdefault(entry.contestant, []).append(entry.bytes / ours)
    if not found:
        return "No other contestant needs less memory than ours in these cases."
    lines = [f"- {name}: {min(r):.2f}x to {max(r):.2f}x" for name, r in found.items()]
    return "\n".join(["**Ours needs more memory** than (theirs / ours):", "", *lines])


def _head_summary(groups: Groups) -> list[str]:
    limits: dict[str, list[float]] = {}
    best = []
    for entries in groups.values():
        if limit := next((entry for entry in entries if entry.role == "limit"), None):
            limits.setdefault(limit.case["dtype"], []).append(limit.ratio[1])
            best.append(min(e.ratio[1] for e in entries if e.is_peer))
    spans = " and ".join(f"{span(values)} in {dtype}" for dtype, values in limits.items())
    return [
        f"Theirs / ours, over {len(best)} cases: the {LIMIT} by torch take {spans}. The fastest "
        f"other library takes {span(best)}."
    ]


def _step_summary(groups: Groups) -> list[str]:
    peers: dict[str, list[tuple[float, float]]] = {}
    for entries in groups.values():
        ours = next(entry for entry in entries if entry.role == "ours")
        for entry in (entry for entry in entries if entry.is_peer and entry.ratio):
            found = entry.ratio[1], entry.bytes / ours.bytes
            peers.setdefault(entry.contestant, []).append(found)
    lines = [f"Theirs / ours, over {len(groups)} settings:", ""]
    for name, found in peers.items():
        time, memory = (span(values) for values in zip(*found, strict=True))
        lines.append(f"- {name}: time {time}, peak memory {memory}")
    return ["\n".join(lines)]


SUMMARIES = {"head": _head_summary, "step": _step_summary}


def _bold(entry: Entry) -> str:
    return f"**{entry.contestant}**" if entry.role == "ours" else entry.contestant


def _group_table(name: str, entries: list[Entry]) -> str:
    """Table of a group: a row per contestant, with the columns that any of them has."""
    rows = []
    for entry in entries:
        row = {
            "": _bold(entry) + (" (limit)" if entry.role == "limit" else ""),
            "median": duration(entry.median),
            "rounds": str(len(entry.seconds)),
            "theirs / ours": factor(entry.ratio) if entry.ratio else "1x",
        }
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
    """Yields a title, the values of `key`, and the entries by contestant and value."""
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
        return "None: every contestant was installed."
    rows = [(f"`{run}`", str(count), reason) for (run, reason), count in found.items()]
    return table(("run", "benchmarks", "reason"), rows)


HEADS = {
    "ours": "**`rdpo_loss`**",
    LIMIT: "bare GEMMs by torch (limit)",
    "ours, torch backend": "`rdpo_loss` without the C++ kernels",
    "F.linear_cross_entropy": "torch `F.linear_cross_entropy`",
    "eager logits": "eager torch",
    "TRL chunked log-prob": "TRL {trl} chunked log-prob",
    "Liger DPO, two calls": "Liger {liger-kernel} DPO, two calls",
    "CCE": "CCE {cut-cross-entropy}, its CPU version",
}
QUARTER = "LLaVA-1.5-7B, H / 4 1024x32000"


def head_summary(run: Run) -> str | None:
    """Time over ours of each contestant, for a quarter of LLaVA-1.5-7B's head."""
    groups = groups_of([run], "head")
    columns = {
        f"{dtype}, {words}": {
            e.contestant: e for e in groups.get(f"head, {kind}, {dtype}, {QUARTER}", [])
        }
        for dtype in ("bf16", "fp32")
        for kind, words in (("frozen", "frozen"), ("trainable", "trained"))
    }
    if not any(columns.values()):
        return None
    rows = []
    for name, words in HEADS.items():
        found = [entries.get(name) for entries in columns.values()]
        cells = [
            ("-" if e is None else "1x" if e.ratio is None else f"{e.ratio[1]:.2f}x") for e in found
        ]
        rows.append((words.format(**run.machine["versions"]), *cells))
    return table(("theirs / ours", *columns), rows)


def pages(folder: Path = results.FOLDER) -> dict[Path, dict[str, str]]:
    """Generated blocks by the path of the page, relative to the root.

    Raises:
        ValueError: Results are missing.
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
    """SVG charts of the README by path, relative to the root.

    Raises:
        ValueError: Results are missing.
    """
    stepped = next(filter(readme.step_ratios, read_runs(folder)), None)
    if stepped is None:
        return {}
    return {Path(path): readme.chart(stepped, theme) for theme, path in readme.CHARTS.items()}


def main() -> int:
    """Writes the blocks and charts; returns an exit code."""
    try:
        for page, found in pages().items():
            put(ROOT / page, found)
        for path, text in charts().items():
            (ROOT / path).parent.mkdir(exist_ok=True)
            (ROOT / path).write_text(text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from benchmarks import plots  # needs matplotlib, which other uses of this module do not

    runs = read_runs()
    for suite, draw in plots.DRAW.items():
        if groups := groups_of(runs, suite):
            draw(groups, CHARTS)
    verdicts = [targets.verdict(t, t.value(runs)) for t in targets.read()[0]]
    print(f"Wrote docs/ and README.md. Targets on a CPU: {targets.counts(verdicts)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
