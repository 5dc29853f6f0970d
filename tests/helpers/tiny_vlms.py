"""A tiny random model of every VLM family, its processor and records; nothing is downloaded.

`make` builds the family's own classes from small configs. They have its M-RoPE sections, DeepStack,
AnyRes grids, tiling, sliding windows, bidirectional blocks and softcaps. Weights are random and
large enough that attention and images matter. `tiny_truth.py` scores prompts with plain
transformers.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tiny_processors import SIDE, WORDS, make_processor
from transformers import AutoConfig, AutoModelForImageTextToText

from realign.data.records import Record, StoredImage
from realign.modeling.attention import IMPLEMENTATIONS
from realign.modeling.encode import check_prompt

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "internvl",
    "gemma3",
    "paligemma",  # PaliGemma 2, with a Gemma 2 language model
    "janus",
)
WIDTH, TOWER = 32, 24  # hidden sizes of language model and vision tower
SIZES = [(28, 28), (56, 28), (28, 56), (56, 42), (49, 56)]  # of images, in pixels


def make(family: str, *, attention: str = "sdpa", seed: int = 0):
    """The model, in fp32 and eval mode, and its processor.

    Args:
        family: one of `FAMILIES`, "qwen3_5", whose first layer carries a state, or one of
            `tiny_more.CASES`.
        attention: `attn_implementation`, or "tree" or "flash". Models with a softcap (PaliGemma)
            or sinks use eager instead of these and "sdpa", which lack them.
        seed: seed of the weights.
    """
    from tiny_more import CASES  # which imports this module

    case = CASES.get(family)
    kind = case.kind if case else family
    eager = case.eager if case else family == "paligemma"
    processor = case.processor() if case else make_processor(family)
    config = (case.config if case else _CONFIGS[family])(processor)
    config = AutoConfig.for_model(kind, **config)
    if attention in ("tree", "flash", "sdpa") and eager:
        attention = {"text_config": "eager", "vision_config": "sdpa"}
    elif attention in ("tree", "flash"):
        attention = {"": "sdpa", "text_config": IMPLEMENTATIONS[attention]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        _randomize(vlm)
    if case and case.ends:
        vlm.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids([*case.ends])
    return vlm.float().eval(), processor


def random_images(rng: np.random.Generator, count: int, sizes=None) -> list[Image.Image]:
    """Images of noise over a color ramp; sizes are (width, height)."""
    made = []
    for i in range(count):
        width, height = sizes[i] if sizes else SIZES[rng.integers(len(SIZES))]
        ramp = np.linspace(0, 160, width)[None, :, None] * rng.random(3)
        noise = rng.integers(0, 96, (height, width, 3))
        made.append(Image.fromarray((ramp + noise).astype(np.uint8)))
    return made


def random_text(rng: np.random.Generator, low: int, high: int) -> str:
    """A text of `low` to `high` words."""
    return " ".join(rng.choice(WORDS, rng.integers(low, high + 1)))


def random_record(
    family: str, processor, rng: np.random.Generator, images: int = 1, negatives: int = 1
) -> Record:
    """A record of random words, with `images` images and `negatives` times as many retrieved ones.

    The images of a prompt have different sizes. `check_prompt` checks that the prompt places them.
    """
    chosen = random_text(rng, 2, 9)
    while (rejected := random_text(rng, 2, 9)) == chosen:
        pass
    order = rng.permutation(len(SIZES))
    sizes = [SIZES[i] for i in order] * (images * negatives)
    shown = random_images(rng, images, sizes)
    retrieved = random_images(rng, images * negatives, sizes[::-1])
    record = Record(
        f"{family}-{rng.integers(1 << 30)}",
        ({"role": "user", "content": random_text(rng, 3, 8)},),
        chosen,
        rejected,
        tuple(StoredImage.from_pil(image) for image in shown),
        tuple(StoredImage.from_pil(image) for image in retrieved),
    )
    check_prompt(processor, record, images)
    return record


@torch.no_grad()
def _randomize(vlm) -> None:
    """Randomize all weights: matrices keep the scale of inputs, vectors differ from 0 and 1."""
    for name, weight in vlm.named_parameters():
        if weight.ndim < 2 or "image_newline" in name:
            weight.add_(0.2 * torch.randn_like(weight))
        else:
            weight.normal_(std=1.5 / weight[0].numel() ** 0.5)


def _text(processor, heads: int = 4, **more) -> dict:
    tokenizer = processor.tokenizer
    return {
        "vocab_size": max(128, -(-len(tokenizer) // 8) * 8),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def _tower(patch: int = 7, layers: int = 2, **more) -> dict:
    return {
        "hidden_size": TOWER,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": patch,
        **more,
    }


def _siglip(**more) -> dict:
    return _tower(model_type="siglip_vision_model", vision_use_head=False, **more)


def _clip(**more) -> dict:
    return _tower(model_type="clip_vision_model", layers=3, projection_dim=16, **more)


def _llava(processor) -> dict:
    return {
        "image_token_index": processor.image_token_id,
        "image_seq_length": 16,
        "vision_config": _clip(),
        "text_config": _text(processor, model_type="llama"),
    }


def _llava_next(processor) -> dict:
    return {
        "image_token_index": processor.image_token_id,
        "image_seq_length": 4,
        "image_grid_pinpoints": processor.image_processor.image_grid_pinpoints,
        "vision_config": _clip(patch=14),
        "text_config": _text(processor, model_type="mistral", head_dim=8, sliding_window=None),
    }


def _llava_onevision(processor) -> dict:
    return {
        "image_token_index": processor.image_token_id,
        "video_token_index": processor.video_token_id,
        "image_grid_pinpoints": processor.image_processor.image_grid_pinpoints,
        "vision_aspect_ratio": processor.vision_aspect_ratio,
        "vision_config": _siglip(patch=14),
        "text_config": _text(processor, model_type="qwen2", tie_word_embeddings=True),
    }


_TOWER_OF_QWEN = {"hidden_size": TOWER, "intermediate_size": 32, "out_hidden_size": WIDTH}


def _mrope(*section: int, **more) -> dict:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [*section], **more}


def _qwen(processor, vision: dict, **text) -> dict:
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": processor.image_processor.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **vision,
    }
    ids = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "vision_config": vision,
        "text_config": _text(processor, **text),
    }


def _qwen2_vl(processor) -> dict:
    vision = {"embed_dim": TOWER, "hidden_size": WIDTH, "mlp_ratio": 2}
    return _qwen(processor, vision, heads=2, rope_parameters=_mrope(2, 3, 3))


def _qwen2_5_vl(processor) -> dict:
    vision = _TOWER_OF_QWEN | {
        "window_size": 28,  # 2 x 2 image tokens, smaller than an image
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return _qwen(processor, vision, heads=2, rope_parameters=_mrope(2, 3, 3))


def _qwen3_vl(processor) -> dict:
    deeper = {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    vision = _TOWER_OF_QWEN | deeper
    rope = _mrope(4, 2, 2, mrope_interleaved=True) | {"rope_theta": 5e6}
    config = _qwen(processor, vision, head_dim=16, rope_parameters=rope)
    return config | {"tie_word_embeddings": True}


def _qwen3_5(processor) -> dict:
    vision = _TOWER_OF_QWEN | {"num_position_embeddings": 16}
    rope = _mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5)
    return _qwen(
        processor,
        vision,
        head_dim=16,
        rope_parameters=rope,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )


def _idefics3(processor) -> dict:
    return {
        "image_token_id": processor.image_token_id,
        "scale_factor": 2,
        "vision_config": _tower(),
        "text_config": _text(processor, model_type="llama"),
    }


def _smolvlm(processor) -> dict:
    return _idefics3(processor) | {"tie_word_embeddings": True}


def _internvl(processor) -> dict:
    return {
        "image_token_id": processor.image_token_id,
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "vision_config": _tower(attention_bias=True),
        "text_config": _text(processor, model_type="qwen2"),
        "tie_word_embeddings": True,
    }


_WINDOWED = {
    "head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def _gemma3(processor) -> dict:
    tokenizer = processor.tokenizer
    text = _text(
        processor,
        **_WINDOWED,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    )
    return {
        "mm_tokens_per_image": 4,
        "image_token_index": tokenizer.image_token_id,
        "boi_token_index": tokenizer.boi_token_id,
        "eoi_token_index": tokenizer.eoi_token_id,
        "vision_config": _siglip(),
        "text_config": text,
    }


def _paligemma(processor) -> dict:
    text = _text(
        processor,
        model_type="gemma2",
        **_WINDOWED,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    )
    return {
        "image_token_index": processor.image_token_id,
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
        "vision_config": _siglip(),
        "text_config": text,
    }


def _janus(processor) -> dict:
    vision = _tower(mlp_ratio=2, num_image_tokens=16, projection_dim=WIDTH, depth=2)
    del vision["intermediate_size"]
    image_generator = {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "num_embeddings": 16,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }
    return {
        "image_token_id": processor.tokenizer.image_token_id,
        "vision_config": vision,
        "vq_config": image_generator,
        "text_config": _text(processor, model_type="llama"),
        "tie_word_embeddings": False,
    }


_CONFIGS = {family: globals()[f"_{family}"] for family in (*FAMILIES, "qwen3_5")}
