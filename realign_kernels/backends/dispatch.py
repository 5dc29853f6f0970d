"""Backend choice per device and dtype: `choose`, `use_backend`, `explain`.

`use_backend` comes first, then the environment variable REALIGN_BACKEND, then the fastest backend
for the device and dtype. Operators choose when they run, not when they are traced. So a choice
never breaks a compiled graph, and `use_backend` also works around a call of a compiled function.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from realign_kernels._extension import extension, missing_reason
from realign_kernels.backends.base import Backend
from realign_kernels.backends.chunked import ChunkedBackend
from realign_kernels.objectives import Objective

MODULES = {
    "reference": ("realign_kernels.backends.reference", "ReferenceBackend"),
    "torch": ("realign_kernels.backends.torch", "TorchKernels"),
    "cpp": ("realign_kernels.backends.cpp", "CppKernels"),
    "triton": ("realign_kernels.backends.triton.backend", "TritonKernels"),
}
"""Module and class of each backend, or of its kernels for the chunked backend."""

ENVIRONMENT = "REALIGN_BACKEND"

_override: ContextVar[str] = ContextVar("realign_backend", default="")


class Choice(NamedTuple):
    """A backend and the reason for choosing it."""

    name: str
    reason: str


def _missing(name: str) -> str | None:
    """The reason why this installation lacks a backend, or None if it has it."""
    if name == "cpp":
        return missing_reason()
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "triton" and torch.cuda.is_available():
        if torch.version.hip is not None:
            return "its kernels are tuned for NVIDIA GPUs"
        if torch.cuda.get_device_capability() < (8, 0):
            return "it needs compute capability 8.0 or above"
    return None


def _cannot(name: str, device: str, dtype: torch.dtype) -> str | None:
    """The reason why a backend does not support this device and dtype, or None if it does."""
    if name == "cpp" and (device != "cpu" or dtype not in (torch.float32, torch.bfloat16)):
        return "it supports float32 and bfloat16 on the CPU"
    if name == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if dtype == torch.float64 or (device != "cuda" and not interpreted):
            return "it supports float32, bfloat16 and float16 on CUDA"
    return None


def _check(name: str, source: str) -> None:
    if name not in MODULES:
        raise ValueError(f"{source}: unknown backend {name!r}. Choose one of {', '.join(MODULES)}.")
    if reason := _missing(name):
        available = ", ".join(other for other in MODULES if not _missing(other))
        raise ValueError(
            f"{source}: backend {name!r} is not available ({reason}). Choose one of {available}."
        )


def _decide(device: str, dtype: torch.dtype, override: str, environment: str) -> Choice:
    asked = override or environment
    if asked:
        source = "use_backend" if override else ENVIRONMENT
        _check(asked, source)
        if reason := _cannot(asked, device, dtype):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{source}: backend {asked!r} does not support {name} on {device}: {reason}. "
                "Choose torch or reference."
            )
        return Choice(asked, f"selected by {source}")
    passed_over = []
    for name in ("triton", "cpp"):
        if _cannot(name, device, dtype):
            continue
        if reason := _missing(name):
            passed_over.append(f"no {name}: {reason}")
            if name == "cpp":
                extension()  # warns once
        elif name == "cpp":
            module = importlib.import_module(MODULES[name][0])
            return Choice(name, f"the fastest on this CPU: {module.describe()}")
        elif device == "cuda":
            return Choice(name, "the default on CUDA; docs/gpu.md has its speed")
    return Choice("torch", "; ".join(passed_over) or "the only backend for this device and dtype")


_decided = functools.cache(_decide)


def choose(device: torch.device, dtype: torch.dtype, override: str = "") -> Choice:
    """The backend for tensors of this device and dtype. `override` takes precedence."""
    asked = override or current_override()
    return _decided(device.type, dtype, asked, os.environ.get(ENVIRONMENT, ""))


def current_override() -> str:
    """The name given to the active `use_backend` block, or an empty string."""
    return _override.get()


@functools.cache
def _load(name: str) -> Backend:
    module, kind = MODULES[name]
    made = getattr(importlib.import_module(module), kind)()
    return made if name == "reference" else ChunkedBackend(made)


def backend_for(tensor: Tensor, override: str = "") -> Backend:
    """The backend for this tensor."""
    return _load(choose(tensor.device, tensor.dtype, override).name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Selects a backend inside a `with` block, in this thread or task only.

    A backward pass uses the backend of its forward. Enter the block outside compiled functions.

    Raises:
        ValueError: the name is unknown, or this installation lacks the backend.
    """
    _check(name, "use_backend")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    objective: Objective | None = None,
) -> str:
    """One line with the backend for this device and dtype, and the reason for the choice.

    With an objective, the line also states whether one fused kernel computes its loss from token
    log-probs, or torch operations, and the reason. Torch operations also compute reduction "none",
    and everything under torch.compile.
    """
    device = torch.device(device)
    choice = choose(device, dtype)
    name = str(dtype).removeprefix("torch.")
    line = f"realign_kernels: backend {choice.name} for {name} on {device.type} ({choice.reason})"
    if objective is None:
        return line
    kernel = _load(choice.name).fused_loss(objective)
    path = f"torch operations ({kernel})" if isinstance(kernel, str) else "one fused kernel"
    return f"{line}; loss {objective.name}: {path}"
