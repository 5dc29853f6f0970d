"""Precision of a model object: which dtypes of weights RDPOTrainer trains, and what it widens.

AdamW on bf16 weights loses most updates: near 1 a step of 1e-5 is 400 times less than the spacing
of bf16. So what learns is in fp32, and bf16 is for frozen weights and for computing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from realign.hf.adapters import base_state

_KEPT = (torch.float32, torch.bfloat16)
_REMEDY = "Load it with dtype=torch.float32, and set bf16=True to compute in bf16."


def check_weights(vlm: PreTrainedModel, *, adapted: bool, autocast: bool) -> None:
    """Refuse weights of a model without adapters that cannot be trained as asked.

    Args:
        vlm: the model; adapters in it are left out.
        adapted: whether adapters learn, not its own weights.
        autocast: whether the forward computes in bf16 whatever the weights' dtype is.

    Raises:
        ValueError: names the dtype and the part of the model, and how to load it.
    """
    if getattr(vlm, "hf_quantizer", None) is not None:
        method = vlm.config.quantization_config
        kind = getattr(method, "quant_method", None) or type(method).__name__
        raise ValueError(
            f"the model's weights are quantized ({getattr(kind, 'value', kind)}), which no test "
            "covers. Load it without quantization_config; bf16 weights with adapters take 2 bytes "
            "a weight."
        )
    for name, value in vlm.named_parameters():
        if value.is_meta:
            raise ValueError(
                f"weight {name} of the model is on the meta device. Load it with from_pretrained, "
                "without a device_map that offloads; make adapters without low_cpu_mem_usage."
            )
    parts: dict[torch.dtype, str] = {}
    weights = {parameter.data_ptr() for parameter in vlm.parameters()}
    for name, value in base_state(vlm).items():
        if value.data_ptr() in weights:
            parts.setdefault(value.dtype, name)
    for dtype, name in parts.items():
        if dtype not in _KEPT:
            raise ValueError(
                f"weight {name} of the model is in {_name(dtype)}, which does not train. {_REMEDY}"
            )
    if not adapted and torch.bfloat16 in parts:
        raise ValueError(
            f"weight {parts[torch.bfloat16]} of the model is in bfloat16, in which AdamW loses "
            f"most updates. {_REMEDY}"
        )
    if len(parts) > 1 and not autocast:
        shown = " and ".join(f"{_name(dtype)} ({name})" for dtype, name in parts.items())
        raise ValueError(
            f"the model's weights are in {shown}, which compute together under bf16=True only. Set "
            "it, or load the model in one dtype."
        )


def widen(holder: nn.Module, *, autocast: bool, say: Callable[[str], None]) -> None:
    """Keep what learns of adapters in fp32; PEFT does so only where it makes them."""
    narrow = [p for p in holder.parameters() if p.requires_grad and p.dtype != torch.float32]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        say(f"{len(narrow)} weights of adapters are widened to float32, in which they learn")
    if not autocast and holder.dtype != torch.float32:
        say(f"computing in {_name(holder.dtype)}, the dtype of the model's weights")


@contextmanager
def dtypes_named(model: nn.Module) -> Iterator[None]:
    """Name the dtypes of a model whose layers do not compute together, as a trained bias in fp32.

    Raises:
        ValueError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        kinds = sorted({_name(parameter.dtype) for parameter in model.parameters()})
        if len(kinds) < 2 or "type" not in str(error):
            raise
        raise ValueError(
            f"weights of the model in {' and '.join(kinds)} do not compute together ({error}). "
            f"{_REMEDY}"
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
