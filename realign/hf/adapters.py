"""PEFT adapters in a model: their holder, digest, saving and loading.

Adapters are recognized by their modules in any holder. The holder is a PeftModel, or a model of
transformers after `load_adapter`, `inject_adapter_in_model`, or `AutoModel` on an adapter's folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from realign.modeling.adapter_config import read_adapter_config
from realign.modeling.reference_logps import weights_digest

_OF_HOLDER = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "runtime_config", "task_type",
}  # fmt: skip


def split(model: Any) -> tuple[PreTrainedModel, nn.Module | None]:
    """Return the model of transformers, and the holder of its adapters.

    The holder is a PeftModel, the model itself, or None.

    Raises:
        ValueError: for any other object.
    """
    vlm = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(vlm, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}. Give a folder, a Hub name, a model of "
            "transformers, or a PeftModel around one."
        )
    return vlm, model if isinstance(model, PeftModel) or _has_adapters(vlm) else None


def configs_of(holder: nn.Module) -> dict[str, PeftConfig]:
    """The configurations of a model's adapters, by name."""
    return getattr(holder, "peft_config", {})


def active_adapters(holder: nn.Module) -> list[str]:
    """Names of the active adapters, in the order of the configurations."""
    vlm, _ = split(holder)
    layers = (module for module in vlm.modules() if isinstance(module, BaseTunerLayer))
    active = {name for layer in layers for name in layer.active_adapters}
    return [name for name in configs_of(holder) if name in active]


def changes_nothing(vlm: nn.Module) -> bool:
    """Whether the outputs of a model are bitwise equal to those of its base.

    True only for plain LoRA with a zero factor. DoRA rounds, and copied modules have their own
    weights.
    """
    for module in vlm.modules():
        if isinstance(module, LoraLayer):
            if not all(
                _is_plain(module, n) and adds_zero(module, n) for n in module.active_adapters
            ):
                return False
        elif _is_of_peft(module):
            return False
    return True


def adds_zero(layer: LoraLayer, name: str) -> bool:
    """Whether the product of an adapter's two factors is zero."""
    if name in layer.lora_embedding_B:
        return not (layer.lora_embedding_A[name].any() and layer.lora_embedding_B[name].any())
    return name not in layer.lora_B or not layer.lora_B[name].get_parameter("weight").any()


