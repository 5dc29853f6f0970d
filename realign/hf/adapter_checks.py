"""Checks of adapters for RDPOTrainer: unsupported kinds, options and states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftType, get_model_status
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.shira import ShiraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from realign.hf import adapters
from realign.modeling.adapter_config import check_saved
from realign.modeling.merging import check_kind
from realign_kernels import head_inputs

SUPPORTED = {
    "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT",
    "PSOFT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA",
    "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""Kinds that act in the layers they replace. Tests train, save and reload each of them."""

_REASONS = {
    "ADALORA": "it needs a call in each step and its own loss",
    "LILY": "its layers average over all tokens of a batch, across records",
    "PVERA": "it draws random weights in each step, so policy and reference never agree",
}
_REFUSED_OPTIONS = {
    "arrow_config": "it routes among adapters that are not trained",
    "monteclora_config": "it needs its own loss",
    "kasa_config": "it needs its own loss",
    "use_asa": "it needs a call in each step",
    "save_only_topk_weights": "a checkpoint of it cannot be resumed",
    "layer_replication": "no test covers it",
    "use_bdlora": "no test covers it",
    "use_qalora": "no test covers it",
    "velora_config": "no test covers it",
}
_CHANGES_BASE = ("olora", "pissa")  # values of init_lora_weights that change the base
_INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva", *_CHANGES_BASE)


def check_config(config: PeftConfig, name: str = "peft_config") -> None:
    """Check the configuration of an adapter for unsupported kinds and options.

    Raises:
        ValueError: for such a kind or option, with the reason.
    """
    if not isinstance(config, PeftConfig):
        raise ValueError(
            f"{name} is a {type(config).__name__}. Give a PeftConfig, such as LoraConfig."
        )
    check_kind(config, name)
    if (kind := PeftType(config.peft_type).value) not in SUPPORTED:
        reason = _REASONS.get(kind, "no test shows that it acts in the layers it replaces")
        raise ValueError(f"{name} is of kind {kind}: {reason}. Use LoRA, or another kind.")
    refused = [(option, why) for option, why in _REFUSED_OPTIONS.items() if _option(config, option)]
    if _option(config, "init_lora_weights", True) not in _INITIAL_WEIGHTS:
        why = "it changes the base by random numbers or data that are not saved"
        refused.append(("init_lora_weights", why))
    for option, why in refused:
        value = _option(config, option)
        raise ValueError(f"{name} has {option}={value!r:.60}: {why}. Leave it out.")
    try:
        check_saved(config)
    except ValueError as error:
        raise ValueError(f"{name} could not be loaded again after training: {error}.") from error


def _option(config: PeftConfig, name: str, default: Any = None) -> Any:
    """An option of a configuration, or the default for kinds without the option."""
    value = getattr(config, name, None)
    return default if value is None else value


