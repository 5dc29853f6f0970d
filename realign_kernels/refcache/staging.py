"""Asynchronous transfer of per-leaf log-prob sums (fp64) from the device to the host.

`Staging` is a ring. push enqueues and returns, so the device can start the next forward. pop waits
for the oldest sums only. csrc/staging/staging.h implements the ring on the CPU and, in a CUDA
build, on the GPU. `_TorchRing` is the fallback. All add in the order of `leaf_sums`, with bitwise
equal results.
"""

import warnings
from collections import deque
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from realign_kernels._extension import extension

_LANES = 32


def leaf_sums(
    values: NDArray[np.float32],  # (N,)
    offsets: NDArray[np.int64],  # (L + 1,)
) -> NDArray[np.float64]:  # (L,)
    """Reference implementation of the sums, in the order of csrc/staging/segments.h.

    Leaf i is values[offsets[i]:offsets[i + 1]].
    """
    begin, end = offsets[:-1, None], offsets[1:, None]
    lanes = np.zeros((len(begin), _LANES))
    for first in range(0, int((end - begin).max(initial=0)), _LANES):
        index = begin + first + np.arange(_LANES)
        inside = index < end
        lanes[inside] += values[index[inside]]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


class _Ring(Protocol):
    def push(self, values: Tensor, offsets: NDArray[np.int64]) -> None: ...

    def pop(self) -> NDArray[np.float64]: ...


class _ExtensionRing:
    """`_C.StagingRing`, on the current stream of each push."""

    def __init__(self, module: ModuleType, device: torch.device, slots: int) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._ring = module.StagingRing(slots, device.index if self._cuda else -1)

    def push(self, values: Tensor, offsets: NDArray[np.int64]) -> None:
        stream = torch.cuda.current_stream(self._cuda).cuda_stream if self._cuda else 0
        self._ring.push(values.data_ptr(), values.numel(), offsets, stream)

    def pop(self) -> NDArray[np.float64]:
        return self._ring.pop()


class _TorchRing:
    """Copies the log-probs of tokens, a few tens of KB, from any device and adds on the host."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._taken: deque[tuple[Tensor, NDArray[np.int64], Any]] = deque()

    def push(self, values: Tensor, offsets: NDArray[np.int64]) -> None:
        # On CUDA a copy into pinned memory does not wait. Other devices wait here, as .cpu() does.
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=self._cuda)
        host.copy_(values, non_blocking=self._cuda)
        done = torch.cuda.current_stream(values.device).record_event() if self._cuda else None
        self._taken.append((host, offsets.copy(), done))

    def pop(self) -> NDArray[np.float64]:
        host, offsets, done = self._taken[0]
        if done is not None:
            done.synchronize()
        self._taken.popleft()
        return leaf_sums(host.numpy(), offsets)


class Staging:
    """A ring of `slots` forwards whose sums are being copied to the host.

    Args:
        device: device of the values.
        slots: number of pushes that may be pending. With 2 the device computes one forward while
            the host reads the sums of the previous one.
    """

    def __init__(self, device: torch.device, slots: int = 2) -> None:
        assert slots >= 1
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.slots = slots
        # `backend` is a line with the implementation of the sums and the reason for it.
        self._ring, self.backend = _make_ring(extension(), device, slots)
        # References to pushed tensors. Without them torch's allocator could give the memory to the
        # stream on which the tensor was made, before this stream has computed the sums.
        self._alive: deque[Tensor] = deque()

    def push(
        self,
        values: Tensor,  # (N,) fp32 on `device`
        offsets: NDArray[np.int64],  # (L + 1,)
    ) -> None:
        """Enqueues the sums of values[offsets[i]:offsets[i + 1]] on the current stream.

        Args:
            values: (N,) float32 log-probs, one per token. Until the pop, only later work of the
                same stream may overwrite them.
            offsets: (L + 1,) int64, non-decreasing, in [0, N]. They are copied.
        """
        assert values.dim() == 1 and values.dtype == torch.float32 and values.device == self.device
        assert not self.full, "pop() first"
        values = values.detach().contiguous()
        self._ring.push(values, np.ascontiguousarray(offsets))
        self._alive.append(values)

    def pop(self) -> NDArray[np.float64]:  # (L,)
        """Returns the oldest sums. Waits for these only.

        Raises:
            RuntimeError: the device failed.
        """
        assert self.pending, "push() first"
        sums = self._ring.pop()
        self._alive.popleft()
        return sums

    @property
    def pending(self) -> int:
        """Number of pushes that were not popped."""
        return len(self._alive)

    @property
    def full(self) -> bool:
        """Whether every slot is pending."""
        return self.pending == self.slots


def _make_ring(module: ModuleType | None, device: torch.device, slots: int) -> tuple[_Ring, str]:
    """The extension's ring if it supports this device, else `_TorchRing`, and the reason."""
    if module is None:
        return _TorchRing(device), "torch: no extension"
    if device.type == "cpu":
        return _ExtensionRing(module, device, slots), "extension on the CPU"
    if device.type != "cuda":
        return _TorchRing(device), f"torch: the extension has no ring for {device.type}"
    if not module.CUDA_ARCHITECTURES:
        return _TorchRing(device), "torch: the extension was built without CUDA"
    try:
        return _ExtensionRing(module, device, slots), f"extension for {module.CUDA_ARCHITECTURES}"
    except RuntimeError as error:  # a driver older than the toolkit, or a GPU that is too old
        reason = f"the extension cannot use {device} ({error})"
        warnings.warn(f"{reason}. torch copies log-probs instead.", RuntimeWarning, stacklevel=3)
        return _TorchRing(device), f"torch: {reason}"
