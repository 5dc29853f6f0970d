"""Generated blocks of docs/gpu.md, README and docs/kernels.md, from a GPU check."""

import textwrap

from benchmarks import roofline, targets
from benchmarks.contestants import CONTESTANTS, LIMIT, OURS
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.check import Check
from benchmarks.gpu.table import table as summary
from benchmarks.tables import number, span, table

GEMMS = {"frozen": 2, "trained": 3, "log-probs": 1}
"""GEMMs of 2 N H V FLOP in each kind of head."""
STEPS = ("ours", "ours, DPO", "TRL DPO", "released")


def fill(text: str) -> str:
    """A paragraph in lines of 110."""
    return textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False)


def wall_and_busy(check: Check, group: str, name: str) -> tuple[float | None, float | None]:
    """Milliseconds of a contestant of the head: wall, and those in which the GPU is busy."""
    case = f"{group}/{name}"
    return check.figure("head", case, "ms"), check.figure("head", case, "busy_ms")


def over_gemms(check: Check, group: str) -> float | None:
    """Wall time of ours over that of the same GEMMs alone."""
    ours, gemms = (wall_and_busy(check, group, name)[0] for name in (OURS, LIMIT))
    return None if ours is None or gemms is None else ours / gemms


def measured(check: Check) -> str:
    """Machine, rates, correct cases and missing parts."""
    gemm, copy = check.figure("facts", "GEMM", "tflops"), check.figure("facts", "copy", "tb_per_s")
    return fill(
        f"**Measured** on one {check.machine}, by CUDA events and with the L2 cache flushed before "
        f"every round. Bursts of 8192 x 8192 x 8192 GEMMs reach {number(gemm)} TFLOP/s, copies "
        f"{number(copy)} TB/s. Cases within the error budget: {check.correct}. {check.missing}"
    )


def verdicts(check: Check) -> str:
    """How many targets are met and missed."""
    found = targets.read()[1]
    return targets.counts([targets.verdict(one, one.value(check)) for one in found])


def target_block(check: Check) -> str:
    """Each target with its bound, the measured figure, and cuBLAS's time for the same GEMMs."""
    rows = []
    for one in targets.read()[1]:
        value, group = one.value(check), one.case.rpartition("/")[0]
        limit = check.figure("head", f"{group}/{LIMIT}", "ms") if one.figure == "ms" else None
        shown = "-" if value is None else f"{number(value)} {one.unit}"
        cells = one.name, one.bound, shown, f"**{targets.verdict(one, value)}**"
        rows.append((*cells, "-" if limit is None else f"{number(limit)} ms", one.reason))
    columns = "target", "bound", "measured", "", "its GEMMs by cuBLAS", "why this bound"
    return f"{verdicts(check)}.\n\n{table(columns, rows)}"


def where_block(check: Check) -> str:
    """Wall and busy time of ours and of its GEMMs, their quotients, and the rate of the GEMMs."""
    rows, clocks = [], []
    for group in check.groups:
        (wall, busy), (alone, alone_busy) = (wall_and_busy(check, group, n) for n in (OURS, LIMIT))
        if wall is None or alone is None:
            continue
        clocks.append(100 * (alone / alone_busy - 1))
        N, H, V, kind = roofline.shape_of(group)
        count = GEMMS[kind]
        quotients = (
            f"{wall / alone:.2f}",
            f"{busy / alone_busy:.2f}",
            f"{count * wall / alone:.2f}u",
        )
        rate = f"{count * 2 * N * H * V / alone / 1e9:.0f}"
        cells = map(number, (wall, busy, wall - busy, alone, alone_busy))
        rows.append((group, *cells, *quotients, rate))
    columns = (
        "N x H x V", "ours, ms", "GPU busy", "wall less busy", "GEMMs alone, ms", "GPU busy",
        "ours / GEMMs", "busy / busy", "in u", "TFLOP/s of the GEMMs",
    )  # fmt: skip
    spread = f"{min(clocks):+.0f} to {max(clocks):+.0f} %" if clocks else "-"
    error = f"Wall time of the GEMMs alone less busy time, the error of a column: {spread}."
    return f"{table(columns, rows)}\n\n{error}"


def contestants_block(check: Check) -> str:
    """Milliseconds and errors of every contestant; peers that are faster, or wait for the host."""
    heads = {case.rpartition("/")[2] for part, case in check.cases if part == "head"}
    names = [name for name in (LIMIT, *CONTESTANTS) if name in heads]
    rows = []
    for group in check.groups:
        cells = []
        for name in names:
            wall, busy = wall_and_busy(check, group, name)
            over = check.over_ours(group, name)
            cells.append(f"{number(wall)} / {number(busy)}" + (f" ({over:.2f})" if over else ""))
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
    return "\n\n".join([times, fill(losses(check)), table(columns, errors)])


