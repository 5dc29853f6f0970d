"""Counting reads of device values on a CPU: operations that would wait for a CUDA stream."""

import traceback
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_OPERATORS = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default,
    _aten.bincount.default, _aten.equal.default, _aten.unique_dim.default,
    _aten._unique2.default, _aten.repeat_interleave.Tensor,
}  # fmt: skip
"""Operators whose result, or its shape, the host has to know."""
_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class HostReads:
    """Inside the context `where` counts reads of this thread by "file:function" that made them.

    Reads of values that are on the host anyway count too: on a CPU they look the same.
    """

    def __init__(self) -> None:
        self.where: Counter[str] = Counter()
        self._modes = (_Operators(self), _Methods(self))

    def note(self, name: str) -> None:
        """A read by the innermost frame outside torch."""
        for frame in reversed(traceback.extract_stack()):
            if "/torch/" not in frame.filename and frame.filename != __file__:
                parts = frame.filename.rsplit("/", 2)[-2:]
                self.where[f"{'/'.join(parts)}:{frame.name}"] += 1
                return

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is _aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if func in _OPERATORS or by_mask:
            self._reads.note(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _METHODS:
            self._reads.note(func.__name__)
        return func(*args, **(kwargs or {}))
