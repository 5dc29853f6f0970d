"""RMSNorm and SwiGLU of one model by liger-kernel.

liger's own `apply_liger_kernel_to_*` replaces functions and classes of transformers for every model
of the process. Here `forward` is set on the instances of one model, if liger's kernel gives the
same result. Rotary embeddings are a module-level function of transformers, so they are not
replaced. The loss stays this project's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import nn

_TOLERANCE = 1e-4  # relative, fp32; a different norm offset, or GELU in the MLP, is off by > 0.01


def check(device: torch.device) -> None:
    """Check that liger's kernels can run.

    Raises:
        ValueError: without CUDA, or if liger-kernel is not installed.
    """
    if device.type != "cuda":
        raise ValueError("liger needs CUDA, and there is no GPU. Leave --liger out.")
    if find_spec("liger_kernel") is None:
        raise ValueError("liger-kernel is not installed. Run `pip install liger-kernel`.")


def use(layers: Iterable[nn.Module], device: torch.device) -> str:
    """Replace the forward of RMSNorm and SwiGLU modules in `layers` by liger's kernels.

    The first module of every class is tested on a random input on `device`. A class keeps its own
    forward if liger's result differs. Returns a line with the number of modules per class.

    Raises:
        ValueError: when there is no such module.
    """
    replacements: dict[type, Callable | None] = {}
    count: dict[str, int] = {}
    for module in (module for layer in layers for module in layer.modules()):
        kind = type(module)
        if kind not in replacements:
            replacements[kind] = next(
                (f for f in _candidates(module) if _agrees(module, f, device)), None
            )
        if (forward := replacements[kind]) is not None:
            module.forward = MethodType(forward, module)
            count[kind.__name__] = count.get(kind.__name__, 0) + 1
    if not count:
        raise ValueError(
            "--liger would have no effect: no RMSNorm or SwiGLU of the trained layers agrees with "
            "its kernels. Leave --liger out."
        )
    return "liger: " + ", ".join(f"{number} {name}" for name, number in sorted(count.items()))


def _candidates(module: nn.Module) -> list[Callable]:
    """liger's functions of (module, hidden) that may equal the module's forward."""
    if hasattr(module, "weight") and type(module).__name__.endswith("RMSNorm"):
        llama = partial(_norm, offset=0.0, casting="llama")
        return [llama, partial(_norm, offset=1.0, casting="gemma")]
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return [_swiglu]
    return []


def _agrees(module: Any, forward: Callable, device: torch.device) -> bool:
    """Whether a copy of the module with random weights agrees with `forward`, in fp32."""
    tried = copy.deepcopy(module).to_empty(device=device).float()  # it may be on the meta device
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in tried.parameters():
            parameter.normal_(std=0.1, generator=generator)
        width = (tried.weight if hasattr(tried, "weight") else tried.gate_proj.weight).shape[-1]
        hidden = torch.randn(4, 8, width, device=device, generator=generator)
        expected, output = tried(hidden), forward(tried, hidden)
    return bool((output - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _norm(
    norm: Any,
    hidden: torch.Tensor,  # (..., H)
    *,
    offset: float,
    casting: str,
) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    # False: the backward must not overwrite its incoming gradient.
    return LigerRMSNormFunction.apply(hidden, norm.weight, epsilon, offset, casting, False, None)


def _swiglu(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    gated = LigerSiLUMulFunction.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden), 1.0, 1.0)
    return mlp.down_proj(gated)
