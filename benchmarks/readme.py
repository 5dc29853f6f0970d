"""Generated blocks of the README: the chart of a training step, and the machines."""

from html import escape
from typing import NamedTuple

from benchmarks.gpu.check import Check
from benchmarks.gpu.pages import fill, peers
from benchmarks.results import Run, groups_of
from benchmarks.tables import ratio_range

CHARTS = {"light": "docs/images/step.svg", "dark": "docs/images/step-dark.svg"}
"""Paths of the chart for light and dark pages."""
COLOURS = {
    "light": {"ink": "#1f2328", "quiet": "#59636e", "bars": "#c2410c #2563eb"},
    "dark": {"ink": "#f0f6fc", "quiet": "#9da7b1", "bars": "#f0883e #58a6ff"},
}
PEERS = {
    "TRL DPO, labelled rows": "TRL {trl}'s DPO, with logits of responses only (as on CUDA)",
    "TRL DPO": "TRL {trl}'s DPO, with logits of every token (its CPU default)",
    "released, three sequences": "plain rDPO, three sequences as in the authors' release",
}
"""Titles of the contestants of a step. The fair comparison is first."""
TUNES, DTYPES = {"lora": "LoRA", "full": "full"}, ("bf16", "fp32")
MODEL = (
    "A LLaVA of 60 M parameters: hidden size 512, 8 layers, vocabulary 32,000. {examples} examples "
    "per step: 576 image tokens, prompt 64, responses 128."
)
METHODS = (
    "Ours is rDPO: three responses in two trees, cached references. TRL's DPO: two sequences, live "
    "reference. Plain rDPO: three sequences, live reference."
)
MACHINE = (
    "LoRA of rank 128, or full fine-tuning. {cpu} ({capability}), {threads} threads, "
    "torch {torch}. Medians of rounds in turns."
)
EXPLAINED = "1.3x: theirs takes 1.3 times as long as ours, or 1.3 times as much memory."


class Setting(NamedTuple):
    """Time and peak memory of a peer over ours, in one setting of the step."""

    name: str
    time: float
    memory: float


class StepRatios(NamedTuple):
    """Settings by title of the peer, for the largest number of examples."""

    examples: int
    peers: dict[str, list[Setting]]


def step_ratios(run: Run) -> StepRatios | None:
    """Ratios of the training step in a run; None if the run has no step."""
    groups = groups_of([run], "step").values()
    examples = max((entries[0].case["examples"] for entries in groups), default=0)
    settings = {
        (entries[0].case["tune"], entries[0].case["dtype"]): {e.contestant: e for e in entries}
        for entries in groups
        if entries[0].case["examples"] == examples
    }
    peers: dict[str, list[Setting]] = {}
    for tune, dtype in ((tune, dtype) for tune in TUNES for dtype in DTYPES):
        entries = settings.get((tune, dtype), {})
        for name, title in PEERS.items():
            if peer := entries.get(name):
                memory = peer.bytes / entries["ours"].bytes
                found = Setting(f"{TUNES[tune]}, {dtype}", peer.ratio[1], memory)
                peers.setdefault(title.format(**_versions(run)), []).append(found)
    ordered = (title.format(**_versions(run)) for title in PEERS.values())
    return StepRatios(examples, {t: peers[t] for t in ordered if t in peers}) if peers else None


def _versions(run: Run) -> dict[str, str]:
    return {name: str(version).split("+")[0] for name, version in run.machine["versions"].items()}


def step_block(run: Run) -> str | None:
    """Ranges over the settings for the fair peer, and the chart with all peers."""
    found = step_ratios(run)
    if found is None:
        return None
    ranges = [
        f"{ratio_range([setting.time for setting in settings], 'faster', 'slower')} than {title}. "
        f"It takes {ratio_range([setting.memory for setting in settings], 'less', 'more')} memory"
        for title, settings in found.peers.items()
    ]
    alt = "Bar chart of a training step, theirs over ours. Ours is " + ". Ours is ".join(ranges)
    return "\n".join((
        fill(f"A step of rDPO by `realign.train` is {ranges[0]}:"),
        "",
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{CHARTS["dark"]}">',
        f'  <img src="{CHARTS["light"]}" width="880" alt="{escape(alt, quote=False)}">',
        "</picture>",
    ))  # fmt: skip


