"""Chunk sizes: rows that pass through the head together, by memory and, on CUDA, by SM count."""

import functools
import math
from typing import NamedTuple

import torch


class Processor(NamedTuple):
    """Memory in bytes and number of multiprocessors of a GPU."""

    memory: int
    multiprocessors: int


H100 = Processor(80 * 2**30, 132)
"""The GPU assumed for plans on a machine without one, such as memory estimates."""

LOGIT, E = 4, 2
"""Bytes per logit: the fp32 logit, and its E in half precision."""


@functools.cache
def processor(device: torch.device) -> Processor:
    """The GPU of a CUDA device."""
    if not torch.cuda.is_available():
        return H100
    properties = torch.cuda.get_device_properties(device)
    return Processor(properties.total_memory, properties.multi_processor_count)


def default_chunk_rows(vocabulary: int, device: torch.device, size: int = LOGIT + E) -> int:
    """Default number of rows in a chunk.

    On the CPU it is at least 256, or as many rows as have 64 MiB of fp32 logits. On CUDA it is at
    least 1024, or as many rows as fit into a 40th of the memory (at most 1.75 GiB) with `size`
    bytes per logit. That is 2,048 rows at V = 151936.

    Taller chunks have faster GEMMs. On 2 cores (H = 1024, V = 32000, bf16) both GEMMs of 768 rows
    take 0.32 s in chunks of 32 rows, 0.19 s in chunks of 128, and 0.15 s in chunks of 256 or 768.
    On an H200 (H = 4096, V = 128256) they run at 696 TFLOP/s in chunks of 1,024 rows, and at 738
    in chunks of 2,048.
    """
    if device.type != "cuda":
        return max(256, 64 * 2**20 // (LOGIT * max(vocabulary, 1)))
    budget = min(processor(device).memory // 40, 7 * 2**28)
    return max(1024, budget // (size * max(vocabulary, 1)))


def even_step(rows: int, limit: int) -> int:
    """Chunk size up to `limit` without a short last chunk: 600 rows at limit 524 are 2 x 300."""
    return max(1, math.ceil(rows / math.ceil(max(rows, 1) / limit)))


TILE = 128, 256
"""Rows and columns of a GEMM's tile on Hopper."""


def filling_step(rows: int, limit: int, width: int, multiprocessors: int) -> int:
    """Chunk size up to `limit` for which the product E W fills the multiprocessors best.

    That product has `width` columns. A chunk of 2,048 rows at width 4,096 has 16 x 16 tiles, which
    fill 97 % of two rounds of 132 multiprocessors. Among equally good sizes the smallest wins,
    because it leaves the longest last chunk.
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
    """Chunk size up to `limit`: `filling_step` on CUDA, `even_step` on other devices."""
    if device.type != "cuda":
        return even_step(rows, limit)
    return filling_step(rows, limit, width, processor(device).multiprocessors)


def kept_rows(chunk: int, width: int, device: torch.device) -> int:
    """Number of rows whose E is kept for one product that gives the weight gradient (V, width).

    It is twice a chunk, so that few examples are split. On CUDA it is at least 2 * width. The E of
    that many rows is as large as an fp32 sum of weight gradients, and replaces that sum. On the CPU
    E overwrites its logits.
    """
    return max(2 * chunk, 2 * width if device.type == "cuda" else 0)


def workspace_bytes(
    rows: int, width: int, vocabulary: int, device: torch.device | str, *, trains: bool
) -> int:
    """Bytes of the largest buffers of a call with a gradient (logits and E), with default chunks.

    Args:
        rows: response rows.
        width: width of the head.
        vocabulary: rows of the head, or of this rank's part with a process group.
        device: device of the tensors.
        trains: whether the head trains.
    """
    device = torch.device(device)
    chunk = default_chunk_rows(vocabulary, device)
    kept = kept_rows(chunk, width, device) if trains else chunk
    if device.type != "cuda":  # E overwrites its logits
        return LOGIT * min(rows, kept) * vocabulary
    return (LOGIT * min(rows, chunk) + E * min(rows, kept)) * vocabulary
