"""Tiny processors of more VLM families: their own classes, small images, word-level tokenizers.

`tiny_more.py` names the cases. Chat templates end turns as the family's does, name the role of each
turn, and write empty thoughts where the family's does.
"""

from __future__ import annotations

from importlib import import_module

import transformers as hf
from tiny_processors import _GRID, _SQUARE, SIDE, _chatml, _qwen, _template, _tokenizer
from torchvision_stand_in import image_processor, imported
from transformers.video_processing_utils import VideoProcessorMixin

_LINE = "{{ '\\n' }}"
_ROLE = "{{ message['role'] }}"
_MERGED = {"patch_size": 7, "merge_size": 2}
_PIXELS = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}

for _family in (
    "Gemma4", "Gemma4Unified", "Glm4v", "Glm46V", "MiniCPMV4_6", "MiniCPMV4_7", "Ernie4_5_VLMoe",
    "Molmo2", "Kimi_K25", "LlavaNextVideo", "PerceptionLM", "VideoLlava",
):  # fmt: skip
    getattr(hf, f"{_family}Processor").video_processor_class = "VideoProcessorMixin"


def _pil(family: str, name: str) -> type:
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{name}ImageProcessorPil")


def _chatml_tokenizer(*special: str, **named: str):
    ends = {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>"}
    return _tokenizer(["<|im_start|>", *special], **ends, **named)


def _thinking(image: str) -> str:
    """Qwen3.5's template: an assistant's turn begins with empty thoughts."""
    thoughts = "<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}"
    end = f"<|im_end|>{_LINE}"
    turns = f"<|im_start|>{_ROLE}{_LINE}", f"<|im_start|>assistant{_LINE}{thoughts}"
    return _template(*turns, end, end, image)


def qwen3_vl_moe():
    return _qwen(hf.Qwen3VLProcessor)


def qwen3_5_moe():
    processor = _qwen(hf.Qwen3VLProcessor)
    processor.chat_template = _thinking("<|vision_start|><|image_pad|><|vision_end|>")
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    return processor


_GEMMA4 = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
    "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
}  # fmt: skip


def _gemma4(processor, image):
    special, ends = ["<|turn>", "<turn|>", "<|video|>"], ("<bos>", "<eos>", "<pad>")
    tokenizer = _tokenizer(
        special, **dict(zip(("bos", "eos", "pad"), ends, strict=True)), **_GEMMA4
    )
    end = f"<turn|>{_LINE}"
    turns = f"<|turn>{_ROLE}{_LINE}", f"<|turn>model{_LINE}"
    return processor(
        hf.Gemma4AudioFeatureExtractor(), image, tokenizer, VideoProcessorMixin(),
        image_seq_length=70, chat_template=_template(*turns, end, end, "<|image|>", start="<bos>"),
    )  # fmt: skip


_GEMMA4_IMAGES = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}


def gemma4():
    return _gemma4(hf.Gemma4Processor, _pil("gemma4", "Gemma4")(**_GEMMA4_IMAGES))


def gemma4_unified():
    image = image_processor("gemma4_unified", "Gemma4UnifiedImageProcessor")
    return _gemma4(hf.Gemma4UnifiedProcessor, image(**_GEMMA4_IMAGES))


def _glm(processor, image, thoughts: str = ""):
    """GLM's template ends no turn: the next turn's header does."""
    special = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"]
    special += [f"<|{edge}_of_{kind}|>" for edge in ("begin", "end") for kind in ("image", "video")]
    ends = {"bos": None, "eos": "<|endoftext|>", "pad": "<pad>"}
    images = "<|begin_of_image|><|image|><|end_of_image|>"
    answer = f"<|assistant|>{_LINE}"
    template = _template(
        f"<|{_ROLE}|>{_LINE}", answer + thoughts, "", "", images, start="[gMASK]<sop>"
    )
    template = template.removesuffix(answer + thoughts + "{% endif %}") + answer + "{% endif %}"
    return processor(
        image(temporal_patch_size=2, size=_PIXELS | {"longest_edge": 8 * SIDE**2}, **_MERGED),
        _tokenizer(special, **ends, image_token="<|image|>", video_token="<|video|>"),
        VideoProcessorMixin(),
        chat_template=template,
    )