def check(holder: nn.Module, report: Callable[[str], None]) -> None:
    """Check that adapters are active and that their training can be saved.

    Args:
        holder: holder of the adapters, from `adapters.split`.
        report: receives a line with the weights that this function freezes.

    Raises:
        ValueError: for an unsupported adapter or state, with the name of the adapter.
    """
    vlm, _ = adapters.split(holder)
    if holder is vlm and (frozen := _freeze_bases(vlm)):
        report(f"{', '.join(frozen)} stays frozen, since an adapter is trained on it")
    configs = adapters.configs_of(holder)
    for name, config in configs.items():
        check_config(config, f"adapter {name!r} of the model")
    for name, config in configs.items():
        tying = _option(config, "ensure_weight_tying")
        if tying and holder is vlm:
            raise ValueError(
                f"adapter {name!r} of the model has ensure_weight_tying, which transformers drops "
                "when it loads an adapter. Load it with PeftModel.from_pretrained."
            )
        if len(configs) > 1 and (tying or _changes_base(config)):
            why = "with ensure_weight_tying, PEFT ties only the weights of the first adapter"
            if _changes_base(config):
                initial = _option(config, "init_lora_weights")
                why = f"its init_lora_weights={initial!r} changed the base"
            raise ValueError(
                f"adapter {name!r} of the model cannot be saved beside others: {why}. "
                "Keep one adapter, or merge the first before you add the next."
            )
    status = get_model_status(holder)
    if unknown := set(status.available_adapters) - set(configs):
        raise ValueError(
            f"the model holds layers of the adapter(s) {', '.join(sorted(unknown))}, but not their "
            "configurations, so they cannot be saved. Merge or delete them first."
        )
    if status.merged_adapters:
        raise ValueError(
            "adapters of the model are merged into its weights, so they would not be trained. Call "
            "unmerge_adapter() first, or save the merged model (save_pretrained) and load it."
        )
    if status.enabled is not True:
        raise ValueError(
            "adapters of the model are disabled in some or all layers, and a saved adapter is "
            "always enabled. Call enable_adapter_layers() or enable_adapters() first."
        )
    if len(active := adapters.active_adapters(holder)) > 1:
        raise ValueError(
            f"adapters {', '.join(active)} are active together, but loading activates only one. "
            "Combine them (add_weighted_adapter), or merge and save those that should not be "
            "trained."
        )
    for name, layer in vlm.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        inner = getattr(layer, "base_layer", None)
        of_parameters = isinstance(layer, ParamWrapper) and isinstance(inner, ParamWrapper)
        if isinstance(inner, BaseTunerLayer) and not of_parameters:
            raise ValueError(
                f"{name} has an adapter on top of another one. Merge the first before you add the "
                "second."
            )
        if isinstance(layer, LoraLayer | LycorisLayer | ShiraLayer):
            _check_scaling(name, layer)
        if isinstance(layer, LoraLayer) and holder is vlm:
            _check_magnitudes(name, layer)
    saved = {name: _pointers(adapters.state_of(holder, name)) for name in configs}
    _check_learning(holder, saved)
    _check_head(vlm)
    if all(
        config.peft_type == PeftType.LORA
        and not _changes_base(config)
        and not _option(config, "ensure_weight_tying")
        for config in configs.values()
    ):
        _check_base(vlm, saved)


def _changes_base(config: PeftConfig) -> bool:
    """Whether LoRA has changed its base at initialisation, as in PiSSA."""
    return _option(config, "init_lora_weights") in _CHANGES_BASE


def _check_base(vlm: PreTrainedModel, adapted: Mapping[str, set[int]]) -> None:
    """Check that weights are those of the base that a saved adapter will name.

    `merge_and_unload()` leaves no other trace. In a tiny model, a new adapter that was reloaded on
    the unmerged base was off by 5.9 nats. The first row of each weight is compared with the base's
    files, except for biases that are saved with an adapter. Both are rounded to bf16, since either
    may have been rounded before.
    """
    owned = set().union(*adapted.values())
    state = {n: v for n, v in adapters.base_state(vlm).items() if v.data_ptr() not in owned}
    for name, shape, saved in _saved_rows(vlm, state):
        weight = state[name]
        row = weight[:1] if shape else weight
        if shape != [*weight.shape] or not torch.equal(saved.bfloat16(), row.cpu().bfloat16()):
            raise ValueError(
                f"weight {name} of the model is not that of {vlm.name_or_path}, which a saved "
                "adapter would name as its base. merge_and_unload() may have changed it. Save the "
                "model and its processor (save_pretrained), and load the base from there."
            )


def _saved_rows(
    vlm: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, list[int], torch.Tensor]]:
    """Name, shape and first row of weights in a model's files, without network requests."""
    renamings = [r for r in get_model_conversion_mapping(vlm) if isinstance(r, WeightRenaming)]
    for file in _weight_files(vlm):
        with safe_open(file, "pt") as saved:
            keys = saved.keys()
            for key in keys:
                name = key if key in state else apply_renamings(key, renamings)
                if name in state:
                    part = saved.get_slice(key)
                    shape = part.get_shape()
                    yield name, shape, part[:1] if shape else saved.get_tensor(key)


