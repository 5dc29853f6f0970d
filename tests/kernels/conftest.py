"""Fixtures of the kernel tests."""

import os

# cuBLAS reads it once: `poisoned_memory` asks for deterministic products, which need a workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import realign_kernels as rk


@pytest.fixture(autouse=True)
def one_thread():
    """Inputs are tiny, so threads only wait for each other: on a busy machine 31 s against 4 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """Fills memory that is allocated but not written with NaN, so that a read of it shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # only the filling is wanted
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(params=["reference", "torch", "cpp"])
def cpu_backend(request):
    """Every backend for the CPU, one after the other; its name."""
    if request.param == "cpp":
        pytest.importorskip("realign_kernels._C")
    with rk.use_backend(request.param):
        yield request.param
