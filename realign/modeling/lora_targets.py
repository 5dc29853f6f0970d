"""Targets of LoRA: linear layers and fused experts of a language model, and a check of them.

PEFT adapts the 3-D weights of fused experts by `target_parameters`. Routers, embeddings and norms
stay frozen.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import peft
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from realign.modeling.layouts import frozen_by_default
from realign.modeling.quantized import LINEAR

ALL = "all-linear"
"""All linear layers and fused experts of the language model."""
_ENDS = re.compile(r"[\w.\-]+(?:\s*,\s*[\w.\-]*)*")
"""Ends of names with commas between them. A dot between names is no operator here."""
_ROUTERS = {"gate", "router"}
"""Names of modules that choose experts."""
_ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
"""Settings with the number of experts that each token uses."""


class Layer(NamedTuple):
    """A module of a model, without the adapters around it.

    Attributes:
        name: its name in the model without adapters.
        module: the module.
        adapted: names of its parameters that adapters change.
    """

    name: str
    module: nn.Module
    adapted: frozenset[str]

    @property
    def fused(self) -> list[str]:
        """Names of its own 3-D parameters, if the module is not one of torch."""
        if type(self.module).__module__.startswith("torch."):
            return []
        return [name for name, p in self.module.named_parameters(recurse=False) if p.dim() == 3]

    @property
    def is_experts(self) -> bool:
        """Whether transformers calls it as fused experts, so that its forward reads its weights."""
        return bool(self.fused) and hasattr(self.module, "is_transposed")

    def is_router(self, counts: set[int]) -> bool:
        """Whether it chooses among a number of experts in `counts`."""
        weights = [p for p in self.module.parameters(recurse=False) if p.dim() == 2]
        named = not _ROUTERS.isdisjoint(self.name.split("."))
        return named and any(len(weight) in counts for weight in weights)


def layers_of(module: nn.Module, name: str = "") -> Iterator[Layer]:
    """Yield all modules of a model with the names that they have without adapters."""
    adapted = frozenset()
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        changed = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        adapted |= {str(changed)}
        inner = "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else "base_layer"
        module = getattr(module, inner)
    yield Layer(name, module, adapted)
    for child_name, child in module.named_children():
        yield from layers_of(child, f"{name}.{child_name}" if name else child_name)


class Targets(NamedTuple):
    """Layers of a language model: those that get LoRA, and routers, which stay frozen."""

    linear: list[Layer]
    experts: list[Layer]
    routers: list[Layer]


def targets_of(layers: list[Layer]) -> Targets:
    """The linear layers except routers, the modules with fused experts, and the routers."""
    experts = [layer for layer in layers if layer.is_experts]
    counts = {len(layer.module.get_parameter(n)) for layer in experts for n in layer.fused}
    routers = [layer for layer in layers if layer.is_router(counts)]
    linear = [m for m in layers if isinstance(m.module, LINEAR) and m not in routers]
    return Targets(linear, experts, routers)


def _language_model(model: PreTrainedModel) -> tuple[str, list[Layer]]:
    """Name of the language model in a model, and the layers in it with their full names."""
    language = model.model.get_decoder()
    (prefix,) = (name for name, module in model.named_modules() if module is language)
    return prefix, [layer for layer in layers_of(language, prefix) if layer.name != prefix]


def chosen(model: PreTrainedModel, targets: str = ALL) -> set[str]:
    """Names of the weights that get LoRA: of linear layers, and parameters of fused experts.

    Args:
        model: the model of transformers, without adapters.
        targets: 'all-linear', ends of names with commas between them, or a regular expression.

    Raises:
        ValueError: for a name or an expression without a layer. The message lists the names.
    """
    _, layers = _language_model(model)
    inside = _weights(layers)
    if targets == ALL:
        return inside
    unused = {m for part in frozen_by_default(model, True) for m in part.modules()}
    rest = _weights([m for m in layers_of(model) if m.module not in unused]) - inside
    found: set[str] = set()
    if not _ENDS.fullmatch(targets):
        found = {n for n in inside | rest if re.fullmatch(targets, n.removesuffix(".weight"))}
        missing = [] if found else [targets]
    else:
        ends = [end.strip() for end in targets.split(",") if end.strip()]
        matched = {end: _ending(end, inside) or _ending(end, rest) for end in ends}
        found = set().union(*matched.values())
        missing = [end for end, names in matched.items() if not names]
    if missing:
        known, others = (
            ", ".join(sorted({_short(name) for name in names})) for names in (inside, rest)
        )
        raise ValueError(
            f"--lora-targets: no layer of this model of type {model.config.model_type!r} is named "
            f"{', '.join(missing)}. Layers of the language model: {known}. Elsewhere: {others}."
        )
    return found


def _weights(layers: list[Layer]) -> set[str]:
    """Names of the weights that LoRA can adapt. Routers are none of them."""
    linear, experts, _ = targets_of(layers)
    names = {f"{layer.name}.weight" for layer in linear}
    return names | {f"{layer.name}.{name}" for layer in experts for name in layer.fused}


def _ending(end: str, names: set[str]) -> set[str]:
    """The names of weights that end in a name of a layer or of fused weights."""
    return {n for n in names if f".{n.removesuffix('.weight')}".endswith(f".{end}")}


def _short(name: str) -> str:
    """The last part of a name, and the part before it if the last is a number."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])