def measured_line(run: Run, check: Check) -> str:
    """Sentences with the CPU of the chart, and the GPU run of an earlier version."""
    seconds = [check.figure("step", case, "seconds") for case in ("TRL DPO", "ours")]
    ratio = "-" if None in seconds else f"{seconds[0] / seconds[1]:.2f}x"
    machine = run.machine
    eager = peers(check).get("eager logits", {}).values()
    slower = sum(over < 1 for over in eager)
    return fill(
        f"Measured on a CPU ({machine['cpu']}, {machine['threads']} threads, commit "
        f"{run.commit[:7]} of {run.date[:10]}; [benchmarks](docs/benchmarks.md)). On a GPU "
        f"(one {check.card}), only an earlier version was timed. Its LoRA step of LLaVA-1.5-7B "
        f"with random weights was {ratio} faster than TRL's DPO. Its head was slower than eager "
        f"logits in {slower} of {len(eager)} cases ([GPU](docs/gpu.md))."
    )


FONT = "-apple-system,'Segoe UI','Noto Sans',Helvetica,Arial,sans-serif"
WIDTH, LEFT, SCALE = 880, (104, 510), 104
"""Width of the chart, left edges of its two panels, and pixels of 1x."""
TOP, TITLE, BAR, GAP = 112, 24, 18, 14
"""Heights in pixels: space above the first group, title of a group, bar with its gap, gap between
groups."""


def chart(run: Run, theme: str) -> str | None:
    """SVG of the chart, with a group per peer and a bar per setting."""
    found = step_ratios(run)
    if found is None:
        return None
    colours = COLOURS[theme]
    machine = run.machine | _versions(run)
    end = TOP + sum(TITLE + BAR * len(one) + GAP for one in found.peers.values())
    captions = (MODEL.format(examples=found.examples), METHODS, MACHINE.format(**machine))
    height = end + 18 * len(captions) + 8
    parts = [
        _text(0, 20, "Time and memory of a training step: theirs over ours", "title"),
        _text(0, 42, EXPLAINED, "quiet"),
    ]
    for left, what in zip(LEFT, ("time", "peak memory"), strict=True):
        parts.append(_text(left, 76, what, "group"))
        parts.append(_text(left + SCALE, 96, "ours: 1x", "tick"))
    y = TOP
    for title, settings in found.peers.items():
        parts.append(_text(0, y + 14, title[0].upper() + title[1:], "group"))
        y += TITLE
        for setting in settings:
            parts.append(_text(LEFT[0] - 10, y + 12, setting.name, "name"))
            for place, value in enumerate((setting.time, setting.memory)):
                x, width = LEFT[place], SCALE * value
                parts.append(
                    f'<rect class="bar{place}" x="{x}" y="{y + 1}" width="{width:.1f}" '
                    f'height="{BAR - 4}"/>'
                )
                parts.append(_text(x + width + 6, y + 12, f"{value:.2f}x", "value"))
            y += BAR
        for x in (left + SCALE for left in LEFT):
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y - BAR * len(settings)}" y2="{y}"/>')
        y += GAP
    parts += [_text(0, end + 14 + 18 * i, text, "quiet") for i, text in enumerate(captions)]
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape('Time and memory of a training step: theirs over ours')}</title>",
        f"<style>{_style(colours)}</style>",
        *parts,
        "</svg>\n",
    ))  # fmt: skip


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y}">{escape(text, quote=False)}</text>'


def _style(colours: dict[str, str]) -> str:
    time, memory = colours["bars"].split()
    rules = {
        "text": f"font:13px {FONT};fill:{colours['ink']}",
        ".title": "font-size:18px;font-weight:600",
        ".group": "font-weight:600",
        ".name": "font-size:12px;text-anchor:end",
        ".value": "font-size:12px",
        ".quiet": f"font-size:12px;fill:{colours['quiet']}",
        ".tick": f"font-size:11px;text-anchor:middle;fill:{colours['quiet']}",
        "line": f"stroke:{colours['ink']};stroke-width:1.5",
        ".bar0": f"fill:{time}",
        ".bar1": f"fill:{memory}",
    }
    return "".join(f"{selector}{{{properties}}}" for selector, properties in rules.items())
