"""Adapters of every PEFT kind on a tiny model, ways to load them, and plain log-probs.

`KINDS` has a configuration for every PEFT tuner except prompt learning, and for the variants of
LoRA. `WAYS` load a saved adapter as users do. `perturb` replaces training.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from tiny_vlms import make
from transformers import AutoModelForImageTextToText, PreTrainedModel

FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "smolvlm")
"""Untied, untied, tied by default, tied on request."""

_PROJECTIONS = r".*\.(language_model|text_model)\..*\.(q_proj|v_proj)"
_WIDE = r".*\.(language_model|text_model)\..*\.(q_proj|o_proj)"  # (32, 32) in every family
_Q_AND = r".*\.(language_model|text_model)\..*\.q_proj|.*\.?"
_HEAD, _EMBEDDING = _Q_AND + "lm_head", _Q_AND + "embed_tokens"
_ON = {"target_modules": _PROJECTIONS}


def _lora(**more) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8} | _ON | more))


KINDS: dict[str, PeftConfig] = {
    "LoRA": _lora(),
    "LoRA, rank-stabilized": _lora(use_rslora=True),
    "LoRA, dropout": _lora(lora_dropout=0.1),
    "LoRA, DoRA": _lora(use_dora=True),
    "LoRA, PiSSA": _lora(init_lora_weights="pissa"),
    "LoRA, OLoRA": _lora(init_lora_weights="olora"),
    "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
    "LoRA, Gaussian": _lora(init_lora_weights="gaussian"),
    "LoRA, bias=all": _lora(bias="all"),
    "LoRA, bias=lora_only": _lora(bias="lora_only"),
    "LoRA, lora_bias": _lora(lora_bias=True),
    "LoRA, rank and alpha patterns": _lora(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "LoRA, all-linear": _lora(target_modules="all-linear"),
    "LoRA, lm_head": _lora(target_modules=_HEAD),
    "LoRA, embed_tokens": _lora(target_modules=_EMBEDDING),
    "LoRA, both ends": _lora(target_modules=f"{_HEAD}|.*embed_tokens"),
    "LoRA, both ends, tied": _lora(
        target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    ),
    "DoRA, lm_head": _lora(target_modules=_HEAD, use_dora=True),
    "DoRA, embed_tokens": _lora(target_modules=_EMBEDDING, use_dora=True),
    "LoRA, modules_to_save lm_head": _lora(modules_to_save=["lm_head"]),
    "LoRA, modules_to_save embed_tokens": _lora(modules_to_save=["embed_tokens"]),
    "LoRA, modules_to_save both": _lora(modules_to_save=["lm_head", "embed_tokens"]),
    "LoRA, modules_to_save norm": _lora(modules_to_save=["input_layernorm"]),
    "LoRA, modules_to_save tied": _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA, trainable tokens": _lora(trainable_token_indices=[3, 5, 7, 9]),
    "LoRA, target_parameters": _lora(
        target_modules=[], target_parameters=["mlp.down_proj.weight", "mlp.up_proj.weight"]
    ),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **_ON),
    "AdaMSS": peft.AdamssConfig(r=8, num_subspaces=2, target_modules=_WIDE),
    "BEFT": peft.BeftConfig(target_modules=_PROJECTIONS),
    "BOFT": peft.BOFTConfig(boft_block_size=4, **_ON),
    "C3A": peft.C3AConfig(block_size=8, **_ON),
    "DEFT": peft.DeftConfig(r=4, **_ON),
    "DeLoRA": peft.DeloraConfig(r=4, delora_lambda=4, **_ON),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, scaling=50.0, **_ON),
    "FRoD": peft.FrodConfig(progressbar=False, target_modules=_WIDE),
    "GLoRA": peft.GloraConfig(r=4, **_ON),
    "GraLoRA": peft.GraloraConfig(r=4, alpha=8, **_ON),
    "HiRA": peft.HiraConfig(r=4, **_ON),
    "HRA": peft.HRAConfig(r=4, **_ON),
    "IA3": peft.IA3Config(
        target_modules=_WIDE + r"|.*\.(language_model|text_model)\..*\.down_proj",
        feedforward_modules=r".*\.down_proj",
    ),
    "Lily": peft.LilyConfig(r=4, **_ON),
    "LN tuning": peft.LNTuningConfig(
        target_modules=r".*\.(language_model|text_model)\..*\.input_layernorm"
    ),
    "LoHa": peft.LoHaConfig(r=4, **_ON),
    "LoKr": peft.LoKrConfig(r=4, **_ON),
    "LoKr, modules_to_save lm_head": peft.LoKrConfig(r=4, modules_to_save=["lm_head"], **_ON),
    "LoKr, lm_head": peft.LoKrConfig(r=4, target_modules=_HEAD),
    "MiSS": peft.MissConfig(r=4, **_ON),
    "MiSS, bat": peft.MissConfig(r=4, init_weights="bat", target_modules=_WIDE),
    "OFT": peft.OFTConfig(oft_block_size=8, **_ON),
    "OFT, lm_head": peft.OFTConfig(oft_block_size=8, target_modules=_HEAD),
    "OSF": peft.OSFConfig(effective_rank=8, **_ON),
    "PEANuT": peft.PeanutConfig(r=4, **_ON),
    "PSOFT": peft.PsoftConfig(r=4, psoft_alpha=4, **_ON),
    "PVeRA": peft.PveraConfig(r=8, **_ON),
    "RandLoRA": peft.RandLoraConfig(r=4, randlora_alpha=8, **_ON),
    "RoAd": peft.RoadConfig(group_size=8, **_ON),
    "SHiRA": peft.ShiraConfig(r=4, random_seed=0, **_ON),
    "SuperTuning": peft.SupertuningConfig(sparsity=0.9, **_ON),
    "TinyLoRA": peft.TinyLoraConfig(r=2, u=8, **_ON),
    "Trainable tokens": peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[3, 5, 7, 9]
    ),
    "Uni-LoRA": peft.UniLoraConfig(r=4, theta_d_length=64, **_ON),
    "VB-LoRA": peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=8, **_ON),
    "VeRA": peft.VeraConfig(r=8, **_ON),
    "VeRA, no projections": peft.VeraConfig(r=8, save_projection=False, **_ON),
    "WaveFT": peft.WaveFTConfig(n_frequency=32, **_ON),
}

SPECIAL: dict[str, PeftConfig] = {
    "LoRA, activated": _lora(alora_invocation_tokens=[5]),
    "Adaption prompt": peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
    "Poly": peft.PolyConfig(r=4, n_tasks=2, n_skills=2, **_ON),
    "Prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "Prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}
"""Kinds that act in the forward of `PeftModel`, which a forest never calls."""


def config_of(kind: str) -> PeftConfig:
    """A new configuration, since PEFT modifies the one it is given."""
    return copy.deepcopy((KINDS | SPECIAL)[kind])


@contextmanager
def quiet():
    """Ignore PEFT's warnings, which `pytest -W error` turns into failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_base(family: str, folder: Path) -> Path:
    """Write the tiny model of a family and its processor."""
    model, processor = make(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load_base(base: Path) -> PreTrainedModel:
    """The base in fp32, loaded by transformers."""
    return AutoModelForImageTextToText.from_pretrained(str(base), dtype=torch.float32)


def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Add noise to every trained weight, instead of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn(weight.shape, generator=generator))


