"""Commands of a model card, by the kind of the adapter and the type of the model."""

import ast
import json
import re
import shlex

import pytest
import torch
from adapter_kinds import save_base, save_trained
from safetensors.torch import load_file, save_file

from realign.training.serving import commands


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("smolvlm", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A plain LoRA of rank 4."""
    folder = tmp_path_factory.mktemp("adapter")
    save_trained(base, "LoRA", folder)
    return folder


def of(folder, base="org/base", model_type="smolvlm", **more):
    return commands(folder, adapter=True, base=str(base), model_type=model_type, **more)


def test_a_plain_lora_is_served_on_its_base(adapter, base):
    text = of(adapter)
    options = "--enable-lora --max-lora-rank 8 --lora-modules aligned=THIS_FOLDER"
    assert f"vllm serve org/base {options}\n" in text
    assert "--model-path org/base --enable-lora --lora-paths aligned=THIS_FOLDER\n" in text
    assert "python -m realign.export --model THIS_FOLDER --output merged\n" in text
    assert "convert_hf_to_gguf.py merged --mmproj --outfile mmproj.gguf\n" in text
    assert 'base = AutoModelForImageTextToText.from_pretrained("org/base", quant' in text
    local = of(base=base, folder=adapter, place="THIS_FOLDER/mine")
    assert str(base.parent) not in local and f'"{base.name}"' in local
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER/mine")' in local
    assert (
        "aligned=THIS_FOLDER/mine" in local and "realign.export --model THIS_FOLDER/mine" in local
    )
    assert 'AutoProcessor.from_pretrained("THIS_FOLDER")' in local


@pytest.mark.parametrize(
    ("rank", "given"), [(1, 8), (8, 8), (9, 16), (100, 128), (300, 320), (512, 512), (513, None)]
)
def test_the_rank_is_one_that_vllm_accepts(adapter, tmp_path, rank, given):
    """vLLM's list: 1, 8, 16, 32, 64, 128, 256, 320, 512."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    wide = {n: torch.zeros((rank, 8) if "lora_A" in n else (8, rank)) for n in weights}
    save_file(wide, tmp_path / "adapter_model.safetensors")
    text = of(tmp_path)
    assert (f"--max-lora-rank {given} " in text) == (given is not None)
    assert ("vLLM needs the merged folder: its rank 513 exceeds 512." in text) == (given is None)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("LoRA, DoRA", "it is a DoRA"),
        ("LoRA, modules_to_save norm", "it has copies of input_layernorm"),
        ("LoRA, rank and alpha patterns", "its ranks differ, and its scalings differ"),
        ("LoRA, bias=all", "it has biases of the base"),
        ("LoRA, lora_bias", "it has biases"),
        ("LoRA, PiSSA", "its initialization changes the base"),
        ("LoRA, target_parameters", "it adapts fused experts"),
        ("LoRA, all-linear", "it adapts layers outside of the language model, such as model."),
        ("LoRA, lm_head", "it adapts layers outside of the language model, such as lm_head"),
        ("LoRA, embed_tokens", "it has weights of other kinds than the factors"),
        ("LoRA, trainable tokens", "it has weights of other kinds than the factors"),
        ("IA3", "this adapter is of PEFT's kind IA3"),
    ],
)
def test_other_adapters_are_merged_first(base, tmp_path, kind, reason):
    save_trained(base, kind, tmp_path)
    text = of(tmp_path)
    assert f"vLLM needs the merged folder: {reason}" in text
    assert "vllm serve merged\n" in text and "--model-path merged\n" in text
    assert "--enable-lora" not in text and "--lora-paths" not in text


def test_types_without_support_are_not_listed(adapter, tmp_path):
    text = of(adapter, model_type="llava_next")
    assert "models of type llava_next are not in its list for LoRA" in text
    assert "Models of type llava_next are not listed by llama.cpp's conversion." in text
    assert "gguf" not in text and "vllm serve merged\n" in text
    whole = commands(tmp_path, adapter=False, base="org/base", model_type="qwen3_vl")
    assert "vllm serve THIS_FOLDER\n" in whole and "gguf" in whole
    assert "peft" not in whole and "org/base" not in whole and "merged" not in whole
    assert json.dumps("THIS_FOLDER") in whole


def test_a_card_before_its_adapter_names_the_reason(tmp_path):
    assert "this card was written before the adapter" in of(tmp_path)


def code_of(text, language):
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


@pytest.mark.parametrize("name", ["my base", "a;rm -rf ~", "it's", 'a "x"', "$(id)", "a\\nb"])
def test_names_are_quoted_in_commands(adapter, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    text = of(adapter, base=folder, place=f"THIS_FOLDER/{name}")
    words = [shlex.split(line, comments=True) for line in code_of(text, "console")[0].splitlines()]
    served = next(line for line in words if line[:2] == ["vllm", "serve"])
    assert served[2] == name and served[-1] == f"aligned=THIS_FOLDER/{name}"
    merge = next(line for line in words if "realign.export" in line)
    assert merge[merge.index("--model") + 1] == f"THIS_FOLDER/{name}"
    for code in code_of(text, "python"):
        strings = [
            node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)
        ]
        assert name in strings and f"THIS_FOLDER/{name}" in strings


def test_the_code_for_4_bits_loads_the_adapter(adapter, tmp_path):
    """Run with stand-ins, which record their arguments."""
    calls = []

    class Auto:
        @staticmethod
        def from_pretrained(*given, **options):
            calls.append((given, options.keys()))
            return "model"

    scope = {"AutoModelForImageTextToText": Auto, "PeftModel": Auto}
    code = code_of(of(adapter), "python")[1].replace("True", "False")
    exec(code, scope)
    assert calls == [
        (("org/base",), {"quantization_config"}), (("model", "THIS_FOLDER"), set())
    ]  # fmt: skip
    calls.clear()
    whole = commands(tmp_path, adapter=False, base="", model_type="llava")
    exec(code_of(whole, "python")[1].replace("True", "False"), scope)
    assert calls == [(("THIS_FOLDER",), {"quantization_config"})]
