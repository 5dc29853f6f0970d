"""Tiny models of more VLM families, by case: a family, or a family and a variant of it.

`tiny_vlms.make(case)` builds a case. Each has the mechanisms of its family: experts, attention
sinks, latent attention, tiles, slices, token columns, blocks whose tokens see each other both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tiny_more_processors as processors
from tiny_processors import SIDE
from tiny_processors import make_processor as plain_processor
from tiny_vlms import (
    _TOWER_OF_QWEN,
    TOWER,
    WIDTH,
    _clip,
    _internvl,
    _llava,
    _llava_next,
    _mrope,
    _qwen3_5,
    _qwen3_vl,
    _siglip,
    _text,
    _tower,
)


@dataclass(frozen=True)
class Case:
    """A model type, its processor, and its configuration.

    Attributes:
        kind: `model_type`.
        processor: makes the processor.
        config: makes the configuration from the processor.
        eager: whether the language model needs eager attention, as for sinks.
        images: most images of different sizes that its processor takes in a prompt.
        ends: tokens that end a response by the generation configuration.
    """

    kind: str
    processor: Callable
    config: Callable
    eager: bool = False
    images: int = 3
    ends: tuple[str, ...] = ()


_TWO_KINDS = ["sliding_attention", "full_attention"]


def _qwen_experts(**more) -> dict:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **more}


def qwen3_vl_moe(processor) -> dict:
    config = _qwen3_vl(processor)
    config["text_config"] |= _qwen_experts(num_local_experts=4)
    return config


def qwen3_5_moe(processor) -> dict:
    config = _qwen3_5(processor)
    config["text_config"] |= _qwen_experts(shared_expert_intermediate_size=16)
    return config


def _gemma4(processor, vision: dict | None = None, layers: int = 2, **text) -> dict:
    ids = processor.tokenizer.convert_tokens_to_ids
    windows = {"head_dim": 8, "sliding_window": 24, "num_hidden_layers": layers}
    windows["layer_types"] = _TWO_KINDS * (layers // 2)
    more = {"global_head_dim": 16, "num_global_key_value_heads": 1, "final_logit_softcapping": 6.0}
    text = _text(processor, **windows, **more, **text)
    vision = vision or {
        **_TOWER_OF_GEMMA, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    return {
        "text_config": text, "vision_config": vision, "audio_config": None,
        "image_token_id": ids("<|image|>"), "video_token_id": ids("<|video|>"),
        "audio_token_id": ids("<|audio|>"), "boi_token_id": ids("<|image>"),
        "eoi_token_id": ids("<image|>"), "boa_token_id": ids("<|audio>"),
        "eoa_token_index": ids("<audio|>"),
    }  # fmt: skip


_TOWER_OF_GEMMA = {
    "hidden_size": TOWER, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 12,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def gemma4_vision(processor) -> dict:
    """Gemma 4 31B: tokens of an image see each other both ways."""
    return _gemma4(processor, hidden_size_per_layer_input=0, use_bidirectional_attention="vision")


def gemma4(processor) -> dict:
    """Gemma 4 E2B and E4B: causal, with embeddings for each layer and shared keys and values."""
    vocabulary = _text(processor)["vocab_size"]
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": vocabulary}
    return _gemma4(processor, **per_layer, layers=4, num_kv_shared_layers=2)


def gemma4_moe(processor) -> dict:
    """Gemma 4 26B-A4B."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    both_ways = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
    return _gemma4(processor, **experts, moe_intermediate_size=16, **both_ways)


def gemma4_unified(processor) -> dict:
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": WIDTH,
              "mm_posemb_size": 80, "output_proj_dims": WIDTH}  # fmt: skip
    return _gemma4(processor, vision)


def _glm(processor, vision: dict | None = None, **text) -> dict:
    ids = processor.tokenizer.convert_tokens_to_ids
    edges = {
        f"{kind}_{edge}_token_id": ids(f"<|{word}_of_{kind}|>")
        for kind in ("image", "video")
        for edge, word in (("start", "begin"), ("end", "end"))
    }
    tower = {"depth": 2, "num_heads": 2, "image_size": SIDE, "patch_size": 7}
    rope = _mrope(4, 2, 2) | {"partial_rotary_factor": 1.0}
    text = {"heads": 2, "rope_parameters": rope, **text}
    return edges | {
        "image_token_id": ids("<|image|>"),
        "video_token_id": ids("<|video|>"),
        "vision_config": _TOWER_OF_QWEN | tower | {"spatial_merge_size": 2} | (vision or {}),
        "text_config": _text(processor, **text),
    }


