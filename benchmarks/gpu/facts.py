"""Facts: versions, what the card copies and multiplies per second, which features exist."""

import importlib.util
import os
import platform
import warnings

import torch

from benchmarks.gpu.measure import COPY_SIZE, GEMM_SIZE, copy_rate, gemm_rate
from benchmarks.gpu.record import Record, smi
from benchmarks.results import version_of
from realign_kernels import explain, missing_reason
from realign_kernels._extension import extension
from realign_kernels.refcache.staging import Staging

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "peft", "trl", "datasets",
    "liger-kernel", "cut-cross-entropy", "flash-attn",
)  # fmt: skip


def _versions() -> dict[str, str]:
    versions = {package: version_of(package) or "absent" for package in PACKAGES}
    return {"python": platform.python_version()} | versions


def _properties(device: str) -> dict[str, str | int | float]:
    """Of the device, and the cores and torch's threads of the host."""
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


def _loaded(device: str) -> dict[str, str | float]:
    """GEMMs one after another for two seconds; clock and power while they run."""
    size = GEMM_SIZE[device]
    rate = gemm_rate(device, size)
    if device == "cpu":
        return {"tflops": rate / 1e12}
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out, count = torch.empty_like(left), round(2 * rate / (2 * size**3))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        torch.mm(left, right, out=out)
    end.record()
    state = smi(clock="clocks.sm", power="power.draw")  # some 1,000 launches are still queued
    end.synchronize()
    return {"tflops": 2 * size**3 * count / start.elapsed_time(end) / 1e9, **state}


def _extension(device: str) -> dict[str, str | bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is a figure here
        module = extension()
        ring = Staging(torch.device(device)).backend
    return {
        "loads": module is not None,
        "reason": missing_reason() or "",
        "cuda": getattr(module, "CUDA_ARCHITECTURES", ""),
        "staging": ring,
    }


def _features(device: str) -> dict[str, bool | str]:
    return {
        "varlen_attn": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
        "linear_cross_entropy": hasattr(torch.nn.functional, "linear_cross_entropy"),
        "bf16": explain(device, torch.bfloat16),
    }


def run(record: Record) -> None:
    """Each fact is a case; the rates are measured by CUDA events."""
    device = record.device
    cases = {
        "properties": lambda: _properties(device),
        "versions": _versions,
        "GEMM": lambda: {"tflops": gemm_rate(device, GEMM_SIZE[device]) / 1e12},
        "GEMM under load": lambda: _loaded(device),
        "copy": lambda: {"tb_per_s": copy_rate(device, COPY_SIZE[device]) / 1e12},
        "extension": lambda: _extension(device),
        "features": lambda: _features(device),
    }
    for case in record.missing(cases):
        with record.attempt(case):
            record(case, **cases[case]())
