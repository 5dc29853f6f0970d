"""A tiny processor of every VLM family: its own classes, small images, a word-level tokenizer.

Each has the family's special tokens, and a chat template that places images and ends assistant
turns as the family's does. PaliGemma has no template. Its template here is prompt, space, answer.

Two packages that only videos need are replaced here, in this process only: torchvision, for
processors with a video processor, and num2words, for SmolVLM's.
"""

from __future__ import annotations

import transformers as hf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_processing_utils import VideoProcessorMixin

SIDE = 28  # width and height of one view, in pixels
_LINE = "red green blue one two three four a the is of and left right small large dot bar"
WORDS = _LINE.split()
_SQUARE = {"height": SIDE, "width": SIDE}
_GRID = [[28, 56], [56, 28], [56, 56]]  # AnyRes resolutions
_ROLES = ("user", "assistant", "system", "model", "User", "Assistant", "USER", "ASSISTANT")

for _family in ("LlavaOnevision", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "SmolVLM", "InternVL"):
    getattr(hf, f"{_family}Processor").video_processor_class = "VideoProcessorMixin"
hf.processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin
VideoProcessorMixin.num_frames = VideoProcessorMixin.fps = None  # SmolVLM's template reads them
processing_smolvlm.num2words = processing_smolvlm.num2words or str


_VICUNA_ENDS, _CHATML_ENDS = ("<s>", "</s>", "<pad>"), (None, "<|im_end|>", "<|endoftext|>")
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_TILES = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
_TOKENS = {  # (first, end and padding token), special tokens, and named ones
    "llava": (_VICUNA_ENDS, [], {"image_token": "<image>"}),
    "llava_next": (_VICUNA_ENDS, ["[INST]", "[/INST]"], {"image_token": "<image>"}),
    "llava_onevision": (
        _CHATML_ENDS, ["<|im_start|>"], {"image_token": "<image>", "video_token": "<video>"},
    ),
    "qwen": (_CHATML_ENDS, ["<|im_start|>", *_VISION], {}),
    "idefics": (
        ("<|begin_of_text|>", "<end_of_utterance>", "<|end_of_text|>"),
        ["<fake_token_around_image>", "<image>", "<global-img>", "<|im_start|>", *_TILES], {},
    ),
    "internvl": (_CHATML_ENDS, ["<|im_start|>"], {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }),
    "gemma3": (("<bos>", "<eos>", "<pad>"), ["<start_of_turn>", "<end_of_turn>"], {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }),
    "paligemma": (("<bos>", "<eos>", "<pad>"), [], {"image_token": "<image>"}),
    "janus": (("<|begin_of_sentence|>", "<|end_of_sentence|>", "<pad>"), [], {
        "image_token": "<image_placeholder>", "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    }),
}  # fmt: skip


def make_processor(family: str):
    """The processor of a family of `tiny_vlms.FAMILIES`."""
    return _PROCESSORS[family]()


def _tokenizer_of(family: str) -> hf.PreTrainedTokenizerFast:
    (bos, eos, pad), special, named = _TOKENS[family]
    return _tokenizer(special, bos=bos, eos=eos, pad=pad, **named)


def _tokenizer(
    special: list[str], *, bos: str | None, eos: str, pad: str, **named: str
) -> hf.PreTrainedTokenizerFast:
    """A word-level tokenizer for words, newlines and punctuation."""
    first = [pad, *([bos] if bos else []), eos, "<unk>"]
    special = [*dict.fromkeys([*first, *named.values(), *special])]
    words = ["\n", "\n\n", ":", ".", "?", "Here", *_ROLES, *WORDS]
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n\n|\n|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.add_special_tokens(special)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token="<unk>",
        extra_special_tokens=named, model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _template(user: str, assistant: str, end: str, close: str, image: str, start: str = "") -> str:
    """A chat template from the text before turns, after each turn, and for an image."""
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
        "<|im_start|>{{ message['role'] }}{{ '\\n' }}",
        "<|im_start|>assistant{{ '\\n' }}",
        end,
        end,
        image,
    )


# LLaVA-1.5's template leaves the end token of an assistant's turn to the trainer.
_VICUNA = _template("USER: ", "ASSISTANT: ", " ", " ", "<image>{{ '\\n' }}", start="<s>")


def _llava():
    return hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE),
        _tokenizer_of("llava"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_VICUNA,
    )


