"""A tiny processor of every VLM family: its own classes, small images, a word-level tokenizer.

Each has the family's special tokens and a chat template that places images and closes assistant
turns as the family's does. PaliGemma has none of its own; its template is prompt, space, answer.

Two packages that only videos need are done without: torchvision, for processors that hold a video
processor, and num2words, for SmolVLM's. Their places are filled here, in this process only.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    JanusProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
    processing_utils,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import VideoProcessorMixin

SIDE = 28  # pixels of one view
_LINE = "red green blue one two three four a the is of and left right small large dot bar"
WORDS = _LINE.split()
_SQUARE = {"height": SIDE, "width": SIDE}
_GRID = [[28, 56], [56, 28], [56, 56]]  # AnyRes resolutions
_ROLES = ("user", "assistant", "system", "model", "User", "Assistant", "USER", "ASSISTANT")

_VIDEO_FAMILIES = (
    LlavaOnevisionProcessor,
    Qwen2VLProcessor,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
    InternVLProcessor,
)
for _family in _VIDEO_FAMILIES:
    _family.video_processor_class = "VideoProcessorMixin"
processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin
VideoProcessorMixin.num_frames = VideoProcessorMixin.fps = None  # SmolVLM's template asks for them
processing_smolvlm.num2words = processing_smolvlm.num2words or str


def make_processor(family: str):
    """The processor of a family of `tiny_vlms.FAMILIES`."""
    return _PROCESSORS[family]()


def _tokenizer(
    special: list[str], *, bos: str | None, eos: str, pad: str, **named: str
) -> PreTrainedTokenizerFast:
    """Words, newlines and punctuation; `named` become attributes such as `image_token`."""
    special = [
        *dict.fromkeys([pad, *([bos] if bos else []), eos, "<unk>", *named.values(), *special])
    ]
    words = ["\n", "\n\n", ":", ".", "?", "Here", *_ROLES, *WORDS]
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n\n|\n|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>",
        extra_special_tokens=named,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _template(user: str, assistant: str, end: str, close: str, image: str, start: str = "") -> str:
    """A chat template: how turns begin, how each ends, and what stands for an image."""
    return (
        f"{start}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}" + assistant + "{% else %}" + user + "{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}" + close + "{% else %}" + end + "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}" + assistant + "{% endif %}"
    )


def _chatml(image: str) -> str:
    end = "<|im_end|>{{ '\\n' }}"
    return _template(
        "<|im_start|>user{{ '\\n' }}", "<|im_start|>assistant{{ '\\n' }}", end, end, image
    )


# LLaVA-1.5's leaves the end token of an assistant's turn to the trainer.
_VICUNA = _template("USER: ", "ASSISTANT: ", " ", " ", "<image>{{ '\\n' }}", start="<s>")


def _llava() -> LlavaProcessor:
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE),
        _tokenizer([], bos="<s>", eos="</s>", pad="<pad>", image_token="<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_VICUNA,
    )


def _llava_next() -> LlavaNextProcessor:
    image = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=_SQUARE, image_grid_pinpoints=_GRID
    )
    return LlavaNextProcessor(
        image,
        _tokenizer(
            ["[INST]", "[/INST]"], bos="<s>", eos="</s>", pad="<pad>", image_token="<image>"
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template(
            "[INST] ", " ", " [/INST]", "</s>", "<image>{{ '\\n' }}", start="<s>"
        ),
    )


def _llava_onevision() -> LlavaOnevisionProcessor:
    tokenizer = _tokenizer(
        ["<|im_start|>"],
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image_token="<image>",
        video_token="<video>",
    )
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_GRID),
        tokenizer,
        VideoProcessorMixin(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",  # so that the largest grid is scaled down
        chat_template=_chatml("<image>{{ '\\n' }}"),
    )


def _qwen(processor, patch: int):
    tokenizer = _tokenizer(
        ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}  # pixels
    return processor(
        Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size),
        tokenizer,
        VideoProcessorMixin(),
        chat_template=_chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _idefics(processor, image_processor, *more, **end_of_turn: str):
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    tokenizer = _tokenizer(
        ["<fake_token_around_image>", "<image>", "<global-img>", "<|im_start|>", *tiles],
        bos="<|begin_of_text|>",
        eos="<end_of_utterance>",
        pad="<|end_of_text|>",
    )
    image = image_processor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    end = "<end_of_utterance>{{ '\\n' }}"
    return processor(
        image,
        tokenizer,
        *more,
        image_seq_len=4,
        chat_template=_template("User: ", "Assistant: ", end, end, "<image>", **end_of_turn),
    )


def _internvl() -> InternVLProcessor:
    tokenizer = _tokenizer(
        ["<|im_start|>"],
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=3),
        tokenizer,
        VideoProcessorMixin(),
        image_seq_length=4,
        chat_template=_chatml("<IMG_CONTEXT>{{ '\\n' }}"),
    )


def _gemma3() -> Gemma3Processor:
    tokenizer = _tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    end = "<end_of_turn>{{ '\\n' }}"
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size=_SQUARE),
        tokenizer,
        image_seq_length=4,
        chat_template=_template(
            "<start_of_turn>user{{ '\\n' }}",
            "<start_of_turn>model{{ '\\n' }}",
            end,
            end,
            "<start_of_image>",
            start="<bos>",
        ),
    )


def _paligemma() -> PaliGemmaProcessor:
    image = SiglipImageProcessorPil(size=_SQUARE)
    image.image_seq_length = 16
    tokenizer = _tokenizer([], bos="<bos>", eos="<eos>", pad="<pad>", image_token="<image>")
    return PaliGemmaProcessor(
        image, tokenizer, chat_template=_template("", " ", "", "<eos>", "<image>")
    )


def _janus() -> JanusProcessor:
    tokenizer = _tokenizer(
        [],
        bos="<|begin_of_sentence|>",
        eos="<|end_of_sentence|>",
        pad="<pad>",
        image_token="<image_placeholder>",
        boi_token="<begin_of_image>",
        eoi_token="<end_of_image>",
    )
    return JanusProcessor(
        JanusImageProcessorPil(size=_SQUARE),
        tokenizer,
        num_image_tokens=16,
        chat_template=_template(
            "User: ",
            "Assistant: ",
            "{{ '\\n\\n' }}",
            "<|end_of_sentence|>",
            "<image_placeholder>{{ '\\n' }}",
            start="<|begin_of_sentence|>",
        ),
    )


_PROCESSORS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen(Qwen2VLProcessor, 7),
    "qwen2_5_vl": lambda: _qwen(Qwen2_5_VLProcessor, 7),
    "qwen3_vl": lambda: _qwen(Qwen3VLProcessor, 7),
    "idefics3": lambda: _idefics(Idefics3Processor, Idefics3ImageProcessorPil),
    "smolvlm": lambda: _idefics(
        SmolVLMProcessor, SmolVLMImageProcessorPil, VideoProcessorMixin(), start="<|im_start|>"
    ),
    "internvl": _internvl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "janus": _janus,
    "qwen3_5": lambda: _qwen(Qwen3VLProcessor, 7),
}
