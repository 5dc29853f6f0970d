"""Generated blocks of docs/gpu.md and docs/kernels.md from a GPU check."""

import textwrap

from benchmarks import roofline, targets
from benchmarks.contestants import CONTESTANTS, OURS
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.check import Check
from benchmarks.gpu.table import table as summary_of
from benchmarks.results import LIMIT
from benchmarks.tables import number, span, table

GEMMS = {"frozen": 2, "trained": 3, "log-probs": 1}
"""Number of GEMMs of 2 N H V FLOP by kind of head."""
STEPS = ("ours", "ours, DPO", "TRL DPO", "released")


def fill(text: str) -> str:
    """Wraps a paragraph at 110 characters."""
    return textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False)


def wall_and_busy(check: Check, group: str, name: str) -> tuple[float | None, float | None]:
    """Wall time and GPU-busy time of a head contestant in milliseconds."""
    case = f"{group}/{name}"
    return check.figure("head", case, "ms"), check.figure("head", case, "busy_ms")


def gemms_over_ours(check: Check, group: str) -> float | None:
    """Wall time of the bare GEMMs over that of ours."""
    ours, gemms = (wall_and_busy(check, group, name)[0] for name in (OURS, LIMIT))
    return None if ours is None or gemms is None else gemms / ours


def measured(check: Check) -> str:
    """Machine, rates, number of correct cases, and missing parts."""
    gemm, copy = check.figure("facts", "GEMM", "tflops"), check.figure("facts", "copy", "tb_per_s")
    return fill(
        f"**Measured** on one {check.machine}. CUDA events time each round after a flush of the "
        f"L2 cache. Bursts of 8192 x 8192 x 8192 GEMMs reach {number(gemm)} TFLOP/s, and copies "
        f"{number(copy)} TB/s. Cases within the error budget: {check.correct}. {check.missing}"
    )


def verdicts(check: Check) -> str:
    """Number of met and missed targets."""
    found = targets.read()[1]
    return targets.counts([targets.verdict(one, one.value(check)) for one in found])


def target_block(check: Check) -> str:
    """Targets with bound, measured value, and cuBLAS's time for the same GEMMs."""
    rows = []
    for one in targets.read()[1]:
        value, group = one.value(check), one.case.rpartition("/")[0]
        limit = check.figure("head", f"{group}/{LIMIT}", "ms") if one.figure == "ms" else None
        shown = "-" if value is None else one.shown(value)
        cells = one.name, one.bound, shown, f"**{targets.verdict(one, value)}**"
        rows.append((*cells, "-" if limit is None else f"{number(limit)} ms", one.reason))
    columns = "target", "bound", "measured", "", "its GEMMs by cuBLAS", "reason for the bound"
    return f"{verdicts(check)}.\n\n{table(columns, rows)}"


def where_block(check: Check) -> str:
    """Wall and busy times of ours and of the bare GEMMs, ratios, and the rate of the GEMMs."""
    rows, clocks = [], []
    for group in check.groups:
        (wall, busy), (bare, bare_busy) = (wall_and_busy(check, group, n) for n in (OURS, LIMIT))
        if wall is None or bare is None:
            continue
        clocks.append(100 * (bare / bare_busy - 1))
        N, H, V, kind = roofline.shape_of(group)
        count = GEMMS[kind]
        quotients = (
            f"{bare / wall:.2f}x",
            f"{bare_busy / busy:.2f}x",
            f"{count * wall / bare:.2f}u",
        )
        rate = f"{count * 2 * N * H * V / bare / 1e9:.0f}"
        cells = map(number, (wall, busy, wall - busy, bare, bare_busy))
        rows.append((group, *cells, *quotients, rate))
    columns = (
        "N x H x V", "ours, ms", "GPU busy", "wall less busy", "bare GEMMs, ms", "GPU busy",
        "GEMMs / ours", "busy / busy", "ours in u", "TFLOP/s of the GEMMs",
    )  # fmt: skip
    spread = f"{min(clocks):+.0f} to {max(clocks):+.0f} %" if clocks else "-"
    error = f"Error of a column: {spread} (wall time of the bare GEMMs less their busy time)."
    return f"{table(columns, rows)}\n\n{error}"


