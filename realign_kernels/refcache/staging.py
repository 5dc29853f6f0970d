"""Per-token log-probs of a forward to the host, as one fp64 sum per leaf, without a wait.

`Staging` is a ring: push enqueues and returns, so the device starts the next forward, and pop
waits for the oldest sums only. csrc/staging/staging.h does it on the CPU and, in a CUDA build, on
the GPU; elsewhere `_TorchRing` does. All add up in the order of `leaf_sums`, bit for bit.
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
    """The definition: leaf i is values[offsets[i]:offsets[i + 1]] (csrc/staging/segments.h)."""
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
    """`_C.StagingRing`, on the stream that is current at each push."""

    def __init__(self, module: ModuleType, device: torch.device, slots: int) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._ring = module.StagingRing(slots, device.index if self._cuda else -1)

    def push(self, values: Tensor, offsets: NDArray[np.int64]) -> None:
        stream = torch.cuda.current_stream(self._cuda).cuda_stream if self._cuda else 0
        self._ring.push(values.data_ptr(), values.numel(), offsets, stream)

    def pop(self) -> NDArray[np.float64]:
        return self._ring.pop()


class _TorchRing:
    """Copies tokens to the host and adds them there: a few tens of KB, from any device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._taken: deque[tuple[Tensor, NDArray[np.int64], Any]] = deque()

    def push(self, values: Tensor, offsets: NDArray[np.int64]) -> None:
        # Only a copy into pinned memory does not wait. Other devices wait here, as .cpu() does.
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
        device: where the values will be.
        slots: number of pushes that may be pending; with 2 the device computes one forward while
            the host reads the sums of the previous one.
    """

    def __init__(self, device: torch.device, slots: int = 2) -> None:
        assert slots >= 1
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.slots = slots
        # `backend` names the implementation of the sums, and the reason, in a line.
        self._ring, self.backend = _make_ring(extension(), device, slots)
        # A tensor that its owner drops returns to torch's allocator, which does not know this ring.
        # If it was made on another stream than the one that reads it, that other stream could get
        # the memory before the sums are computed.
        self._alive: deque[Tensor] = deque()

    def push(
        self,
        values: Tensor,  # (N,) fp32 on `device`
        offsets: NDArray[np.int64],  # (L + 1,)
    ) -> None:
        """Enqueues the sums of values[offsets[i]:offsets[i + 1]] on the current stream.

        Args:
            values: (N,) float32 log-probs, one per token. They must not be written to until popped,
                except by later work of the same stream.
            offsets: (L + 1,) int64, not decreasing, in [0, N]; copied.
        """
        assert values.dim() == 1 and values.dtype == torch.float32 and values.device == self.device
        assert not self.full, "pop() first"
        values = values.detach().contiguous()
        self._ring.push(values, np.ascontiguousarray(offsets))
        self._alive.append(values)

    def pop(self) -> NDArray[np.float64]:  # (L,)
        """Waits for the oldest sums, and for nothing after them.

        Raises:
            RuntimeError: the device failed.
        """
        assert self.pending, "push() first"
        sums = self._ring.pop()
        self._alive.popleft()
        return sums

    @property
    def pending(self) -> int:
        """Pushes that were not popped."""
        return len(self._alive)

    @property
    def full(self) -> bool:
        """Whether every slot is pending."""
        return self.pending == self.slots


def _make_ring(module: ModuleType | None, device: torch.device, slots: int) -> tuple[_Ring, str]:
    """The ring of the extension where it has one for this device, else the stand-in."""
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
    except RuntimeError as error:  # of a driver older than the toolkit, or a GPU that is too old
        reason = f"the extension cannot use {device} ({error})"
        warnings.warn(f"{reason}: torch takes log-probs to the host", RuntimeWarning, stacklevel=3)
        return _TorchRing(device), f"torch: {reason}"