def _weight_files(vlm: PreTrainedModel) -> list[Path]:
    """The safetensors files of a model in its folder, or in the cache of the Hub."""
    name = str(vlm.name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        revision = getattr(vlm.config, "_commit_hash", None)
        try:
            config = try_to_load_from_cache(name, "config.json", revision=revision)
        except ValueError:  # not a valid Hub name
            return []
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return sorted(folder.glob("model*.safetensors"))


def _check_head(vlm: PreTrainedModel) -> None:
    head = vlm.get_output_embeddings()
    assert head is not None
    device = next(head.parameters()).device
    hidden = torch.zeros(1, vlm.config.get_text_config().hidden_size, device=device)
    try:
        with torch.no_grad():
            head_inputs(head, hidden)
    except ValueError as error:
        raise ValueError(
            "the adapter on the output layer is neither plain LoRA nor a copy in modules_to_save. "
            "The loss supports no other kind there. Leave lm_head out of target_modules."
        ) from error


def _check_scaling(place: str, layer: LoraLayer | LycorisLayer | ShiraLayer) -> None:
    for name, scaling in layer.scaling.items():
        configured = 1.0  # of SHiRA
        if isinstance(layer, LoraLayer):
            root = 0.5 if layer.use_rslora.get(name) else 1
            configured = layer.lora_alpha[name] / layer.r[name] ** root
        elif isinstance(layer, LycorisLayer):
            configured = layer.alpha[name] / layer.r[name]
        if abs(scaling - configured) > 1e-6 * abs(configured):
            raise ValueError(
                f"{place} scales adapter {name!r} by {scaling:g}, but its configuration gives "
                f"{configured:g}, and the scale is not saved. Undo set_scale or scale_layer, or "
                "merge the adapter."
            )


def _check_magnitudes(place: str, layer: LoraLayer) -> None:
    """Check DoRA magnitudes, which transformers 5.23 does not load."""
    for name, dora in layer.lora_magnitude_vector.items():
        weight = layer.get_base_layer().get_parameter("weight").detach()
        fresh = weight.norm(dim=1 if name in layer.lora_B else 0)
        magnitudes = dora.get_parameter("weight").flatten().to(fresh.dtype)
        if not adapters.adds_zero(layer, name) and torch.equal(magnitudes, fresh):
            raise ValueError(
                f"{place} has a trained DoRA adapter {name!r} with the magnitudes of the base, "
                "since transformers does not load them. Load it with PeftModel.from_pretrained."
            )


def _check_learning(holder: nn.Module, saved: Mapping[str, set[int]]) -> None:
    """Check that all trained weights will be saved, and that an active adapter is trained."""
    trained = {n: p.data_ptr() for n, p in holder.named_parameters() if p.requires_grad}
    saved_pointers = set().union(*saved.values())
    if unsaved := [name for name, pointer in trained.items() if pointer not in saved_pointers]:
        raise ValueError(
            f"{', '.join(unsaved[:3])}{', ...' * (len(unsaved) > 3)} would be trained but is in no "
            "adapter, so it would not be saved. Name it in modules_to_save, or freeze it "
            "(requires_grad_(False))."
        )
    active = adapters.active_adapters(holder)
    if not set().union(*(saved[name] for name in active)) & set(trained.values()):
        raise ValueError(
            f"no weight of the model is trained. Of its adapter(s) {', '.join(saved)}, the active "
            f"one is {', '.join(active) or 'none'}. Load it with is_trainable=True, or choose "
            "another one with set_adapter."
        )


def _freeze_bases(vlm: PreTrainedModel) -> list[str]:
    """Freeze weights that adapters in a model of transformers replace. Returns their names.

    `load_adapter` leaves an embedding trainable if PEFT saved it with its adapter.
    """
    names = {id(p): name for name, p in vlm.named_parameters() if p.requires_grad}
    frozen = []
    for module in vlm.modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if isinstance(module, BaseTunerLayer) and weight is not None and id(weight) in names:
            frozen.append(names[id(weight)])
            weight.requires_grad_(False)
    return frozen


def _pointers(state: Mapping[str, torch.Tensor]) -> set[int]:
    return {value.data_ptr() for value in state.values()}
