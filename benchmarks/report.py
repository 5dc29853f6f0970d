"""Report of all results: `python -m benchmarks.report` writes docs and the README's tables.

Reads every run in benchmarks/results/, so no figure is typed by hand: `full` ones first, then what
`slow` ones add, then `default`. GPU figures come from `gpu` (`make bench-gpu`) and gpu-check.jsonl
(`python -m benchmarks.gpu`). Where neither is there, the pages say "not measured".
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import compare, plots, readme, results, roofline, targets
from benchmarks.gpu import pages as gpu_pages
from benchmarks.gpu.check import Check, load
from benchmarks.results import Entry, Run, over_limit
from benchmarks.words import (
    PAGES,
    against_ours,
    bytes_of,
    duration,
    factor,
    head_sentence,
    memory_sentence,
    quantity,
    scaling_sentence,
    step_sentence,
    table,
)

ROOT = Path(__file__).parent.parent
PAGE, PICTURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"
SUITES = PAGES["suites"]


def read_runs(folder: Path) -> tuple[list[Run], Run | None]:
    """(runs on a CPU, those with more first; the run on a GPU).

    Raises:
        ValueError: when there is none.
    """
    names = ("full*.json", "slow*.json", "default.json")
    files = [file for name in names for file in sorted(folder.glob(name))]
    runs = [results.read(file) for file in files]
    if not runs:
        raise ValueError(f"{folder} holds no results; run `make bench` first.")
    gpu = folder / "gpu.json"
    return runs, results.read(gpu) if gpu.exists() else None


def read_earlier(folder: Path) -> Run | None:
    """The default run once more, kept as earlier.json to tell how far runs differ."""
    file = folder / "earlier.json"
    return results.read(file) if file.exists() else None


def page(
    runs: list[Run],
    gpu: Run | None,
    draw: bool = True,
    earlier: Run | None = None,
    check: Check | None = None,
) -> str:
    """The text of docs/benchmarks.md; draws the pictures beside it.

    Args:
        runs: on a CPU, those with more first.
        gpu: the run on a GPU, if there is one.
        draw: whether to draw the pictures.
        earlier: the default run once more, at another time, to tell how far runs differ.
        check: results of a GPU check, if there are any.
    """
    parts = ["# Benchmarks", PAGES["head"], _machines([*runs, *([gpu] if gpu else [])])]
    if gpu is None and check is None:
        parts.append("**No GPU timing has been measured**; [gpu.md](gpu.md) has a calculation.")
    parts += _targets(runs)
    parts += _again(earlier, runs[-1]) if earlier else []
    for suite, words in SUITES.items():
        parts.append(f"## {words['title']}")
        groups = results.groups_of(runs, suite)
        if not groups:
            parts.append("Not measured.")
            continue
        parts.append(words["words"])
        parts += _pictures(suite, groups, draw)
        parts.append(_tables(suite, groups))
    return "\n\n".join([*parts, *_gpu(gpu, check), *_skipped(runs)]) + "\n"


def _machines(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        machine = run.machine
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
        load = "" if run.load is None else f", load {run.load:.1f} when it began"
        device = machine["gpu"] or (
            f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads of "
            f"{machine['cores']} cores{load}, no GPU"
        )
        lines.append(
            f"- `{run.name}`, {run.date} UTC, commit {run.commit}: {device}; Python "
            f"{machine['python']}, {versions}."
        )
    return "\n".join(lines)


def _targets(runs: list[Run]) -> list[str]:
    rows = []
    for target in targets.read():
        value, verdict = targets.verdict(target, runs)
        shown = "-" if value is None else quantity(value)
        rows.append((target.name, target.bound, shown, f"**{verdict}**", target.reason))
    counts = Counter(row[3].strip("*") for row in rows)
    told = ", ".join(f"{counts[word]} {word}" for word in ("met", "missed", "not measured"))
    reached = f"On a CPU (docs/targets.toml; *On a GPU*, below, has its own): {told}."
    columns = ("target", "bound", "measured", "", "why this bound")
    return ["## Targets", reached, table(columns, rows)]


def _again(earlier: Run, later: Run) -> list[str]:
    """How far two runs of the same benchmarks differ."""
    text, _ = compare.report(earlier, later, 0.1, every=False)
    return ["## The same run twice", PAGES["again"], f"```text\n{text}\n```"]


def _pictures(suite: str, groups: dict[str, list[Entry]], draw: bool) -> list[str]:
    """Each picture with its sentence."""
    found = []

    def picture(name: str, about: str, sentence: str, make) -> None:
        if draw:
            make(PICTURES / f"{name}.png")
        found.append(f"![{about}](benchmarks/{name}.png)\n\n{sentence}")

    if suite == "head":
        panels = plots.limit_panels(groups)
        line = "time over that of the GEMMs alone (line at 1: the limit)"
        picture(
            "head", "Time of each contestant over the limit", head_sentence(groups),
            lambda path: plots.rankings(panels, line, path),
        )  # fmt: skip
        picture(
            "error", "Error of the gradient against time",
            PAGES["error"],
            lambda path: plots.error_against_time(groups, path),
        )  # fmt: skip
    elif suite == "memory":
        picture(
            "memory", "Peak memory against image tokens", memory_sentence(groups),
            lambda path: plots.memory(groups, path),
        )  # fmt: skip
    elif suite == "step":
        panels = [
            (name.removeprefix("step, "),
             [("ours", (1.0, 1.0, 1.0)), *((e.contestant, e.ratio) for e in entries if e.ratio)])
            for name, entries in groups.items()
        ]  # fmt: skip
        picture(
            "step", "Cost of a training step", step_sentence(groups),
            lambda path: plots.rankings(panels, "time of a step over ours", path),
        )  # fmt: skip
    elif suite == "scaling":
        picture(
            "scaling", "Time against size", scaling_sentence(groups),
            lambda path: plots.scaling(groups, path),
        )  # fmt: skip
    else:
        found.append(against_ours(groups))
    return found


def _tables(suite: str, groups: dict[str, list[Entry]]) -> str:
    if suite == "memory":
        return _memory_table(groups)
    if suite == "scaling":
        return _scaling_table(groups)
    return "\n\n".join(_table(name, entries) for name, entries in groups.items())


def _table(name: str, entries: list[Entry]) -> str:
    """One group: a row a contestant, columns as it has them."""
    limits = over_limit(entries)
    rows = []
    for entry in entries:
        bold = "**" if entry.role == "ours" else ""
        row = {
            "": f"{bold}{entry.contestant}{bold}" + (" (limit)" if entry.role == "limit" else ""),
            "median": duration(entry.median),
            "rounds": str(len(entry.seconds)),
            "over ours": factor(entry.ratio) if entry.ratio else "1",
        }
        if limits:
            row["over the limit"] = (
                factor(limits[entry.contestant]) if entry.contestant in limits else "1"
            )
        for what, error in entry.error.items():
            row[f"error of {what}"] = f"{error:.1e}"
        if entry.bytes is not None:
            row["peak"] = bytes_of(entry.bytes)
        if "rate" in entry.extra:
            row["rate"] = f"{quantity(entry.extra['rate'])} {entry.extra['unit']}/s"
        if "filled" in entry.extra:
            row["filled"] = f"{100 * entry.extra['filled']:.2f} %"
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [tuple(row.get(column, "-") for column in columns) for row in rows]
    shown = entries[0].case
    size = f" (N = {shown['N']})" if "N" in shown and shown.get("rows") else ""
    return f"**{name}**{size}\n\n{table(columns, cells)}"


def _memory_table(groups: dict[str, list[Entry]]) -> str:
    parts: dict[str, dict[str, dict[int, int]]] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        part = parts.setdefault("{head}, {dtype}".format(**entry.case), {})
        part.setdefault(entry.contestant, {})[entry.case["image_tokens"]] = entry.bytes
    found = []
    for title, names in parts.items():
        tokens = sorted({t for values in names.values() for t in values})
        rows = [
            (f"**{name}**" if name == "ours" else name,
             *(f"{values[t] / 2**20:,.1f}" if t in values else "-" for t in tokens))
            for name, values in names.items()
        ]  # fmt: skip
        columns = (f"{title}, MiB at image tokens", *(f"{t:,}" for t in tokens))
        found.append(table(columns, rows))
    return "\n\n".join(found)


def _scaling_table(groups: dict[str, list[Entry]]) -> str:
    axes: dict[str, dict[str, dict[int, Entry]]] = {}
    for entry in (entry for entries in groups.values() for entry in entries):
        axis = entry.case["axis"]
        title = f"{axis}, head {entry.case['head']}" if axis == "ranks" else axis
        part = axes.setdefault(title, {}).setdefault(entry.contestant, {})
        part[entry.case["value"]] = entry
    found = []
    for title, names in axes.items():
        values = sorted({v for points in names.values() for v in points})
        rows = [_scaling_row(name, points, values) for name, points in names.items()]
        tail = ("speed-up",) if title.startswith("ranks") else ("slope of memory", "peak memory")
        columns = (title, *(f"{v:,}" for v in values), "slope of time", *tail)
        found.append(table(columns, rows))
    return "\n\n".join(found)


def _scaling_row(name: str, points: dict[int, Entry], values: list[int]) -> list[str]:
    """Times, slopes, and either peaks or, of ranks, the speed-up."""
    last = points[max(points)]
    slopes = last.extra.get("slope", {})
    row = [f"**{name}**" if name.startswith("ours") else name]
    row += [duration(points[v].median) if v in points else "-" for v in values]
    row.append(f"{slopes['time']:.2f}" if "time" in slopes else "-")
    if last.case["axis"] == "ranks":
        return [*row, factor(last.extra["speedup"]) if "speedup" in last.extra else "-"]
    peaks = [points[v].bytes for v in sorted(points) if points[v].bytes]
    row.append(f"{slopes['memory']:.2f}" if "memory" in slopes else "-")
    return [*row, f"{bytes_of(peaks[0])} to {bytes_of(peaks[-1])}" if peaks else "-"]


def _gpu(gpu: Run | None, check: Check | None) -> list[str]:
    parts = ["## On a GPU"]
    if check is not None:
        parts += gpu_pages.benchmarks_section(check, roofline.ratios(check))
    if gpu is not None:
        parts += [_tables(s, gpu.groups(s)) for s in SUITES if gpu.groups(s)]
    else:
        parts.append(PAGES["gpu_not_measured"])
    return parts


def _skipped(runs: list[Run]) -> list[str]:
    found = Counter((run.name, one["reason"]) for run in runs for one in run.skipped)
    if not found:
        return ["## Skipped", "Nothing: every contestant was installed."]
    rows = [(f"`{run}`", str(count), reason) for (run, reason), count in found.items()]
    return ["## Skipped", table(("run", "benchmarks", "reason"), rows)]


def put_gpu_sentences(root: Path, check: Check | None) -> None:
    """README and docs/kernels.md: what a GPU check measured, or that there was none."""
    readme.put(root / "README.md", "gpu", gpu_pages.readme_sentence(check))
    readme.put(root / "docs" / "kernels.md", "gpu", gpu_pages.kernels_sentence(check))


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads, writes; returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, help="folder with the results files"
    )
    given = parser.parse_args(arguments)
    try:
        runs, gpu = read_runs(given.results)
        check = load(given.results)
        PAGE.write_text(page(runs, gpu, earlier=read_earlier(given.results), check=check))
        roofline.FILE.write_text(roofline.page(check))
        readme.refresh(ROOT / "README.md", runs)
        put_gpu_sentences(ROOT, check)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for run in [*runs, *([gpu] if gpu else [])]:
        results.write_csv(run, given.results / f"{run.name}.csv")
    verdicts = [targets.verdict(target, runs)[1] for target in targets.read()]
    met = f"{verdicts.count('met')} of {len(verdicts)} targets met"
    pages = f"docs/{PAGE.name} with its pictures, docs/{roofline.FILE.name}"
    print(f"wrote {pages} and the generated parts of README.md and docs/kernels.md; {met}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
