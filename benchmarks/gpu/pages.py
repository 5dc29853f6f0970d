"""Tables and sentences of a GPU check, for docs/gpu.md, docs/benchmarks.md and the README."""

import string
import textwrap
from collections.abc import Iterable

from benchmarks.contestants import CONTESTANTS, LIMIT, OURS
from benchmarks.gpu import targets
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.check import Check
from benchmarks.gpu.table import table as lines_of
from benchmarks.words import PAGES, span, table

WORDS = PAGES["gpu"]
GEMMS = {"frozen": 2, "trained": 3, "log-probs": 1}
"""GEMMs of 2 N H V FLOP in each kind of head."""
STEPS = ("ours", "ours, DPO", "TRL DPO", "released")


def ratio(measured: float | None, calculated: float) -> str:
    """measured / calculated."""
    return "-" if measured is None else f"{measured / calculated:.2f}"


def number(value: float | str | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:.3g}"


def filled(page: str) -> str:
    """A page whose paragraphs are in lines of 110; other blocks, such as tables, stay."""
    blocks = (
        textwrap.fill(" ".join(block.split()), 110, break_on_hyphens=False)
        if block.lstrip("*(").startswith(tuple(string.ascii_letters + string.digits))
        else block
        for block in page.split("\n\n")
    )
    return "\n\n".join(blocks)


def shape_of(group: str) -> tuple[int, int, int, str]:
    """N, H, V and the kind of a group of cases of the head."""
    size, _, kind = group.partition(" ")
    N, H, V = map(int, size.split("x"))
    return N, H, V, kind


def target_table(check: Check) -> str:
    """Each target with its bound, the measured figure, and cuBLAS's time for the same GEMMs."""
    rows = []
    for one in targets.read():
        value, group = one.value(check), one.case.rpartition("/")[0]
        limit = check.figure("head", f"{group}/{LIMIT}", "ms") if one.figure == "ms" else None
        shown = "-" if value is None else f"{value:.3g} {one.unit}"
        cells = one.name, f"at most {one.at_most:g} {one.unit}", shown, f"**{one.verdict(check)}**"
        rows.append((*cells, "-" if limit is None else f"{limit:.3g} ms", one.reason))
    columns = "target", "bound", "measured", "", "its GEMMs by cuBLAS", "why this bound"
    return table(columns, rows)


def target_counts(check: Check) -> str:
    """How many targets are met and missed."""
    found = [one.verdict(check) for one in targets.read()]
    words = ("met", "missed", "not measured")
    return ", ".join(f"{found.count(word)} {word}" for word in words if word in found)


def wall_and_busy(check: Check, group: str, name: str) -> tuple[float | None, float | None]:
    """Milliseconds of a contestant of the head: wall, and those in which the GPU is busy."""
    case = f"{group}/{name}"
    return check.figure("head", case, "ms"), check.figure("head", case, "busy_ms")


def missed(check: Check) -> str:
    """Why targets of the head are missed: times beside those of its GEMMs, and memory."""
    lines = []
    for one in targets.read():
        if one.part != "head" or one.verdict(check) != "missed":
            continue
        group = one.case.rpartition("/")[0]
        N, H, V, kind = shape_of(group)
        if one.figure == "peak_gib":
            line = f"- {one.name}: {number(one.value(check))} GiB."
            if kind == "trained":
                line += f" {number(2 * H * V / 2**30)} GiB are the gradient of the weight in bf16."
        else:
            ours, gemms = (wall_and_busy(check, group, name) for name in (OURS, LIMIT))
            line = "- {}: {} ms, GPU busy {}; its GEMMs {} ms, GPU busy {}."
            line = line.format(one.name, *map(number, (*ours, *gemms)))
            if not one.over and gemms[0] and gemms[0] > one.at_most:
                line += " The GEMMs alone exceed the bound."
        lines.append(line)
    return "\n".join([WORDS["missed"].strip(), "", *lines] if lines else [])


def over_gemms(check: Check, group: str) -> float | None:
    """Wall time of ours over that of the same GEMMs alone."""
    ours, gemms = (wall_and_busy(check, group, name)[0] for name in (OURS, LIMIT))
    return None if None in (ours, gemms) else ours / gemms


