"""Checks of `RDPOTrainer`: arguments, processor, and weights in a dtype that trains.

AdamW on bf16 weights loses most updates: near 1, a step of 1e-5 is 400 times smaller than the
spacing of bf16. Trained weights are therefore in fp32. bf16 is for frozen weights and computation.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel

from realign.checks import no_effect
from realign.hf.adapters import base_state, split
from realign.hf.config import RDPOConfig
from realign.modeling.loading import load_processor

_REPLACED = ("compute_loss_func", "compute_metrics", "data_collator", "model_init")
_TRAINABLE_DTYPES = (torch.float32, torch.bfloat16)
_REMEDY = "Load it with dtype=torch.float32, and set bf16=True to compute in bf16."


def check_arguments(args: Any, arguments: dict[str, Any]) -> None:
    """Check arguments of `RDPOTrainer` for unsupported ones, and for ones without effect.

    Raises:
        ValueError: for such an argument, with its name.
    """
    if not isinstance(args, RDPOConfig):
        raise ValueError(f"args is a {type(args).__name__}. Give an RDPOConfig.")
    if arguments["train_dataset"] is None:
        raise ValueError("train_dataset is None. Give the preference records to train on.")
    if arguments.get("ref_model") is not None:
        raise ValueError(
            "the reference is RDPOConfig(reference_model=...), a folder or Hub name, which is "
            "loaded for the reference pass only. Leave out ref_model."
        )
    if arguments.get("eval_dataset") == {}:
        raise ValueError("eval_dataset is an empty dict. Give records, or leave it out.")
    if args.projector_learning_rate and any(arguments.get("optimizers") or ()):
        raise ValueError(
            "projector_learning_rate would have no effect on the given optimizer. Leave it out, "
            "or give the optimizer its own groups."
        )
    for name in _REPLACED:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} would have no effect here. Leave it out.")
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ValueError("DeepSpeed is not supported. Shard with FSDP2 (fsdp_config, version 2).")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible, but this is one process. Start it with `accelerate "
            "launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES)."
        )


def checked_processor(processor: Any, path: str | Path, vlm: PreTrainedModel) -> Any:
    """Check the given processor. None loads the processor of the model's folder.

    Raises:
        ValueError: if it is not a processor of images and text, or belongs to a different model.
    """
    remedy = "Give the model's processor, as returned by AutoProcessor.from_pretrained(...)."
    if processor is None:
        if not str(path):
            raise ValueError(f"processing_class is None, and the model has no name. {remedy}")
        processor = load_processor(path)
    kind = type(processor).__name__
    for part in ("tokenizer", "image_processor", "apply_chat_template"):
        if not hasattr(processor, part):
            raise ValueError(f"processing_class is a {kind}, which has no {part}. {remedy}")
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"processing_class is a {kind} without a chat template, so prompts cannot be rendered. "
            "Set its chat_template."
        )
    embeddings: Any = vlm.get_input_embeddings()
    tokens, rows = len(processor.tokenizer), len(embeddings.weight)
    image = vlm.config.image_token_id
    # In Gemma 3, the processor's token precedes an image, and the tokenizer's is for features.
    ids = {getattr(part, "image_token_id", image) for part in (processor, processor.tokenizer)}
    if tokens > rows or image not in ids:
        raise ValueError(
            f"processing_class belongs to a different model. {kind} has {tokens} tokens and image "
            f"token {min(ids)}, and the model ({vlm.config.model_type}) has {rows} and {image}. "
            f"{remedy}"
        )
    return processor


def check_full_model(vlm: PreTrainedModel) -> None:
    """Check that a model without adapters has trained weights and can be saved.

    Raises:
        ValueError: if it has no trained weights, or cannot be saved.
    """
    if not any(parameter.requires_grad for parameter in vlm.parameters()):
        raise ValueError("no weight of the model is trained. Set requires_grad_(True).")
    try:
        with TemporaryDirectory() as folder:
            vlm.generation_config.save_pretrained(folder)
    except ValueError as error:
        raise ValueError(
            "the model's generation_config was changed, and transformers would not save it "
            f"({textwrap.shorten(str(error), 250, placeholder=' ...')}). Set do_sample=True in it, "
            "or leave out the sampling settings."
        ) from error


def check_splits(args: RDPOConfig, training: Any, evaluation: Iterable[Any]) -> None:
    """Check that `split` and `eval_split` have an effect. Rows have no splits.

    Raises:
        ValueError: when one has none.
    """
    named = [isinstance(rows, str | Path) for rows in evaluation]
    if args.eval_split and not any(named):
        no_effect("eval_split", "no eval_dataset is a path or a name", "give one")
    if args.split and not (isinstance(training, str | Path) or any(named)):
        no_effect("split", "no data set is a path or a name", "give one")


def check_sharding(accelerator: Accelerator) -> None:
    """Check that FSDP gathers whole weights for a checkpoint, as `RDPOTrainer` writes them.

    Raises:
        ValueError: when it would write shards.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    kind = plugin.state_dict_type
    if kind != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"fsdp_state_dict_type is {kind.name}, so the trained model would not be saved. Set "
            "FULL_STATE_DICT in accelerate's configuration, or state_dict_type in fsdp_config."
        )


