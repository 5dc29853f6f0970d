"""Layouts: positions, attention mask and prompt sharing of a model family.

Families differ in a few mechanisms, each implemented here once. Four fields of `Layout` decide the
mask of a family: `both_ways`, `kinds`, `window` and `separate`. `ForestBatch.sees` applies them,
and `attention.forest_mask` formats the mask for an attention implementation.

To add a family:

1. Run `python -m realign.cache fill --model MODEL --pairs FILE`. `ForestModel.check_forest`
   compares forests with plain forwards, and names the part that differs. If it passes, no code is
   needed.
2. If tokens see each other both ways, add the model type to `_BOTH_WAYS`. `layout_of` takes
   positions, windows and kinds of layers from the model's configuration and code.
3. Add a tiny model to tests/helpers/tiny_more.py, its processor to tiny_more_processors.py, and the
   model type to `TESTED`. tests/modeling/test_families.py compares it with plain transformers. If
   its tower cannot take several images in one call, add the type to `ONE_BY_ONE`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

TESTED = {
    "aria", "deepseek_vl", "deepseek_vl_hybrid", "ernie4_5_vl_moe", "gemma3", "gemma4",
    "gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "idefics2", "idefics3", "internvl",
    "janus", "kimi_k25", "lfm2_vl", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "minicpmv4_6", "minicpmv4_7", "mistral3", "molmo2", "ovis2", "paddleocr_vl", "paligemma",
    "perception_lm", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
    "smolvlm", "video_llama_3", "video_llava", "vipllava",
}  # fmt: skip
"""Model types that tests compare with plain forwards (docs/families.md)."""

FULL, SLIDING = "full_attention", "sliding_attention"

ONE_BY_ONE = {"lfm2_vl", "minicpmv4_6", "minicpmv4_7", "molmo2", "perception_lm"}
"""Tested types whose tower takes one image a call: images share an axis, tiles or indices."""

_PIXELS = "pixel_values"
_OF_TEXT = {
    "attention_mask", "cache_position", "input_ids", "inputs_embeds", "labels", "logits_to_keep",
    "mm_encoder_outputs", "past_key_values", "per_layer_inputs", "position_ids", "return_dict",
    "use_cache",
}  # fmt: skip
"""Parameters of a model's forward that no processor fills for an image."""
_UNUSED = ("vqmodel", "generation", "audio", "embed_audio", "speech")
"""Prefixes of modules that no forward with images calls: image generation, and sound."""


_BOTH_WAYS = {"gemma3": "image", "molmo2": "images", "paligemma": "prompt"}
"""Types of models with attention both ways (`Layout.both_ways`), besides those with a setting."""

Columns = Mapping[str, np.ndarray]
"""Token columns by name: integers for each token of a prompt, besides its ids."""


