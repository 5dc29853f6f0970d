"""What is installed, which backend runs and why, and what to add: `python -m realign.doctor`.

Exit code 0 where everything that is needed works, 1 where something is broken. It never fails on a
missing package, nor on a compiled extension that ends Python: that is what it is for. Every line is
printed as soon as it is known.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

NEEDED = {
    "torch": "2.11", "numpy": "2", "transformers": "5.18", "tokenizers": "", "peft": "0.21",
    "safetensors": "", "pyarrow": "", "pillow": "", "tqdm": "", "jinja2": "", "scikit-learn": "",
    "scipy": "",
}  # fmt: skip
"""Distributions that everything needs -> the oldest that will do, as pyproject.toml lists them."""
OPTIONAL = {"faiss-gpu": "1.15", "ray": "2.60"}
"""Optional distributions -> likewise, where it names a version."""
_MODULES = {
    "pillow": "PIL", "scikit-learn": "sklearn", "scikit-image": "skimage", "faiss-cpu": "faiss",
    "faiss-gpu": "faiss", "liger-kernel": "liger_kernel",
    "sentence-transformers": "sentence_transformers",
}  # fmt: skip


class Extra(NamedTuple):
    """An optional package.

    Attributes:
        names: distributions any of which will do.
        gives: what it is for.
        remedy: how to install it.
        cuda: whether it is of use with a CUDA GPU alone.
    """

    names: tuple[str, ...]
    gives: str
    remedy: str
    cuda: bool = False


EXTRAS = (
    Extra(("faiss-cpu", "faiss-gpu"), "IVF and HNSW search for pairs", "pip install faiss-cpu"),
    Extra(("triton",), "the CUDA kernels", "it comes with torch for CUDA", cuda=True),
    Extra(("liger-kernel",), "--liger", "pip install '.[gpu]'", True),
    Extra(("matplotlib",), "pictures of demo and stats", "pip install 'realign[demo]'"),
    Extra(("scikit-image",), "the study on photographs", "pip install 'realign[study]'"),
    Extra(("datasets",), "data sets of other trainers", "pip install datasets"),
    Extra(("sentence-transformers",), "--similarity", "pip install 'realign[sentences]'"),
    Extra(("ray",), "--ray", "pip install 'realign[ray]'"),
    Extra(("tensorboard",), "--tensorboard", "pip install 'realign[tensorboard]'"),
    Extra(("wandb",), "--wandb", "pip install 'realign[wandb]'"),
)
_WIDE = max(len(extra.names[0]) for extra in EXTRAS)


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        mark: "ok", "--" for what could be added, or "BAD" for what is broken.
        what: in the first column.
        about: in the second.
    """

    mark: str
    what: str
    about: str


