"""Facts about the machine: versions, copy and GEMM rates, available features."""

import importlib.util
import os
import platform
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.record import Record, smi
from benchmarks.race import turns
from benchmarks.results import version_of
from realign_kernels import explain, missing_reason
from realign_kernels._extension import extension
from realign_kernels.refcache.staging import Staging

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "peft", "trl", "datasets",
    "liger-kernel", "cut-cross-entropy", "flash-attn",
)  # fmt: skip
GEMM_SIZE = {"cuda": 8192, "cpu": 128}
COPY_SIZE = {"cuda": 4 << 30, "cpu": 1 << 20}


def _rate(call: Callable[[], object], work: float) -> float:
    """Work per second from the median of calls, with the L2 cache flushed before each."""
    return work / statistics.median(turns(call, None, 0.5)[0])


def _properties(device: str) -> dict[str, str | int | float]:
    """Properties of the device, and the host's cores and torch threads."""
    host = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cpu":
        return {"devices": 0} | host
    properties = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "l2_mib": properties.L2_cache_size / 2**20,
        "devices": torch.cuda.device_count(),
    } | host


def _gemm(device: str, loaded: bool) -> dict[str, str | float]:
    """Rate of torch's bf16 GEMM on random data.

    With `loaded`, GEMMs run for two seconds while clock and power are recorded.
    """
    size = GEMM_SIZE[device]
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    call, flop = partial(torch.mm, left, right, out=torch.empty_like(left)), 2 * size**3
    rate = _rate(call, flop)
    if not loaded or device == "cpu":
        return {"tflops": rate / 1e12}
    count = round(2 * rate / flop)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    state = smi(clock="clocks.sm", power="power.draw")  # some 1,000 launches are still queued
    end.synchronize()
    return {"tflops": flop * count / start.elapsed_time(end) / 1e9, **state}


def _copy(device: str) -> dict[str, float]:
    """Rate of a copy within the device, in bytes read and written."""
    source = torch.ones(COPY_SIZE[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"tb_per_s": _rate(lambda: target.copy_(source), 2 * len(source)) / 1e12}


def _extension(device: str) -> dict[str, str | bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is recorded
        module = extension()
        ring = Staging(torch.device(device)).backend
    return {
        "loads": module is not None,
        "reason": missing_reason() or "",
        "cuda": getattr(module, "CUDA_ARCHITECTURES", ""),
        "staging": ring,
    }


def run(record: Record) -> None:
    """Records each fact as a case. CUDA events measure the rates."""
    device = record.device
    record.each({
        "properties": partial(_properties, device),
        "versions": lambda: {
            "python": platform.python_version(),
            **{package: version_of(package) or "absent" for package in PACKAGES},
        },
        "GEMM": partial(_gemm, device, loaded=False),
        "GEMM under load": partial(_gemm, device, loaded=True),
        "copy": partial(_copy, device),
        "extension": partial(_extension, device),
        "features": lambda: {
            "varlen_attn": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
            "flash_attn": importlib.util.find_spec("flash_attn") is not None,
            "linear_cross_entropy": hasattr(torch.nn.functional, "linear_cross_entropy"),
            "bf16": explain(device, torch.bfloat16),
        },
    })  # fmt: skip