@dataclass
class Layout:
    """Properties of a model family that decide the rows of a batch.

    Attributes:
        image_token_id: the token that image features replace.
        first_position: first position of a prompt.
        rope_index: computes positions on several axes (M-RoPE); None for one axis.
        grids: names of the image inputs that positions, or the language model, depend on.
        accepts: names of the parameters of `model.forward`.
        tower_inputs: names of the parameters of `model.get_image_features`.
        both_ways: which tokens see each other both ways. "image" means those of one image, "images"
            those of all images of a prompt, and "prompt" the whole prompt. None means none.
        types: the token column that marks image tokens, if the model reads one.
        both_ways_kinds: the kinds of layers in which they do.
        beyond_window: whether they do so beyond the window of a sliding layer.
        kinds: kinds of layers: full attention, sliding attention, or others.
        window: positions that a token sees in a sliding layer, itself included.
        separate: reason why responses cannot share a prompt; None if they can.
        one_by_one: whether the vision tower gets one image a call.
        ends: ids of the tokens at which the model stops, from its generation settings.
    """

    image_token_id: int
    first_position: int = 0
    rope_index: Callable | None = None
    grids: tuple[str, ...] = ()
    accepts: frozenset[str] = frozenset()
    tower_inputs: frozenset[str] = frozenset()
    both_ways: str | None = None
    types: str | None = None
    both_ways_kinds: tuple[str, ...] = (FULL, SLIDING)
    beyond_window: bool = False
    kinds: tuple[str, ...] = (FULL,)
    window: int | None = None
    separate: str | None = None
    one_by_one: bool = False
    ends: tuple[int, ...] = ()

    @property
    def shares_prefix(self) -> bool:
        """Whether responses share one copy of their prompt."""
        return self.separate is None

    @property
    def causal(self) -> bool:
        """Whether a token sees exactly itself and the earlier tokens of its sequence."""
        return self.both_ways is None and self.kinds == (FULL,)

    def columns(self, ids: np.ndarray, columns: Columns) -> Columns:
        """The token columns of a prompt that the model reads, (P,) int64 each.

        Args:
            ids: token ids of the prompt.
            columns: token columns of the processor. A missing `types` marks image tokens.
        """
        read = {name: column for name, column in columns.items() if name in self.accepts}
        if self.types and self.types not in read:
            image = ids == self.image_token_id
            read[self.types] = (image & (self.both_ways != "prompt")).astype(np.int64)
        return read

    def of_response(self, ids: np.ndarray, name: str, column: np.ndarray) -> int:
        """The value of a token column over responses: that of text, or of PaliGemma's suffix."""
        if self.both_ways == "prompt" and name == self.types:
            return 1
        text = column[ids != self.image_token_id]
        return int(text[-1]) if len(text) else 0

    def positions(self, ids: np.ndarray, grids: dict[str, torch.Tensor], columns: Columns):
        """Positions of a prompt, (axes, P) int64; its responses continue from the largest.

        Args:
            ids: token ids of the prompt.
            grids: the image inputs of `grids`, of all images of the prompt.
            columns: token columns of the prompt (`columns`).
        """
        if self.rope_index is None or not grids:
            axes = 1 if self.rope_index is None else 3
            return np.tile(self.first_position + np.arange(len(ids)), (axes, 1))
        accepted = inspect.signature(self.rope_index).parameters
        given = {n: torch.from_numpy(c)[None] for n, c in columns.items() if n in accepted}
        given |= {name: grid for name, grid in grids.items() if name in accepted}
        positions, _ = self.rope_index(torch.from_numpy(ids)[None], **given)
        return positions[:, 0].numpy()

    def blocks(self, columns: Columns) -> np.ndarray:
        """(P,) int64: index of the block of each token of a prompt, -1 for none.

        Args:
            columns: token columns of the prompt (`columns`).
        """
        assert self.types is not None
        types = columns[self.types]
        if self.both_ways == "prompt":
            return np.zeros(len(types), np.int64)
        image = (types == 1) | (types == 2)
        if self.both_ways == "images":
            return np.where(image, 0, -1)
        first = image & ~np.append(False, image[:-1])
        return np.where(image, np.cumsum(first) - 1, -1)


def layout_of(vlm: PreTrainedModel) -> Layout:
    """The layout of a model.

    Raises:
        ValueError: for a model that does not support forest batches.
    """
    kind, model = vlm.config.model_type, getattr(vlm, "model", None)
    accepted = parameters(model, "forward")
    image_token = getattr(vlm.config, "image_token_id", None)
    if "mm_encoder_outputs" not in accepted or image_token is None:
        raise ValueError(
            f"models of type {kind!r} do not take image features in place of pixels, so an image "
            f"cannot be encoded once for many prompts. Known types: {', '.join(sorted(TESTED))}."
        )
    text = vlm.config.get_text_config()
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(text, name, None) not in (None, 1):
            raise ValueError(
                f"the model scales its logits ({name} = {getattr(text, name)}), which the loss "
                "does not support. Use a model of a different type."
            )
    both_ways = _both_ways(kind, text)
    tower = parameters(model, "get_image_features")
    rope_index = getattr(model, "get_rope_index", None)
    for_positions = parameters(model, "get_rope_index")
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [SLIDING if window else FULL]
    types = "token_type_ids" if kind in ("gemma3", "paligemma") else "mm_token_type_ids"
    others = {n for n in accepted - tower - _OF_TEXT if not n.startswith(_PIXELS)}
    return Layout(
        image_token_id=image_token,
        first_position=1 if kind == "paligemma" else 0,
        rope_index=rope_index,
        grids=tuple(sorted((for_positions & tower) | others)),
        accepts=accepted,
        tower_inputs=tower,
        both_ways=both_ways,
        types=types if both_ways or types in for_positions else None,
        both_ways_kinds=(SLIDING,) if kind == "gemma4" else (FULL, SLIDING),
        beyond_window=kind in ("gemma4_unified", "paligemma"),
        kinds=tuple(sorted(set(kinds))),
        window=window,
        separate=_separate(kinds),
        one_by_one=kind not in TESTED or kind in ONE_BY_ONE,
        ends=_ends(vlm),
    )


