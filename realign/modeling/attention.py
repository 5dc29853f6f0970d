"""Choice of the attention implementation, and the forest's attention mask for it.

`ForestBatch.sees` defines the mask. Attention by tree uses the lengths of the trees instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from realign.modeling import tree_attention, varlen_attention
from realign.modeling.forest import Example, ForestBatch
from realign.modeling.layouts import Layout, head_width

IMPLEMENTATIONS = {
    "tree": tree_attention.CALLS,
    "flash": tree_attention.VARLEN,
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
}
"""Names of the implementations in transformers, by the values of `--attention`."""

_FLEX_ROW = 8192  # tokens; flex skips masked pairs, so long rows cost it nothing


def choose(
    attention: str, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> tuple[str, str | None]:
    """Choose the implementation for the setting `attention` on a device.

    Args:
        attention: a key of `IMPLEMENTATIONS`.
        device: device of the model.
        dtype: compute dtype.
        compiled: whether the model's layers are compiled.

    Returns:
        A key of `IMPLEMENTATIONS`, and a line with the reason if it differs from `attention`.

    Raises:
        ValueError: for flex without CUDA, and for flash without its kernel.
    """
    if attention == "flex" and device.type != "cuda":
        raise ValueError(
            "--attention is 'flex', whose kernels have a backward on CUDA only, and there is no "
            "GPU. Use --attention sdpa."
        )
    if attention not in ("tree", "flash"):
        return attention, None
    missing = varlen_attention.missing(device, dtype)
    if attention == "flash" and missing:
        raise ValueError(
            "--attention is 'flash', which needs torch's flash kernel in fp16 or bf16, and "
            f"{missing}. Use --attention tree."
        )
    if not missing:
        reason = f"attention by tree is one operator a layer: {dtype} on CUDA"
        return "flash", reason if attention == "tree" else None
    if compiled:  # one call per tree would recompile for every layout
        return "sdpa", f"attention by tree is sdpa under --compile: {missing}"
    return "tree", None


def implementations(config: PreTrainedConfig, attention: str) -> dict[str, str]:
    """The `attn_implementation` of a vision-language model for the setting `attention`.

    Args:
        config: configuration of the whole model.
        attention: a key of `IMPLEMENTATIONS`, for the language model.

    Returns:
        Names of implementations for the whole model ("") and its language model. Eager replaces
        sdpa, tree and flash where the class in transformers supports no sdpa.
    """
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    language = MODEL_MAPPING.get(type(config.get_text_config()), None)
    if attention in ("tree", "flash", "sdpa") and not _supports_sdpa(language):
        attention = "eager"
    return {
        "": "sdpa" if _supports_sdpa(whole) else "eager",
        "text_config": IMPLEMENTATIONS[attention],
    }


def suitable(decoder: PreTrainedModel, layout: Layout) -> tuple[str, str | None]:
    """The implementation for a language model, which may differ from that in its configuration.

    Args:
        decoder: the language model.
        layout: its layout.

    Returns:
        transformers' name of the implementation, and the reason if it is not the configured one or
        could not be another one.

    Raises:
        ValueError: for an implementation that supports no forests.
    """
    config = decoder.config
    attends = str(config._attn_implementation)
    if attends not in IMPLEMENTATIONS.values():
        raise ValueError(
            f"the model attends by {attends!r}, which supports no forests. Load it with one of "
            f"these as attn_implementation: {', '.join(IMPLEMENTATIONS.values())}."
        )
    if attends != IMPLEMENTATIONS["flex"] and not _supports_sdpa(type(decoder)):
        # They have softcaps or attention sinks, which sdpa ignores.
        return "eager", f"{type(decoder).__name__} supports no sdpa"
    if attends not in tree_attention.NAMES:
        return attends, None
    if not layout.causal:
        return "sdpa", "not every layer has full causal attention"
    if getattr(config, "attention_dropout", 0):
        return "sdpa", "it has dropout"
    if attends == tree_attention.VARLEN:
        width = head_width(config)
        if not varlen_attention.supports_width(width):
            return tree_attention.CALLS, f"its heads are {width} wide"
    return attends, None


def _supports_sdpa(model_class: object) -> bool:
    return getattr(model_class, "_supports_sdpa", True)


def row_budget(implementation: str, examples: Sequence[Example]) -> int:
    """Maximum number of tokens in a row of a forward over these examples (`--row-tokens 0`).

    The cost of attention is quadratic in the row's length, unless masked pairs are skipped.
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
    blocks: bool = True,
) -> torch.Tensor | BlockMask:
    """The attention mask of a batch in the format of an attention implementation.

    Args:
        batch: a batch whose leaves share roots.
        implementation: transformers' name of the implementation.
        dtype: compute dtype.
        window: window of sliding layers (`ForestBatch.sees`).
        blocks_ignore_window: see `ForestBatch.sees`.
        blocks: see `ForestBatch.sees`.

    Returns:
        For attention by tree a placeholder, since `batch.trees` and `batch.sequences` replace the
        mask. For "sdpa" (R, 1, T, T) bool, True where a query sees a key. For "eager" (R, 1, T, T)
        `dtype`, to add to the scores. For "flex_attention" a BlockMask.
    """
    if implementation in tree_attention.NAMES:
        return tree_attention.no_mask(batch.segment.device)
    if implementation == "flex_attention":
        rows, tokens = batch.segment.shape
        return create_block_mask(
            batch.sees(window, blocks_ignore_window, blocks),
            rows,
            None,
            tokens,
            tokens,
            device=batch.segment.device,
            _compile=batch.segment.is_cuda,  # uncompiled, it materializes the T x T mask
        )
    seen = batch.attention_mask(window, blocks_ignore_window, blocks)
    if implementation == "eager":
        hidden = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, hidden)
    return seen
