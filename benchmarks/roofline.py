"""Time of the head on an H100 by calculation: `python -m benchmarks.roofline` writes docs/gpu.md.

Each kernel takes the longer of its FLOP at the tensor cores' peak and its bytes at the memory's
bandwidth; kernels run one after another. So these are lower bounds; the second figure replaces the
peak by what good GEMMs reach. Results of a GPU check are put beside them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.contestants import OURS
from benchmarks.gpu.check import Check, load
from benchmarks.gpu.pages import WORDS, filled, number, ratio, sections, shape_of
from benchmarks.words import table
from realign_kernels.backends.chunk_plan import chunk_step, default_chunk_rows, even_step, kept_rows

FILE = Path(__file__).parent.parent / "docs" / "gpu.md"
PEAK, BANDWIDTH = 989e12, 3.35e12  # H100 SXM: dense bf16 FLOP/s, HBM3 bytes/s (data sheet)
REACHED = 770e12  # FLOP/s of bf16 GEMMs; Liger reports 760 to 790e12 for its own on an H200
SHAPES = {
    "LLaVA-1.5-7B": (4096, 32000),
    "Qwen2.5-VL-3B": (2048, 151936),
    "Qwen2.5-VL-7B": (3584, 152064),
    "Gemma-3-4B": (2560, 262144),
}
RESPONSE, EXAMPLES = 64, 16  # as `make bench-gpu` runs them
ROWS = 3 * EXAMPLES * RESPONSE
IMAGE_ROWS = 3 * EXAMPLES * (576 + 64)
FP32, BF16 = 4, 2
ROW_BYTES = FP32 + BF16
"""Of a logit in the row kernel: read once in fp32; E is written in bf16."""
LABEL = 2 * BF16
"""Of an element of hidden in the label's logit, before E without logits: hidden and weight."""
FINISH = FP32 + BF16 + FP32
"""Of an element of hidden in the last step of its gradient: E W, weight, direction."""
CHECK, SCALE = FP32, FP32 + BF16
"""Of an element of a frozen head's direction in the check of results and in the backward."""
PUSH = 2 * BF16 + BF16 + FP32 + FP32 + 2 * BF16
"""Of an element of hidden in the factors of the weight's gradient, in bf16 and in fp32, and in the
scatter-add of the latter to rows of that gradient."""
CUDA = torch.device("cuda")


@dataclass
class Kernels:
    """Kernels one after another: FLOP and bytes of each."""

    found: list[tuple[float, float]]

    def seconds(self, peak: float) -> float:
        """Time at a peak of `peak` FLOP/s."""
        return sum(max(flop / peak, size / BANDWIDTH) for flop, size in self.found)

    @property
    def bytes(self) -> float:
        """Read and written, in all."""
        return sum(size for _, size in self.found)


def gemm(m: int, n: int, k: int, out: int, accumulate: bool = False) -> tuple[float, float]:
    """(m, k) x (k, n) of bf16 into `out` bytes an element, which is read, too, to accumulate."""
    return 2.0 * m * n * k, BF16 * (m * k + k * n) + out * m * n * (1 + accumulate)


def elementwise(size: float) -> tuple[float, float]:
    """A pass over memory."""
    return 0.0, size