def adapt(base: Path, kind: str, *, name: str = "default", seed: int = 0) -> PeftModel:
    """The base with a new adapter of a kind, which may equal the base at first."""
    torch.manual_seed(seed)
    with quiet():
        return get_peft_model(load_base(base), config_of(kind), adapter_name=name).eval()


def save_trained(base: Path, kind: str, folder: Path, *, seed: int = 0) -> PeftModel:
    """Write an adapter that differs from its base. Returns the model with the adapter."""
    model = adapt(base, kind, seed=seed)
    perturb(model, seed)
    with quiet():
        model.save_pretrained(folder)
    return model


def _peft(base: Path, folder: Path, name: str = "default", learns: bool = True) -> PeftModel:
    return PeftModel.from_pretrained(
        load_base(base), folder, adapter_name=name, is_trainable=learns
    )


def _one_of_several(base: Path, folder: Path) -> PeftModel:
    model = _peft(base, folder, "first", learns=False)
    perturb(model)  # only its neighbour is measured; the difference detects a mix-up
    model.load_adapter(str(folder), adapter_name="second", is_trainable=True)
    model.set_adapter("second")
    return model


def _load_adapter(base: Path, folder: Path) -> PreTrainedModel:
    model = load_base(base)
    model.load_adapter(str(folder), is_trainable=True)
    return model


WAYS: dict[str, Callable[[Path, Path], PeftModel | PreTrainedModel]] = {
    "PeftModel.from_pretrained": _peft,
    "by a name of its own": lambda base, folder: _peft(base, folder, "mine"),
    "one of several": _one_of_several,
    "model.load_adapter": _load_adapter,
    "AutoModel on the adapter's folder": lambda base, folder: load_base(folder),
}
"""A saved adapter as a model, from (base, adapter folder). "get_peft_model" is `adapt`."""


def inputs_of(processor) -> dict[str, torch.Tensor]:
    """One image and a sentence as model inputs."""
    ask = [{"type": "image"}, {"type": "text", "text": "red green blue one two three"}]
    text = processor.apply_chat_template([{"role": "user", "content": ask}])
    made = processor(images=[Image.radial_gradient("L").convert("RGB").resize((28, 28))],
                     text=[text], return_tensors="pt")  # fmt: skip
    return {name: value for name, value in made.items() if name != "labels"}


@torch.no_grad()
def logps(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probs of every token at every position by one plain forward, (T, V) fp64."""
    return model.eval()(**inputs, use_cache=False).logits[0].double().log_softmax(-1)
