"""The compiled extension `realign_kernels._C`: looked for once, its absence told once.

Code that has a Python fallback calls `extension()` and takes it when the answer is None.
"""

import functools
import importlib
import warnings
from types import ModuleType

ABI = 4
"""What the Python side expects of the extension: csrc/bindings/kernels.cpp."""


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
    """The extension, or None after one warning per process that says why and what to do."""
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
