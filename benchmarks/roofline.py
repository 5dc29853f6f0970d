"""Roofline model of the head on an H100, for the calculated times of docs/gpu.md.

A kernel takes the longer of two times: its FLOP at the tensor cores' peak, or its bytes at the
memory's bandwidth. Kernels run one after another. The results are lower bounds. A second figure
replaces the peak by the rate of good GEMMs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.tables import table
from realign_kernels.backends.chunk_plan import chunk_step, default_chunk_rows, even_step, kept_rows

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
"""Bytes per logit in the row kernel, which reads fp32 once and writes E in bf16."""
LABEL = 2 * BF16
"""Bytes per element of hidden for the label's logit (hidden and weight), without full logits."""
FINISH = FP32 + BF16 + FP32
"""Bytes per element of hidden in the last step of its gradient: E W, weight, direction."""
CHECK, SCALE = FP32, FP32 + BF16
"""Bytes per element of a frozen head's direction in the check of results and in the backward."""
PUSH = 2 * BF16 + BF16 + FP32 + FP32 + 2 * BF16
"""Bytes per element of hidden for the weight's gradient. They are for the factors in bf16 and fp32,
and for the scatter-add of the fp32 factors to rows of the gradient."""
CUDA = torch.device("cuda")


@dataclass
class Kernels:
    """Sequence of kernels, each with its FLOP and bytes."""

    found: list[tuple[float, float]]

    def seconds(self, peak: float) -> float:
        """Time in seconds at `peak` FLOP/s."""
        return sum(max(flop / peak, size / BANDWIDTH) for flop, size in self.found)

    @property
    def bytes(self) -> float:
        """Total bytes read and written."""
        return sum(size for _, size in self.found)


def gemm(m: int, n: int, k: int, out: int, accumulate: bool = False) -> tuple[float, float]:
    """bf16 GEMM (m, k) x (k, n) with `out` bytes per result; accumulation also reads the result."""
    return 2.0 * m * n * k, BF16 * (m * k + k * n) + out * m * n * (1 + accumulate)


def elementwise(size: float) -> tuple[float, float]:
    """Elementwise kernel that moves `size` bytes."""
    return 0.0, size


