"""Installation check: versions, backends and missing packages, `python -m realign.doctor`.

The exit code is 0 if all required parts work, and 1 if a part is broken. A missing package, or an
extension that crashes Python, is a finding. Each line is printed immediately.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from realign.cli import CommandParser
from realign.terminal import show

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Finding = tuple[str, str, str]
"""Mark ("ok", "--" for a missing extra, "BAD" for a broken package), name and finding."""
EXTRAS = (
    "", "cpu", "gpu", "demo", "tensorboard", "wandb", "quantize", "ray", "sentences", "endpoint",
)  # fmt: skip
"""Extras of pyproject.toml for users, after the required packages. `gpu` needs a GPU."""
_LOAD = """import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))"""


def _package(requirement: Requirement, extra: str) -> Finding:
    """Whether a package is installed, new enough, and importable."""
    name = requirement.name
    remedy = f"pip install '{f'realign[{extra}]' if extra else f'{name}{requirement.specifier}'}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "--" if extra else "BAD", name, f"missing: {remedy}"
    if version not in requirement.specifier:
        return "BAD", name, f"{version} is not {requirement.specifier}: {remedy}"
    try:
        modules = [m for m, names in _modules().items() if name in names and m[0] != "_"]
        importlib.import_module(min(modules, key=len, default=name))
    except Exception as error:  # a broken package may raise any exception
        return "BAD", name, f"{version} cannot be imported: {_line(error)}"
    return "ok", name, version


_modules = functools.cache(importlib.metadata.packages_distributions)


def _machine() -> Iterator[Finding]:
    new = "ok" if sys.version_info >= (3, 11) else "BAD"
    yield new, "Python", f"{platform.python_version()}, needs >= 3.11"
    yield "ok", "system", f"{platform.platform()}, {os.cpu_count()} CPUs"


def _packages() -> Iterator[Finding]:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield "BAD", "packaging", "missing: pip install packaging"
        return
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("realign") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield "--", "realign", "not installed, so no versions are checked: pip install ."
        return
    for extra in EXTRAS:
        for requirement in requirements:
            marker = requirement.marker
            applies = marker.evaluate({"extra": extra}) if marker else not extra
            if applies and (extra != "gpu" or shutil.which("nvidia-smi")):
                yield _package(requirement, extra)


def _kernels() -> Iterator[Finding]:
    import torch
    from torch.utils import collect_env

    if crash := _crash():
        sys.modules["realign_kernels._C"] = None  # pyright: ignore[reportArgumentType] - blocks it

    from realign_kernels import explain, missing_reason

    if (reason := missing_reason()) is None:
        cuda = importlib.import_module("realign_kernels._C").CUDA_ARCHITECTURES
        yield "ok", "C++ extension", f"built; CUDA code for: {cuda or 'none (built without nvcc)'}"
    else:
        remedy = "pip install -v --force-reinstall --no-deps . (in the checkout, with a compiler)"
        mark = "--" if "No module named" in reason and not crash else "BAD"
        yield mark, "C++ extension", f"{crash or reason}; {remedy}"
    gpu = collect_env.get_gpu_info(collect_env.run) if torch.cuda.is_available() else None
    yield "ok" if gpu else "--", "GPU", gpu or "torch finds none, so everything runs on the CPU"
    backends = {"cpu": ["torch"] + ["cpp"] * (reason is None)}
    if gpu:
        backends["cuda"] = ["torch"] + ["triton"] * bool(importlib.util.find_spec("triton"))
    for device, names in backends.items():
        for dtype in (torch.float32, torch.bfloat16):
            line = explain(device, dtype).removeprefix("realign_kernels: backend ")
            yield "ok", f"{device}, {str(dtype)[6:]}", line
        for name in names:
            yield _loss(device, name)


def _crash() -> str | None:
    """Describe the crash of a subprocess that loads the extension; None without a crash."""
    root = importlib.import_module("realign_kernels").__path__
    spec = importlib.machinery.PathFinder.find_spec("realign_kernels._C", root)
    if spec is None or spec.origin is None:
        return None
    command = [sys.executable, "-c", _LOAD, spec.name, spec.origin]
    code = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    if code >= 0:
        return None
    name = signal.Signals(-code).name
    return f"loading {spec.origin} ends Python ({name}): damaged, or built for another machine"


def _error(device: str, backend: str) -> float:
    """Relative error of a small loss and its gradient in fp32, against fp64."""
    import torch

    from realign_kernels import rdpo_loss, use_backend

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 2, 5, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(64, (3, 2, 5), generator=generator)

    def run(name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        inputs = hidden.to(device, dtype).clone().requires_grad_()
        references = torch.full((3, 2), -20.0, device=device)
        with use_backend(name):
            loss = rdpo_loss(inputs, weight.to(device, dtype), labels.to(device), references).loss
            (grad,) = torch.autograd.grad(loss, inputs)
        return torch.cat([loss.detach().view(1), grad.flatten()]).double().cpu()

    exact = run("reference", torch.float64, "cpu")
    return float((run(backend, torch.float32, device) - exact).norm() / exact.norm())


def _loss(device: str, backend: str) -> Finding:
    try:
        error = _error(device, backend)
    except Exception as problem:
        return "BAD", f"rdpo_loss, {backend}", f"{device}: failed: {_line(problem)}"
    about = f"{device}: relative error {error:.0e} in fp32, against the reference in fp64"
    return "ok" if error < 1e-5 else "BAD", f"rdpo_loss, {backend}", about


def _folders() -> Iterator[Finding]:
    from realign.files import check_folder
    from realign.modeling.reference_logps import default_directory

    folder = default_directory()
    try:
        check_folder("$REALIGN_CACHE", folder)
    except ValueError as error:
        yield "BAD", "reference cache", _line(error)
        return
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free / 2**30
    yield "ok", "reference cache", f"{folder}, {free:.0f} GiB free ($REALIGN_CACHE moves it)"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks and print them. Returns an exit code."""
    parser = CommandParser(
        prog="python -m realign.doctor",
        description="Installation check: print versions, backends and missing packages. The exit "
        "code is 1 if a required part does not work.",
        example="python -m realign.doctor",
    )
    parser.parse_args(arguments)
    bad: list[str] = []
    for section in (_machine, _packages, _kernels, _folders):
        show(section.__name__[1:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the findings contain the same information
            for mark, name, text in section():
                bad += [name] if mark == "BAD" else []
                show(f"  {mark:3} {name:21}  {text}")
        if bad and section is _packages:
            break  # later sections import the broken packages
    show(f"\nbroken: {', '.join(bad)}" if bad else "\nall required parts work")
    return int(bool(bad))


if __name__ == "__main__":
    faulthandler.enable()  # a crash prints its stack
    sys.exit(main())