def glm4v(processor) -> dict:
    return _glm(processor)


def glm46v(processor) -> dict:
    config = _glm(processor)
    for part, kind in (("vision", "glm4v_vision"), ("text", "glm4v_text")):
        config[f"{part}_config"]["model_type"] = kind
    return config


def glm4v_moe(processor) -> dict:
    return _glm(
        processor, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        n_shared_experts=1, first_k_dense_replace=1, head_dim=16,
        rope_parameters=_mrope(2, 1, 1, partial_rotary_factor=0.5),
    )  # fmt: skip


def glm_ocr(processor) -> dict:
    return _glm(processor, head_dim=16)


def _internvl_with(kind: str, **text) -> Callable:
    def config(processor) -> dict:
        return _internvl(processor) | {
            "tie_word_embeddings": False,
            "text_config": _text(processor, model_type=kind, head_dim=8, **text),
        }

    return config


_SINKS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12,
          "layer_types": _TWO_KINDS,
          "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip


def _minicpm(processor) -> dict:
    tokenizer = processor.tokenizer
    text = _qwen3_5(plain_processor("qwen3_5"))["text_config"]
    own = _text(processor)
    ids = {name: own[name] for name in own if name.endswith("_id")}
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "image_size": 64,
        "insert_layer_id": 0,
        "text_config": text | ids | {"model_type": "qwen3_5_text"},
        "vision_config": _tower(patch=8, insert_layer_id=0) | {"image_size": 64},
    }


def minicpmv4_6(processor) -> dict:
    return _minicpm(processor)


def minicpmv4_7(processor) -> dict:
    tokenizer = processor.tokenizer
    names = ("image_start", "image_end", "slice_start", "slice_end")
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    return _minicpm(processor) | ids | {"newline_id": tokenizer.convert_tokens_to_ids("\n")}


def mistral3(processor) -> dict:
    return {
        "image_token_index": processor.image_token_id,
        "spatial_merge_size": 2,
        "vision_config": _tower(model_type="pixtral", head_dim=12) | {"image_size": 2 * SIDE},
        "text_config": _text(processor, model_type="mistral", head_dim=8, sliding_window=None),
        "tie_word_embeddings": False,
    }


