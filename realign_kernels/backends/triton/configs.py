"""Tile sizes per architecture, in tables: nothing is autotuned at import or at first use.

The tiles are chosen from ahead-of-time reports (`triton.compile`): no spills, shared memory that
fits, and tensor cores fed from shared memory. Two tiles of sm_90 were timed on an H200. The row
kernel's was the fastest of its candidates. The forward's wide tile took the time of cuBLAS's GEMM
at 8190 x 4096 x 151936. The speed of the other tiles is not measured.

An unlisted architecture uses the nearest lower one in the tables: 86 and 89 use 80, 103 uses 100.
An architecture below 80 uses 80. The tiles of 80 fit into 99 KiB of shared memory, the limit of 86
and 89. 120 has the same limit and the same tensor core instructions, so it uses the tiles of 80.
"""

import functools
import math
from typing import NamedTuple

import torch


class RowConfig(NamedTuple):
    """Configuration of the row kernel: elements per step, and warps."""

    block: int
    warps: int


class GemmConfig(NamedTuple):
    """Configuration of a fused head: rows x columns logits per tile, `depth` of H per step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int
    """Row blocks that pass over the vocabulary together."""
    descriptors: bool
    """Whether tiles are fetched by the tensor memory accelerator (90 and later)."""


MOST_SPLITS = 256
"""Limit on splits, whose results are read again to combine them.

256 splits keep every multiprocessor busy with a single row block."""

LOSS_BLOCK = 256
LOSS_WARPS = 4

# Registers limit the rows per multiprocessor. 4096 elements take 64 registers (four rows), or 73 to
# 80 if the row is read once (three rows). 8192 elements take 100 (two rows). On an H200 1024
# elements were the fastest of 8 sizes.
ROWS = dict.fromkeys((80, 100, 120), RowConfig(4096, 8)) | {90: RowConfig(1024, 8)}

# Tiles by problem size:
# - "wide" needs H above 1024 and a vocabulary of at least 16384. A smaller vocabulary has too few
#   tiles of 256 columns for all multiprocessors.
# - "narrow": with H up to 1024 a larger share of a tile's time is outside the GEMM. 4 warps per
#   tile let two tiles share a multiprocessor: one multiplies while the other exponentiates.
# - "pointers" is for rows that are not aligned to 16 bytes (H is not a multiple of 8). Descriptors
#   and wide loads cannot address them, and narrow loads cost registers.
_AMPERE = {
    "wide": GemmConfig(128, 128, 64, 8, 3, 16, False),
    "narrow": GemmConfig(64, 128, 64, 4, 3, 16, False),
    "few rows": GemmConfig(64, 128, 64, 4, 3, 16, False),
    "float32": GemmConfig(64, 32, 32, 4, 3, 16, False),
    "pointers": GemmConfig(64, 64, 32, 4, 3, 16, False),
}
_HOPPER = {
    "wide": GemmConfig(128, 256, 64, 8, 3, 16, True),
    "narrow": GemmConfig(128, 128, 64, 4, 3, 16, True),
    "few rows": GemmConfig(64, 256, 64, 8, 4, 16, True),  # 4 warps spill if V is odd
    "float32": GemmConfig(64, 32, 32, 4, 3, 16, False),
    "pointers": GemmConfig(64, 64, 32, 4, 3, 16, False),
}
_BLACKWELL = {**_HOPPER, "wide": GemmConfig(128, 256, 64, 8, 4, 16, True)}
GEMMS = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 120: _AMPERE}

EXP_HEADS = {
    90: GemmConfig(128, 256, 64, 8, 3, 16, True),
    100: GemmConfig(128, 128, 64, 8, 4, 16, True),
    120: GemmConfig(128, 128, 64, 8, 3, 16, True),
}
"""Tiles of `exp_head` in Triton.

On an H200 the tile of 90 was the fastest of 9, with 690 TFLOP/s at V = 128256. It spills on 100.
80 has no tile, because its descriptor loads do not overlap with the product."""


def listed(architecture: int) -> int:
    """The architecture whose tables to use: the nearest lower one, or 80."""
    return max((known for known in GEMMS if known <= architecture), default=80)


def row_config(architecture: int, vocabulary: int) -> RowConfig:
    """Row kernel configuration. A small vocabulary is one step, with a warp per 256 tokens."""
    block, warps = ROWS[listed(architecture)]
    if vocabulary >= block:
        return RowConfig(block, warps)
    block = max(32, 1 << (vocabulary - 1).bit_length())
    return RowConfig(block, min(warps, max(1, block // 256)))


def gemm_bin(dtype: torch.dtype, rows: int, width: int, vocabulary: int, describable: bool) -> str:
    """Key of the entry in a table of `GEMMS`."""
    if dtype == torch.float32:
        return "float32"
    if not describable:
        return "pointers"
    if rows <= 64:
        return "few rows"
    return "wide" if width > 1024 and vocabulary >= 16384 else "narrow"


def gemm_config(
    architecture: int,
    dtype: torch.dtype,
    rows: int,
    width: int,
    vocabulary: int,
    describable: bool = True,
) -> GemmConfig:
    """The tile for a product of (rows, width) and (width, vocabulary)."""
    return GEMMS[listed(architecture)][gemm_bin(dtype, rows, width, vocabulary, describable)]


@functools.lru_cache(1024)
def choose_splits(row_blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """(splits of the vocabulary, tiles per split) with the least work for the busiest processor.

    Among equals it takes the fewest splits. It assumes one program per processor at a time. More
    programs per processor only help.
    """
    best, least = (1, max(tiles, 1)), math.inf
    for per_split in range(max(tiles, 1), 0, -1):
        splits = math.ceil(tiles / per_split)
        work = math.ceil(row_blocks * splits / processors) * per_split
        if work < least and splits <= MOST_SPLITS:
            best, least = (splits, per_split), work
    return best