def glm4v():
    return _glm(hf.Glm4vProcessor, _pil("glm4v", "Glm4v"))


def glm46v():
    """Its template writes empty thoughts into an answer that its prompt does not write."""
    thoughts = f"<think></think>{_LINE}"
    return _glm(hf.Glm46VProcessor, _pil("glm46v", "Glm46V"), thoughts)


def _minicpm(version: int, slices: bool):
    tokenizer = _chatml_tokenizer(
        "0", "1", "2", "<think>", "</think>",
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        image_start_token="<image>", image_end_token="</image>",
        slice_start_token="<slice>", slice_end_token="</slice>",
        image_id_start_token="<image_id>", image_id_end_token="</image_id>",
    )  # fmt: skip
    video = VideoProcessorMixin()
    video.slice_mode, video.downsample_mode = False, "16x"
    image = _pil("minicpmv4_6", "MiniCPMV4_6")(
        max_slice_nums=3 if slices else 1,
        scale_resolution=32 if slices else 64,
        patch_size=8,
        slice_mode=slices,
    )
    processor = getattr(hf, f"MiniCPMV4_{version}Processor")
    return processor(image, video, tokenizer, chat_template=_thinking(f"<|image_pad|>{_LINE}"))


def minicpmv4_6():
    return _minicpm(6, slices=False)


def minicpmv4_6_slices():
    return _minicpm(6, slices=True)


def minicpmv4_7():
    return _minicpm(7, slices=False)


def minicpmv4_7_slices():
    return _minicpm(7, slices=True)


def _pixtral(merge: int):
    special = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG_BREAK]"]
    tokenizer = _tokenizer(
        [*special, "[IMG_END]"], bos="<s>", eos="</s>", pad="<pad>", image_token="[IMG]"
    )
    begin = "{{ '[SYSTEM_PROMPT]' if message['role'] == 'system' else '[INST]' }}"
    end = "{{ '[/SYSTEM_PROMPT]' if message['role'] == 'system' else '[/INST]' }}"
    module = imported("transformers.models.pixtral.processing_pixtral")
    return module.PixtralProcessor(
        hf.PixtralImageProcessorPil(patch_size=7, size={"longest_edge": 2 * SIDE}),
        tokenizer,
        patch_size=7,
        spatial_merge_size=merge,
        chat_template=_template(begin, "", end, "</s>", "[IMG]", start="<s>"),
    )


def mistral3():
    return _pixtral(merge=2)


def pixtral():
    return _pixtral(merge=1)


