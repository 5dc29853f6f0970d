"""The chunked head with Triton row kernels, and the forward without logits where no gradient is."""

from realign_kernels.backends.chunked import ChunkedBackend
from realign_kernels.backends.torch import buffers, empty, gemm, release
from realign_kernels.backends.triton.exp_head import fused, fuses
from realign_kernels.backends.triton.finish import finish, scale
from realign_kernels.backends.triton.forward import head_stats
from realign_kernels.backends.triton.loss import preference_sums, supports
from realign_kernels.backends.triton.rows import read_rows
from realign_kernels.backends.triton.scatter import add_rows

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
    import realign_kernels.backends.triton.backend as kernels

    return ChunkedBackend(kernels)
