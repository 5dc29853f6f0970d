"""LoRA on fused experts by products of its factors, without a sum of weights.

PEFT computes W + scaling B A for all experts in each forward, keeps it for the backward, and then
computes its whole gradient. In Qwen3-VL-30B-A3B the sums have 58 GB in bf16. Here each factor is a
grouped product of its own. The rest follows transformers' forward by grouped products. `forward`
is set on instances, so names, state dicts, saving and merging stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

_ALIGNED = 8  # grouped products on CUDA need rows of 16 bytes


class Factors(NamedTuple):
    """LoRA of one parameter: the change of expert e is scaling B[e] A[e]."""

    a: Tensor  # (E, rank, in)
    b: Tensor  # (E, out, rank)
    scaling: float


def use(model: nn.Module) -> None:
    """Replace the forward of PEFT's layers around fused experts in `model`."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}  # one wrapper for each parameter
    for wrapper in wrappers:
        experts: Any = wrapper.get_base_layer()
        if id(wrapper) not in inner and hasattr(experts, "is_transposed"):
            wrapper.forward = MethodType(forward, wrapper)


def forward(layer: ParamWrapper, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of the outermost wrapper. Layers that are not plain use PEFT's forward.

    The name equals the method's, so that an unpickled model gets PEFT's forward.
    """
    factors = None if len(args) != 2 or kwargs else _factors(layer, hidden_states)
    if factors is None:
        return ParamWrapper.forward(layer, hidden_states, *args, **kwargs)
    return experts_forward(layer.get_base_layer(), factors, hidden_states, *args)


def _factors(layer: ParamWrapper, hidden_states: Tensor) -> dict[str, Factors] | None:
    """The factors of each parameter, or None unless each has exactly one active adapter."""
    experts: Any = layer.get_base_layer()
    dtype = hidden_states.dtype
    if experts.config._experts_implementation != "grouped_mm" or experts._is_expert_parallel:
        return None
    if torch.is_autocast_enabled(hidden_states.device.type):
        return None
    found: dict[str, Factors] = {}
    wrapper: Any = layer
    while isinstance(wrapper, ParamWrapper):
        names = wrapper.active_adapters
        if wrapper.disable_adapters or wrapper.merged or len(names) != 1:
            return None
        weight = wrapper.get_param()
        if names[0] not in wrapper.lora_A or weight.dim() != 3 or weight.dtype != dtype:
            return None
        count = len(weight)
        a, b = (one[names[0]].get_parameter("weight") for one in (wrapper.lora_A, wrapper.lora_B))
        a = a.to(dtype).unflatten(0, (count, -1))
        b = b.to(dtype).unflatten(1, (-1, count)).permute(2, 0, 1)
        more = -a.shape[1] % _ALIGNED
        a, b = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more)).contiguous()
        found[wrapper.parameter_name] = Factors(a, b, wrapper.scaling[names[0]])
        wrapper = wrapper.base_layer
    return found


def experts_forward(
    experts: Any,
    factors: Mapping[str, Factors],
    hidden_states: Tensor,  # (T, H)
    top_k_index: Tensor,  # (T, K) int64
    top_k_weights: Tensor,  # (T, K)
) -> Tensor:  # (T, H)
    """`grouped_mm_experts_forward` of transformers with LoRA.

    Args:
        experts: a module that `use_experts_implementation` decorates.
        factors: LoRA by the name of the parameter.
        hidden_states: inputs of the tokens.
        top_k_index: experts of each token.
        top_k_weights: weights of these experts.
    """
    top_k = top_k_index.shape[1]
    owners, order = torch.sort(top_k_index.flatten())
    wanted = torch.arange(experts.num_experts, device=owners.device)
    ends = torch.searchsorted(owners, wanted, right=True).int()

    def linear(rows: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[owners] if experts.has_bias else None
        weight = getattr(experts, name)
        out = _grouped_linear(rows, weight, ends, bias, experts.is_transposed)
        if name not in factors:
            return out
        a, b, scaling = factors[name]
        return out.add(_grouped_linear(_grouped_linear(rows, a, ends), b, ends), alpha=scaling)

    rows = hidden_states[order // top_k]
    if experts.has_gate:
        rows = experts._apply_gate(linear(rows, "gate_up_proj"))
    else:
        rows = experts.act_fn(linear(rows, "up_proj"))
    rows = linear(rows, "down_proj")
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.flatten()[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rows[back].unflatten(0, (-1, top_k)).sum(1).to(hidden_states.dtype)