def _llava_next():
    size = {"size": {"shortest_edge": SIDE}, "crop_size": _SQUARE}
    image = "<image>{{ '\\n' }}"
    return hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(image_grid_pinpoints=_GRID, **size),
        _tokenizer_of("llava_next"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("[INST] ", " ", " [/INST]", "</s>", image, start="<s>"),
    )


def _llava_onevision():
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_GRID),
        _tokenizer_of("llava_onevision"),
        VideoProcessorMixin(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",  # so that the largest grid is scaled down
        chat_template=_chatml("<image>{{ '\\n' }}"),
    )


def _qwen(processor):
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}  # pixels
    return processor(
        hf.Qwen2VLImageProcessorPil(patch_size=7, merge_size=2, temporal_patch_size=2, size=size),
        _tokenizer_of("qwen"),
        VideoProcessorMixin(),
        chat_template=_chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _idefics(processor, image_processor, *more, **end_of_turn: str):
    end = "<end_of_utterance>{{ '\\n' }}"
    return processor(
        image_processor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        _tokenizer_of("idefics"),
        *more,
        image_seq_len=4,
        chat_template=_template("User: ", "Assistant: ", end, end, "<image>", **end_of_turn),
    )


def _internvl():
    return hf.InternVLProcessor(
        hf.GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=3),
        _tokenizer_of("internvl"),
        VideoProcessorMixin(),
        image_seq_length=4,
        chat_template=_chatml("<IMG_CONTEXT>{{ '\\n' }}"),
    )


def _gemma3():
    end = "<end_of_turn>{{ '\\n' }}"
    turns = [f"<start_of_turn>{role}{{{{ '\\n' }}}}" for role in ("user", "model")]
    return hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size=_SQUARE),
        _tokenizer_of("gemma3"),
        image_seq_length=4,
        chat_template=_template(*turns, end, end, "<start_of_image>", start="<bos>"),
    )


def _paligemma():
    image = hf.SiglipImageProcessorPil(size=_SQUARE)
    image.image_seq_length = 16
    template = _template("", " ", "", "<eos>", "<image>")
    return hf.PaliGemmaProcessor(image, _tokenizer_of("paligemma"), chat_template=template)


def _janus():
    begin, end, image = _TOKENS["janus"][0][0], "<|end_of_sentence|>", "<image_placeholder>"
    turns = "User: ", "Assistant: ", "{{ '\\n\\n' }}", end
    return hf.JanusProcessor(
        hf.JanusImageProcessorPil(size=_SQUARE),
        _tokenizer_of("janus"),
        num_image_tokens=16,
        chat_template=_template(*turns, image + "{{ '\\n' }}", start=begin),
    )


_PROCESSORS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen(hf.Qwen2VLProcessor),
    "qwen2_5_vl": lambda: _qwen(hf.Qwen2_5_VLProcessor),
    "qwen3_vl": lambda: _qwen(hf.Qwen3VLProcessor),
    "idefics3": lambda: _idefics(hf.Idefics3Processor, hf.Idefics3ImageProcessorPil),
    "smolvlm": lambda: _idefics(
        hf.SmolVLMProcessor, hf.SmolVLMImageProcessorPil, VideoProcessorMixin(),
        start="<|im_start|>",
    ),
    "internvl": _internvl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "janus": _janus,
    "qwen3_5": lambda: _qwen(hf.Qwen3VLProcessor),
}  # fmt: skip
