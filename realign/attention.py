"""The forest's mask for each attention implementation of transformers.

Who sees whom is `ForestBatch.sees`; this gives it the form an implementation reads. Flash attention
reads no mask, so it cannot hide one leaf from another: with it a row is one leaf
(`layouts.Layout.separate`).
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.utils import is_flash_attn_2_available

from realign.forest import ForestBatch

IMPLEMENTATIONS = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
    "flash": "flash_attention_2",
}
"""transformers' names of the implementations, by those of `--attention`."""

_FLEX_ROW = 8192  # tokens; a longer row costs flex nothing, since it skips what is not seen


def check(attention: str, device: torch.device) -> None:
    """Refuse an implementation that does not train on `device`.

    Raises:
        ValueError: for flex without CUDA, and for flash without CUDA or its package.
    """
    if attention == "flash" and not (device.type == "cuda" and is_flash_attn_2_available()):
        raise ValueError(
            "attention is 'flash', which needs a GPU and the package flash-attn, and one of them is"
            " missing here. Use --attention sdpa."
        )
    if attention == "flex" and device.type != "cuda":
        raise ValueError(
            "attention is 'flex', whose kernels have a backward on CUDA alone, and there is no "
            "GPU. Use --attention sdpa."
        )


def row_tokens(attention: str, longest_tree: int) -> int:
    """The default of `--row-tokens` in training; 0 is the longest tree of each batch."""
    return max(longest_tree, _FLEX_ROW) if attention == "flex" else 0


def forest_mask(
    batch: ForestBatch,
    implementation: str,
    dtype: torch.dtype,
    window: int | None = None,
    blocks_ignore_window: bool = False,
) -> torch.Tensor | BlockMask:
    """Who may attend to whom, as transformers' `implementation` reads it.

    Args:
        batch: a batch whose leaves share roots.
        implementation: of transformers.
        dtype: in which the model computes.
        window: of sliding layers (`ForestBatch.sees`).
        blocks_ignore_window: as there.

    Returns:
        For "sdpa" (R, 1, T, T) bool, True where a token is seen; for "eager" (R, 1, T, T) `dtype`,
        to be added to the scores; for "flex_attention" a BlockMask.
    """
    if implementation == "flex_attention":
        rows, tokens = batch.segment.shape
        return create_block_mask(
            batch.sees(window, blocks_ignore_window),
            rows,
            None,
            tokens,
            tokens,
            device=batch.segment.device,
            _compile=batch.segment.is_cuda,  # else all T x T places are written out first
        )
    seen = batch.attention_mask(window, blocks_ignore_window)
    if implementation == "eager":
        hidden = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, hidden)
    return seen
