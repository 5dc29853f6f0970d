"""Generated parts of the README and docs, from `<!-- NAME: generated -->` to `<!-- /NAME -->`."""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import Entry, Run, over_limit
from benchmarks.words import table

STEPS = {
    "TRL DPO": "**rDPO here** over TRL {trl}'s plain DPO",
    "TRL DPO, labelled rows": "the same, TRL made to project response rows alone",
    "released, three sequences": "over plain rDPO, three sequences as in the authors' release",
}
HEADS = {
    "ours": "**`rdpo_loss`**",
    "ours, torch backend": "`rdpo_loss` without the C++ kernels",
    "F.linear_cross_entropy": "torch `F.linear_cross_entropy`",
    "eager logits": "eager torch",
    "TRL chunked log-prob": "TRL {trl} chunked log-prob",
    "Liger DPO, two calls": "Liger {liger-kernel} DPO, two calls",
    "CCE": "CCE {cut-cross-entropy}, its CPU version",
}
QUARTER = "LLaVA-1.5-7B, H / 4 1024x32000"
TUNES, DTYPES = {"lora": "LoRA", "full": "full"}, ("fp32", "bf16")


def refresh(path: Path, runs: list[Run]) -> None:
    """Writes the tables of the first run that has what they show.

    Raises:
        ValueError: when the file has no place for one of them.
    """
    for name, make in TABLES.items():
        found = next(filter(None, (make(run) for run in runs)), None)
        if found is not None:
            put(path, name, found)


def put(path: Path, name: str, new: str) -> None:
    """Replaces the generated part `name` of a page.

    Raises:
        ValueError: when the page has no place for it.
    """
    text = path.read_text()
    mark = re.compile(rf"(<!-- {name}: generated -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not mark.search(text):
        raise ValueError(
            f"{path.name} has no place for the table {name!r}: put "
            f"'<!-- {name}: generated -->' and '<!-- /{name} -->' on lines of their own."
        )
    path.write_text(mark.sub(lambda match: f"{match[1]}{new}\n{match[2]}", text))


def step(run: Run) -> str | None:
    """Ours over theirs for a step of 60 M parameters; the most examples that were run."""
    groups = list(run.groups("step").values())
    if not groups:
        return None
    most = max(entries[0].case["examples"] for entries in groups)
    settings: dict[tuple[str, str], dict[str, Entry]] = {
        (entries[0].case["tune"], entries[0].case["dtype"]): {e.contestant: e for e in entries}
        for entries in groups
        if entries[0].case["examples"] == most
    }
    columns = [(t, d) for t in TUNES for d in DTYPES if (t, d) in settings]
    rows = []
    for name, words in STEPS.items():
        cells, memory = [], []
        for setting in columns:
            theirs, ours = settings[setting].get(name), settings[setting]["ours"]
            cells.append("-" if theirs is None else f"{1 / theirs.ratio[1]:.2f}")
            memory += [] if theirs is None else [ours.bytes / theirs.bytes]
        if name == "TRL DPO":
            cells = [f"**{cell}**" for cell in cells]
        ends = dict.fromkeys(f"{part(memory):.2f}" for part in (min, max)) if memory else ("-",)
        span = " - ".join(ends)
        rows.append((words.format(**run.machine["versions"]), *cells, span))
    size = f"{most} example{'s' if most > 1 else ''}"
    what = f"a training step of a LLaVA of 60 M parameters, {size}, on a CPU: ours / theirs"
    return table((what, *(f"{TUNES[t]}, {d}" for t, d in columns), "peak memory"), rows)


def head(run: Run) -> str | None:
    """Time over that of the GEMMs alone, for a quarter of LLaVA-1.5-7B's head."""
    shown = {}
    for dtype in reversed(DTYPES):
        for kind, words in (("frozen", "frozen"), ("trainable", "trains")):
            entries = run.groups("head").get(f"head, {kind}, {dtype}, {QUARTER}")
            if entries and over_limit(entries):
                shown[f"{dtype}, {words}"] = over_limit(entries)
    if not shown:
        return None
    rows = []
    for name, words in HEADS.items():
        cells = [f"{limits[name][1]:.2f}" if name in limits else "" for limits in shown.values()]
        if name == "ours":
            cells = [f"**{cell}**" for cell in cells]
        if any(cells):
            rows.append((words.format(**run.machine["versions"]), *cells))
    return table(("", *shown), rows)


TABLES: dict[str, Callable[[Run], str | None]] = {"step": step, "head": head}