def chunks(rows: int, H: int, limit: int, examples: bool = False) -> list[int]:
    """Rows of each chunk; of whole examples where the head trains."""
    one = 3 * RESPONSE
    step = max(one, limit // one * one) if examples else chunk_step(rows, limit, H, CUDA)
    return [min(step, rows - start) for start in range(0, rows, step)]


def ours(
    N: int, H: int, V: int, trainable: bool, derivative: bool = True, fused: bool = False
) -> Kernels:
    """As `realign_kernels.backends.chunked` runs on CUDA. E in bf16, hidden's gradient in fp32.

    Args:
        N: rows.
        H: width of the head.
        V: vocabulary.
        trainable: whether the head trains.
        derivative: whether gradients are wanted.
        fused: E in the epilogue of the first GEMM, else fp32 logits and the row kernel.
    """
    limit = default_chunk_rows(V, CUDA, BF16 if fused else FP32 + BF16)
    parts = chunks(N, H, kept_rows(limit, H, CUDA) if trainable else limit, examples=trainable)
    found = []
    for done, n in enumerate(parts):
        if fused:
            found += [elementwise(n * H * LABEL), gemm(n, V, H, BF16)]
        else:
            step = even_step(n, limit)
            for rows in (min(step, n - start) for start in range(0, n, step)):
                found.append(gemm(rows, V, H, FP32))  # logits
                found.append(elementwise(rows * V * (ROW_BYTES if derivative else FP32)))
        if derivative:
            found += [gemm(n, H, V, FP32), elementwise(n * H * FINISH)]
        if trainable:
            out = BF16 if len(parts) == 1 else FP32
            found += [elementwise(n * H * PUSH), gemm(V, H, n, out, accumulate=done > 0)]
    if derivative:
        found.append(elementwise(N * H * (SCALE + (0 if trainable else CHECK))))
    if trainable and len(parts) > 1:
        found.append(elementwise(V * H * (FP32 + BF16)))  # round the sum
    return Kernels(found)


def no_logits(N: int, H: int, V: int) -> Kernels:
    """The forward that never writes logits: one GEMM with an epilogue."""
    flop, size = gemm(N, V, H, 0)
    return Kernels([(flop, size)])


def eager(N: int, H: int, V: int, trainable: bool) -> Kernels:
    """Full logits, to fp32, log_softmax, gather, and back; two or three GEMMs."""
    passes = [
        elementwise(N * V * (BF16 + FP32)),  # .float()
        elementwise(N * V * 2 * FP32),  # log_softmax
        elementwise(N * V * FP32),  # the gradient of gather, zeros
        elementwise(N * V * 3 * FP32),  # log_softmax backward
        elementwise(N * V * (FP32 + BF16)),  # back to bf16
    ]
    products = [gemm(N, V, H, BF16), gemm(N, H, V, BF16)]
    products += [gemm(V, H, N, BF16)] if trainable else []
    return Kernels(products + passes)


def units(N: int, H: int, V: int, count: float, peak: float) -> float:
    """Seconds of `count` GEMMs of the head, at a rate."""
    return count * 2 * N * H * V / peak


def ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{1e3 * seconds:.3g}"


def row(H: int) -> float:
    """Units that the row kernel takes: its bytes a logit over the time of 2 H FLOP."""
    return ROW_BYTES / BANDWIDTH / (2 * H / PEAK)


def case_of(rows: int, H: int, V: int, kind: str, contestant: str = OURS) -> str:
    """Name of a case of the part `head` of a GPU check."""
    return f"{rows}x{H}x{V} {kind}/{contestant}"


def rows_of(trainable: bool) -> list[tuple[str, ...]]:
    """Cells of forward and backward: a shape each."""
    least, others = (3, (4, 3)) if trainable else (2, (3, 2))
    found = []
    for model, (H, V) in SHAPES.items():
        plain, limit = eager(ROWS, H, V, trainable), units(ROWS, H, V, least, PEAK)
        cells = [f"{model} {H} x {V}", ms(limit)]
        for fused in (False, True):
            mine = ours(ROWS, H, V, trainable, fused=fused)
            cells += [
                f"{ms(mine.seconds(PEAK))} / {ms(mine.seconds(REACHED))}",
                f"{mine.seconds(REACHED) / units(ROWS, H, V, 1, REACHED):.2f}u",
                f"{mine.bytes / 1e9:.1f}",
            ]
        cells += [
            f"{ms(plain.seconds(PEAK))} / {ms(plain.seconds(REACHED))}",
            ms(units(ROWS, H, V, others[0], REACHED)),
            ms(units(4 / 3 * (ROWS + IMAGE_ROWS), H, V, others[1], REACHED)),
        ]
        found.append(tuple(cells))
    return found


def forward_rows() -> list[tuple[str, ...]]:
    """Cells for log-probs alone: a shape each."""
    found = []
    for model, (H, V) in SHAPES.items():
        chunked, fused = ours(ROWS, H, V, False, derivative=False), no_logits(ROWS, H, V)
        limit = ms(units(ROWS, H, V, 1, PEAK))
        times = (limit, ms(chunked.seconds(PEAK)), ms(fused.seconds(PEAK)))
        found.append((f"{model} {H} x {V}", *times, f"{ROWS * V * FP32 / 1e9:.1f}"))
    return found


def step_seconds(positions: float) -> float:
    """GEMMs of LLaVA-1.5-7B's language model under LoRA 128, forward and backward, at 770.

    A frozen matrix is multiplied twice for each position, one of LoRA three times. Attention, the
    tower, the head and all elementwise work come on top.
    """
    width, inner, layers, rank = 4096, 11008, 32, 128
    frozen = layers * (4 * width**2 + 3 * width * inner)
    lora = layers * rank * (4 * 2 * width + 3 * (width + inner))
    return positions * (4.0 * frozen + 6.0 * lora) / REACHED


def attention_seconds(trees: Iterable[Iterable[int]], width: int) -> float:
    """Products of one layer's attention over trees, (root, leaf, ...) tokens each, at 770.

    A query and a key that it sees take 14 FLOP a channel: two products forward, five backward.
    """
    pairs = 0
    for root, *leaves in trees:
        pairs += root * (root + 1) // 2
        pairs += sum(leaf * root + leaf * (leaf + 1) // 2 for leaf in leaves)
    return 14.0 * pairs * width / REACHED


def ratios(check: Check) -> list[tuple[str, ...]]:
    """(part, case, calculated, measured, ratio) of everything that is calculated."""
    rows: list[tuple[str, ...]] = []

    def add(part: str, case: str, name: str, calculated: float) -> None:
        found = check.figure(part, case, name)
        unit = name.replace("_per_", "/")
        cells = f"{calculated:.3g} {unit}", f"{number(found)} {unit}", ratio(found, calculated)
        rows.append((part, case, *cells))

    add("facts", "GEMM", "tflops", REACHED / 1e12)
    add("facts", "copy", "tb_per_s", BANDWIDTH / 1e12)
    for group in check.groups:
        N, H, V, kind = shape_of(group)
        kernels = no_logits(N, H, V) if kind == "log-probs" else ours(N, H, V, kind == "trained")
        add("head", f"{group}/{OURS}", "ms", 1e3 * kernels.seconds(REACHED))
    # Here, since the part `head` imports this file and need not load transformers.
    from benchmarks.gpu.attention import LLAVA, batch_of

    seconds = attention_seconds(batch_of(LLAVA).trees[0], LLAVA.heads * LLAVA.width)
    for case in ("tree, cuDNN off", "varlen"):
        add("attention", case, "ms", 1e3 * seconds)
    positions = check.figure("step", "ours", "positions")
    if positions is not None:
        add("step", "ours", "seconds", step_seconds(positions))
    return rows


def columns(recomputing: int, storing: int) -> tuple[str, ...]:
    """Heads of the table of `rows_of`."""
    return (
        "head",
        "limit, ms",
        "ours by `rows`, ms: at peak / at 770",
        "units at 770",
        "GB moved",
        "ours without logits, ms: at peak / at 770",
        "units at 770",
        "GB moved",
        "eager, ms: at peak / at 770",
        f"{recomputing}u at 770: TRL, CCE",
        f"{storing}u on 4/3 of all rows at 770: Liger, two calls",
    )


FORWARD = (
    "head",
    "limit, ms",
    "by chunks with logits, ms at peak",
    "without logits (Triton), ms at peak",
    "logits not written, GB",
)


def page(check: Check | None = None) -> str:
    """docs/gpu.md, with measured figures where a check has been run."""
    intro, measured = WORDS["not_measured"].strip(), ""
    if check is not None:
        intro = WORDS["measured"].strip().format(
            machine=check.machine,
            gemm=number(check.figure("facts", "GEMM", "tflops")),
            copy=number(check.figure("facts", "copy", "tb_per_s")),
            correct=check.correct,
            missing=check.missing,
            since=WORDS["since"].strip(),
        )  # fmt: skip
        measured = sections(check)
    text = WORDS["page"].format(
        intro=intro,
        sections=measured,
        peak=f"{PEAK / 1e12:.0f}",
        bandwidth=f"{BANDWIDTH / 1e12:.2f}",
        rows=f"{ROWS:,}",
        examples=EXAMPLES,
        response=RESPONSE,
        all_rows=f"{ROWS + IMAGE_ROWS:,}",
        frozen=table(columns(3, 2), rows_of(False)),
        trains=table(columns(4, 3), rows_of(True)),
        forward=table(FORWARD, forward_rows()),
        row_4096=f"{row(4096):.2f}",
        row_2048=f"{row(2048):.2f}",
        chunk=f"{default_chunk_rows(10**6, CUDA):,}",
        ridge=f"{PEAK / BANDWIDTH:.0f}",
        three_peak=ms(units(8192, 4096, 151936, 3, PEAK)),
        three_reached=ms(units(8192, 4096, 151936, 3, REACHED)),
    )
    return filled(text.rstrip()) + "\n"


def main() -> None:
    """Writes the page."""
    FILE.write_text(page(load()))
    print(f"wrote docs/{FILE.name}")


if __name__ == "__main__":
    main()