def agreed(fingerprint: dict[str, str]) -> dict[str, str]:
    """Check that all processes have the same fingerprint. Every process calls this function.

    Raises:
        ValueError: if their weights differ, as with random adapters without a seed.
    """
    if len(set(gather_object([fingerprint["weights"]]))) > 1:
        raise ValueError(
            "the models of the processes have different weights. Call set_seed before "
            "get_peft_model, or give a peft_config."
        )
    return fingerprint


def check_weights(vlm: PreTrainedModel, *, adapted: bool, autocast: bool) -> None:
    """Check that the weights of a model can be trained, without those of adapters.

    Args:
        vlm: the model. Adapters in it are not checked.
        adapted: whether adapters are trained instead of the model's own weights.
        autocast: whether the forward computes in bf16, for weights of any dtype.

    Raises:
        ValueError: for quantized or missing weights, or an unsuitable dtype, with a weight's name.
    """
    if getattr(vlm, "hf_quantizer", None) is not None:
        method = vlm.config.quantization_config
        kind = getattr(method, "quant_method", None) or type(method).__name__
        raise ValueError(
            f"the model's weights are quantized ({getattr(kind, 'value', kind)}), which is not "
            "supported. Load it without quantization_config. With adapters, bf16 weights take 2 "
            "bytes each."
        )
    for name, value in vlm.named_parameters():
        if value.is_meta:
            raise ValueError(
                f"weight {name} of the model is on the meta device. Load it with from_pretrained, "
                "without a device_map that offloads. Make adapters without low_cpu_mem_usage."
            )
    parts: dict[torch.dtype, str] = {}
    weights = {parameter.data_ptr() for parameter in vlm.parameters()}
    for name, value in base_state(vlm).items():
        if value.data_ptr() in weights:
            parts.setdefault(value.dtype, name)
    for dtype, name in parts.items():
        if dtype not in _TRAINABLE_DTYPES:
            raise ValueError(
                f"weight {name} of the model is in {_name(dtype)}, which does not train. {_REMEDY}"
            )
    if not adapted and torch.bfloat16 in parts:
        raise ValueError(
            f"weight {parts[torch.bfloat16]} of the model is in bfloat16, in which AdamW loses "
            f"most updates. {_REMEDY}"
        )
    if len(parts) > 1 and not autocast:
        dtypes = " and ".join(f"{_name(dtype)} ({name})" for dtype, name in parts.items())
        raise ValueError(
            f"the model's weights are in {dtypes}, which needs bf16=True. Set it, or load the "
            "model in one dtype."
        )


def widen(holder: nn.Module, *, autocast: bool, log: Callable[[str], None]) -> None:
    """Widen trained weights of adapters to fp32, as PEFT does for new adapters only."""
    narrow = [p for p in holder.parameters() if p.requires_grad and p.dtype != torch.float32]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        log(f"{len(narrow)} adapter weights are widened to float32 for training")
    dtype = split(holder)[0].dtype
    if not autocast and dtype != torch.float32:
        log(f"computing in {_name(dtype)}, the dtype of the model's weights")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
