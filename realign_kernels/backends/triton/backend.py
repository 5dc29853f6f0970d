"""The chunked head with Triton row kernels, and the forward without logits where no gradient is."""

from realign_kernels.chunked import ChunkedBackend
from realign_kernels.torch_backend import buffers, empty, gemm, release
from realign_kernels.triton.exp_head import fused, fuses
from realign_kernels.triton.finish import finish, scale
from realign_kernels.triton.forward import head_stats
from realign_kernels.triton.loss import preference_sums, supports
from realign_kernels.triton.rows import read_rows
from realign_kernels.triton.scatter import add_rows

__all__ = [
    "add_rows",
    "backend",
    "buffers",
    "empty",
    "finish",
    "fused",
    "fuses",
    "gemm",
    "head_stats",
    "preference_sums",
    "read_rows",
    "release",
    "scale",
    "supports",
]


def backend() -> ChunkedBackend:
    """See `dispatch.Backend`."""
    import realign_kernels.triton.backend as kernels

    return ChunkedBackend(kernels)
