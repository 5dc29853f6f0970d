"""Parts of `realign.hf`: the module that Trainer trains, its data, losses to check, digests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from realign import reference
from realign.model import ForestModel


class Module(ForestModel):
    """A ForestModel with what Trainer asks of a model."""

    @property
    def config(self) -> Any:
        return self.vlm.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.vlm.gradient_checkpointing_enable(*args, **kwargs)


class Places(Dataset):
    """Indices first .. last - 1 of the examples."""

    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, i: int) -> int:
        return self._range[i]


def indices(places: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch, collated: its indices, (B,) int64."""
    return {"places": torch.tensor(places)}


class Losses:
    """Losses that are still on the device, read together by `check`."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, tuple[str, ...]]] = []

    def add(self, loss: torch.Tensor, names: tuple[str, ...]) -> None:
        """Keep a scalar loss of the records of these names."""
        self._pending.append((loss.detach(), names))

    def clear(self) -> None:
        """Forget them."""
        self._pending = []

    def check(self) -> None:
        """Read all in one copy, and forget them.

        Raises:
            ValueError: when one is not finite; names its records.
        """
        pending, self._pending = self._pending, []
        values = torch.stack([loss for loss, _ in pending]).tolist() if pending else []
        for value, (_, names) in zip(values, pending, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss of records {', '.join(names)} is {value}. Look at their images and "
                    "texts, or lower the learning rate; checkpoints are kept."
                )


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 shards, gathered on the CPU: every rank must ask."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def begins_as_base(adapter: PeftModel | None) -> bool:
    """Whether a model computes what its base computes: it adds LoRA alone, and all B are zero.

    Not so where adapters were trained before, or begin elsewhere (PiSSA, OLoRA).
    """
    for name, value in adapter.named_parameters() if adapter is not None else ():
        part = next((part for part in _LORA if f".{part}." in name), "")
        if value.requires_grad and not part or part.endswith("_B") and value.any():
            return False
    return True


def base_digest(vlm: PreTrainedModel) -> str:
    """Digest of a model's weights without its LoRA."""
    return reference.weights_digest(_WithoutAdapters(vlm), vlm.dtype)


def whole_digest(adapter: PeftModel) -> str:
    """Digest of a model with its adapters and their settings."""
    settings = {name: config.to_dict() for name, config in adapter.peft_config.items()}
    about = json.dumps(settings, sort_keys=True, default=str)
    weights = reference.weights_digest(adapter.get_base_model(), adapter.dtype)
    return hashlib.blake2b(f"{weights} {about}".encode(), digest_size=16).hexdigest()


class _WithoutAdapters:
    """A model's tensors under the names they have without adapters, for their digest."""

    def __init__(self, vlm: PreTrainedModel) -> None:
        self._vlm = vlm

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._plain(self._vlm.state_dict().items())

    def named_buffers(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self._plain(self._vlm.named_buffers()).items()

    @staticmethod
    def _plain(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {n.replace(".base_layer.", "."): t for n, t in tensors if ".lora_" not in n}
