"""LoRA's linear layer as one autograd function, without elementwise passes over its tensors.

PEFT's layer computes `base(x) + lora_B(lora_A(x)) * scaling` in 14 operators forward and about 30
backward. It makes a pass over a whole tensor to write the product of B, to scale it and to add it.
Its backward makes one to scale the gradient, and one to add the two gradients of the input. This
function takes 3 GEMMs forward and 5 backward that accumulate in place. `forward` is set on
instances, so names, state dicts, saving and merging stay PEFT's.

Adapters may be in fp32 beside a base in bf16. They are cast to the dtype of the input, as FSDP2
casts gathered parameters.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from realign.modeling import quantized


def use(model: nn.Module) -> None:
    """Replace the forward of every LoRA layer on an `nn.Linear` or a quantized layer in `model`."""
    for layer in model.modules():
        of_weight = type(layer) is ParamWrapper and layer.parameter_name == "weight"
        plain = (type(layer) is Linear or of_weight) and type(layer.base_layer) is nn.Linear
        if plain or (isinstance(layer, LoraLayer) and quantized.is_quantized(layer.base_layer)):
            layer.forward = MethodType(forward, layer)


def forward(
    layer: Any,
    x: Tensor,  # (..., H)
    *args: Any,
    **kwargs: Any,
) -> Tensor:  # (..., O)
    """The layer's forward by `AdaptedLinear`. Layers that are not plain use PEFT's forward.

    On a quantized layer, PEFT's forward would keep the input in fp32 for the backward.

    The name equals the method's, so that an unpickled model gets PEFT's forward.
    """
    if args or kwargs or not _is_plain(layer, x):
        return type(layer).forward(layer, x, *args, **kwargs)
    (name,) = layer.active_adapters
    base = layer.base_layer
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = layer.lora_dropout[name]
    drops = dropout.training and type(dropout) is nn.Dropout
    dropped = dropout(x) if drops else None
    if quantized.is_quantized(base):
        a, b = (factor.to(x.dtype) for factor in factors)
        down = (x if dropped is None else dropped).flatten(0, -2).mm(a.t())
        out = torch.addmm(base(x.flatten(0, -2)), down, b.t(), alpha=layer.scaling[name])
        return out.view(*x.shape[:-1], -1)
    return AdaptedLinear.apply(x, base.weight, base.bias, *factors, layer.scaling[name], dropped)


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether the layer adds one adapter's product to a frozen base, in one dtype.

    Layers with variants (DoRA), trained biases, autocast or hooks are not plain.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    base = layer.base_layer
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return False
    hooks = base._forward_hooks, base._forward_pre_hooks
    if any(hooks) or base._backward_hooks or base._backward_pre_hooks:
        return False
    if type(layer.lora_dropout[name]) not in (nn.Identity, nn.Dropout) or x.dim() == 1:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return x.dtype == base.weight.dtype or quantized.is_quantized(base)


class AdaptedLinear(torch.autograd.Function):
    """`x W' + bias + scaling d A' B'`, with W and bias frozen. d is x, or x after dropout."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (..., H)
        weight: Tensor,  # (O, H)
        bias: Tensor | None,  # (O,)
        a: Tensor,  # (rank, H)
        b: Tensor,  # (O, rank)
        scaling: float,
        dropped: Tensor | None = None,  # (..., H)
    ) -> Tensor:  # (..., O)
        a, b, rows = a.to(x.dtype), b.to(x.dtype), x.flatten(0, -2)
        inputs = rows if dropped is None else dropped.flatten(0, -2)
        down = inputs.mm(a.t())
        out = F.linear(rows, weight, bias).addmm_(down, b.t(), alpha=scaling)
        ctx.save_for_backward(inputs, weight, a, b, down)
        ctx.drops = dropped is not None
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, a, b, down = ctx.saved_tensors
        shape, grad = grad.shape, grad.flatten(0, -2)
        down_grad = grad.mm(b)
        x_grad = dropped_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad.mm(weight)
            if ctx.drops:
                dropped_grad = down_grad.mm(a).mul_(ctx.scaling).view(*shape[:-1], a.shape[1])
            else:
                x_grad.addmm_(down_grad, a, alpha=ctx.scaling)
            x_grad = x_grad.view(*shape[:-1], a.shape[1])
        # beta=0 ignores `factor`; alpha scales the product without another pass.
        a_grad, b_grad = (
            factor.addmm(left.t(), right, beta=0, alpha=ctx.scaling)
            for factor, left, right in ((a, down_grad, inputs), (b, grad, down))
        )
        return x_grad, None, None, a_grad, b_grad, None, dropped_grad
