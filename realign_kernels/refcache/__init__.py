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

__all__ = [
    "MissingReferences",
    "ReferenceCache",
    "References",
    "compact",
    "fingerprint_digest",
    "inspect",
    "tables",
]
