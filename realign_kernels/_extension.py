"""Access to the compiled extension `realign_kernels._C`, with one warning if it is missing.

Code that has a Python fallback calls `extension()`. Other code calls `require_extension()`.
"""

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

ABI = 5
"""The version of csrc/bindings/kernels.cpp that this Python code expects."""


@functools.cache
def _probe() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("realign_kernels._C")
    except ImportError as error:
        return None, str(error)
    if getattr(module, "ABI", 0) != ABI:
        return None, f"{module.__file__} was built from a different version of the sources"
    return module, ""


def missing_reason() -> str | None:
    """The reason why the C++ extension cannot be used, or None if it can. Never warns."""
    module, reason = _probe()
    return reason if module is None else None


@functools.cache
def extension() -> ModuleType | None:
    """The extension, or None if it is missing. Warns once per process, with a remedy."""
    module, reason = _probe()
    if module is None:
        warnings.warn(
            f"realign_kernels runs without its C++ extension ({reason}). It is slower, and rounds "
            "bf16 logits. To build the extension, install a C++17 compiler and run in the "
            "checkout: pip install -v --force-reinstall --no-deps .",
            RuntimeWarning,
            stacklevel=3,
        )
    return module


def require_extension() -> Any:
    """The extension, for callers that know it is built. Its functions are untyped."""
    module = extension()
    assert module is not None
    return module