def examine() -> Iterator[tuple[str, Finding]]:
    """Look at everything, one thing after the other: its section and what was found."""
    broken = False
    for look in (_machine, _packages):
        for finding in look():
            broken |= look is _packages and finding.mark == "BAD"
            yield look.__name__[1:], finding
    if broken:
        return  # nothing else can be looked at
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        for look in (_kernels, _optional, _folders):
            for finding in look():
                yield look.__name__[1:], finding


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    new = sys.version_info >= (3, 11)
    yield Finding("ok" if new else "BAD", "Python", version if new else f"{version}; it needs 3.11")
    yield Finding(
        "ok", "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    )


def _packages() -> Iterator[Finding]:
    for name, least in {"realign": "", **NEEDED}.items():
        version = _version(name)
        if version is None and name == "realign":
            yield Finding("--", name, "not installed, runs from a checkout: pip install .")
        elif version is None:
            yield Finding("BAD", name, f"missing: {_install(name, least)}")
        elif problem := _problem(name, version, least):
            yield Finding("BAD", name, f"{version}{problem}")
        else:
            yield Finding("ok", name, version)


def _problem(name: str, version: str, least: str) -> str | None:
    """What keeps an installed distribution from being used; None where it can be."""
    if _release(version) < _release(least):
        return f", too old: needs >= {least}: {_install(name, least)}"
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # a broken package fails in ways of its own
        return f", but it cannot be imported: {_line(error)}"
    return None


def _release(version: str) -> list[int]:
    """The numbers of a version, without a suffix such as +cu128, and zeros at the end."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _install(name: str, least: str) -> str:
    return f"pip install '{name}>={least}'" if least else f"pip install {name}"


def _kernels() -> Iterator[Finding]:
    import torch

    if crash := _crash():
        sys.modules["realign_kernels._C"] = None  # no import may try it in this process

    from realign_kernels import explain, missing_reason

    reason = missing_reason()
    if reason is None:
        module = importlib.import_module("realign_kernels._C")
        cuda = module.CUDA_ARCHITECTURES or "none (it was built without nvcc)"
        yield Finding("ok", "C++ extension", f"built; CUDA code for: {cuda}")
    else:
        absent = "No module named" in reason
        told = crash or reason
        remedy = "pip install -v --force-reinstall --no-deps . (in the checkout, with a compiler)"
        yield Finding("--" if absent else "BAD", "C++ extension", f"{told}; {remedy}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            line = explain(device, dtype).removeprefix("realign_kernels: backend ")
            line = line.replace(reason, "loading it ends Python") if crash else line
            yield Finding("ok", f"backend, {device}", line)
        try:
            error = _try(device)
        except Exception as problem:
            yield Finding("BAD", f"rdpo_loss, {device}", f"it fails: {_line(problem)}")
        else:
            fine = error < 1e-5
            yield Finding(
                "ok" if fine else "BAD",
                f"rdpo_loss, {device}",
                f"fp32 is {error:.0e} from the specification in fp64",
            )
    if "cuda" not in devices:
        yield Finding("--", "GPU", "torch sees none: everything runs on the CPU")


def _crash() -> str | None:
    """What loading the extension, tried in another process, does to Python; None: it survives."""
    places = importlib.util.find_spec("realign_kernels").submodule_search_locations
    spec = importlib.machinery.PathFinder.find_spec("realign_kernels._C", places)
    if spec is None:
        return None
    ended = subprocess.run(
        [sys.executable, "-c", _LOAD, spec.name, spec.origin], stderr=subprocess.DEVNULL
    ).returncode
    if ended >= 0:
        return None  # errors of Python are told where they are raised
    name = signal.Signals(-ended).name
    return f"loading {spec.origin} ends Python ({name}): it is damaged, or of another machine"


_LOAD = """import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))"""


def _try(device: str) -> float:
    """Relative error of a small loss and of its gradient, against fp64."""
    import torch

    from realign_kernels import rdpo_loss, use_backend

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 2, 5, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(64, (3, 2, 5), generator=generator)
    reference = torch.full((3, 2), -20.0, dtype=torch.float64)

    def run(dtype: torch.dtype, where: str) -> torch.Tensor:
        given = hidden.to(where, dtype).clone().requires_grad_()
        out = rdpo_loss(given, weight.to(where, dtype), labels.to(where), reference.to(where))
        out.loss.backward()
        found = torch.cat([out.loss.detach().view(1), given.grad.flatten()])
        return found.double().cpu()

    with use_backend("reference"):
        truth = run(torch.float64, "cpu")
    return float((run(torch.float32, device) - truth).norm() / truth.norm())


def _optional() -> Iterator[Finding]:
    import torch

    for extra in EXTRAS:
        installed = [(name, _version(name)) for name in extra.names if _version(name)]
        useful = not extra.cuda or torch.cuda.is_available()
        if installed:
            shown = ", ".join(f"{name} {version}" for name, version in installed)
            problems = [_problem(name, v, OPTIONAL.get(name, "")) for name, v in installed]
            if problem := next(filter(None, problems), None):
                mark = "BAD" if useful else "--"
                yield Finding(mark, extra.names[0], f"{shown}{problem} (for {extra.gives})")
            else:
                yield Finding("ok", extra.names[0], f"{shown}: {extra.gives}")
        elif useful:
            yield Finding("--", extra.names[0], f"for {extra.gives}: {extra.remedy}")
    vllm = os.environ.get("REALIGN_VLLM_PYTHON")
    if vllm and not shutil.which(vllm):
        yield Finding("BAD", "vLLM", f"$REALIGN_VLLM_PYTHON is {vllm}, which is no program")
    elif vllm:
        yield Finding("ok", "vLLM", f"in the environment of {vllm}")
    else:
        yield Finding("--", "vLLM", "for vllm: engines: $REALIGN_VLLM_PYTHON, a Python that has it")


def _folders() -> Iterator[Finding]:
    from realign.files import check_folder
    from realign.modeling.reference_logps import default_directory

    folder = default_directory()
    try:
        check_folder("$REALIGN_CACHE", folder)
    except ValueError as error:
        yield Finding("BAD", "reference cache", _line(error))
        return
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free / 2**30
    about = f"{folder}, {free:.0f} GiB free ($REALIGN_CACHE names another place)"
    yield Finding("ok", "reference cache", about)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, print; returns an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words:
        asked = words in (["-h"], ["--help"])
        print(__doc__ if asked else f"error: {words[0]!r} is unknown; it takes no arguments.")
        return 0 if asked else 2
    section, bad = "", []
    for name, (mark, what, about) in examine():
        if name != section:
            print("\n" * bool(section) + name)
        section = name
        bad += [what] if mark == "BAD" else []
        print(f"  {mark:3} {what:{_WIDE}}  {about}".rstrip(), flush=True)
    print(f"\nbroken: {', '.join(bad)}" if bad else "\neverything that is needed works")
    return int(bool(bad))


if __name__ == "__main__":
    faulthandler.enable()  # a crash says where
    sys.exit(main())
