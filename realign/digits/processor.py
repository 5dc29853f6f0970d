"""Tokenizer and processor of the digits model, in Hugging Face format."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from realign.digits.scenes import CAPTION_PROMPT, PLACES, PROPERTIES, SIZE, WORDS

PATCH = 4  # pixels; SIZE / PATCH squared = 16 image tokens
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "<s>"
    "{% for message in messages %}"
    "{{ ' user :' if message['role'] == 'user' else ' assistant :' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ ' </s>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ ' assistant :' if add_generation_prompt else '' }}"
)


def vocabulary() -> list[str]:
    """All tokens of the digits language: special tokens, then words in a fixed order."""
    words = ["user", "assistant", ":", ",", ".", "?", "yes", "no", "is", "what"]
    words += CAPTION_PROMPT.split() + [word for place in PLACES for word in place.split()]
    return [*SPECIAL, *dict.fromkeys([*words, *WORDS, *PROPERTIES])]


def build_processor() -> LlavaProcessor:
    """Build the processor: a word-level tokenizer and a CLIP image processor of SIZE pixels."""
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
    )
