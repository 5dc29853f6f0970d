"""Quantized base weights for LoRA by bitsandbytes: 4 bits (NF4) or 8 bits (row-wise int8).

The linear layers of the language model are quantized. Embeddings, head, norms, vision tower and
projector keep the compute dtype. A layer's weight is dequantized for each product, in forward and
backward. The model therefore equals a plain one with the dequantized weights.

bitsandbytes' own forward is not used. In 8 bits it also rounds activations, and it treats columns
with outliers separately, so a log-prob would depend on the rest of the batch. In 4 bits it repacks
weights in evaluation on CPUs with AVX512-BF16, and a repacked weight passes no gradient on.
"""

from __future__ import annotations

import importlib.metadata
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""Classes of plain linear layers."""
_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Stored bytes per weight. 64 weights share a scale in 8 bits, and 256 scales share one in fp32."""


def settings(method: str, dtype: torch.dtype, vlm: PreTrainedModel) -> BitsAndBytesConfig:
    """The arguments of bitsandbytes for a model.

    Args:
        method: '4bit' or '8bit'.
        dtype: compute dtype.
        vlm: the model without quantization, on any device.
    """
    return BitsAndBytesConfig(
        load_in_4bit=method == "4bit",
        load_in_8bit=method == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_outside_decoder(vlm),
    )


def describe(method: str) -> str:
    """Method and version, for fingerprints of what the weights compute."""
    kind = "nf4, double quantization" if method == "4bit" else "int8 per row"
    return f"{method}: {kind}, bitsandbytes {importlib.metadata.version('bitsandbytes')}"


def use(vlm: PreTrainedModel) -> None:
    """Replace the forward of every quantized layer by a product with its dequantized weight.

    Its scales leave the state dict, since torch's checkpoints find no parameter of their names.
    """
    for layer in vlm.modules():
        if is_quantized(layer):
            layer.forward = MethodType(forward, layer)
            layer._save_to_state_dict = MethodType(nn.Module._save_to_state_dict, layer)


def scales(vlm: nn.Module) -> dict[str, Tensor]:
    """Scales and settings of all quantized weights, by name."""
    state: dict[str, Tensor] = {}
    for name, layer in vlm.named_modules():
        if is_quantized(layer):
            type(layer)._save_to_state_dict(layer, state, f"{name}.", False)
    return state


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer holds weights that bitsandbytes quantized."""
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:  # (O, H)
    """The weight of a quantized layer in `dtype`."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = layer.get_parameter("weight")
    return dequantize_bnb_weight(weight, getattr(layer, "state", None)).to(dtype)


def forward(layer: nn.Module, x: Tensor) -> Tensor:  # (..., H) -> (..., O)
    """Forward of a quantized layer, in the dtype of `x`.

    The name equals the method's, so that an unpickled model gets bitsandbytes' forward.
    """
    return _Product.apply(x, layer)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """`x W' + bias` with a frozen layer, whose weight is dequantized again in the backward."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (..., H)
        layer: nn.Linear,
    ) -> Tensor:  # (..., O)
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, dequantized(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dequantized(ctx.layer, grad.dtype), None


def linears(vlm: PreTrainedModel) -> list[nn.Module]:
    """The layers of an unquantized model that `settings` quantizes."""
    return [m for m in vlm.model.get_decoder().modules() if type(m) in LINEAR]


def stored_bytes(weights: int, method: str) -> int:
    """Bytes of this many quantized weights with their scales."""
    return round(weights * _BYTES[method])


def transient_bytes(method: str, dtype: torch.dtype) -> int:
    """Bytes per weight while a layer is used. 8 bits are dequantized to fp32 first."""
    return dtype.itemsize + (4 if method == "8bit" else 0)


def summary(vlm: PreTrainedModel, method: str) -> str:
    """Method and quantized share of the language model, for a model with or without LoRA.

    Fused experts are tensors, not linear layers, so they keep the compute dtype.
    """
    decoder = vlm.model.get_decoder()
    layers = [m for m in decoder.modules() if is_quantized(m)]
    inside = sum(m.in_features * m.out_features for m in layers)
    outside = sum(
        p.numel()
        for m in decoder.modules()
        for p in m.parameters(recurse=False)
        if not (is_quantized(m) or isinstance(m, nn.Embedding) or p.requires_grad)
    )
    return f"{method} for {inside / (inside + outside):.1%} of the weights in its layers"


def _outside_decoder(vlm: PreTrainedModel) -> list[str]:
    """Names of the largest modules that hold no part of the language model's layers."""
    decoder, names = vlm.model.get_decoder(), []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child is decoder:
                continue
            if any(part is decoder for part in child.modules()):
                visit(child, f"{prefix}{name}.")
            else:
                names.append(prefix + name)

    visit(vlm, "")
    return names
