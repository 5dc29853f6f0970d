"""Precision of models under RDPOTrainer: dtypes, autocast, quantized and missing weights."""

import math

import pytest
import torch
from hf_runs import LORA, config, history
from peft import LoraConfig, get_peft_model
from tiny_vlms import make
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer
from realign.modeling.loading import load_processor


@pytest.fixture(scope="module")
def records(pairs_file):
    return read_pairs(pairs_file)[:4]


def model_in(dtype):
    return AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=dtype)


def part_in(dtype):
    model = model_in(torch.float32)
    model.model.vision_tower.to(dtype)
    return model


def on_meta():
    config = model_in(torch.float32).config
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def adapter_on_meta():
    return get_peft_model(model_in(torch.float32), LoraConfig(**LORA), low_cpu_mem_usage=True)


def quantized():
    model = model_in(torch.float32)
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


@pytest.mark.parametrize(
    ("make_model", "lora", "bf16", "message"),
    [
        (lambda: model_in(torch.float16), True, True, "in float16, which does not train.*float32"),
        (lambda: part_in(torch.float16), True, True, "vision_tower.* in float16"),
        (lambda: model_in(torch.bfloat16), False, True, "AdamW loses.*float32, and set bf16=True"),
        (lambda: part_in(torch.bfloat16), False, True, "vision_tower.* in bfloat16"),
        (lambda: part_in(torch.bfloat16), True, False, "bfloat16 .* and float32 .*bf16=True"),
        (on_meta, True, False, "is on the meta device"),
        (adapter_on_meta, False, False, "lora_A.* is on the meta device.*without low_cpu_mem"),
        (quantized, True, False, "are quantized .dict"),
    ],
    ids=[
        "fp16",
        "fp16 tower",
        "bf16",
        "bf16 tower",
        "mixed",
        "meta",
        "adapter on meta",
        "quantized",
    ],
)
def test_untrainable_weights_are_rejected(make_model, lora, bf16, message, records, tmp_path):
    peft = LoraConfig(**LORA) if lora else None
    with pytest.raises(ValueError, match=message):
        RDPOTrainer(make_model(), config(tmp_path, bf16=bf16), records, peft_config=peft,
                    processing_class=load_processor(ASSETS))  # fmt: skip


@pytest.mark.parametrize("name", ["fp16", "fp16_full_eval", "bf16_full_eval"])
def test_settings_that_cast_weights_are_rejected(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is not supported. Set bf16=True"):
        config(tmp_path, **{name: True})


def test_the_precision_of_accelerate_is_used(records, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'.*Launch with"):
        config(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = RDPOTrainer(model_in(torch.float32), config(tmp_path), records)
    assert trainer.model.dtype == torch.bfloat16
    assert trainer._about["dtype"] == "bfloat16"


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "more", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
def test_under_autocast_policy_and_reference_agree(kept, more, records, tmp_path):
    settings = config(tmp_path, max_steps=1, bf16=True)
    peft = LoraConfig(**LORA, **more)
    torch.manual_seed(0)
    model = get_peft_model(model_in(kept), peft)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    trainer = RDPOTrainer(model, settings, records)
    trainer.train()
    # Rows of other lengths round differently: by 1e-4 here, and by 1.6e-3 without autocast.
    assert history(trainer)[0] == pytest.approx(2 * math.log(2), abs=3e-4)
    learns = {p.dtype for p in model.parameters() if p.requires_grad}
    assert learns == {torch.float32}


def test_adapters_that_transformers_made_in_bf16_are_widened(records, tmp_path, capsys):
    model = model_in(torch.bfloat16)
    model.add_adapter(LoraConfig(**LORA))
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    settings = config(tmp_path, max_steps=1, disable_tqdm=False)
    trainer = RDPOTrainer(model, settings, records)
    assert narrow and all(p.dtype == torch.float32 for p in narrow)
    printed = capsys.readouterr().out
    assert f"{len(narrow)} adapter weights are widened to float32" in printed
    assert "computing in bfloat16, the dtype of the model's weights" in printed
    trainer.train()
    assert history(trainer)[0] == pytest.approx(2 * math.log(2), abs=3e-4)


def test_unsuitable_processors_are_rejected(records, tmp_path):
    processor = AutoProcessor.from_pretrained(ASSETS)
    _, foreign = make("qwen2_5_vl")
    unnamed = AutoModelForImageTextToText.from_config(model_in(torch.float32).config)
    unnamed.config._name_or_path = ""
    bare = AutoProcessor.from_pretrained(ASSETS)
    bare.chat_template = None
    warmer = model_in(torch.float32)
    warmer.generation_config.temperature = 0.5
    for model, given, message in (
        (model_in(torch.float32), processor.tokenizer, "has no tokenizer. Give the model's proc"),
        (model_in(torch.float32), processor.image_processor, "has no tokenizer. Give the model"),
        (model_in(torch.float32), bare, "without a chat template"),
        (
            model_in(torch.float32),
            foreign,
            "to a different model. Qwen2_5_VLProcessor has .* tokens",
        ),
        (unnamed, None, "processing_class is None, and the model has no name. Give the model's"),
    ):
        with pytest.raises(ValueError, match=message):
            RDPOTrainer(model, config(tmp_path), records, processing_class=given)
    with pytest.raises(ValueError, match="train_dataset is None"):
        RDPOTrainer(model_in(torch.float32), config(tmp_path), None)
    with pytest.raises(ValueError, match="generation_config was changed.*temperature.*Set do_sam"):
        RDPOTrainer(warmer, config(tmp_path), records)
    with pytest.raises(ValueError, match="model is a dict. Give a folder"):
        RDPOTrainer({}, config(tmp_path), records)
    with pytest.raises(ValueError, match="peft_config is a dict. Give a PeftConfig"):
        RDPOTrainer(model_in(torch.float32), config(tmp_path), records, peft_config={"r": 8})
