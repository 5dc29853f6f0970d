"""The reference cache: log-probs of a frozen model, computed once per distinct leaf."""

from realign_kernels.refcache.cache import (
    MissingReferences,
    ReferenceCache,
    References,
    compact,
    fingerprint_digest,
    inspect,
    tables,
)
from realign_kernels.refcache.keys import KEY, Leaves

__all__ = [
    "KEY",
    "Leaves",
    "MissingReferences",
    "ReferenceCache",
    "References",
    "compact",
    "fingerprint_digest",
    "inspect",
    "tables",
]