def config_for(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    *,
    targets: str = ALL,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    save: Sequence[str] = (),
) -> LoraConfig:
    """The configuration of LoRA on linear layers and fused experts.

    An expert's rank is `rank` divided by the number of experts that a token uses. A token then has
    as many learned weights in experts as in a linear layer. The scale is the same everywhere.

    Args:
        model: the model of transformers, without adapters.
        rank: rank of linear layers.
        alpha: the update is scaled by alpha / rank.
        targets: see `chosen`.
        dropout: share of the inputs that is dropped.
        rslora: scale by alpha / sqrt(rank).
        dora: train the size of each output's weights apart.
        save: names of modules that are trained in full.

    Raises:
        ValueError: for unknown targets, and for an option that fused experts do not support.
    """
    prefix, _ = _language_model(model)
    weights = chosen(model, targets)
    names = {n.removesuffix(".weight") for n in weights if n.endswith(".weight")}
    parameters = sorted(n for n in weights if not n.endswith(".weight"))
    if parameters and (dropout or dora):
        option = "--use-dora" if dora else "--lora-dropout"
        linear = sorted({_short(name) for name in names})
        instead = f"--lora-targets {','.join(linear)}" if linear else "other --lora-targets"
        raise ValueError(
            f"{option} does not work on fused experts, such as {parameters[0]}: PEFT adds their "
            f"change to the weights. Leave it out, or train other layers with {instead}."
        )
    if inside := [n for n in sorted(weights) if n.startswith(tuple(f"{name}." for name in save))]:
        raise ValueError(
            f"--lora-targets {targets} adapts {inside[0].removesuffix('.weight')}, which "
            "--projector-learning-rate trains in full. Leave out one of them."
        )
    head = model.get_output_embeddings()
    if dora and any(model.get_submodule(name) is head for name in names):
        raise ValueError(
            "--use-dora does not work on the output head, whose log-probs are computed without its "
            "forward. Leave it out of --lora-targets."
        )
    config = model.config.get_text_config()
    active = next((getattr(config, n) for n in _ACTIVE if getattr(config, n, None)), 1)
    of_expert = max(1, rank // (max(active) if isinstance(active, list | tuple) else active))
    patterns = {".".join(name.split(".")[-2:]) for name in parameters if of_expert != rank}
    share = of_expert / rank
    made = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT only multiplies by it
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=sorted(names),
        modules_to_save=[*save] or None,
        rank_pattern=dict.fromkeys(sorted(patterns), of_expert),
        alpha_pattern=dict.fromkeys(sorted(patterns), alpha * (share**0.5 if rslora else share)),
        task_type="CAUSAL_LM",
    )
    if not names:
        made.target_modules = None
    elif renamed := names - _kept_by_peft(made, model):
        made.target_modules = sorted(names - renamed)
        parameters += sorted(f"{name}.weight" for name in renamed)
        if dropout or dora:
            raise ValueError(
                f"--use-dora and --lora-dropout do not work on models of type "
                f"{model.config.model_type!r}: PEFT {peft.__version__} adapts {min(renamed)} as a "
                "weight of fused experts. Leave them out."
            )
    elif all(name.startswith(f"{prefix}.") for name in names):
        leaves = {name.rsplit(".", 1)[-1] for name in names}
        pattern = rf"{re.escape(prefix)}\.(?:.*\.)?({'|'.join(sorted(map(re.escape, leaves)))})"
        others = [n for n, _ in model.named_modules() if n not in names]
        made.target_modules = pattern
        made.exclude_modules = [n for n in others if re.fullmatch(pattern, n)] or None
    made.target_parameters = parameters or None
    return made