def where_table(check: Check) -> str:
    """Wall and busy time of ours and of its GEMMs, their quotients, and the rate of the GEMMs."""
    rows = []
    for group in check.groups:
        over = over_gemms(check, group)
        if over is None:
            continue
        N, H, V, kind = shape_of(group)
        count = GEMMS[kind]
        (wall, busy), (alone, alone_busy) = (wall_and_busy(check, group, n) for n in (OURS, LIMIT))
        rate = count * 2 * N * H * V / alone / 1e9
        cells = wall, busy, wall - busy, alone, alone_busy
        quotients = f"{over:.2f}", f"{busy / alone_busy:.2f}", f"{count * over:.2f}u"
        rows.append((group, *map(number, cells), *quotients, f"{rate:.0f}"))
    columns = (
        "N x H x V", "ours, ms", "GPU busy", "wall less busy", "GEMMs alone, ms", "GPU busy",
        "ours / GEMMs", "busy / busy", "in u", "TFLOP/s of the GEMMs",
    )  # fmt: skip
    return table(columns, rows)


def clocks(check: Check) -> str:
    """How far wall and busy time of the GEMMs alone differ: the error of `wall less busy`."""
    found = [wall_and_busy(check, group, LIMIT) for group in check.groups]
    shares = [100 * (wall / busy - 1) for wall, busy in found if wall and busy]
    return f"{min(shares):+.0f} to {max(shares):+.0f} %" if shares else "-"


def loaded(check: Check) -> str:
    """Rate, clock and power of GEMMs that run for two seconds."""
    rate, clock, power = (
        check.figure("facts", "GEMM under load", name) for name in ("tflops", "clock", "power")
    )
    if rate is None:
        return ""
    return f"GEMMs of 8192 rows reach {number(rate)} TFLOP/s for two seconds, at {clock}, {power}."


def contestants_table(check: Check) -> str:
    """Wall and GPU-busy milliseconds of every contestant, its time over ours; memory of ours."""
    names = [
        n for n in (LIMIT, *CONTESTANTS) if any(f"{g}/{n}" in _heads(check) for g in check.groups)
    ]
    rows = []
    for group in check.groups:
        cells = []
        for name in names:
            wall, busy = wall_and_busy(check, group, name)
            over = check.over_ours(group, name)
            cells.append(f"{number(wall)} / {number(busy)}" + (f" ({over:.2f})" if over else ""))
        rows.append((group, *cells, number(check.figure("head", f"{group}/{OURS}", "peak_gib"))))
    columns = ("N x H x V", *names, "peak of ours beyond inputs, GiB")
    return table(columns, rows)


def _heads(check: Check) -> set[str]:
    return {case for part, case in check.cases if part == "head"}


def _peers(check: Check) -> list[tuple[str, str, float]]:
    """(contestant, group, time over ours) of all other libraries and of eager torch."""
    names = [name for name in CONTESTANTS if not name.startswith(OURS)]
    pairs = [
        (name, group, check.over_ours(group, name)) for name in names for group in check.groups
    ]
    return [(name, group, over) for name, group, over in pairs if over is not None]


def losses(check: Check) -> str:
    """Contestants that are faster than ours, and where."""
    found: dict[str, list[str]] = {}
    for name, group, over in _peers(check):
        if over < 1:
            found.setdefault(name, []).append(f"{over:.2f} at {group}")
    if not found:
        return "No contestant is faster than ours in any of them."
    told = "; ".join(f"{name} takes {', '.join(where)}" for name, where in found.items())
    return f"**Where we lose**, in units of ours: {told}."


def loss_counts(check: Check) -> str:
    """In how many cases a contestant is faster than ours, for the README."""
    peers = _peers(check)
    found = []
    for name in dict.fromkeys(name for name, _, over in peers if over < 1):
        overs = [over for one, _, over in peers if one == name]
        faster = [over for over in overs if over < 1]
        found.append(
            f"{name} is faster in {len(faster)} of {len(overs)} cases ({span(faster)} of ours)"
        )
    return "; ".join(found) or "no contestant is faster in any case"


def waiting(check: Check) -> str:
    """Cases of other libraries in which the GPU is busy for less than half of the wall time."""
    found: dict[str, list[str]] = {}
    for name, group, _ in _peers(check):
        wall, busy = wall_and_busy(check, group, name)
        if busy < wall / 2:
            found.setdefault(name, []).append(f"{100 * busy / wall:.0f} % at {group}")
    told = "; ".join(f"{name} {', '.join(where)}" for name, where in found.items())
    return f"The GPU is busy for less than half of the wall time: {told}." if told else ""


