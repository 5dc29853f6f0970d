"""Attention by tree: attention over a forest without a mask over the whole row.

With the mask of `ForestBatch.attention_mask`, attention is quadratic in the row's length, even for
masked scores, and rows are padded. Here a root with its first leaf is one causal sequence. Every
further leaf attends to its root and to itself. Trees follow one another in a row without padding.
Masked scores are therefore never computed.

The function is registered with transformers under two names. `tree` calls SDPA once per leaf.
`tree_varlen` is one operator for all trees (`varlen_attention`). Layers select it by their
configuration, and nothing is patched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from realign.modeling import varlen_attention
from realign.modeling.varlen_attention import Sequences

CALLS, VARLEN = NAMES = "tree", "tree_varlen"
"""Values of `_attn_implementation` for attention by tree: several calls, or one operator."""

_IGNORED = (
    "position_ids",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
)
"""Options of layers that do not change attention over a forest."""

Trees = tuple[tuple[tuple[int, ...], ...], ...]
"""For each row its trees in order, each the lengths of its root and leaves."""


def no_mask(device: torch.device) -> torch.Tensor:
    """A placeholder mask. Its four axes keep transformers from creating a mask."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (R, heads, T, D)
    key: torch.Tensor,  # (R, groups, T, D)
    value: torch.Tensor,  # (R, groups, T, V)
    attention_mask: torch.Tensor | None,
    *,
    trees: Trees | None = None,
    sequences: Sequences | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """Attention within each tree of each row, without a mask. Padding gives zeros.

    With `trees` it calls SDPA, with `sequences` the varlen operator. With neither, in a forward
    over plain sequences, it calls transformers' `sdpa`.

    Returns:
        The output, (R, T, heads, V), and None in place of attention weights.

    Raises:
        RuntimeError: when the model's layers got trees and did not pass them on.
        ValueError: for an option that this attention does not compute, such as attention sinks.
    """
    if trees is not None or sequences is not None:
        _check_options(module, options)
    if sequences is not None:
        # Under autocast RoPE returns query and key in fp32. The value keeps the autocast dtype. The
        # kernels need equal widths, and zeros change neither scores nor the other columns.
        width = max(query.shape[-1], value.shape[-1])
        rows = [
            F.pad(states.to(value.dtype), (0, width - states.shape[-1]))
            .transpose(1, 2)
            .flatten(0, 1)
            for states in (query, key, value)
        ]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out, _ = varlen_attention.forest_attention(*rows, *sequences, scale)
        return out.unflatten(0, (len(query), -1))[..., : value.shape[-1]], None
    if trees is None:
        if attention_mask is not None and attention_mask.numel() == 1 < query.shape[2]:
            raise RuntimeError(
                f"{type(module).__name__} does not pass trees to attention; use --attention sdpa."
            )
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    shared = {
        "dropout_p": dropout,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    rows = [
        _row(q, k, v, row, shared)
        for q, k, v, row in zip(query.split(1), key.split(1), value.split(1), trees, strict=True)
    ]
    return torch.cat(rows).transpose(1, 2), None


def _check_options(module: torch.nn.Module, options: dict) -> None:
    """Raise ValueError for an option that would be left out of the attention of a layer."""
    for name, value in options.items():
        default = name == "is_causal"  # the other flags are off by default
        if name not in _IGNORED and value is not None and value is not default:
            raise ValueError(
                f"{type(module).__name__} passes {name} to its attention, which attention by tree "
                "does not compute. Use --attention eager. Load a model for RDPOTrainer with "
                'attn_implementation="eager".'
            )


def _row(query, key, value, trees, shared: dict) -> torch.Tensor:
    """Attention over one row, (1, heads, T, V)."""
    sizes = [size for root, first, *more in trees for size in (root + first, *more)]
    sizes.append(query.shape[2] - sum(sizes))
    # One split: its backward concatenates gradients. The backward of a slice pads to full length.
    queries, keys, values = (iter(states.split(sizes, 2)) for states in (query, key, value))
    out = []
    for root, _, *more in trees:
        k, v = next(keys), next(values)
        out.append(F.scaled_dot_product_attention(next(queries), k, v, is_causal=True, **shared))
        for size in more:
            seen = torch.ones(size, root + size, dtype=torch.bool, device=query.device).tril(root)
            out.append(
                F.scaled_dot_product_attention(
                    next(queries),
                    _for_heads(torch.cat([k[:, :, :root], next(keys)], 2), query.shape[1]),
                    _for_heads(torch.cat([v[:, :, :root], next(values)], 2), query.shape[1]),
                    attn_mask=seen,
                    **shared | {"enable_gqa": False},
                )
            )
    out.append(query.new_zeros(1, query.shape[1], sizes[-1], value.shape[-1]))
    return torch.cat(out, 2)


def _for_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat keys or values per head: CUDA's fused kernels take either a mask or groups."""
    return states.repeat_interleave(heads // states.shape[1], 1)


for name in NAMES:
    AttentionInterface.register(name, forest_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
