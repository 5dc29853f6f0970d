"""Tile sizes per architecture: tables, so that nothing is tuned at import or at first use.

They are chosen from ahead-of-time reports (`triton.compile`): no spill,
shared memory that fits, tensor cores fed from it. Of sm_90's, the row kernel's was raced on an H200
and the forward's wide tile took the time of cuBLAS's GEMM at 8190 x 4096 x 151936; the speed of the
other tiles is not measured.

An architecture that is not listed takes the nearest lower one that is (86 and 89 take 80, 103 takes
100), one below 80 takes 80. 80's tiles stay within 99 KiB of shared memory, all that 86 and 89
have; so has 120, whose tensor cores are programmed as 80's too, so it is listed as 80.
"""

import functools
import math
from typing import NamedTuple

import torch


class RowConfig(NamedTuple):
    """The row kernel: elements per step and warps."""

    block: int
    warps: int


class GemmConfig(NamedTuple):
    """The fused head: a tile of rows x columns logits, depth of H at a time."""

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
"""Per-split results are read again to combine them; 256 keep one row block on every processor."""

LOSS_BLOCK = 256
LOSS_WARPS = 4

# 4096 elements take 64 registers, so four rows share a multiprocessor; if the row is read once, 73
# to 80, three rows. 8192 elements take 100, two rows. On an H200 1024 were the fastest of 8.
ROWS = dict.fromkeys((80, 100, 120), RowConfig(4096, 8)) | {90: RowConfig(1024, 8)}

# Bins. Hidden states up to 1024 wide spend a larger share of a tile outside the GEMM: 4 warps per
# tile let two tiles share a multiprocessor, one multiplying while the other exponentiates. A
# vocabulary below 16384 has too few tiles of 256 columns to go round. "pointers" is for tensors
# whose rows are not aligned to 16 bytes (an H that is not a multiple of 8): neither descriptors nor
# wide loads can address them, and narrow ones cost registers.
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
    "few rows": GemmConfig(64, 256, 64, 8, 4, 16, True),  # 4 warps spill where V is odd
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
"""Tiles of `exp_head` in Triton. On an H200 90's was the fastest of 9 at V = 128256, 690 TFLOP/s.

It spills on 100. 80 has none: there descriptors are loads that do not overlap with the product."""


def listed(architecture: int) -> int:
    """The nearest architecture of the tables, from below if there is one."""
    return max((known for known in GEMMS if known <= architecture), default=80)


def row_config(architecture: int, vocabulary: int) -> RowConfig:
    """A small vocabulary is one step, with a warp for every 256 tokens."""
    block, warps = ROWS[listed(architecture)]
    if vocabulary >= block:
        return RowConfig(block, warps)
    block = max(32, 1 << (vocabulary - 1).bit_length())
    return RowConfig(block, min(warps, max(1, block // 256)))


def gemm_bin(dtype: torch.dtype, rows: int, width: int, vocabulary: int, describable: bool) -> str:
    """Which entry of a table of `GEMMS`."""
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
    """The tile for rows x width times width x vocabulary."""
    return GEMMS[listed(architecture)][gemm_bin(dtype, rows, width, vocabulary, describable)]


@functools.lru_cache(1024)
def choose_splits(row_blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """(splits of the vocabulary, tiles per split) with the least work for the busiest processor.

    Of equals the fewest splits. One program per processor at a time is assumed; more only help.
    """
    best, least = (1, max(tiles, 1)), math.inf
    for per_split in range(max(tiles, 1), 0, -1):
        splits = math.ceil(tiles / per_split)
        work = math.ceil(row_blocks * splits / processors) * per_split
        if work < least and splits <= MOST_SPLITS:
            best, least = (splits, per_split), work
    return best