def errors_table(check: Check) -> str:
    """Errors of every contestant against fp64: the least and the most over the shapes."""
    rows = []
    for name in CONTESTANTS:
        cells = []
        for what in ("loss", "hidden", "weight"):
            found = [check.figure("head", f"{g}/{name}", f"{what}_error") for g in check.groups]
            known = [value for value in found if value is not None]
            cells.append(f"{min(known):.1e} to {max(known):.1e}" if known else "-")
        if set(cells) != {"-"}:
            rows.append((name, *cells))
    return table(("error", "loss", "gradient of hidden", "gradient of the weight"), rows)


def step_table(check: Check) -> str:
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


def attention_table(check: Check) -> str:
    """Milliseconds of one layer's attention, forward and backward."""
    rows = []
    for part, case in check.cases:
        if part == "attention" and check.figure(part, case, "ms") is not None:
            cells = (check.figure(part, case, f) for f in ("ms", "busy_ms", "first_ms", "peak_gib"))
            rows.append((case, *map(number, cells)))
    return table(("attention", "ms", "GPU busy, ms", "first call, ms", "peak, GiB"), rows)


def cudnn_sentence(check: Check) -> str:
    """What cuDNN takes to plan a shape."""
    names = ("first_ms_a_call", "ms_a_call", "calls")
    first, again, calls = (check.figure("attention", "tree, cuDNN on", name) for name in names)
    if first is None:
        return ""
    return (
        f"With cuDNN the first call of a shape takes {first:.3g} ms, a repeated one {again:.3g} ms "
        f"({calls} calls); training keeps it off."
    )


def sections(check: Check) -> str:
    """docs/gpu.md: targets, parts of the time, contestants, a step, attention."""
    found = {
        "counts": target_counts(check), "targets": target_table(check), "missed": missed(check),
        "where": where_table(check), "clocks": clocks(check), "loaded": loaded(check),
        "contestants": contestants_table(check), "errors": errors_table(check),
        "losses": losses(check), "waiting": waiting(check), "step": step_table(check),
        "attention": attention_table(check), "cudnn": cudnn_sentence(check),
    }  # fmt: skip
    return WORDS["sections"].format(**found)


def kernels_sentence(check: Check | None) -> str:
    """For docs/kernels.md: whether the Triton kernels have run on a GPU."""
    if check is None:
        return WORDS["kernels_not_run"].strip()
    since = WORDS["since_kernels"].strip()
    words = WORDS["kernels_run"].strip()
    return filled(words.format(card=check.card, correct=check.correct, since=since))


def readme_sentence(check: Check | None) -> str:
    """For the README: a training step, the head and the targets, or that nothing was run."""
    if check is None:
        return WORDS["readme_not_measured"].strip()
    found = {"counts": target_counts(check), "losses": loss_counts(check)}
    found["since_readme"] = WORDS["since_readme"].strip()
    each = check.figure("step", "ours", "each")
    found["steps"] = ", ".join(map(number, sorted(each))) if each else "-"
    mine = check.figure("step", "ours", "seconds")
    for name, peer in (("trl", "TRL DPO"), ("released", "released")):
        theirs = check.figure("step", peer, "seconds")
        found[name] = "-" if None in (mine, theirs) else f"{theirs / mine:.2f}"
    for kind in ("frozen", "trained"):
        over = [over_gemms(check, group) for group in check.groups if group.endswith(f" {kind}")]
        known = [value for value in over if value is not None]
        found[kind] = span(known) if known else "-"
    return filled(WORDS["readme_measured"].strip().format(machine=check.machine, **found))


def benchmarks_section(check: Check, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """For docs/benchmarks.md: targets, measured over calculated, the whole table of the check."""
    columns = ("part", "case", "calculated", "measured", "measured / calculated")
    whole = "\n".join(lines_of(check.lines, PARTS))
    words = WORDS["check"].strip().format(
        machine=check.machine,
        counts=target_counts(check),
        losses=losses(check),
        since=WORDS["since"].strip(),
    )  # fmt: skip
    return [filled(words), target_table(check), table(columns, rows), f"```text\n{whole}\n```"]