def ernie4_5_vl_moe():
    named = {f"{kind}_{edge}_token": f"<|{kind}_{edge}|>".upper() for kind in ("image", "video")
             for edge in ("start", "end")}  # fmt: skip
    tokenizer = _chatml_tokenizer(
        image_token="<|IMAGE_PLACEHOLDER|>", video_token="<|video@placeholder|>", **named
    )
    return hf.Ernie4_5_VLMoeProcessor(
        _pil("ernie4_5_vl_moe", "Ernie4_5_VLMoe")(temporal_patch_size=1, size=_PIXELS, **_MERGED),
        tokenizer,
        VideoProcessorMixin(),
        chat_template=_chatml("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )


def kimi_k25():
    """Kimi's tokens name the role of a turn."""
    special = ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"]
    media = ["<|media_begin|>", "<|media_content|>", "<|media_end|>"]
    tokenizer = _tokenizer(
        [*special, *media], bos="[BOS]", eos="<|im_end|>", pad="[PAD]",
        image_token="<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>",
    )  # fmt: skip
    turns = f"<|im_{_ROLE}|>{_ROLE}<|im_middle|>", "<|im_assistant|>assistant<|im_middle|>"
    image = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    size = {"max_height": 2 * SIDE, "max_width": 2 * SIDE}
    return hf.Kimi_K25Processor(
        image_processor("kimi_k25", "Kimi_K25ImageProcessor")(size=size, **_MERGED),
        tokenizer,
        VideoProcessorMixin(),
        chat_template=_template(*turns, "<|im_end|>", "<|im_end|>", image),
    )


def lfm2_vl():
    places = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = _tokenizer(
        ["<|im_start|>", *places], bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>",
        image_token="<image>", image_start_token="<|image_start|>",
        image_end_token="<|image_end|>", image_thumbnail_token="<|img_thumbnail|>",
    )  # fmt: skip
    image = image_processor("lfm2_vl", "Lfm2VlImageProcessor")(
        min_tiles=2, max_tiles=4, min_image_tokens=4, max_image_tokens=8, encoder_patch_size=7,
        tile_size=SIDE, downsample_factor=2, max_pixels_tolerance=1.0, size=_SQUARE,
        max_num_patches=64,
    )  # fmt: skip
    template = "{{ bos_token }}" + _chatml("<image>")
    return hf.Lfm2VlProcessor(image, tokenizer, chat_template=template)


def ovis2():
    special = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    return hf.Ovis2Processor(
        hf.Ovis2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=3),
        _chatml_tokenizer(*special, "<IMG_ATOM>", image_token="<image>"),
        image_seq_length=4,
        chat_template=_chatml(f"<image>{_LINE}"),
    )


_MOLMO2 = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>"]
_MOLMO2 += ["<im_end>", "<frame_end>", "<im_low>", "<|im_start|>"]


def molmo2():
    tokenizer = _tokenizer(
        _MOLMO2, bos=None, eos="<|im_end|>", pad="<|endoftext|>",
        image_token="<|image|>", video_token="<|video|>",
    )  # fmt: skip
    image = image_processor("molmo2", "Molmo2ImageProcessor")(
        size=_SQUARE, patch_size=7, max_crops=3, overlap_margins=[1, 1], pooling_size=[2, 2]
    )
    return hf.Molmo2Processor(
        image, VideoProcessorMixin(), tokenizer, chat_template=_chatml("<|image|>")
    )


def _vicuna_tokenizer(*special: str, **named: str):
    return _tokenizer([*special], bos="<s>", eos="</s>", pad="<pad>", **named)


_VICUNA = _template("USER: ", "ASSISTANT: ", " ", "</s>", f"<image>{_LINE}", start="<s>")


def idefics2():
    tokenizer = _vicuna_tokenizer(
        "<end_of_utterance>", image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
    )  # fmt: skip
    end = f"<end_of_utterance>{_LINE}"
    return hf.Idefics2Processor(
        hf.Idefics2ImageProcessorPil(size={"shortest_edge": 14, "longest_edge": 28}),
        tokenizer,
        image_seq_len=4,
        chat_template=_template("User: ", "Assistant: ", end, end, "<image>", start="<s>"),
    )


def deepseek_vl():
    tokenizer = _tokenizer(
        [], bos="<|begin_of_sentence|>", eos="<|end_of_sentence|>", pad="<pad>",
        image_token="<image_placeholder>",
    )  # fmt: skip
    turns = "User: ", "Assistant: ", "{{ '\\n\\n' }}", "<|end_of_sentence|>"
    return hf.DeepseekVLProcessor(
        _pil("deepseek_vl", "DeepseekVL")(size=_SQUARE),
        tokenizer,
        num_image_tokens=16,
        chat_template=_template(*turns, f"<image_placeholder>{_LINE}"),
    )


def deepseek_vl_hybrid():
    processor = deepseek_vl()
    image = _pil("deepseek_vl_hybrid", "DeepseekVLHybrid")
    return hf.DeepseekVLHybridProcessor(
        image(size=_SQUARE, high_res_size={"height": 2 * SIDE, "width": 2 * SIDE}),
        processor.tokenizer,
        num_image_tokens=16,
        chat_template=processor.chat_template,
    )


def video_llama_3():
    processor = hf.VideoLlama3Processor
    processor.video_processor_class = "VideoProcessorMixin"
    image = _pil("video_llama_3", "VideoLlama3")(
        size=_PIXELS, temporal_patch_size=1, min_tokens=4, max_tokens=64, **_MERGED
    )
    tokenizer = _chatml_tokenizer(image_token="<image>", video_token="<video>")
    return processor(
        image, tokenizer, VideoProcessorMixin(), chat_template=_chatml(f"<image>{_LINE}")
    )


def vipllava():
    return hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE),
        _vicuna_tokenizer(image_token="<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_VICUNA,
    )


