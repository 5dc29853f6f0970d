"""Layouts: positions, attention mask and prompt sharing of a model family.

Families differ in a few mechanisms, each implemented here once. Four fields of `Layout` decide the
mask of a family: `both_ways`, `kinds`, `window` and `separate`. `ForestBatch.sees` applies them,
and `attention.forest_mask` formats the mask for an attention implementation.

To add a family:

1. Run `python -m realign.cache fill --model MODEL --pairs FILE`. `ForestModel.check_forest`
   compares the forest of the first record with separate forwards. If the printed difference is
   rounding, no code is needed.
2. If tokens see each other both ways, add the model type to `_BOTH_WAYS`. `layout_of` takes
   positions, windows and kinds of layers from the model's configuration and code.
3. Add a tiny model to tests/helpers/tiny_vlms.py, its processor to tiny_processors.py, and the
   model type to `TESTED`. tests/modeling/test_families.py compares it with plain transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

TESTED = {
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3",
    "smolvlm", "internvl", "gemma3", "paligemma", "janus", "qwen3_5",
}  # fmt: skip
"""Model types that tests compare with separate forwards (docs/families.md)."""

FULL, SLIDING = "full_attention", "sliding_attention"

_BOTH_WAYS = {"gemma3": "image", "paligemma": "prompt"}
"""Model types in which tokens of an image, or of the prompt, see each other both ways."""


@dataclass
class Layout:
    """Properties of a model family that decide the rows of a batch.

    Attributes:
        image_token_id: the token that image features replace.
        first_position: first position of a prompt.
        rope_index: computes positions on several axes (M-RoPE); None for one axis.
        grids: names of the image inputs that `rope_index` takes.
        both_ways: "image" if tokens of one image see each other both ways, "prompt" if all tokens
            of the prompt do, None for causal attention.
        kinds: kinds of layers: full attention, sliding attention, or others.
        window: positions that a token sees in a sliding layer, itself included.
        separate: reason why responses cannot share a prompt; None if they can.
        ends: ids of the tokens at which the model stops, from its generation settings.
    """

    image_token_id: int
    first_position: int = 0
    rope_index: Callable | None = None
    grids: tuple[str, ...] = ()
    both_ways: str | None = None
    kinds: tuple[str, ...] = (FULL,)
    window: int | None = None
    separate: str | None = None
    ends: tuple[int, ...] = ()

    @property
    def shares_prefix(self) -> bool:
        """Whether responses share one copy of their prompt."""
        return self.separate is None

    @property
    def causal(self) -> bool:
        """Whether a token sees exactly itself and the earlier tokens of its sequence."""
        return self.both_ways is None and self.kinds == (FULL,)

    def positions(self, ids: np.ndarray, grids: dict[str, torch.Tensor]) -> np.ndarray:
        """Positions of a prompt, (axes, P) int64; its responses continue from the largest."""
        if self.rope_index is None or not grids:
            axes = 1 if self.rope_index is None else 3
            return np.tile(self.first_position + np.arange(len(ids)), (axes, 1))
        tokens = torch.from_numpy(ids)[None]
        kinds = (tokens == self.image_token_id).int()
        positions, _ = self.rope_index(tokens, mm_token_type_ids=kinds, **grids)
        return positions[:, 0].numpy()

    def blocks(self, ids: np.ndarray) -> np.ndarray:
        """(P,) int64: index of the block of each token of a prompt, -1 for none."""
        if self.both_ways == "prompt":
            return np.zeros(len(ids), np.int64)
        image = ids == self.image_token_id
        first = image & ~np.append(False, image[:-1])
        return np.where(image, np.cumsum(first) - 1, -1)


def layout_of(vlm: PreTrainedModel) -> Layout:
    """The layout of a model.

    Raises:
        ValueError: for a model that does not support forest batches.
    """
    kind = vlm.config.model_type
    accepted = inspect.signature(vlm.model.forward).parameters
    if not hasattr(vlm.model, "get_image_features") or "mm_encoder_outputs" not in accepted:
        raise ValueError(
            f"models of type {kind!r} do not take image features in place of pixels, so an image "
            f"cannot be encoded once for many prompts. Known types: {', '.join(sorted(TESTED))}."
        )
    if "token_type_ids" in accepted and kind not in _BOTH_WAYS:
        raise ValueError(
            f"models of type {kind!r} have token types of unknown meaning. Known types: "
            f"{', '.join(sorted(TESTED))}."
        )
    text = vlm.config.get_text_config()
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(text, name, None) not in (None, 1):
            raise ValueError(
                f"the model scales its logits ({name} = {getattr(text, name)}), which the loss "
                "does not support. Use a model of a different type."
            )
    rope_index = getattr(vlm.model, "get_rope_index", None)
    names = inspect.signature(rope_index).parameters if rope_index else ()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [SLIDING if window else FULL]
    return Layout(
        image_token_id=vlm.config.image_token_id,
        first_position=1 if kind == "paligemma" else 0,
        rope_index=rope_index,
        grids=tuple(name for name in names if name.startswith("image_")),
        both_ways=_BOTH_WAYS.get(kind),
        kinds=tuple(sorted(set(kinds))),
        window=window,
        separate=_separate(kinds),
        ends=_ends(vlm),
    )


def head_width(text: PreTrainedConfig) -> int:
    """Width of an attention head of a language model."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _ends(vlm: PreTrainedModel) -> tuple[int, ...]:
    """The end tokens in the generation settings of a model, one or several."""
    ends = getattr(vlm.generation_config, "eos_token_id", None)
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


def _separate(kinds: list[str]) -> str | None:
    """The reason why responses cannot share a prompt, or None."""
    if unmasked := sorted(set(kinds) - {FULL, SLIDING}):
        return f"in its {', '.join(unmasked)} layers no mask hides one response from another"
    return None
