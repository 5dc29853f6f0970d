"""Variants of the head's kernels, tiles and chunk sizes, at one shape.

A group of variants is a function that yields (name, call). The calls of a group return the same
numbers, up to rounding. The difference to the first call is recorded beside the time.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.contestants import gemms
from benchmarks.gpu import truth
from benchmarks.gpu.measure import figures
from benchmarks.gpu.record import Record
from realign_kernels import rdpo_loss
from realign_kernels.backends.base import score
from realign_kernels.backends.torch import TorchKernels
from realign_kernels.backends.triton import configs, exp_head
from realign_kernels.backends.triton.forward import head_stats
from realign_kernels.backends.triton.logits import device_facts
from realign_kernels.backends.triton.row_kernel import row_stats
from realign_kernels.lm_head import Head

SIZE = ((4096, 4096, 128256), (20, 24, 150))
"""N, H, V on the device, and in a rehearsal."""
CHUNK = 2048
RESPONSE = 6  # rows of a sequence, few enough that examples fit every chunk
Variants = Iterator[tuple[str, Callable[[], Tensor]]]


def fused_heads(problem: truth.Case) -> Variants:
    """Every tile of the tables up to this architecture. A tile that does not fit fails."""
    hidden, weight, labels = problem.hidden, problem.weight, problem.labels.clamp(min=0)
    architecture = configs.listed(device_facts(hidden)[0])
    known = [config for listed in sorted(configs.GEMMS) if listed <= architecture
             for config in configs.GEMMS[listed].values()]  # fmt: skip
    default = configs.gemm_config(architecture, hidden.dtype, *hidden.shape, len(weight))
    for config in dict.fromkeys([default, *known]):
        name = "x".join(map(str, config[:3])) + " warps {} stages {}".format(*config[3:5])
        name += " TMA" if config.descriptors else ""
        call = partial(head_stats, hidden, weight, labels, None, None, 1.0, config=config)
        yield name, lambda call=call: call().sum_exp


def kernels(hidden: Tensor, head: Head) -> list[str]:
    """Names of the kernels for E on this device."""
    with patch.dict(os.environ, {exp_head.ENVIRONMENT: "triton"}):
        if exp_head.choice(hidden, head) == "rows":
            return ["rows"]
    return ["cutlass"] * exp_head.built() + ["triton", "rows"]


def exponentials(problem: truth.Case) -> Variants:
    """E of one chunk: by CUTLASS, by Triton, and by a GEMM with the row kernel."""
    hidden, labels = problem.hidden[:CHUNK], problem.labels[:CHUNK].clamp(min=0)
    head = Head(problem.weight, None, None, 1.0)
    torch_kernels = TorchKernels()
    logits, exp_logits = torch_kernels.buffers(len(hidden), hidden, len(problem.weight), True)

    def fused(gemm: Callable) -> Tensor:
        logit, shift, narrow = exp_head.label_logits(hidden, labels, head)
        return exp_head.score_sums(gemm(hidden, head, narrow, shift, exp_logits), logit, 1.0)[0]

    def rows() -> Tensor:
        torch_kernels.gemm(hidden, problem.weight.T, out=logits)
        return score(row_stats(logits, labels, None, None, 1.0, None, exp_logits), None).logps

    fused_gemms = {"cutlass": exp_head.cutlass_rows, "triton": exp_head.exp_rows}
    for name in kernels(hidden, head):
        yield name, partial(fused, fused_gemms[name]) if name in fused_gemms else rows


def row_kernels(problem: truth.Case) -> Variants:
    """Block sizes and warps of the row kernel, over the logits of one chunk."""
    rows = problem.hidden[:1024]
    labels = problem.labels[:1024].clamp(min=0)
    logits = rows.float() @ problem.weight.float().T
    exp_logits = torch.empty_like(logits, dtype=problem.hidden.dtype)
    architecture = configs.listed(device_facts(rows)[0])
    default = configs.ROWS[architecture]
    sizes = [(1024, 4), (1024, 8), (2048, 8), (4096, 8), (4096, 16), (8192, 16)]
    for block, warps in dict.fromkeys([default, *sizes]):
        config = configs.RowConfig(block, warps)

        def call(config=config) -> Tensor:
            with patch.dict(configs.ROWS, {architecture: config}):
                return row_stats(logits, labels, None, None, 1.0, None, exp_logits).sum_exp

        yield f"{block} warps {warps}", call


def heads(problem: truth.Case, trains: bool) -> Variants:
    """`rdpo_loss` on examples of three sequences, with each kernel for E and chunk size."""
    examples = len(problem.labels) // (3 * RESPONSE)
    rows = 3 * examples * RESPONSE
    ids = torch.arange(rows, device=problem.labels.device) // RESPONSE
    # The head needs the rows of an example to be adjacent.
    ids = ids % 3 * examples + ids // 3
    labels = problem.labels[:rows].clamp(min=0)
    table = torch.zeros(3, examples, device=ids.device)

    def call(chunk: int | None = None, kernel: str = "") -> Tensor:
        hidden = problem.hidden[:rows].detach().requires_grad_()
        weight = problem.weight.detach().requires_grad_(trains)
        settings = {"sequence_ids": ids, "chunk_rows": chunk}
        with patch.dict(os.environ, {exp_head.ENVIRONMENT: kernel}):
            rdpo_loss(hidden, weight, labels, table, **settings).loss.backward()
        return hidden.grad

    yield "default", call
    for kernel in kernels(problem.hidden, Head(problem.weight, None, None, 1.0)):
        yield kernel, partial(call, kernel=kernel)
    for chunk in (1024, 2048, 3072, 4096):
        yield f"chunk_rows {chunk}", partial(call, chunk)


GROUPS: dict[str, tuple[Callable[[truth.Case], Variants], int | None, int]] = {
    "frozen": (partial(heads, trains=False), None, 2),
    "trained": (partial(heads, trains=True), None, 3),
    "E": (exponentials, CHUNK, 1),
    "row kernel": (row_kernels, None, 0),
    "fused head": (fused_heads, None, 1),
}
"""Groups of variants, most valuable first, each with the rows of its limit (None: all) and its
number of GEMMs of 2 N H V FLOP."""


def run(record: Record) -> None:
    """Runs a case per variant, with the default first in its group.

    Each variant alternates with the GEMMs of its group. `u` is its time over theirs, times their
    number.
    """
    dtype = (
        torch.float16 if record.rehearse else torch.bfloat16
    )  # the interpreter rounds bf16 wrongly
    problem = truth.make(SIZE[record.rehearse], dtype, record.device).case
    for name, (variants, rows, units) in GROUPS.items():
        calls = {f"{name}/{variant}": call for variant, call in variants(problem)}
        limit, default = None, None
        if units:
            settings = {"derivative": units > 1, "trainable": units > 2}
            limit = gemms(problem.hidden[:rows], problem.weight, **settings)
        for case in record.missing(calls):
            with record.attempt(case):
                if default is None:
                    default = next(iter(calls.values()))()
                difference = truth.error(calls[case](), default)
                found = figures(calls[case], record.device, budget=0.3, ours=limit)
                if limit is not None:
                    found = {"u": found.pop("ratio") * units, "limit": units} | found
                record(case, **found, difference=difference)