def aria():
    tokenizer = _tokenizer(
        ["<|im_start|>", "<fim_prefix>", "<fim_suffix>"], bos="<s>", eos="<|im_end|>",
        pad="<pad>", image_token="<|img|>",
    )  # fmt: skip
    processor = hf.AriaProcessor(
        _pil("aria", "Aria")(max_image_size=490, min_image_size=28),
        tokenizer,
        chat_template=_chatml("<fim_prefix><|img|><fim_suffix>"),
        size_conversion={490: 4},
    )
    processor.images_kwargs = {"max_image_size": 490, "split_image": False}
    return processor


def paddleocr_vl():
    tokenizer = _vicuna_tokenizer(
        "<|IMAGE_START|>", "<|IMAGE_END|>", image_token="<|IMAGE_PLACEHOLDER|>"
    )
    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    turns = "User: ", f"Assistant:{_LINE}", _LINE, "</s>"
    return hf.PaddleOCRVLProcessor(
        _pil("paddleocr_vl", "PaddleOCRVL")(size=_PIXELS, temporal_patch_size=1, **_MERGED),
        tokenizer,
        chat_template=_template(*turns, image, start="<s>"),
    )


def llava_next_video():
    size = {"size": {"shortest_edge": SIDE}, "crop_size": _SQUARE}
    return hf.LlavaNextVideoProcessor(
        VideoProcessorMixin(),
        hf.LlavaNextImageProcessorPil(image_grid_pinpoints=_GRID, **size),
        _vicuna_tokenizer(image_token="<image>", video_token="<video>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_VICUNA,
    )


def _perception_lm(**images):
    tokenizer = _tokenizer(
        ["<|start_header_id|>", "<|end_header_id|>"], bos="<|begin_of_text|>", eos="<|eot_id|>",
        pad="<pad>", image_token="<|image|>", video_token="<|video|>",
    )  # fmt: skip
    header = f"<|start_header_id|>{_ROLE}<|end_header_id|>{{{{ '\\n\\n' }}}}"
    turns = header, header.replace(_ROLE, "assistant"), "<|eot_id|>", "<|eot_id|>"
    image = image_processor("perception_lm", "PerceptionLMImageProcessor")
    return hf.PerceptionLMProcessor(
        VideoProcessorMixin(),
        image(tile_size=SIDE, size=_SQUARE, **images),
        tokenizer,
        patch_size=7,
        pooling_ratio=2,
        chat_template=_template(*turns, "<|image|>", start="<|begin_of_text|>"),
    )


def perception_lm():
    return _perception_lm(vision_input_type="vanilla")


def perception_lm_tiles():
    return _perception_lm(max_num_tiles=3)


def video_llava():
    return hf.VideoLlavaProcessor(
        hf.VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=_SQUARE),
        VideoProcessorMixin(),
        _vicuna_tokenizer(image_token="<image>", video_token="<video>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=_VICUNA,
    )


_COHERE = {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>"}
_COHERE_TURNS = (
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip
_COHERE_SPECIAL = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]


def cohere2_vision():
    tokenizer = _tokenizer(
        _COHERE_SPECIAL, **_COHERE, image_token="<|IMG_PATCH|>", boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>", img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    image = image_processor("cohere2_vision", "Cohere2VisionImageProcessor")
    return hf.Cohere2VisionProcessor(
        image(size=_SQUARE, patch_size=2, max_patches=3),
        tokenizer,
        chat_template=_template(*_COHERE_TURNS, "<|IMG_PATCH|>", start="<BOS_TOKEN>"),
    )


def aya_vision():
    edges = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    tiles = [f"TILE_{i}" for i in range(1, 5)]
    tokenizer = _tokenizer(
        [*_COHERE_SPECIAL, *edges, *tiles, "TILE", "<|IMG_PATCH|>"], **_COHERE,
        image_token="<image>",
    )  # fmt: skip
    return hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=3),
        tokenizer,
        patch_size=7,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=_template(*_COHERE_TURNS, "<image>", start="<BOS_TOKEN>"),
    )
