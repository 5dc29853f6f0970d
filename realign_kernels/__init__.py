"""Fused preference losses over a language-model head.

Suggested reading order:

1. `objectives`: the losses
2. `reference`: the specification
3. `functional`: the public functions
4. `autograd`: eager mode, and `ops`: operators for compiled graphs
5. `backends.base`: the statistics of a row
6. `backends.chunked`: GEMM, row kernel, GEMM
7. `backends.torch`, `backends.cpp`, `backends.triton`: the kernels
8. `backends.dispatch`: backend choice

docs/kernels.md is a one-page summary.
"""

from realign_kernels import objectives, refcache
from realign_kernels._extension import missing_reason
from realign_kernels.backends.chunk_plan import default_chunk_rows, workspace_bytes
from realign_kernels.backends.dispatch import explain, use_backend
from realign_kernels.functional import (
    RDPOLoss,
    linear_logprobs,
    linear_preference_loss,
    preference_loss,
    rdpo_loss,
)
from realign_kernels.lm_head import head_inputs, head_parameters
from realign_kernels.nonfinite import NonFiniteError
from realign_kernels.objectives import Leaf, Objective, PreferenceOutput, RDPOOutput
from realign_kernels.refcache import MissingReferences, ReferenceCache, References
from realign_kernels.refcache.keys import array_digest, collect_leaves, leaf_keys
from realign_kernels.refcache.packing import ForestPacking, pack_forest

__all__ = [
    "ForestPacking",
    "Leaf",
    "MissingReferences",
    "NonFiniteError",
    "Objective",
    "PreferenceOutput",
    "RDPOLoss",
    "RDPOOutput",
    "ReferenceCache",
    "References",
    "array_digest",
    "collect_leaves",
    "default_chunk_rows",
    "explain",
    "head_inputs",
    "head_parameters",
    "leaf_keys",
    "linear_logprobs",
    "linear_preference_loss",
    "missing_reason",
    "objectives",
    "pack_forest",
    "preference_loss",
    "rdpo_loss",
    "refcache",
    "use_backend",
    "workspace_bytes",
]