def image_tower(vlm: PreTrainedModel) -> nn.Module | None:
    """The vision tower of a model, or None if it has none."""
    return next(iter(_towers(vlm, ("image", "video"))), None)


def frozen_by_default(vlm: PreTrainedModel, train_vision: bool) -> list[nn.Module]:
    """The parts of a model that are not trained: its towers, and what images do not use."""
    parts = _towers(vlm, ("audio",) if train_vision else ("image", "video", "audio"))
    children = vlm.model.named_children()
    return parts + [part for name, part in children if name.startswith(_UNUSED)]


def repeated(module: nn.Module) -> list[nn.Module]:
    """The members of a module's outermost `ModuleList`s."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in repeated(child)]


def _towers(vlm: PreTrainedModel, modalities: Sequence[str]) -> list[nn.Module]:
    """The distinct towers of a model for some modalities. The model is no tower of itself."""
    decoder = vlm.model.get_decoder()
    found = dict.fromkeys(vlm.model.get_encoder(modality) for modality in modalities)
    return [t for t in found if t is not None and all(part is not decoder for part in t.modules())]


def _both_ways(kind: str, text: PreTrainedConfig) -> str | None:
    """Which tokens see each other both ways (`Layout.both_ways`).

    Raises:
        ValueError: for a language model without any causal attention.
    """
    if kind in _BOTH_WAYS:
        return _BOTH_WAYS[kind]
    setting = getattr(text, "use_bidirectional_attention", None)
    if setting is True or setting == "all":
        raise ValueError(
            f"the language model of type {text.model_type!r} has no causal attention "
            f"(use_bidirectional_attention = {setting!r}), so it predicts no next token. Use "
            "another model."
        )
    return "image" if setting == "vision" else None


def parameters(model: nn.Module | None, method: str) -> frozenset[str]:
    """Names of the parameters of a method; none if the model lacks it."""
    function = getattr(model, method, None)
    return frozenset(inspect.signature(function).parameters) if function else frozenset()


def max_tokens(vlm: PreTrainedModel) -> int:
    """Largest number of tokens of a prompt and a response together.

    With longrope, one longer sequence would change the positions of all others in its batch.
    """
    text = vlm.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    changes = rope.get("rope_type") == "longrope"
    original = rope.get("original_max_position_embeddings") if changes else None
    return original or text.max_position_embeddings


def head_width(text: PreTrainedConfig) -> int:
    """Largest width of queries, keys and values of a language model.

    Layers differ in Gemma 4, and values are narrower than keys in DeepSeek V3.
    """
    widths = []
    for layer in getattr(text, "per_layer_config", None) or [text]:
        parts = [getattr(layer, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope")]
        own = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        widths += [sum(parts) or own, getattr(layer, "v_head_dim", None) or 0]
    return max(widths)


def _ends(vlm: PreTrainedModel) -> tuple[int, ...]:
    """The end tokens in the generation settings of a model, one or several."""
    ends = getattr(vlm.generation_config, "eos_token_id", None)
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


def _separate(kinds: list[str]) -> str | None:
    """The reason why responses cannot share a prompt, or None."""
    if unmasked := sorted(set(kinds) - {FULL, SLIDING}):
        return f"in its {', '.join(unmasked)} layers no mask hides one response from another"
    return None