def ernie4_5_vl_moe(processor) -> dict:
    ids = {
        f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id")
        for name in ("image", "image_start", "image_end", "video", "video_start", "video_end")
    }
    experts = {"moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    experts |= {"moe_intermediate_size": [16, 16], "mlp_layer_types": ["sparse"] * 2}
    vision = {"depth": 2, "hidden_size": TOWER, "num_heads": 2, "patch_size": 7}
    text = _text(processor, heads=2, **experts, rope_parameters=_mrope(3, 3, 2))
    return ids | {"vision_config": vision | {"intermediate_size": 32}, "text_config": text}


def kimi_k25(processor) -> dict:
    """The text is DeepSeek V3's: latent attention, with values narrower than keys."""
    ids = processor.tokenizer.convert_tokens_to_ids
    text = _text(
        processor, model_type="deepseek_v3", moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6,
    )  # fmt: skip
    vision = _tower(pos_emb_height=8, pos_emb_width=8, pos_emb_time=1)
    del vision["image_size"]
    return {
        "image_token_id": ids("<|media_pad|>"),
        "video_token_id": ids("<|kimi_k25_video_placeholder|>"),
        "vision_start_token_id": ids("<|media_begin|>"),
        "vision_end_token_id": ids("<|media_end|>"),
        "projection_hidden_size": TOWER,
        "vision_config": vision,
        "text_config": text | {"num_key_value_heads": 4},
        "tie_word_embeddings": False,
    }


def lfm2_vl(processor) -> dict:
    vision = _siglip(num_patches=16) | {"model_type": "siglip2_vision_model"}
    del vision["image_size"]
    text = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    return {
        "image_token_id": processor.tokenizer.image_token_id,
        "downsample_factor": 2,
        "projector_hidden_size": WIDTH,
        "vision_config": vision,
        "text_config": _text(processor, model_type="lfm2", **text),
    }


def ovis2(processor) -> dict:
    ids = processor.tokenizer.convert_tokens_to_ids
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    return {
        "image_token_id": ids("<IMG_ATOM>"),
        "visual_indicator_token_ids": ids(indicators),
        "hidden_size": WIDTH,
        "vocab_size": _text(processor)["vocab_size"],
        "vision_config": _tower(vocab_size=32, hidden_stride=2, num_visual_indicator_tokens=5),
        "text_config": _text(processor, model_type="qwen2", tie_word_embeddings=True),
    }


def molmo2(processor) -> dict:
    ids = processor.tokenizer.convert_tokens_to_ids
    tower = _tower(num_key_value_heads=2, head_dim=12, num_position_embeddings=16, layers=3)
    adapter = {
        "vision_feature_layer": [-1, -2], "hidden_size": TOWER, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 32,
        "text_hidden_size": WIDTH,
    }  # fmt: skip
    return {
        "image_start_token_id": ids("<im_start>"),
        "low_res_image_start_token_id": ids("<low_res_im_start>"),
        "image_end_token_id": ids("<im_end>"),
        "image_patch_id": ids("<im_patch>"),
        "frame_start_token_id": ids("<frame_start>"),
        "frame_end_token_id": ids("<frame_end>"),
        "vision_config": tower | {"image_size": [SIDE, SIDE]},
        "adapter_config": adapter,
        "text_config": _text(processor, head_dim=8, additional_vocab_size=8),
    }


def idefics2(processor) -> dict:
    perceiver = {"hidden_size": WIDTH, "resampler_n_latents": 4, "resampler_depth": 1,
                 "resampler_n_heads": 2, "resampler_head_dim": 8,
                 "num_key_value_heads": 1}  # fmt: skip
    return {
        "image_token_id": processor.image_token_id,
        "vision_config": _tower(),
        "perceiver_config": perceiver,
        "text_config": _text(processor, model_type="mistral", head_dim=8, sliding_window=None),
    }


def deepseek_vl(processor) -> dict:
    return {
        "image_token_id": processor.image_token_id,
        "vision_config": _siglip(),
        "text_config": _text(processor, model_type="llama"),
        "tie_word_embeddings": False,
    }


def deepseek_vl_hybrid(processor) -> dict:
    high = {"hidden_size": TOWER, "output_channels": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 2 * SIDE, "patch_size": 7, "window_size": 4,
            "global_attn_indexes": [1], "mlp_dim": 32, "num_pos_feats": 8, "scale": 4}  # fmt: skip
    return deepseek_vl(processor) | {"high_res_vision_config": high}


def video_llama_3(processor) -> dict:
    vision = _tower()
    del vision["image_size"]
    return {
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_config": vision,
        "text_config": _text(processor, model_type="qwen2"),
    }


def pixtral(processor) -> dict:
    return {
        "image_token_index": processor.image_token_id,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": _tower(model_type="pixtral", head_dim=12) | {"image_size": 2 * SIDE},
        "text_config": _text(processor, model_type="mistral", head_dim=8, sliding_window=None),
    }


def vipllava(processor) -> dict:
    return _llava(processor) | {"vision_feature_layer": [-2, -1, 1]}


def aria(processor) -> dict:
    text = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return {
        "image_token_index": processor.image_token_id,
        "vision_config": _tower(patch=98, model_type="idefics3_vision") | {"image_size": 490},
        "text_config": _text(processor, model_type="aria_text", **text),
        "projector_patch_to_query_dict": {25: 4},
    }


def paddleocr_vl(processor) -> dict:
    ids = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": processor.image_token_id,
        "vision_start_token_id": ids("<|IMAGE_START|>"),
        "vision_end_token_id": ids("<|IMAGE_END|>"),
        "vision_config": _tower(spatial_merge_size=2),
        "text_config": _text(processor, heads=2, head_dim=16, rope_parameters=_mrope(2, 3, 3)),
    }


def llava_next_video(processor) -> dict:
    text = {"text_config": _text(processor, model_type="llama")}
    return _llava_next(processor) | text | {"video_token_index": processor.video_token_id}