def chunks(rows: int, H: int, limit: int, examples: bool = False) -> list[int]:
    """Rows of each chunk; with `examples` (a trained head), of whole examples."""
    one = 3 * RESPONSE
    step = max(one, limit // one * one) if examples else chunk_step(rows, limit, H, CUDA)
    return [min(step, rows - start) for start in range(0, rows, step)]


def ours(
    N: int, H: int, V: int, trainable: bool, derivative: bool = True, fused: bool = False
) -> Kernels:
    """Kernels of `realign_kernels.backends.chunked` on CUDA, with E in bf16.

    Args:
        N: Number of rows.
        H: Width of the head.
        V: Size of the vocabulary.
        trainable: Whether the head trains.
        derivative: Whether gradients are computed (hidden's in fp32).
        fused: Compute E in the epilogue of the first GEMM. If not, fp32 logits and the row kernel.
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
    """Forward without logits: one GEMM with an epilogue."""
    return Kernels([gemm(N, V, H, 0)])


def eager(N: int, H: int, V: int, trainable: bool) -> Kernels:
    """Eager torch: full logits in fp32, log_softmax, gather, backward, and two or three GEMMs."""
    passes = [
        elementwise(N * V * (BF16 + FP32)),  # .float()
        elementwise(N * V * 2 * FP32),  # log_softmax
        elementwise(N * V * FP32),  # gradient of gather, filled with zeros
        elementwise(N * V * 3 * FP32),  # log_softmax backward
        elementwise(N * V * (FP32 + BF16)),  # back to bf16
    ]
    products = [gemm(N, V, H, BF16), gemm(N, H, V, BF16)]
    products += [gemm(V, H, N, BF16)] if trainable else []
    return Kernels(products + passes)


def units(N: int, H: int, V: int, count: float, peak: float) -> float:
    """Seconds of `count` GEMMs of the head at `peak` FLOP/s."""
    return count * 2 * N * H * V / peak


def ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{1e3 * seconds:.3g}"


def shape_of(group: str) -> tuple[int, int, int, str]:
    """(N, H, V, kind) from the name of a head group, "NxHxV kind"."""
    size, _, kind = group.partition(" ")
    N, H, V = map(int, size.split("x"))
    return N, H, V, kind


def table_of(*, trainable: bool) -> str:
    """Table of forward and backward, with a row per shape."""
    least, recomputing, storing = (3, 4, 3) if trainable else (2, 3, 2)
    own = ("ms: at peak / at 770", "units at 770", "GB moved")
    columns = [
        "head", "limit, ms", f"ours by `rows`, {own[0]}", *own[1:],
        f"ours without logits, {own[0]}", *own[1:], "eager, ms: at peak / at 770",
        f"{recomputing}u at 770: TRL, CCE",
        f"{storing}u on 4/3 of all rows at 770: Liger, two calls",
    ]  # fmt: skip
    rows = []
    for model, (H, V) in SHAPES.items():
        cells = [f"{model} {H} x {V}", ms(units(ROWS, H, V, least, PEAK))]
        for fused in (False, True):
            mine = ours(ROWS, H, V, trainable, fused=fused)
            in_units = mine.seconds(REACHED) / units(ROWS, H, V, 1, REACHED)
            cells += [both(mine), f"{in_units:.2f}u", f"{mine.bytes / 1e9:.1f}"]
        liger = units(4 / 3 * (ROWS + IMAGE_ROWS), H, V, storing, REACHED)
        cells += [
            both(eager(ROWS, H, V, trainable)),
            ms(units(ROWS, H, V, recomputing, REACHED)),
            ms(liger),
        ]
        rows.append(cells)
    return table(columns, rows)


def both(kernels: Kernels) -> str:
    """Milliseconds at the peak, and at the rate of good GEMMs."""
    return f"{ms(kernels.seconds(PEAK))} / {ms(kernels.seconds(REACHED))}"


def forward_table() -> str:
    """Table of log-probs only, with a row per shape."""
    rows = []
    for model, (H, V) in SHAPES.items():
        chunked, fused = ours(ROWS, H, V, False, derivative=False), no_logits(ROWS, H, V)
        times = (units(ROWS, H, V, 1, PEAK), chunked.seconds(PEAK), fused.seconds(PEAK))
        cells = (f"{model} {H} x {V}", *map(ms, times), f"{ROWS * V * FP32 / 1e9:.1f}")
        rows.append(cells)
    columns = (
        "head", "limit, ms", "by chunks with logits, ms at peak",
        "without logits (Triton), ms at peak", "logits not written, GB",
    )  # fmt: skip
    return table(columns, rows)


def step_seconds(positions: float) -> float:
    """Seconds of the GEMMs of LLaVA-1.5-7B's language model with LoRA 128, at 770 TFLOP/s.

    Forward and backward multiply a frozen matrix twice per position, and a LoRA matrix three times.
    The result excludes attention, the tower, the head and all elementwise work.
    """
    width, inner, layers, rank = 4096, 11008, 32, 128
    frozen = layers * (4 * width**2 + 3 * width * inner)
    lora = layers * rank * (4 * 2 * width + 3 * (width + inner))
    return positions * (4.0 * frozen + 6.0 * lora) / REACHED


def attention_seconds(trees: Iterable[Iterable[int]], width: int) -> float:
    """Seconds of one layer's attention over trees of (root, leaf, ...) tokens, at 770 TFLOP/s.

    A visible pair of query and key takes 14 FLOP per channel: two products forward, five backward.
    """
    pairs = 0
    for root, *leaves in trees:
        pairs += root * (root + 1) // 2
        pairs += sum(leaf * root + leaf * (leaf + 1) // 2 for leaf in leaves)
    return 14.0 * pairs * width / REACHED
