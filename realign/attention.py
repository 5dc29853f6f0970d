"""The forest's mask for each attention implementation of transformers.

Who sees whom is `ForestBatch.sees`; this gives it the form an implementation reads. Flash attention
reads no mask, so it cannot hide one leaf from another: with it a row is one leaf
(`layouts.Layout.separate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.utils import is_flash_attn_2_available

from realign import tree_attention
from realign.forest import Example, ForestBatch

IMPLEMENTATIONS = {
    "tree": tree_attention.NAME,
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


def row_budget(implementation: str, examples: Sequence[Example]) -> int:
    """Most tokens in a row of a forward over these examples, where `--row-tokens` says nothing.

    A row costs attention its length squared, unless the implementation skips what is not seen.
    """
    longest = max(example.longest_tree for example in examples)
    if implementation == tree_attention.NAME:  # one row, without padding
        return sum(example.tokens for example in examples)
    return max(longest, _FLEX_ROW) if implementation == "flex_attention" else longest


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
        For "tree" nothing that says it (`batch.trees` does). For "sdpa" (R, 1, T, T) bool, True
        where a token is seen; for "eager" (R, 1, T, T) `dtype`,
        to be added to the scores; for "flex_attention" a BlockMask.
    """
    if implementation == tree_attention.NAME:
        return tree_attention.no_mask(batch.segment.device)
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
