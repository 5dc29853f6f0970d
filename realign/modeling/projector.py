"""The projector between vision tower and language model: its modules, and training it under LoRA.

Under LoRA, PEFT's `modules_to_save` trains a copy of each module beside the original, which the
reference uses. The copy is kept in fp32 and cast to the dtype of the original in each forward, as
LoRA's factors are. In bf16, steps of 2e-5 would round to nothing for weights above 0.01.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from realign.modeling.layouts import frozen_by_default

_JOINS = ("merger.", "deepstack_merger_list.")
"""Prefixes of the tower layers that project to the language model (Qwen, GLM)."""
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Classes that PEFT cannot copy, since they have no forward."""


def frozen_parameters(vlm: PreTrainedModel, train_vision: bool) -> list[nn.Parameter]:
    """Parameters of towers that are not trained, and of parts that images do not use."""
    return [p for part in frozen_by_default(vlm, train_vision) for p in _outside_joins(part)]


def _outside_joins(part: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in part.named_parameters() if not name.startswith(_JOINS)]


def parameters(vlm: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters outside of language model, head and towers, by name."""
    parts = [vlm.model.get_decoder(), vlm.get_output_embeddings()]
    parts += frozen_by_default(vlm, False)
    # Some models have a second tower, for video or at a high resolution.
    children = [m for m in vlm.model.children() if isinstance(m, PreTrainedModel)]
    parts += [m for m in children if m.main_input_name == "pixel_values"]
    others = {p for part in parts if part is not None for p in _outside_joins(part)}
    return {name: p for name, p in vlm.named_parameters() if p not in others}


def modules(vlm: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the largest modules of the projector, and of its parameters outside of them.

    Examples of the latter are the newline of LLaVA-NeXT, which belongs to the whole model.
    """
    own, names = parameters(vlm), []

    def visit(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            inside = [f"{prefix}{name}.{n}" for n, _ in child.named_parameters()]
            if not any(n in own for n in inside):
                continue
            if all(n in own for n in inside) and not isinstance(child, _LISTS):
                names.append(prefix + name)
                yield from inside
            else:
                yield from visit(child, f"{prefix}{name}.")

    covered = set(visit(vlm, ""))
    return names, sorted(own.keys() - covered)


def modules_to_save(vlm: PreTrainedModel) -> list[str]:
    """Names of the modules of the projector, for PEFT's `modules_to_save`.

    Raises:
        ValueError: for a model whose projector is no module outside of its tower.
    """
    names, _ = modules(vlm)
    if not names:
        raise ValueError(
            f"models of type {vlm.config.model_type!r} have no projector apart from their vision "
            "tower, so --projector-learning-rate would have no effect. Leave it out. Beside a "
            "recipe, set it to 0."
        )
    return names


def summary(vlm: PreTrainedModel, rate: float) -> str:
    """A line with the trained modules of the projector, and its parameters that stay frozen."""
    wrapped = [n for n, m in vlm.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    names, rest = (wrapped, []) if wrapped else modules(vlm)
    size = sum(p.numel() for p in trained(vlm))
    frozen = [n for n, p in vlm.named_parameters() if n in parameters(vlm) and not p.requires_grad]
    line = f"the projector trains {size / 1e6:.4g} M weights at {rate:g}: {', '.join(names + rest)}"
    inside = tuple(f"{name}." for name in names)
    if frozen := [name for name in frozen if not name.startswith(inside)]:
        line += f"; {', '.join(frozen)} stays frozen, since PEFT saves modules only"
    return line


def use(adapted: nn.Module) -> None:
    """Keep the trained copies of modules in fp32, and cast them in each forward."""
    for wrapper in adapted.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.modules_to_save.float()
            wrapper.forward = MethodType(forward, wrapper)


def forward(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of PEFT's wrapper, with the copy cast to the dtype of the original.

    The name equals the method's, so that an unpickled model gets PEFT's forward.
    """
    original = wrapper.original_module
    if not wrapper.disable_adapters and len(wrapper.active_adapters) == 1:
        copy = wrapper.modules_to_save[wrapper.active_adapters[0]]
        kinds = {name: p.dtype for name, p in original.named_parameters()}
        if any(p.dtype != kinds[name] for name, p in copy.named_parameters()):
            cast = {name: p.to(kinds[name]) for name, p in copy.named_parameters()}
            return torch.func.functional_call(copy, cast, args, kwargs)
    return type(wrapper).forward(wrapper, *args, **kwargs)


def trained(vlm: PreTrainedModel) -> list[nn.Parameter]:
    """The trained parameters of the projector: copies under LoRA, or its own weights."""
    return [p for p in parameters(vlm).values() if p.requires_grad]
