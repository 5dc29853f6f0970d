"""Fixtures for the kernel tests."""

import contextlib
import importlib
import os
from typing import NamedTuple

# cuBLAS reads this variable once. `poisoned_memory` turns on deterministic products, which need a
# workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import kernel_cases as kc
import pytest
import torch

import realign_kernels as rk
from realign_kernels import _extension


@pytest.fixture(autouse=True)
def one_thread():
    """Inputs are tiny, so threads mostly wait: on a busy machine 31 s instead of 4 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """Fills new memory with NaN, so that a read of memory that was not written is detected."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # only for the filling
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(params=["reference", "torch", "cpp"])
def cpu_backend(request):
    """The name of each CPU backend, which is active in the test."""
    if request.param == "cpp":
        pytest.importorskip("realign_kernels._C")
    with rk.use_backend(request.param):
        yield request.param


class Setting(NamedTuple):
    """A row of the numerics matrix."""

    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self):
        return f"{self.backend}-{self.device}-{str(self.dtype)[6:]}"

    def make_case(self, *shape, **settings):
        return kc.make_case(*shape, self.dtype, device=self.device, **settings)


BACKENDS = {
    "reference": (("cpu",), kc.DTYPES),
    "torch": (kc.DEVICES, kc.DTYPES),
    "cpp": (("cpu",), (torch.float32, torch.bfloat16)),
    "triton": ((kc.DEVICE,), kc.TRITON_DTYPES),
}
MATRIX = [
    Setting(name, device, dtype)
    for name, (devices, dtypes) in BACKENDS.items()
    for device in devices
    for dtype in dtypes
]


@pytest.fixture(params=[str(row) for row in MATRIX])
def setting(request, monkeypatch):
    """A device and a dtype, with their backend active."""
    (row,) = (row for row in MATRIX if str(row) == request.param)
    name = row.backend
    if name == "cpp" and _extension.missing_reason():
        pytest.skip("the C++ extension is not built")
    with contextlib.ExitStack() as stack:
        if name == "triton":
            pytest.importorskip("triton")
            cases = importlib.import_module(
                "triton_cases"
            )  # imports the kernels for the interpreter
            stack.enter_context(cases.interpreted())
            if row.device == "cpu":
                monkeypatch.setenv("TRITON_INTERPRET", "1")
        stack.enter_context(rk.use_backend(name))
        yield row
