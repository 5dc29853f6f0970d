"""Masking: selects the segments of a response to replace. Registry `MASKERS`.

To add a masker, write a function with the arguments of `mask_response` in a module of this folder,
and add it to `MASKERS`. `--masker NAME` then selects it. Any other value of `--masker` is an engine
that lists the segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from realign.pairs.masking.mask import Masked, mask_response

__all__ = ["MASKERS", "Masker"]


class Masker(Protocol):
    """Hides segments of a response, or returns None if there is nothing to hide.

    See `mask_response`.
    """

    def __call__(
        self,
        text: str,
        categories: Sequence[str],
        segments: int,
        rng: np.random.Generator,
        *,
        share: float | None = None,
    ) -> Masked | None: ...


MASKERS: dict[str, Masker] = {"rules": mask_response}
"""Name -> masker."""