def _kept_by_peft(config: LoraConfig, model: PreTrainedModel) -> set[str]:
    """Names of target modules that PEFT keeps.

    In MoE types such as glm4v_moe it takes gate_proj, up_proj and down_proj for names of experts in
    transformers 4, and replaces them by the fused experts.
    """
    tried = copy.deepcopy(config)
    convert_peft_config_for_transformers(tried, model, None)
    return set(tried.target_modules or ())


def check(model: PreTrainedModel, wanted: set[str], saved: Sequence[str] = ()) -> None:
    """Check that LoRA is on these weights (`chosen`), and nowhere else.

    Args:
        model: the model of transformers, with adapters in it.
        wanted: names of the weights.
        saved: names of modules that are trained in full.

    Raises:
        ValueError: with the names of the layers, for a version of PEFT that chose others.
    """
    found = {f"{layer.name}.{name}" for layer in layers_of(model) for name in layer.adapted}
    found -= {f"{name}.weight" for name in saved}
    for problem, names in (("missing", wanted - found), ("on others", found - wanted)):
        if names:
            raise ValueError(
                f"PEFT {peft.__version__} put LoRA on other layers of {model.config.model_type!r} "
                f"than it was given: {problem} {', '.join(sorted(names)[:5])}. "
                "Train with --tune full, or report this type of model."
            )


def share(model: PreTrainedModel) -> str:
    """A line with the share of a model's weights that adapters train.

    Args:
        model: the model of transformers, with adapters in it.
    """
    _, layers = _language_model(model)
    linear, experts, routers = targets_of(layers)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = [(_size(layer, n), n in layer.adapted) for layer in layers for n in _names(layer)]
    whole = sum(size for size, _ in sizes)
    part = sum(size for size, adapted in sizes if adapted) / whole
    line = (
        f"adapters train {learned / 1e6:.4g} M weights, on {part:.1%} of the language model's "
        f"{whole / 1e6:.4g} M: {_count(linear)} linear layers"
    )
    if experts:
        frozen = "" if any(m.adapted for m in routers) else "; routers stay frozen"
        line += f", {_count(experts)} modules of fused experts{frozen}"
    if unknown := {type(m.module).__name__ for m in layers if m.fused and not m.is_experts}:
        line += f"; 3-D weights of {', '.join(sorted(unknown))} have no adapter"
    adapted = {m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    if outside := len(adapted - {*model.model.get_decoder().modules()}):
        line += f"; {outside} layers outside of it"
    return line


def _count(layers: list[Layer]) -> str:
    return f"{sum(bool(layer.adapted) for layer in layers)} of {len(layers)}"


def _names(layer: Layer) -> list[str]:
    return [name for name, _ in layer.module.named_parameters(recurse=False)]


def _size(layer: Layer, name: str) -> int:
    """Numbers in a parameter. bitsandbytes packs those of a linear layer."""
    if isinstance(layer.module, nn.Linear) and name == "weight":
        return layer.module.in_features * layer.module.out_features
    return layer.module.get_parameter(name).numel()


@contextmanager
def unwarned() -> Iterator[None]:
    """Ignore PEFT's warning of patterns for parameters: it looks for modules of these names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        yield
