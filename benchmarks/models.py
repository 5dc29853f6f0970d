"""Random LLaVA models, and pairs of the usual lengths, for benchmarks."""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from realign.data.records import Record, StoredImage, write_pairs
from realign.digits.processor import CHAT_TEMPLATE
from realign.modeling import reference_logps
from realign.modeling.attention import IMPLEMENTATIONS
from realign.modeling.encode import encode_records
from realign.modeling.layouts import Layout
from realign_kernels import ReferenceCache, objectives

VOCABULARY, IMAGE_TOKENS = 32000, 576
IMAGE_ID = VOCABULARY - 1
IMAGE_SIZE, PATCH = 336, 14
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":")
TEMPLATE_TOKENS = 5  # <s> user : ... assistant :


def llava_config(
    *,
    vision: tuple[int, ...],
    text: tuple[int, ...],
    vocabulary: int = VOCABULARY,
    image_id: int = IMAGE_ID,
    size: int = IMAGE_SIZE,
    **options,
) -> LlavaConfig:
    """Config of a LLaVA-1.5; `vision` and `text` are hidden size, intermediate size, layers, heads.

    As in llava-hf/llava-1.5-7b-hf, features come from the tower's second last layer, without the
    class token.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            **dict(zip(names, vision, strict=True)), image_size=size, patch_size=PATCH
        ),
        text_config=LlamaConfig(
            **dict(zip(names, text, strict=True)), vocab_size=vocabulary,
            max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=0,
        ),
        image_token_index=image_id, vision_feature_select_strategy="default",
        image_seq_length=(size // PATCH) ** 2,
        **{"vision_feature_layer": -2} | options,
    )  # fmt: skip


def random_llava(*text: int) -> LlavaForConditionalGeneration:
    """Random LLaVA with a small vision tower, 576 image tokens and V = 32000."""
    torch.manual_seed(0)
    config = llava_config(
        vision=(192, 384, 4, 4), text=text, vision_feature_layer=-1, tie_word_embeddings=False
    )
    return LlavaForConditionalGeneration(config)


LLAVA_60M = (512, 1376, 8, 8)
"""Hidden size, intermediate size, layers and heads: 58 M parameters without the tower."""
LLAVA_7B = {
    "vision": (1024, 4096, 24, 16), "text": (4096, 11008, 32, 32), "vocabulary": 32064,
    "image_id": 32000, "size": IMAGE_SIZE,
}  # fmt: skip
"""Arguments of `llava_config` for llava-hf/llava-1.5-7b-hf."""


def random_on(
    device: str, config: LlavaConfig, dtype: torch.dtype, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """Model with random weights, created on the device. Every call gives the same weights.

    Args:
        device: Device of the weights, which never pass through host memory.
        config: For example `llava_config(...)`.
        dtype: dtype of the weights.
        attention: Attention of the language model, as in `realign.modeling.loading.load_model`.
    """
    torch.manual_seed(0)
    kinds = {"": "sdpa", "text_config": IMPLEMENTATIONS[attention]}
    own = copy.deepcopy(config)  # from_config stores the attention in it
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(own, dtype=dtype, attn_implementation=kinds)


def word_processor(image_id=IMAGE_ID, size=IMAGE_SIZE):
    """Processor for these models, with one token per word and `image_id` words."""
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), image_id)), "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    crop = {"height": size, "width": size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop),
        tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def random_records(lengths, image_id=IMAGE_ID, size=IMAGE_SIZE):
    """Records with random words and images, for `word_processor`.

    Args:
        lengths: Tokens of prompt (without the image), chosen and rejected of each record. The end
            token of a response counts.
        image_id: Token of the image; words have smaller ids.
        size: Side of the images in pixels.
    """
    rng = np.random.default_rng(0)

    def text(length):
        return " ".join(f"w{i}" for i in rng.integers(len(WORDS), image_id, length))

    def image():
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        return (StoredImage.from_pil(Image.fromarray(pixels)),)

    return [
        Record(
            name=str(i),
            prompt=({"role": "user", "content": text(prompt - TEMPLATE_TOKENS)},),
            chosen=text(chosen - 1),
            rejected=text(rejected - 1),
            images=image(),
            retrieved_images=image(),
        )
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ]


def encode(records, processor, layout):
    """Encodes records as rDPO forests; returns (examples, store)."""
    return encode_records(
        records, processor, objectives.rdpo(), layout=layout, max_response_tokens=1024,
        max_tokens=4096, progress=False,
    )  # fmt: skip


def fill(folder, fingerprint, model, examples, store, *, batch_rows, device):
    """Fills the cache in `folder` by `reference_logps.fill`; returns (L, B) log-probs."""
    with ReferenceCache.open(folder, fingerprint) as cache:
        return reference_logps.fill(
            cache, model.eval(), examples, store, batch_rows=batch_rows, device=device,
            row_tokens=max(e.longest_tree for e in examples), progress=False, log=lambda _: None,
        )  # fmt: skip


def random_forests(count, *, prompt, response):
    """(examples, store) of `count` random records, with lengths as in `write_setting`."""
    records = random_records([(prompt, response, response)] * count)
    return encode(records, word_processor(), Layout(IMAGE_ID))


def write_setting(folder, count, *, prompt, response):
    """Writes a LLaVA of 60 M to `folder`/model and records to `folder`/pairs.parquet.

    A prompt has `prompt` tokens without the image. A response has `response` tokens with its end
    token.
    """
    folder = Path(folder)
    random_llava(*LLAVA_60M).save_pretrained(folder / "model")
    word_processor().save_pretrained(folder / "model")
    write_pairs(folder / "pairs.parquet", random_records([(prompt, response, response)] * count))
