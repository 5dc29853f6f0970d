"""The attention implementation of a run, and the forest's mask in the form that it reads.

`ForestBatch.sees` defines the mask. Attention by tree reads none: it gets the lengths of the trees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from realign.modeling import tree_attention, varlen_attention
from realign.modeling.forest import Example, ForestBatch

IMPLEMENTATIONS = {
    "tree": tree_attention.CALLS,
    "flash": tree_attention.VARLEN,
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
}
"""transformers' names of the implementations, by those of `--attention`."""

_FLEX_ROW = 8192  # tokens; a longer row costs flex nothing, since it skips masked pairs


def choose(
    attention: str, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> tuple[str, str | None]:
    """Choose the implementation for the setting `attention` on a device.

    Args:
        attention: a key of `IMPLEMENTATIONS`.
        device: device of the model.
        dtype: compute dtype.
        compiled: whether its layers are compiled.

    Returns:
        A key of `IMPLEMENTATIONS`; and a line with the reason where it is not `attention`.

    Raises:
        ValueError: for flex without CUDA, and for flash without its kernel.
    """
    if attention == "flex" and device.type != "cuda":
        raise ValueError(
            "attention is 'flex', whose kernels have a backward on CUDA only, and there is no "
            "GPU. Use --attention sdpa."
        )
    if attention not in ("tree", "flash"):
        return attention, None
    missing = varlen_attention.missing(device, dtype)
    if attention == "flash" and missing:
        raise ValueError(
            "attention is 'flash', which needs torch's flash kernel in fp16 or bf16, and "
            f"{missing}. Use --attention tree."
        )
    if not missing:
        reason = f"attention by tree is one operator a layer: {dtype} on CUDA"
        return "flash", reason if attention == "tree" else None
    if compiled:  # a call for each tree would compile again for every layout
        return "sdpa", f"attention by tree is sdpa under --compile: {missing}"
    return "tree", None


def row_budget(implementation: str, examples: Sequence[Example]) -> int:
    """Most tokens in a row of a forward over these examples, where `--row-tokens` is 0.

    A row costs attention its length squared, unless the implementation skips masked pairs.
    """
    longest = max(example.longest_tree for example in examples)
    if implementation in tree_attention.NAMES:  # one row, without padding
        return sum(example.tokens for example in examples)
    return max(longest, _FLEX_ROW) if implementation == "flex_attention" else longest


def forest_mask(
    batch: ForestBatch,
    implementation: str,
    dtype: torch.dtype,
    window: int | None = None,
    blocks_ignore_window: bool = False,
) -> torch.Tensor | BlockMask:
    """The attention mask of a batch, as transformers' `implementation` reads it.

    Args:
        batch: a batch whose leaves share roots.
        implementation: transformers' name of the implementation.
        dtype: compute dtype.
        window: window of sliding layers (`ForestBatch.sees`).
        blocks_ignore_window: see `ForestBatch.sees`.

    Returns:
        By tree a placeholder, as `batch.trees` and `batch.sequences` replace the mask. For "sdpa"
        (R, 1, T, T) bool, True where a token is seen; for "eager" (R, 1, T, T) `dtype`, to be added
        to the scores; for "flex_attention" a BlockMask.
    """
    if implementation in tree_attention.NAMES:
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
