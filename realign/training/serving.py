"""Commands of a model card: loading, serving, merging and conversion of a trained model.

They follow the documentation of vLLM, SGLang and llama.cpp, which were not run here.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from peft import LoraConfig, PeftType
from safetensors import safe_open

from realign.modeling.adapter_config import read_adapter_config
from realign.training.model_card import shown_name

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank, without 1."""
_VLLM_LORA = {
    "gemma3", "glm4v", "glm4v_moe", "idefics3", "internvl", "lfm2_vl", "llama4", "llava",
    "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
    "smolvlm",
}  # fmt: skip
"""Model types with LoRA in vLLM's table of supported models."""
_LLAMA_CPP = {
    "gemma3", "gemma3n", "glm4v", "glm4v_moe", "idefics3", "llama4", "mistral3", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "smolvlm",
}  # fmt: skip
"""Model types whose class is in both lists of llama.cpp's conversion: language model and images.
LLaVA's class is there for Pixtral only."""
_OF_LANGUAGE_MODEL = re.compile(r"(?!.*(?:vision|visual)).*\.(?:language_model|text_model)\..*")
_FACTORS = (".lora_A.weight", ".lora_B.weight")

_LOAD = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")"""
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "ADAPTER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")"""
_MERGE = """# one folder of whole weights, which needs neither PEFT nor this package
python -m realign.export --model ADAPTER --output merged"""
_SERVE = """# vLLM
vllm serve WHOLE
# SGLang
python -m sglang.launch_server --model-path WHOLE"""
_SERVE_ADAPTER = """# vLLM: requests name the model "aligned"
vllm serve BASE --enable-lora --max-lora-rank RANK --lora-modules aligned=ADAPTER
# SGLang
python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths aligned=ADAPTER"""
_CONVERT = """# llama.cpp: the language model, the part for images, and 4 bits
python convert_hf_to_gguf.py WHOLE --outfile model.gguf
python convert_hf_to_gguf.py WHOLE --mmproj --outfile mmproj.gguf
llama-quantize model.gguf model-q4.gguf Q4_K_M
llama-mtmd-cli -m model-q4.gguf --mmproj mmproj.gguf --image photo.jpg -p "What is this?\""""
_FOUR_BITS = """from transformers import BitsAndBytesConfig

four_bits = BitsAndBytesConfig(load_in_4bit=True)
model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", quantization_config=four_bits)"""
_FOUR_BITS_ADAPTER = """from transformers import BitsAndBytesConfig

four_bits = BitsAndBytesConfig(load_in_4bit=True)
base = AutoModelForImageTextToText.from_pretrained("BASE", quantization_config=four_bits)
model = PeftModel.from_pretrained(base, "ADAPTER")"""


def commands(
    folder: Path, *, adapter: bool, base: str, model_type: str, place: str = "THIS_FOLDER"
) -> str:
    """Markdown with the commands for a saved model. A reader replaces THIS_FOLDER.

    Args:
        folder: the written model or adapter.
        adapter: whether it is an adapter.
        base: folder or Hub name of an adapter's base. A folder is shown by its name only.
        model_type: transformers' type of the model.
        place: shown folder of an adapter, which may be below THIS_FOLDER.
    """
    load, four_bits, shell, notes = _LOAD, _FOUR_BITS, [_SERVE], []
    if adapter:
        load, four_bits, shell = _LOAD_ADAPTER, _FOUR_BITS_ADAPTER, [_MERGE, _SERVE]
        rank, obstacles = _lora(folder)
        if model_type not in _VLLM_LORA:
            obstacles.append(f"models of type {model_type} are not in its list for LoRA")
        if obstacles:
            notes.append(f"vLLM needs the merged folder: {', and '.join(obstacles)}.")
        else:
            shell[1] = _SERVE_ADAPTER.replace("RANK", str(rank))
    if model_type in _LLAMA_CPP:
        shell.append(_CONVERT)
    else:
        notes.append(f"Models of type {model_type} are not listed by llama.cpp's conversion.")
    tested = "the first Python code" + " and `realign.export`" * adapter
    names = {
        "WHOLE": "merged" if adapter else "THIS_FOLDER",
        "ADAPTER": place,
        "BASE": shown_name(base),
    }
    pattern = "|".join(names)

    def python(code: str) -> str:
        code = re.sub(rf'"({pattern})"', lambda found: json.dumps(names[found[1]]), code)
        return f"```python\n{code}\n```"

    lines = re.sub(
        rf"\b({pattern})\b", lambda found: shlex.quote(names[found[1]]), "\n".join(shell)
    )
    parts = (
        python(load),
        f"## Serving and conversion\n\nTests of Re-Align run {tested}. The other commands were not "
        "run here.",
        f"```console\n{lines}\n```",
        *notes,
        f"In 4 bits, with bitsandbytes:\n\n{python(four_bits)}",
    )
    return "\n\n".join(parts)


def _lora(folder: Path) -> tuple[int, list[str]]:
    """The rank to give vLLM for an adapter, and the reasons why vLLM cannot serve it unmerged.

    vLLM takes plain LoRA on linear layers of the language model, with one scaling for all of them.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return 0, ["this card was written before the adapter"]
    config = read_adapter_config(folder / "adapter_config.json")
    if not isinstance(config, LoraConfig):
        return 0, [f"this adapter is of PEFT's kind {PeftType(config.peft_type).value}"]
    fields = {
        "use_dora": "it is a DoRA",
        "modules_to_save": f"it has copies of {', '.join(config.modules_to_save or ())}",
        "lora_bias": "it has biases",
        "target_parameters": "it adapts fused experts",
        "rank_pattern": "its ranks differ",
        "alpha_pattern": "its scalings differ",
    }
    obstacles = [reason for name, reason in fields.items() if getattr(config, name, None)]
    if str(config.init_lora_weights).startswith(("pissa", "olora")):
        obstacles.append("its initialization changes the base")
    if config.bias != "none":
        obstacles.append("it has biases of the base")
    with safe_open(weights, "pt") as file:
        factors = [name for name in file.keys() if name.endswith(_FACTORS)]  # noqa: SIM118
        others = set(file.keys()).difference(factors)
        ranks = [file.get_slice(n).get_shape()[0] for n in factors if n.endswith(_FACTORS[0])]
    outside = [name for name in factors if not _OF_LANGUAGE_MODEL.match(name)]
    if outside:
        module = outside[0].removeprefix("base_model.model.").rsplit(".", 2)[0]
        obstacles.append(f"it adapts layers outside of the language model, such as {module}")
    elif not obstacles and (others or not ranks):
        obstacles.append("it has weights of other kinds than the factors of linear layers")
    rank = next((r for r in _RANKS if ranks and r >= max(ranks)), 0)
    if not rank and ranks:
        obstacles.append(f"its rank {max(ranks)} exceeds {_RANKS[-1]}")
    return rank, obstacles
