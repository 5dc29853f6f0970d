"""LoRA's product as one `addmm_`, without elementwise passes over a layer's outputs.

PEFT's layer computes `base(x) + lora_B(lora_A(x)) * scaling`. It writes the product of B, scales
it, adds it, and scales the gradient, each in a pass over all outputs: in a step of a 7B model on an
H100 LoRA's elementwise work takes about 95 ms (calculated). Here `forward` is set on instances:
names, state dicts, saving and merging stay PEFT's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def use(model: nn.Module) -> None:
    """Let every LoRA layer in `model` on an `nn.Linear` add its product in place."""
    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
            layer.forward = MethodType(_forward, layer)


def _forward(
    layer: Linear,
    x: Tensor,  # (..., H)
    *args: Any,
    **kwargs: Any,
) -> Tensor:  # (..., O)
    """`Linear.forward`; PEFT computes what is not plain."""
    if args or kwargs or not _is_plain(layer, x):
        return Linear.forward(layer, x, *args, **kwargs)
    (name,) = layer.active_adapters
    # In two dimensions: autograd copies the whole gradient for a view that is written in place.
    rows = x.flatten(0, -2)
    result = layer.base_layer(rows)
    down = layer.lora_A[name](layer.lora_dropout[name](rows))
    up = layer.lora_B[name].weight.to(result.dtype)  # autocast does not cast for `addmm_`
    result.addmm_(down, up.t(), alpha=layer.scaling[name])
    return result.view(*x.shape[:-1], result.shape[-1])


def _is_plain(layer: Linear, x: Tensor) -> bool:
    """Whether the layer adds the product of one adapter, without a variant (DoRA) or a bias."""
    if x.dim() == 1:
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    # A backward hook makes the output of the base a view, which autograd refuses to write.
    base = layer.base_layer
    if base._backward_hooks or base._backward_pre_hooks:
        return False
    same = x.dtype == layer.lora_A[name].weight.dtype
    return same or torch.is_autocast_enabled(x.device.type)
