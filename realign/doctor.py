"""What is installed, which backend runs and why, and what to add: `python -m realign.doctor`.

Exit code 0 where everything that is needed works, 1 where something is broken. It never fails on a
missing package: that is what it is for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

NEEDED = (
    "torch", "numpy", "transformers", "tokenizers", "peft", "safetensors", "pyarrow", "pillow",
    "tqdm", "jinja2", "scikit-learn", "scipy",
)  # fmt: skip
"""Distributions that everything needs, as pyproject.toml lists them."""
_MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}


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
    Extra(("flash-attn",), "--attention flash", "pip install '.[gpu]' --no-build-isolation", True),
    Extra(("liger-kernel",), "--liger", "pip install '.[gpu]' --no-build-isolation", True),
    Extra(("matplotlib",), "pictures of demo and stats", "pip install 'realign[demo]'"),
    Extra(("scikit-image",), "the study on photographs", "pip install 'realign[study]'"),
    Extra(("datasets",), "data sets of other trainers", "pip install datasets"),
    Extra(("sentence-transformers",), "--similarity", "pip install 'realign[sentences]'"),
    Extra(("ray",), "--ray", "pip install 'realign[ray]'"),
    Extra(("tensorboard",), "--tensorboard", "pip install 'realign[tensorboard]'"),
    Extra(("wandb",), "--wandb", "pip install 'realign[wandb]'"),
)


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


def examine() -> dict[str, list[Finding]]:
    """Look at everything; section -> findings."""
    sections = {"machine": list(_machine()), "packages": list(_packages())}
    if any(f.mark == "BAD" for f in sections["packages"]):
        return sections  # nothing else can be looked at
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        sections["kernels"] = list(_kernels())
        sections["optional"] = list(_optional())
        sections["folders"] = list(_folders())
    return sections


def report(sections: dict[str, list[Finding]]) -> str:
    """The findings as text."""
    wide = max(len(finding.what) for part in sections.values() for finding in part)
    lines = []
    for name, findings in sections.items():
        lines += ["", name] if lines else [name]
        for mark, what, about in findings:
            lines.append(f"  {mark:3} {what:{wide}}  {about}".rstrip())
    bad = [f.what for part in sections.values() for f in part if f.mark == "BAD"]
    told = f"broken: {', '.join(bad)}" if bad else "everything that is needed works"
    return "\n".join([*lines, "", told])


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    new = sys.version_info >= (3, 11)
    yield Finding("ok" if new else "BAD", "Python", version if new else f"{version}; it needs 3.11")
    yield Finding(
        "ok", "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    )


def _packages() -> Iterator[Finding]:
    for name in ("realign", *NEEDED):
        version = _version(name)
        if version is None:
            yield Finding("BAD", name, f"missing: pip install {name}")
            continue
        try:
            importlib.import_module(_MODULES.get(name, name))
        except Exception as error:  # a broken package fails in ways of its own
            yield Finding("BAD", name, f"{version}, but it cannot be imported: {_line(error)}")
        else:
            yield Finding("ok", name, version)


def _kernels() -> Iterator[Finding]:
    import torch

    from realign_kernels import explain, missing_reason

    reason = missing_reason()
    if reason is None:
        module = importlib.import_module("realign_kernels._C")
        cuda = module.CUDA_ARCHITECTURES or "none (it was built without nvcc)"
        yield Finding("ok", "C++ extension", f"built; CUDA code for: {cuda}")
    else:
        absent = "No module named" in reason
        remedy = "pip install -v --force-reinstall --no-deps . (in the checkout, with a compiler)"
        yield Finding("--" if absent else "BAD", "C++ extension", f"{reason}; {remedy}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            line = explain(device, dtype).removeprefix("realign_kernels: backend ")
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
        if installed:
            shown = ", ".join(f"{name} {version}" for name, version in installed)
            yield Finding("ok", extra.names[0], f"{shown}: {extra.gives}")
        elif not extra.cuda or torch.cuda.is_available():
            yield Finding("--", extra.names[0], f"for {extra.gives}: {extra.remedy}")
    vllm = os.environ.get("REALIGN_VLLM_PYTHON")
    if vllm and not shutil.which(vllm):
        yield Finding("BAD", "vLLM", f"$REALIGN_VLLM_PYTHON is {vllm}, which is no program")
    elif vllm:
        yield Finding("ok", "vLLM", f"in the environment of {vllm}")
    else:
        yield Finding("--", "vLLM", "for vllm: engines: $REALIGN_VLLM_PYTHON, a Python that has it")


def _folders() -> Iterator[Finding]:
    from realign.reference import default_directory

    folder = default_directory()
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / 2**30
    writable = os.access(there, os.W_OK)
    about = f"{folder}, {free:.0f} GiB free ($REALIGN_CACHE names another place)"
    yield Finding(
        "ok" if writable else "BAD",
        "reference cache",
        about if writable else f"{there} cannot be written; set $REALIGN_CACHE",
    )


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
    sections = examine()
    print(report(sections))
    return int(any(f.mark == "BAD" for part in sections.values() for f in part))


if __name__ == "__main__":
    sys.exit(main())
