"""Random LLaVA models and pairs of the usual lengths, for benchmarks."""

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from realign.forest import Example, Leaf, Root
from realign.images import ImageStore
from realign.layouts import Layout

VOCABULARY, IMAGE_TOKENS = 32000, 576
IMAGE_ID = VOCABULARY - 1


def random_llava(*, hidden, intermediate, layers, heads):
    """A LLaVA with a small vision tower and 576 image tokens, V = 32000."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=2048,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def random_pairs(count, *, prompt, response):
    """rDPO's three leaves under two images, and the store of the images."""
    rng = np.random.default_rng(0)
    store, examples = ImageStore(None, Layout(IMAGE_ID), cache_bytes=1 << 40), []
    for i in range(count):
        words = rng.integers(10, IMAGE_ID, prompt)
        chosen, rejected = rng.integers(10, IMAGE_ID, (2, response))
        roots = []
        for name in (f"v{i}", f"w{i}"):
            bundle = {"pixel_values": torch.randn(1, 3, 336, 336)}
            key = store.keep(name, None, bundle, IMAGE_TOKENS)
            roots.append(Root((key,), np.concatenate([[IMAGE_ID] * IMAGE_TOKENS, words])))
        leaves = (Leaf(0, chosen), Leaf(0, rejected), Leaf(1, chosen))
        examples.append(Example(str(i), tuple(roots), leaves))
    return examples, store