def contestants_block(check: Check) -> str:
    """Times and errors of every contestant, and the peers that are faster or wait for the host."""
    heads = {case.rpartition("/")[2] for part, case in check.cases if part == "head"}
    names = [name for name in (LIMIT, *CONTESTANTS) if name in heads]
    rows = []
    for group in check.groups:
        cells = []
        for name in names:
            wall, busy = wall_and_busy(check, group, name)
            over = check.over_ours(group, name)
            cell = "-" if wall is None else f"{number(wall)} / {number(busy)}"
            if over:
                cell += f" (**{over:.2f}x**)" if over < 1 else f" ({over:.2f}x)"
            cells.append(cell)
        rows.append((group, *cells, number(check.figure("head", f"{group}/{OURS}", "peak_gib"))))
    times = table(("N x H x V", *names, "peak of ours beyond inputs, GiB"), rows)
    errors = []
    for name in filter(CONTESTANTS.__contains__, names):
        cells = []
        for what in ("loss", "hidden", "weight"):
            found = [check.figure("head", f"{g}/{name}", f"{what}_error") for g in check.groups]
            known = [value for value in found if value is not None]
            cells.append(f"{min(known):.1e} to {max(known):.1e}" if known else "-")
        errors.append((name, *cells))
    columns = ("error", "loss", "gradient of hidden", "gradient of the weight")
    return "\n\n".join([times, losses(check), table(columns, errors)])


def peers(check: Check) -> dict[str, dict[str, float]]:
    """Time over ours of each other library and of eager torch, by group."""
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in CONTESTANTS if not name.startswith(OURS)):
        overs = {group: check.over_ours(group, name) for group in check.groups}
        found[name] = {group: over for group, over in overs.items() if over is not None}
    return found


def losses(check: Check) -> str:
    """Peers that are faster than ours, and peers whose GPU waits for the host most of the time."""
    faster, waiting = [], []
    for name, overs in peers(check).items():
        if ratios := [over for over in overs.values() if over < 1]:
            faster.append(f"- {name}: {len(ratios)} of {len(overs)} cases, {span(ratios)}")
        times = {group: wall_and_busy(check, group, name) for group in overs}
        where = [f"{100 * b / w:.0f} % at {group}" for group, (w, b) in times.items() if b < w / 2]
        waiting += [f"- {name}: {one}" for one in where]
    lines = ["No other contestant is faster than ours in these cases."]
    if faster:
        lines = ["**Ours is slower** where the ratio is bold:", "", *faster]
    if waiting:
        lines += ["", "The GPU is busy for less than half of the wall time:", "", *waiting]
    return "\n".join(lines)


def step_block(check: Check) -> str:
    """Wall and busy time of a step, its memory, and its time over ours."""
    ours, rows = check.figure("step", "ours", "seconds"), []
    names = ("seconds", "each", "busy_seconds", "examples_per_second", "positions", "peak_gib")
    for case in STEPS:
        seconds, each, busy, rate, positions, peak = (check.figure("step", case, n) for n in names)
        rows.append((
            case, number(seconds), f"{min(each):.3g} to {max(each):.3g}" if each else "-",
            number(busy), number(rate), f"{positions:,}" if positions else "-", number(peak),
            "-" if None in (seconds, ours) else f"{seconds / ours:.2f}x",
        ))  # fmt: skip
    columns = (
        "step", "seconds", "least to most", "GPU busy, s", "examples/s", "positions", "peak, GiB",
        "theirs / ours",
    )  # fmt: skip
    return table(columns, rows)


def attention_block(check: Check) -> str:
    """Time of one layer's attention, forward and backward, and of cuDNN's planning."""
    rows = []
    for part, case in check.cases:
        if part == "attention" and check.figure(part, case, "ms") is not None:
            cells = (check.figure(part, case, f) for f in ("ms", "busy_ms", "first_ms", "peak_gib"))
            rows.append((case, *map(number, cells)))
    found = table(("attention", "ms", "GPU busy, ms", "first call, ms", "peak, GiB"), rows)
    names = ("first_ms_a_call", "ms_a_call", "calls")
    first, again, calls = (check.figure("attention", "tree, cuDNN on", name) for name in names)
    if first is None:
        return found
    return (
        f"{found}\n\nWith cuDNN the first call of a shape takes {number(first)} ms, and a repeated "
        f"call {number(again)} ms ({calls} calls)."
    )


