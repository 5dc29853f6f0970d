"""Preference records and tiny models for the benchmark of the start (`start_up.py`).

Images are JPEG, 640 x 480, of about 106 KiB, as in the photographs of COCO. Records have two: one
in `images` and one in `retrieved_images`. A JPEG comment with a number makes every image distinct,
so 500 bodies are enough. Texts are runs of words from Python's own help, as long as in RLAIF-V.
Everything is made once per folder, and depends on the arguments only.
"""

from __future__ import annotations

import io
import itertools
import pydoc_data.topics
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from realign.data.records import Record, StoredImage, write_pairs

BODIES = 500
SIZE = (640, 480)
NOISE = 52
"""Half the range of the noise in a color. It gives 106 KiB at Pillow's default quality of 75."""
SMALL = 200
"""Distinct images of a data set for the time of texts and headers."""
RLAIF_V = ((10, 21), (60, 101), (60, 101))
"""Words of question, chosen and rejected answer: lowest number, and highest plus one."""
SHORT = ((8, 13), (12, 21), (12, 21))
VOCABULARY = 4096
VICUNA = (
    "<s>{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' "
    "else part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def pairs(folder: Path, kind: str, count: int) -> Path:
    """The Parquet file with `count` records, written on the first call.

    Args:
        folder: folder of all data sets.
        kind: "embedded" (images in the file), "files" (paths of images), or "headers" (paths of
            `SMALL` small images, and short texts).
        count: number of records.
    """
    path = folder / f"{kind}-{count}" / "pairs.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pairs(path, _records(path.parent, kind, count), typed=False)
    return path


def _records(folder: Path, kind: str, count: int) -> Iterator[Record]:
    rng, words = np.random.default_rng(count), corpus().split()
    lengths = SHORT if kind == "headers" else RLAIF_V
    images = _images(folder, kind)
    for number in range(count):
        question, chosen, rejected = (
            _text(rng, words, int(rng.integers(*span))) for span in lengths
        )
        prompt = ({"role": "user", "content": question},)
        one, other = (next(images),), (next(images),)
        yield Record(f"r{number}", prompt, chosen, rejected, one, other)


def corpus() -> str:
    """English text of Python's own help: 55,000 words in a fixed order."""
    topics = pydoc_data.topics.topics
    text = " ".join(topics[name] for name in sorted(topics))
    found = re.findall(r"[A-Za-z]+(?:'[a-z]+)?[.,;:]?(?=\s)", text)
    return " ".join(found)


def _text(rng: np.random.Generator, words: list[str], count: int) -> str:
    start = rng.integers(len(words) - count)
    return " ".join(words[start : start + count]).rstrip(".,;:") + "."


def _images(folder: Path, kind: str) -> Iterator[StoredImage]:
    """Images without end: distinct ones, or `SMALL` distinct ones in turn."""
    if kind == "headers":
        rng = np.random.default_rng(1)
        sizes = rng.integers((16, 16), (65, 49), (SMALL, 2))
        for number, size in enumerate(sizes.tolist()):
            (folder / f"{number}.jpg").write_bytes(jpeg(rng, (size[0], size[1])))
        yield from itertools.cycle([StoredImage(path=f"{n}.jpg") for n in range(SMALL)])
    bodies = [jpeg(np.random.default_rng([2, n]), SIZE) for n in range(BODIES)]
    for number in itertools.count():
        data = numbered(bodies[number % BODIES], number)
        if kind == "embedded":
            yield StoredImage(data)
        else:
            (folder / f"{number}.jpg").write_bytes(data)
            yield StoredImage(path=f"{number}.jpg")


def jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A color ramp with noise as JPEG; `size` is (width, height)."""
    width, height = size
    ramp = np.linspace(40, 210, width)[None, :, None] * rng.uniform(0.6, 1, 3)
    noise = rng.integers(-NOISE, NOISE + 1, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def numbered(data: bytes, number: int) -> bytes:
    """The same JPEG with a number in a comment (marker FFFE) after its first marker."""
    return data[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8) + data[2:]


def model(folder: Path, family: str) -> Path:
    """The folder of a tiny random model with the family's own image processor.

    Args:
        folder: folder of all models.
        family: "llava" (CLIP at 336 pixels, 576 tokens) or "qwen2_vl" (the defaults of its class).
    """
    path = folder / family
    if not (path / "config.json").exists():
        config, processor = {"llava": _llava, "qwen2_vl": _qwen2_vl}[family]()
        torch.manual_seed(0)
        hf.AutoModelForImageTextToText.from_config(config).save_pretrained(path)
        processor.save_pretrained(path)
    return path


def without_torchvision() -> None:
    """Let Qwen's processors load without torchvision, which only their videos need."""
    from transformers.video_processing_utils import VideoProcessorMixin

    if not hf.utils.is_torchvision_available():
        hf.Qwen2VLProcessor.video_processor_class = "VideoProcessorMixin"
        hf.processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin


def _tokenizer(first: str | None, end: str, special: list[str], **named: str):
    """A byte-level BPE trained on `corpus`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, special_tokens=["<pad>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([corpus()], trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=first, eos_token=end,
        extra_special_tokens=named, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _text_config(tokenizer, kind: str, **more) -> dict:
    return {
        "model_type": kind, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **more,
    }  # fmt: skip


def _llava():
    tokenizer = _tokenizer("<s>", "</s>", ["<s>", "</s>", "<image>"], image_token="<image>")
    square = {"height": 336, "width": 336}
    processor = hf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=square), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=VICUNA,
    )  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 336, "patch_size": 14,
        "projection_dim": 16,
    }  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=_text_config(tokenizer, "llama"),
        image_token_index=processor.image_token_id, image_seq_length=576,
        vision_feature_select_strategy="default", vision_feature_layer=-2,
    )  # fmt: skip
    return config, processor


def _qwen2_vl():
    vision_tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    special = ["<|im_start|>", "<|im_end|>", *vision_tokens]
    tokenizer = _tokenizer(None, "<|im_end|>", special)
    without_torchvision()
    from transformers.video_processing_utils import VideoProcessorMixin

    processor = hf.Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(), tokenizer, VideoProcessorMixin(), chat_template=CHATML
    )
    names = ("vision_start", "vision_end", "image", "video")
    ids = zip(names, tokenizer.convert_tokens_to_ids(vision_tokens), strict=True)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 1, "num_heads": 1, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = hf.Qwen2VLConfig(
        vision_config=vision,
        text_config=_text_config(tokenizer, "qwen2_vl_text", rope_parameters=rope),
        **{f"{name}_token_id": token for name, token in ids},
    )
    return config, processor
