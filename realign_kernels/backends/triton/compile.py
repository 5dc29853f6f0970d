"""Ahead-of-time compilation of every Triton kernel, without a GPU, with a resource report.

    python -m realign_kernels.backends.triton.compile --arch 80 90 100

The argument types, alignments and tiles are those of real launches. The launchers run on meta
tensors, and each launch is recorded and compiled.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise RuntimeError("TRITON_INTERPRET is set. Unset it: interpreted kernels do not compile.")

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from realign_kernels import objectives
from realign_kernels.backends.base import Scores
from realign_kernels.backends.triton import (
    epilogue,
    exp_head,
    forward,
    loss,
    row_kernel,
    scatter,
)
from realign_kernels.backends.triton.logits import assume_device
from realign_kernels.lm_head import Head

PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
FETCHES = re.compile(r"\b(LDGSTS|UTMALDG)\b")


class Report(NamedTuple):
    """Resources of one kernel on one architecture."""

    architecture: int
    case: str
    registers: int
    spills: int
    """Bytes stored to and loaded from local memory."""
    shared: int
    """Bytes of shared memory."""
    warps: int
    stages: int
    tensor_cores: str
    """Instruction that multiplies tiles: HMMA (mma.sync), HGMMA (wgmma), UTC...MMA (tcgen05)."""
    fetches: str
    """Instruction that loads tiles into shared memory: LDGSTS (cp.async), UTMALDG (TMA)."""
    serialized: bool
    """Whether ptxas serialized the wgmma instructions (warning C7510)."""


class Launch(NamedTuple):
    """A kernel launch, as a launcher requested it from Triton."""

    kernel: Any
    source: ASTSource
    warps: int
    stages: int


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _long(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)


def _read(dtype: torch.dtype, vocabulary: int, *, options: bool = False, exp_logits: str = "bf16"):
    """A launch of the row kernel; `options` are bias, softcap and runner-ups."""
    logits = _empty(4, vocabulary, dtype=dtype)
    apart = _empty(12, vocabulary)[8:]  # nonzero address, unlike that of `logits`
    target = {"bf16": apart, "in place": logits, "none": None}[exp_logits]
    bias = _empty(vocabulary) if options else None
    runner_up = _empty(4, dtype=torch.bool) if options else None
    softcap, temperature = (30.0, 0.7) if options else (None, 1.0)
    row_kernel.row_stats(logits, _long(4), bias, softcap, temperature, runner_up, target)


def _head(
    count: int, width: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16, cap: bool = True
):
    """A launch of the fused head; `cap` adds bias and softcap."""
    hidden, weight = _empty(count, width, dtype=dtype), _empty(vocabulary, width, dtype=dtype)
    bias = _empty(vocabulary, dtype=dtype) if cap else None
    softcap, temperature = (30.0, 0.7) if cap else (None, 1.0)
    forward.head_stats(hidden, weight, _long(count), bias, softcap, temperature)


def _loss(name: str, count: int, examples: int, shift: bool = False):
    """A launch of the loss; `shift` is a running mean on the device."""
    objective = objectives.get(name)
    if shift:
        objective = objective.at(_empty(dtype=torch.float64))
    logps = _empty(count, dtype=torch.float32)
    table = _empty(len(objective.leaves), examples, dtype=torch.float32)
    loss.preference_sums(logps, _long(count), table, objective)


def _scatter(count: int, width: int, dtype: torch.dtype = torch.float32):
    """A launch of the scatter-add of `count` rows."""
    total = _empty(32000, width, dtype=dtype)
    scatter.add_rows(total, _long(count), _empty(count, width, dtype=torch.float32))


def _exp(count: int, width: int, vocabulary: int):
    """A launch of the GEMM with the exponential."""
    head = Head(_empty(vocabulary, width), None, None, 1.3)
    exp_logits = _empty(count, -(-vocabulary // 8) * 8)[:, :vocabulary]
    narrow = _empty(count, dtype=torch.int32), _empty(count, dtype=torch.float32)
    exp_head.exp_rows(_empty(count, width), head, *narrow, exp_logits)


def _label(count: int, width: int, vocabulary: int):
    head = Head(_empty(vocabulary, width), None, None, 1.3)
    exp_head.label_logits(_empty(count, width), _long(count), head)


def _score(count: int, tiles: int):
    sums, logit = (_empty(*n, dtype=torch.float32) for n in ((2, tiles, count), (count,)))
    exp_head.score_sums(sums, logit, 1.3)


def _epilogue(count: int, width: int):
    logps, one_minus_p, sum_exp, dz_dlogit, factor = (
        _empty(count, dtype=torch.float32) for _ in range(5)
    )
    scores = Scores(logps, one_minus_p, _long(count), sum_exp, dz_dlogit)
    exp_w, out = (_empty(count, width, dtype=torch.float32) for _ in range(2))
    epilogue.hidden_grad_epilogue(exp_w, _empty(32000, width), scores, factor, out)


CASES: dict[str, Callable[[], None]] = {
    "rows fp32 to bf16": lambda: _read(torch.float32, 151936),
    "rows fp32, all options": lambda: _read(torch.float32, 151936, options=True),
    "rows bf16 in place": lambda: _read(torch.bfloat16, 151936, exp_logits="in place"),
    "rows fp32, no derivative": lambda: _read(torch.float32, 151936, exp_logits="none"),
    "head wide": lambda: _head(4096, 4096, 151936, cap=False),
    "head wide, all options": lambda: _head(4096, 4096, 151936),
    "head narrow": lambda: _head(4096, 1024, 151936),
    "head few rows": lambda: _head(64, 4096, 151936),
    "head few rows, V odd": lambda: _head(63, 4096, 32003),
    "head float32 ragged": lambda: _head(4096, 4095, 32003, torch.float32),
    "head pointers": lambda: _head(4096, 4095, 32003),
    "E": lambda: _exp(4096, 4096, 151936),
    "E, V odd": lambda: _exp(4095, 4096, 32003),
    "label logits": lambda: _label(4096, 4096, 151936),
    "score": lambda: _score(4096, 594),
    "epilogue": lambda: _epilogue(4096, 4096),
    "scale": lambda: epilogue.scale(_empty(32000, 4096), _empty(dtype=torch.float32)),
    "loss": lambda: _loss("mdpo", 4096, 32),
    "loss per token": lambda: _loss("simpo", 4096, 32),
    "loss, shifted": lambda: _loss("mpo", 4096, 32, shift=True),
    "scatter fp32": lambda: _scatter(3072, 4096),
    "scatter bf16": lambda: _scatter(3072, 4096, torch.bfloat16),
}

NOT_ON_80 = {"E", "E, V odd"}
"""Cases without a tile for architecture 80."""


class _Driver:
    """The parts of a CUDA driver that compilation needs."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps one cache per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def _recorded(architecture: int) -> Iterator[list[Launch]]:
    """Collects launches instead of running them."""
    launches: list[Launch] = []

    def record(*, fn: Any, compile: Any, **_: Any) -> bool:
        kernel, (attributes,) = fn.jit_function, compile["configs"]
        source = ASTSource(kernel, compile["signature"], compile["constants"], attributes)
        launches.append(Launch(kernel, source, compile["num_warps"], compile["num_stages"]))
        return True  # so that Triton neither compiles nor launches

    driver: Any = triton.runtime.driver
    before = driver._active  # reset_active() needs a real driver
    processors = PROCESSORS.get(architecture, 132)
    with knobs.runtime.scope(), assume_device(architecture, processors):
        knobs.runtime.jit_cache_hook = record
        driver.set_active(_Driver(architecture))
        try:
            yield launches
        finally:
            driver.set_active(before)


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_launch(architecture: int, case: str, launch: Launch) -> Report:
    """Compiles one launch without Triton's cache, which does not keep the log of ptxas."""
    log = io.StringIO()
    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        kernel = triton.compile(
            launch.source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": launch.warps, "num_stages": launch.stages},
        )
    text, sass = log.getvalue(), ""
    if "mma" in kernel.asm["ptx"]:  # disassembly doubles the time, so only for kernels with a GEMM
        sass = _disassemble(kernel.asm["cubin"])
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    (registers,) = re.findall(r"Used (\d+) registers", text)
    assert len(spills) == 2, text
    return Report(
        architecture,
        case,
        int(registers),
        sum(map(int, spills)),
        kernel.metadata.shared,
        launch.warps,
        launch.stages,
        " ".join(sorted(set(TENSOR_CORES.findall(sass)))),
        " ".join(sorted(set(FETCHES.findall(sass)))),
        "C7510" in text,
    )


def reports(architecture: int) -> Iterator[Report]:
    """Compiles the kernels of `CASES` and yields a report for each."""
    for name, call in CASES.items():
        if name in NOT_ON_80 and architecture == 80:
            continue
        with _recorded(architecture) as launches:
            call()
        (launch,) = launches
        yield compile_launch(architecture, name, launch)


def table(found: list[Report]) -> str:
    """Reports as a text table, one line per kernel."""
    lines = ["arch case                       regs spills  shared warps stages tensor  fetch"]
    for r in found:
        serial = "  wgmma serialized" if r.serialized else ""
        lines.append(
            f"{r.architecture:4} {r.case:26} {r.registers:4} {r.spills:6} {r.shared:7} {r.warps:5} "
            f"{r.stages:6} {r.tensor_cores:7} {r.fetches}{serial}".rstrip()
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument(
        "--json", action="store_true", help="print a list of objects instead of a table"
    )
    options = parser.parse_args()
    found = [report for architecture in options.arch for report in reports(architecture)]
    print(json.dumps([report._asdict() for report in found]) if options.json else table(found))


if __name__ == "__main__":
    main()
