"""The compiled extension `realign_kernels._C`: probed once, its absence reported once.

Code with a Python fallback calls `extension()`, code without one `require_extension()`.
"""

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

ABI = 4
"""The version that the Python side expects of csrc/bindings/kernels.cpp."""


@functools.cache
def _probe() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("realign_kernels._C")
    except ImportError as error:
        return None, str(error)
    if getattr(module, "ABI", 0) != ABI:
        return None, f"{module.__file__} was built from other sources"
    return module, ""


def missing_reason() -> str | None:
    """Why the C++ extension cannot be used, or None where it can. Never warns."""
    module, reason = _probe()
    return reason if module is None else None


@functools.cache
def extension() -> ModuleType | None:
    """The extension, or None after one warning per process with the reason and the remedy."""
    module, reason = _probe()
    if module is None:
        warnings.warn(
            f"realign_kernels runs without its C++ extension ({reason}): slower, and with bf16 "
            "logits rounded; to build it, install a C++17 compiler and, in the checkout, run: "
            "pip install -v --force-reinstall --no-deps .",
            RuntimeWarning,
            stacklevel=3,
        )
    return module


def require_extension() -> Any:
    """The extension where it is known to be built; its functions are untyped."""
    module = extension()
    assert module is not None
    return module