def perception_lm(processor) -> dict:
    return {
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_use_cls_token": False,
        "projector_pooling_ratio": 2,
        "vision_config": _siglip(model_args={"embed_dim": TOWER}),  # in place of timm's tower
        "text_config": _text(processor, model_type="llama"),
    }


def video_llava(processor) -> dict:
    return {
        "image_token_index": processor.image_token_id,
        "video_token_index": processor.video_token_id,
        "image_seq_length": 16,
        "vision_config": _clip(),
        "text_config": _text(processor, model_type="llama"),
    }


def _cohere(processor) -> dict:
    windows = {"sliding_window": 12, "layer_types": _TWO_KINDS, "logit_scale": 0.5}
    return _text(processor, model_type="cohere2", head_dim=8, **windows)


def cohere2_vision(processor) -> dict:
    return {
        "image_token_id": processor.image_token_id,
        "downsample_factor": 2,
        "alignment_intermediate_size": 32,
        "vision_config": _siglip(),
        "text_config": _cohere(processor),
    }


def aya_vision(processor) -> dict:
    return {
        "image_token_index": processor.image_token_id,
        "downsample_factor": 2,
        "vision_config": _siglip(),
        "text_config": _cohere(processor),
    }


def _case(name: str, kind: str | None = None, processor=None, config=None, **more) -> Case:
    processor = processor or getattr(processors, name)
    return Case(kind or name, processor, config or globals()[name], **more)


def _internvl_case(text: str, eager: bool = False, **more) -> Case:
    return Case(
        "internvl", lambda: plain_processor("internvl"), _internvl_with(text, **more), eager
    )


_GLM_ENDS = ("<|endoftext|>", "<|user|>")

CASES = {
    "qwen3_vl_moe": _case("qwen3_vl_moe"),
    "qwen3_5_moe": _case("qwen3_5_moe"),
    "internvl-qwen3": _internvl_case("qwen3"),
    "internvl-qwen3_moe": _internvl_case("qwen3_moe", **_qwen_experts()),
    "internvl-gpt_oss": _internvl_case("gpt_oss", eager=True, **_SINKS),
    "glm4v": _case("glm4v", ends=_GLM_ENDS),
    "glm46v": _case("glm46v", ends=_GLM_ENDS),
    "glm4v_moe": _case("glm4v_moe", processor=processors.glm46v, ends=_GLM_ENDS),
    "glm_ocr": _case("glm_ocr", processor=processors.glm4v, ends=_GLM_ENDS),
    "gemma4": _case("gemma4"),
    "gemma4-vision": _case("gemma4", "gemma4", config=gemma4_vision),
    "gemma4-moe": _case("gemma4", "gemma4", config=gemma4_moe),
    "gemma4_unified": _case("gemma4_unified"),
    "minicpmv4_6": _case("minicpmv4_6"),
    "minicpmv4_6-slices": _case("minicpmv4_6", processor=processors.minicpmv4_6_slices),
    "minicpmv4_7": _case("minicpmv4_7"),
    "minicpmv4_7-slices": _case("minicpmv4_7", processor=processors.minicpmv4_7_slices),
    "mistral3": _case("mistral3"),
    "kimi_k25": _case("kimi_k25"),
    "lfm2_vl": _case("lfm2_vl"),
    "molmo2": _case("molmo2"),
    "ovis2": _case("ovis2"),
    "llava_next_video": _case("llava_next_video"),
    "vipllava": _case("vipllava"),
    "video_llava": _case("video_llava"),
    "llava-pixtral": _case("pixtral", "llava"),
    "video_llama_3": _case("video_llama_3"),
    "deepseek_vl": _case("deepseek_vl"),
    "deepseek_vl_hybrid": _case("deepseek_vl_hybrid"),
    "ernie4_5_vl_moe": _case("ernie4_5_vl_moe"),
    "paddleocr_vl": _case("paddleocr_vl"),
    "idefics2": _case("idefics2"),
    "aria": _case("aria"),
    "perception_lm": _case("perception_lm"),
    "perception_lm-tiles": _case(
        "perception_lm", processor=processors.perception_lm_tiles, images=1
    ),
    "cohere2_vision": _case("cohere2_vision"),
    "aya_vision": _case("aya_vision"),
}
"""The cases, by name."""
