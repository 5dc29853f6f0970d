"""Transfer of per-leaf sums to the host: the ring of the extension and the fallback in torch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from realign_kernels._extension import extension, missing_reason
from realign_kernels.refcache import staging
from realign_kernels.refcache.staging import Staging, leaf_sums

CPU = torch.device("cpu")
LENGTHS = ([], [0], [1], [5, 0, 0, 7], [31, 32, 33], [63, 64, 65, 0], [1000, 1, 4097], [3] * 1500)

without_extension = pytest.mark.skipif(
    missing_reason() is not None, reason=f"no extension: {missing_reason()}"
)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@pytest.fixture(
    params=[
        pytest.param((device, kind), marks=without_extension if kind == "extension" else ())
        for device in DEVICES
        for kind in ("extension", "torch")
    ],
    ids=" ".join,
)
def make(request, monkeypatch):
    """Makes a ring of the device and kind under test."""
    device, kind = request.param
    if kind == "torch":
        monkeypatch.setattr(staging, "extension", lambda: None)

    def make(slots: int = 2) -> Staging:
        ring = Staging(torch.device(device), slots)
        assert ring.backend.startswith(kind)
        return ring

    return make


def forward(lengths, seed=0, before=0, after=0):
    """Log-probs of many magnitudes, and the offsets of the leaves."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(before + sum(lengths) + after, generator=generator) * 30 - 27
    offsets = before + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return -torch.exp2(exponents), offsets


def exact(values, offsets):
    return [math.fsum(values[a:b].tolist()) for a, b in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 3)])
def test_sums(make, before, after):
    ring = make()
    for lengths in LENGTHS:
        values, offsets = forward(lengths, len(lengths), before, after)
        ring.push(values.to(ring.device), offsets)
        sums = ring.pop()
        assert sums.dtype == np.float64 and sums.shape == (len(lengths),)
        # A lane adds ceil(n / 32) values, and the first addition, to 0, is exact. The tree adds 5
        # times. The relative error of an addition is at most 2^-53, and all log-probs are negative.
        bound = (math.ceil(max(lengths, default=0) / 32) + 5) * 2.0**-53
        np.testing.assert_allclose(sums, exact(values, offsets), rtol=bound, atol=0)
        # A cached sum must not depend on the implementation.
        assert sums.tobytes() == leaf_sums(values.numpy(), offsets).tobytes()


def test_results_come_in_order_for_any_interleaving(make):
    forwards = [forward([n, 2 * n], seed=n) for n in (1, 40, 2000, 3, 700, 9, 1, 65)]
    ring = make(3)
    found = []
    for step, (values, offsets) in enumerate(forwards):
        if ring.full or step == 3:
            found.append(ring.pop())
        offsets = offsets.copy()
        ring.push(values.to(ring.device), offsets)
        offsets[:] = 0  # the ring has a copy
        assert ring.pending == step + 1 - len(found)
    while ring.pending:
        found.append(ring.pop())
    for sums, (values, offsets) in zip(found, forwards, strict=True):
        assert sums.tobytes() == leaf_sums(values.numpy(), offsets).tobytes()


def test_values_may_be_overwritten_by_later_work(make):
    values, offsets = forward([50, 60])
    ring = make()
    moving = values.to(ring.device, copy=True)
    ring.push(moving, offsets)
    moving.fill_(float("nan"))
    ring.push(values.to(ring.device).repeat_interleave(2)[::2], offsets)  # not contiguous
    assert (
        ring.pop().tobytes() == ring.pop().tobytes() == leaf_sums(values.numpy(), offsets).tobytes()
    )


def test_non_finite_log_probs_stay_non_finite(make):
    ring = make()
    values = torch.tensor([-1.0, -math.inf, -2.0, math.nan, -3.0], device=ring.device)
    ring.push(values, np.array([0, 2, 4, 5]))
    np.testing.assert_array_equal(ring.pop(), [-math.inf, math.nan, -3.0])


@without_extension
def test_the_core_checks_its_arguments():
    ring = extension().StagingRing(1)
    assert (ring.slots, ring.pending) == (1, 0)
    values = torch.zeros(4)
    for offsets in ([], [[0, 4]], [0, 5], [-1, 4], [3, 2]):
        with pytest.raises(ValueError, match="offsets must"):
            ring.push(values.data_ptr(), 4, np.array(offsets, dtype=np.int64))
    with pytest.raises(ValueError, match="offsets must"):
        ring.push(values.data_ptr(), 4, np.array([0.0, 4.0]))
    with pytest.raises(RuntimeError, match="empty. Call push first"):
        ring.pop()
    ring.push(values.data_ptr(), 4, np.array([0, 4]))
    with pytest.raises(RuntimeError, match="all 1 slots of the staging ring are taken. Call pop"):
        ring.push(values.data_ptr(), 4, np.array([0, 4]))
    assert ring.pop().tolist() == [0.0]
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        extension().StagingRing(0)


class Driverless:
    """An extension with CUDA on a machine with an unsuitable driver."""

    CUDA_ARCHITECTURES = "90-real"

    def StagingRing(self, slots: int, device: int):  # noqa: N802
        raise RuntimeError("driver version is insufficient")


def test_the_extension_is_used_where_it_can_be(monkeypatch):
    cuda = torch.device("cuda", 1)
    calls = []

    class Ring:
        def __init__(self, *arguments):
            calls.append(arguments)

        def push(self, *arguments):
            calls.append(arguments)

    working = SimpleNamespace(CUDA_ARCHITECTURES="90-real", StagingRing=Ring)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7 + device.index)
    )
    ring, reason = staging._make_ring(working, cuda, 3)
    values, offsets = forward([2])
    ring.push(values, offsets)
    assert reason == "extension for 90-real"
    assert calls == [(3, 1), (values.data_ptr(), 2, offsets, 8)]

    for module, device, words in (
        (None, CPU, "no extension"),
        (SimpleNamespace(CUDA_ARCHITECTURES=""), cuda, "built without CUDA"),
        (working, torch.device("meta"), "no ring for meta"),
    ):
        ring, reason = staging._make_ring(module, device, 2)
        assert isinstance(ring, staging._TorchRing) and words in reason
    with pytest.warns(RuntimeWarning, match="cannot use cuda:1 .driver version is insufficient"):
        ring, _ = staging._make_ring(Driverless(), cuda, 2)
    assert isinstance(ring, staging._TorchRing)
