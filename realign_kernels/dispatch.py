"""Which backend computes an operator.

One decision per (device, dtype), in this order: `use_backend`, the environment variable
REALIGN_BACKEND, the default. Operators ask when they run, not when they are traced, so a choice
never breaks a compiled graph and a compiled function obeys the `use_backend` it is called under.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KNOWN = ("reference", "torch", "cpp", "triton")
"""Every backend there is, in any build."""

MODULES = {"reference": "realign_kernels.reference", "torch": "realign_kernels.torch_backend"}
"""The backends of this build."""

ENVIRONMENT = "REALIGN_BACKEND"

_override: ContextVar[str] = ContextVar("realign_backend", default="")


class Backend(Protocol):
    """What a backend module provides. Rows are compacted: no label is ignored, labels in [0, V)."""

    def forward(
        self,
        hidden: Tensor,  # (n, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (n,) int64
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        temperature: float,
        *,
        chunk_rows: int | None,
        keep_direction: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """logps (n,) in fp32 or fp64; if wanted, d logp_i / d hidden_i (n, H) in hidden's dtype."""

    def backward(
        self,
        grad: Tensor,  # (n,) in the dtype of logps
        hidden: Tensor,  # (n, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (n,) int64
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        temperature: float,
        *,
        chunk_rows: int | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias in their dtypes; None where not wanted."""


class Choice(NamedTuple):
    """A backend and why it was taken."""

    name: str
    reason: str


def _check(name: str, source: str) -> None:
    if name not in KNOWN:
        raise ValueError(f"{source}: unknown backend {name!r}, choose one of {', '.join(MODULES)}")
    if name not in MODULES:
        raise ValueError(
            f"{source}: backend {name!r} is not in this build, available: {', '.join(MODULES)}"
        )


@functools.cache
def _decide(device: str, dtype: torch.dtype, override: str, environment: str) -> Choice:
    if override:
        return Choice(override, "asked for by use_backend")
    if environment:
        _check(environment, ENVIRONMENT)
        return Choice(environment, f"asked for by {ENVIRONMENT}")
    absent = " and ".join(name for name in KNOWN if name not in MODULES)
    return Choice("torch", f"the default: {absent} are not in this build")


def choose(device: torch.device, dtype: torch.dtype, override: str = "") -> Choice:
    """The decision for tensors of this device and dtype. `override` stands for use_backend."""
    asked = override or current_override()
    return _decide(device.type, dtype, asked, os.environ.get(ENVIRONMENT, ""))


def current_override() -> str:
    """What `use_backend` asks for here; empty outside of it."""
    return _override.get()


def backend_for(tensor: Tensor, override: str = "") -> Backend:
    """The module that computes on this tensor."""
    return importlib.import_module(MODULES[choose(tensor.device, tensor.dtype, override).name])


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes with one backend inside a `with` block, in this thread or task only.

    A backward pass uses the backend of its forward. Enter the block outside of compiled functions.

    Raises:
        ValueError: the name is unknown, or its backend is not in this build.
    """
    _check(name, "use_backend")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """One line: which backend would compute on this device and dtype, and why."""
    device = torch.device(device)
    choice = choose(device, dtype)
    name = str(dtype).removeprefix("torch.")
    return f"realign_kernels: backend {choice.name} for {name} on {device.type} ({choice.reason})"