def _peers(check: Check) -> dict[str, dict[str, float]]:
    """Time over ours of each other library and of eager torch, by group."""
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in CONTESTANTS if not name.startswith(OURS)):
        overs = {group: check.over_ours(group, name) for group in check.groups}
        found[name] = {group: over for group, over in overs.items() if over is not None}
    return found


def losses(check: Check) -> str:
    """Peers that are faster than ours, and those for whose host the GPU waits most of the time."""
    faster, waiting = [], []
    for name, overs in _peers(check).items():
        where = [f"{over:.2f} at {group}" for group, over in overs.items() if over < 1]
        faster += [f"{name} takes {', '.join(where)}"] if where else []
        times = {group: wall_and_busy(check, group, name) for group in overs}
        where = [f"{100 * b / w:.0f} % at {group}" for group, (w, b) in times.items() if b < w / 2]
        waiting += [f"{name} {', '.join(where)}"] if where else []
    text = "No contestant is faster than ours in any of them."
    if faster:
        text = f"**Where we lose**, in units of ours: {'; '.join(faster)}."
    if waiting:
        text += f" The GPU is busy for less than half of the wall time: {'; '.join(waiting)}."
    return text


def step_block(check: Check) -> str:
    """Seconds of a step, those in which the GPU is busy, memory, and the time over ours."""
    ours, rows = check.figure("step", "ours", "seconds"), []
    names = ("seconds", "each", "busy_seconds", "examples_per_second", "positions", "peak_gib")
    for case in STEPS:
        seconds, each, busy, rate, positions, peak = (check.figure("step", case, n) for n in names)
        rows.append((
            case, number(seconds), f"{min(each):.3g} to {max(each):.3g}" if each else "-",
            number(busy), number(rate), f"{positions:,}" if positions else "-", number(peak),
            "-" if None in (seconds, ours) else f"{seconds / ours:.2f}",
        ))  # fmt: skip
    columns = (
        "step", "seconds", "least to most", "GPU busy, s", "examples/s", "positions", "peak, GiB",
        "over ours",
    )  # fmt: skip
    return table(columns, rows)


def attention_block(check: Check) -> str:
    """Milliseconds of one layer's attention, forward and backward; planning by cuDNN."""
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
        f"{found}\n\nWith cuDNN the first call of a shape takes {number(first)} ms, a repeated one "
        f"{number(again)} ms ({calls} calls)."
    )


def ratios_block(check: Check) -> str:
    """Calculated and measured figures, and their ratio."""
    # Here, since the part `head` imports this file and need not load transformers.
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
    """Blocks of docs/gpu.md: measurements, then the calculation."""
    return {
        "measured": measured(check),
        "targets": target_block(check),
        "where": where_block(check),
        "contestants": contestants_block(check),
        "step": step_block(check),
        "attention": attention_block(check),
        "ratios": ratios_block(check),
        "check": "```text\n{}\n```".format("\n".join(summary(check.lines, PARTS))),
        "frozen": roofline.table_of(trainable=False),
        "trains": roofline.table_of(trainable=True),
        "forward": roofline.forward_table(),
    }


def kernels_sentence(check: Check) -> str:
    """For docs/kernels.md: how many cases of the GPU check were correct, and where."""
    return fill(
        f"On one {check.card}, {check.correct} cases of the GPU check were within their error "
        "budgets."
    )


def readme_sentence(check: Check) -> str:
    """For the README: a training step, the head, its peers and the targets."""

    def slower(peer: str) -> str:
        mine, theirs = (check.figure("step", case, "seconds") for case in ("ours", peer))
        return "-" if mine is None or theirs is None else f"{theirs / mine:.2f}"

    def head(kind: str) -> str:
        overs = [over_gemms(check, group) for group in check.groups if group.endswith(f" {kind}")]
        known = [over for over in overs if over is not None]
        return span(known) if known else "-"

    each = check.figure("step", "ours", "each") or []
    peers = []
    for name, overs in _peers(check).items():
        if faster := [over for over in overs.values() if over < 1]:
            count = f"{len(faster)} of {len(overs)} cases"
            peers.append(f"{name} is faster in {count} ({span(faster)} of ours)")
    return fill(
        f"**On a GPU** ({check.machine}): a LoRA step of rDPO with LLaVA-1.5-7B, random weights, "
        f"was {slower('TRL DPO')} times faster than TRL's DPO and {slower('released')} times "
        "faster than three plain sequences as in the authors' release (medians of five steps; ours "
        f"took {', '.join(map(number, sorted(each)))} s). The head took {head('frozen')} times as "
        f"long as its GEMMs by cuBLAS when frozen, {head('trained')} times when it trained. Peers: "
        f"{'; '.join(peers) or 'no contestant is faster in any case'}. GPU targets: "
        f"{verdicts(check)}."
    )