def ratios_block(check: Check) -> str:
    """Calculated and measured figures with their ratios."""
    # Imported here because it loads transformers, which the other blocks do not need.
    from benchmarks.gpu.attention import LLAVA, batch_of

    reached = roofline.REACHED
    found = [
        ("facts", "GEMM", "tflops", reached / 1e12),
        ("facts", "copy", "tb_per_s", roofline.BANDWIDTH / 1e12),
    ]
    for group in check.groups:
        N, H, V, kind = roofline.shape_of(group)
        if kind == "log-probs":
            kernels = roofline.no_logits(N, H, V)
        else:
            kernels = roofline.ours(N, H, V, kind == "trained")
        found.append(("head", f"{group}/{OURS}", "ms", 1e3 * kernels.seconds(reached)))
    ms = 1e3 * roofline.attention_seconds(batch_of(LLAVA).trees[0], LLAVA.heads * LLAVA.width)
    found += [("attention", case, "ms", ms) for case in ("tree, cuDNN off", "varlen")]
    if positions := check.figure("step", "ours", "positions"):
        found.append(("step", "ours", "seconds", roofline.step_seconds(positions)))
    rows = []
    for part, case, name, calculated in found:
        value, unit = check.figure(part, case, name), name.replace("_per_", "/")
        over = "-" if value is None else f"{value / calculated:.2f}"
        rows.append((part, case, f"{calculated:.3g} {unit}", f"{number(value)} {unit}", over))
    return table(("part", "case", "calculated", "measured", "measured / calculated"), rows)


def blocks(check: Check) -> dict[str, str]:
    """Generated blocks of docs/gpu.md: measurements, then the calculation."""
    return {
        "measured": measured(check),
        "summary": summary(check),
        "targets": target_block(check),
        "where": where_block(check),
        "contestants": contestants_block(check),
        "step": step_block(check),
        "attention": attention_block(check),
        "ratios": ratios_block(check),
        "check": "```text\n{}\n```".format("\n".join(summary_of(check.lines, PARTS))),
        "frozen": roofline.table_of(trainable=False),
        "trains": roofline.table_of(trainable=True),
        "forward": roofline.forward_table(),
    }


def kernels_sentence(check: Check) -> str:
    """Sentence of docs/kernels.md: machine and number of correct cases."""
    return fill(
        f"On one {check.card}, {check.correct} cases of the GPU check were within their error "
        "budgets."
    )


def summary(check: Check) -> str:
    """Summary of a training step, the head, its peers and the targets."""
    seconds = {case: check.figure("step", case, "seconds") for case in STEPS}

    def step(peer: str) -> str:
        known = None not in (seconds["ours"], seconds[peer])
        return f"{seconds[peer] / seconds['ours']:.2f}x" if known else "-"

    def head(kind: str) -> str:
        found = [
            gemms_over_ours(check, group) for group in check.groups if group.endswith(f" {kind}")
        ]
        known = [ratio for ratio in found if ratio is not None]
        return span(known) if known else "-"

    each = check.figure("step", "ours", "each") or []
    found_faster = []
    for name, overs in peers(check).items():
        if faster := [over for over in overs.values() if over < 1]:
            found_faster.append(
                f"{name} is faster in {len(faster)} of {len(overs)} cases ({span(faster)})."
            )
    lines = (
        "Step: a LoRA step of rDPO with LLaVA-1.5-7B, random weights, was "
        f"{step('TRL DPO')} faster than TRL's DPO. It was {step('released')} faster than three "
        "plain sequences as in the authors' release. These are ratios of medians of five steps. "
        "Ours took "
        f"{', '.join(map(number, sorted(each)))} s.",
        f"Head: the bare GEMMs by cuBLAS took {head('frozen')} of our time when the head was "
        f"frozen, and {head('trained')} when it trained.",
        "Peers of the head, theirs / ours: "
        + (" ".join(found_faster) or "none is faster in any case."),
        f"Targets: {verdicts(check)}.",
    )
    return "\n".join(
        textwrap.fill(f"- {line}", 110, subsequent_indent="  ", break_on_hyphens=False)
        for line in lines
    )
