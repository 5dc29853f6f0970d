"""Optimizers by name: torch's fused ones, transformers' Adafactor, and those of bitsandbytes.

A step whose loss or gradient is not finite must leave everything unchanged (`update_and_read`).
torch's fused optimizers read the flag `found_inf` on the device. For all others, `Checked` reads it
on the host, which costs one wait a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from realign.config import OF_ADAM, OF_TORCH, OptimConfig

_OF_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "lion": "Lion32bit",
    "lion_8bit": "Lion8bit",
}
_STATE_BYTES = {
    "adamw": 8.0, "sgd": 0.0, "adafactor": 0.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0,
    "paged_adamw_32bit": 8.0, "lion": 4.0, "lion_8bit": 1.0,
}  # fmt: skip
"""Bytes of state for a trained weight, without scales (8 bits: 1/64) and Adafactor's rows."""


class Checked(torch.optim.Optimizer):
    """Base of optimizers that do not read `found_inf`, and that count steps in a Python number.

    Checkpoints hold tensors only, so the count becomes a tensor.
    """

    found_inf: torch.Tensor | None = None

    def step(self, closure=None):
        """Update the parameters, unless `found_inf` is set."""
        if self.found_inf is not None and self.found_inf.item():
            return
        super().step(closure)
        for state in self.state.values():
            for name in ("step", "RMS"):  # Adafactor's RMS is 0 if it does not scale by it
                if name in state:
                    state[name] = torch.as_tensor(state[name])

    def state_dict(self) -> dict[str, Any]:
        """The state by torch's method. That of bitsandbytes nests tensors in dictionaries."""
        return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state as it is. torch's method would cast 8 bits to the parameter's dtype."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    self.state[parameter] = state_dict["state"][key]


def make(
    optim: OptimConfig, trained: Sequence[nn.Parameter], projector: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters. The second of its groups is that of the projector.

    Args:
        optim: the settings.
        trained: all trained parameters.
        projector: those that are trained at `projector_learning_rate`.
    """
    name, apart = optim.optimizer, set(projector)
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p not in apart]}]
    if projector:
        groups.append({"params": [*projector], "lr": optim.projector_learning_rate})
    options: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    if name in OF_ADAM:
        options |= {"betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon}
    if name in OF_TORCH:
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
        return kind(groups, fused=True, **options)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # As transformers' Trainer: at the given rate, not relative to the size of the weights.
        return _checked(Adafactor)(groups, scale_parameter=False, relative_step=False, **options)
    import bitsandbytes

    return _checked(getattr(bitsandbytes.optim, _OF_BITSANDBYTES[name]))(groups, **options)


def _checked(kind: type) -> type:
    return type(kind.__name__, (Checked, kind), {})


def state_bytes(optim: OptimConfig, trained: int) -> int:
    """Bytes of the optimizer's state for this many trained weights."""
    return round(_STATE_BYTES[optim.optimizer] * trained)
