"""Rows that pass the head together: from memory, and on CUDA from the multiprocessors."""

import functools
import math
from typing import NamedTuple

import torch


class Processor(NamedTuple):
    """Bytes of memory and multiprocessors of a GPU."""

    memory: int
    multiprocessors: int


H100 = Processor(80 * 2**30, 132)
"""Assumed where a plan is made for a GPU that is not there, as on the pages of calculations."""

LOGIT, E = 4, 2
"""Bytes of a logit in fp32 and of its E in half precision."""


@functools.cache
def processor(device: torch.device) -> Processor:
    """The GPU of a CUDA device."""
    if not torch.cuda.is_available():
        return H100
    properties = torch.cuda.get_device_properties(device)
    return Processor(properties.total_memory, properties.multi_processor_count)


def default_chunk_rows(vocabulary: int, device: torch.device, size: int = LOGIT + E) -> int:
    """Rows of a chunk: on the CPU at least 256, more where their fp32 logits fit into 64 MiB.

    On CUDA at least 1024, more where `size` bytes for each logit fit into a 40th of the memory, at
    most 1.75 GiB: 2,048 rows at V = 151936.

    The GEMMs are faster the taller the chunk: on 2 cores at H = 1024, V = 32000 in bf16, 768 rows
    through both GEMMs take 0.32 s in chunks of 32, 0.19 s of 128, 0.15 s of 256 and of 768. On an
    H200 at H = 4096, V = 128256 they run at 696 TFLOP/s in chunks of 1,024 and 738 of 2,048.
    """
    if device.type != "cuda":
        return max(256, 64 * 2**20 // (LOGIT * max(vocabulary, 1)))
    budget = min(processor(device).memory // 40, 7 * 2**28)
    return max(1024, budget // (size * max(vocabulary, 1)))


def even_step(rows: int, limit: int) -> int:
    """The chunk, at most `limit`, that leaves no short, slow rest: 600 rows at 524 are 2 x 300."""
    return max(1, math.ceil(rows / math.ceil(max(rows, 1) / limit)))


TILE = 128, 256
"""Rows and columns of a GEMM's tile on Hopper."""


def filling_step(rows: int, limit: int, width: int, multiprocessors: int) -> int:
    """The chunk, at most `limit`, whose product with the weight fills the multiprocessors best.

    That product has `width` columns: 2,048 x 4,096 are 16 x 16 tiles, 97 % of two rounds of 132
    multiprocessors. Of equal chunks the smallest, which leaves the longest rest.
    """
    high, wide = TILE
    columns = math.ceil(width / wide)

    def rounds(chunk: int) -> int:
        return math.ceil(math.ceil(chunk / high) * columns / multiprocessors)

    least = even_step(rows, limit)
    if least >= rows:
        return max(rows, 1)
    steps = range(math.ceil(least / high) * high, limit + 1, high) or [least]
    return min(steps, key=lambda step: rows // step * rounds(step) + rounds(rows % step))


def chunk_step(rows: int, limit: int, width: int, device: torch.device) -> int:
    """The chunk, at most `limit`, for a head of `width`: filling on CUDA, even elsewhere."""
    if device.type != "cuda":
        return even_step(rows, limit)
    return filling_step(rows, limit, width, processor(device).multiprocessors)


def kept_rows(chunk: int, width: int, device: torch.device) -> int:
    """Rows whose E is kept until one product gives the gradient of a weight (V, width).

    Twice a chunk, so that few examples are split. On CUDA at least 2 * width rows: their E is as
    large as the fp32 sum of several such gradients, which is then not needed. On the CPU E
    overwrites its logits.
    """
    return max(2 * chunk, 2 * width if device.type == "cuda" else 0)


def workspace_bytes(
    rows: int, width: int, vocabulary: int, device: torch.device | str, *, trains: bool
) -> int:
    """Bytes of the largest buffers of a call with a gradient: logits and E, at the defaults.

    Args:
        rows: response rows.
        width: width of the head.
        vocabulary: rows of the head; with a process group, those of a rank.
        device: device of the tensors.
        trains: whether the head trains.
    """
    device = torch.device(device)
    chunk = default_chunk_rows(vocabulary, device)
    kept = kept_rows(chunk, width, device) if trains else chunk
    if device.type != "cuda":  # E overwrites its logits
        return LOGIT * min(rows, kept) * vocabulary
    return (LOGIT * min(rows, chunk) + E * min(rows, kept)) * vocabulary