def _is_plain(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter is a plain product, without a variant or a bias."""
    if name in layer.lora_variant:
        return False
    return name not in layer.lora_B or layer.lora_B[name].bias is None


def base_state(vlm: nn.Module) -> dict[str, Tensor]:
    """State dict of a model, with the names of a model without adapters."""
    return get_base_model_state_dict(
        SimpleNamespace(_is_prompt_learning=False, base_model=SimpleNamespace(model=vlm))
    )


def base_digest(vlm: nn.Module) -> str:
    """Digest of a model's weights without its adapters."""
    return weights_digest(_Base(vlm))


class _Base(nn.Module):
    """The tensors of a model without its adapters, for their digest."""

    def __init__(self, vlm: nn.Module) -> None:
        super().__init__()
        self._vlm = vlm

    def state_dict(self) -> dict[str, Tensor]:
        return base_state(self._vlm)

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """Buffers outside of PEFT's modules, which may be missing from the state dict."""
        inside = tuple(f"{name}." for name, m in self._vlm.named_modules() if _is_of_peft(m))
        return [item for item in self._vlm.named_buffers() if not item[0].startswith(inside)]


def model_digest(vlm: nn.Module) -> str:
    """Digest of everything that the output of a model with adapters depends on.

    It covers weights, configurations, and the state of each layer, such as the scaling and the
    names of its active and merged adapters.
    """
    about = {name: settings(config) for name, config in configs_of(vlm).items()}
    layers = {name: _plain(vars(m)) for name, m in vlm.named_modules() if _is_of_peft(m)}
    text = json.dumps([weights_digest(vlm), about, layers], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def settings(config: PeftConfig) -> dict[str, Any]:
    """A configuration as JSON values, without fields that do not affect the computation.

    Where PEFT changes `target_parameters`, it is a set until it is saved.
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in _OF_HOLDER}
    fields["target_parameters"] = set(fields.get("target_parameters") or ()) or None
    return _plain(fields)


def _plain(value: Any) -> Any:
    """The part of a value that JSON can hold, sorted. The weights' digest covers the tensors."""
    if isinstance(value, Mapping):
        fields = {str(k): _plain(v) for k, v in value.items() if k != "training"}
        return {k: fields[k] for k in sorted(fields) if fields[k] is not None}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else None


def state_of(
    holder: nn.Module, name: str, state: dict[str, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """PEFT's state dict of an adapter, without weights of the base."""
    options = {"save_embedding_layers": False} | options
    return get_peft_model_state_dict(holder, state, name, **options)


def place_of(holder: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """The folder of a saved adapter. Without a name, the folder of the active one.

    PEFT writes "default" to the folder and other adapters to subfolders with their names. For a
    model of transformers, the active adapter is written to the folder, as in transformers.
    """
    active = active_adapters(holder)[0]
    name = active if name is None else name
    at_root = "default" if isinstance(holder, PeftModel) else active
    return Path(folder) if name == at_root else Path(folder) / name


def save(holder: nn.Module, folder: Path, gathered: Mapping[str, Tensor] | None = None) -> None:
    """Write all adapters in PEFT's format, for PeftModel and AutoModel.

    Args:
        holder: holder of the adapters, sharded or not.
        folder: folder to write.
        gathered: name -> whole tensor of the model of transformers, if it is sharded.
    """
    prefix = "base_model.model." if isinstance(holder, PeftModel) else ""
    state = None
    if gathered is not None:
        state = holder.state_dict() | {f"{prefix}{n}": v for n, v in gathered.items()}
    if isinstance(holder, PeftModel):
        holder.save_pretrained(str(folder), state_dict=state)
        return
    for name, config in configs_of(holder).items():
        weights = state_of(holder, name, state, save_embedding_layers="auto")
        weights = {f"base_model.model.{n}": v.clone().contiguous() for n, v in weights.items()}
        config = copy.copy(config)
        config.inference_mode = True
        base = config.base_model_name_or_path or getattr(holder, "name_or_path", "")
        config.base_model_name_or_path = str(base)
        place = place_of(holder, folder, name)
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights, place / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(place))


def check_saved(holder: nn.Module, folder: Path) -> None:
    """Check that `save` has written adapters with the settings of the holder's.

    Raises:
        ValueError: if an adapter is missing, or has different settings, with its name.
    """
    for name, config in configs_of(holder).items():
        place = place_of(holder, folder, name)
        if not (place / SAFETENSORS_WEIGHTS_NAME).exists():
            raise ValueError(
                f"{place} has no {SAFETENSORS_WEIGHTS_NAME} for resuming adapter {name!r}."
            )
        saved = read_adapter_config(place / CONFIG_NAME)
        new, old = settings(config), settings(saved)
        if changed := sorted(k for k in new | old if new.get(k) != old.get(k)):
            raise ValueError(
                f"adapter {name!r} and its checkpoint in {place} have different settings: "
                + "; ".join(f"{k} is {new.get(k)!r:.60}, was {old.get(k)!r:.60}" for k in changed)
                + ". Resume with the settings of the checkpoint."
            )


def load(holder: nn.Module, folder: Path) -> None:
    """Load all adapters that `save` has written into a holder of the same adapters.

    Raises:
        ValueError: if an adapter is missing, or has different settings or weights, with its name.
    """
    check_saved(holder, folder)
    for name in configs_of(holder):
        file = place_of(holder, folder, name) / SAFETENSORS_WEIGHTS_NAME
        weights = load_file(file)
        if not isinstance(holder, PeftModel):
            weights = {n.removeprefix("base_model.model."): v for n, v in weights.items()}
        missing = state_of(holder, name).keys() - weights.keys()
        unexpected = ()
        if not missing:
            unexpected = set_peft_model_state_dict(holder, weights, name).unexpected_keys
        if missing or unexpected:
            raise ValueError(
                f"{file} does not match adapter {name!r}: {len(missing)} weights are missing and "
                f"{len(unexpected)} are unknown, such as {[*missing, *unexpected][0]}. Resume with "
                "the model and peft_config of the checkpoint."
            )


def _is_of_peft(module: nn.Module) -> bool:
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return isinstance(module, kinds) or type(module).__module__.split(".")[0] == "peft"


def _has_adapters(model: nn.Module) -> bool:
    return any(_is_of_peft(module) for module in model.modules())
