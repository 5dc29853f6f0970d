"""Tiny random models with experts, attention sinks or latent attention, with their processors."""

from __future__ import annotations

import functools

import tiny_vlms as tiny
import torch
from tiny_processors import make_processor
from transformers import AutoConfig, AutoModelForImageTextToText

from realign.modeling.attention import implementations

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 6, "num_key_value_heads": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT_OSS = _FEW | {
    "head_dim": 8, "rope_parameters": _ROPE, "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_TEXTS = {
    "internvl-qwen3_moe": ("qwen3_moe", _EXPERTS | {"num_experts": 4, "head_dim": 8}),
    "internvl-gpt_oss": ("gpt_oss", _GPT_OSS),
    "llava-deepseek_v3": ("deepseek_v3", _EXPERTS | _DEEPSEEK),
    "llava-mixtral": ("mixtral", _FEW | {"sliding_window": None}),
}
NAMES = (*_TEXTS, "qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "ernie4_5_vl_moe")


def make_moe(name: str, attention: str = "sdpa"):
    """A model of `NAMES`, in fp32 and eval mode, and its processor, None for the last two."""
    family = name.split("-")[0]
    processor = _processor(family)
    config = AutoConfig.for_model(family, **_config(name, processor))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vlm = AutoModelForImageTextToText.from_config(
            config, attn_implementation=implementations(config, attention)
        )
        tiny._randomize(vlm)
    return vlm.float().eval(), processor


@functools.cache
def _processor(family: str):
    if family in ("glm4v_moe", "ernie4_5_vl_moe"):
        return None
    return make_processor(family.removesuffix("_moe"))


def _config(name: str, processor) -> dict:
    family = name.split("-")[0]
    if processor is None:
        return {"glm4v_moe": _GLM, "ernie4_5_vl_moe": _ERNIE}[family]
    config = tiny._CONFIGS[family.removesuffix("_moe")](processor)
    if name in _TEXTS:
        kind, more = _TEXTS[name]
        more = tiny._text(processor, model_type=kind) | more
        return config | {"tie_word_embeddings": False, "text_config": more}
    more = _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16}
    return config | {"text_config": config["text_config"] | more}


_TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
_TOKENS = ("image", "image_start", "image_end", "video", "video_start", "video_end")
_VISION = {"depth": 2, "hidden_size": 24, "num_heads": 2, "patch_size": 7, "intermediate_size": 32}
_IDS = {f"{name}_token_id": 100 + i for i, name in enumerate(_TOKENS)}
_GLM = _IDS | {
    "vision_config": _VISION | {"image_size": 28, "out_hidden_size": 32},
    "text_config": _TEXT
    | _EXPERTS
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    },
}
_ERNIE = _IDS | {
    "vision_config": _VISION,
    "text_config": _TEXT
    | {
        "moe_intermediate_size": [16, 16],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]},
    },
}
