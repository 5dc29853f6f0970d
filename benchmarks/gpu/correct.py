"""Correctness on the device: every public head function against fp64, the most used first.

Operator checks and a step of one NCCL rank follow. tests/kernels calls each kernel directly, on a
GPU if there is one. A case over its error budget is recorded as an error, so that a second call
runs it again.
"""

import contextlib
import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contestants import CONTESTANTS, EAGER, forward_backward
from benchmarks.gpu import truth
from benchmarks.gpu.record import Record
from benchmarks.models import random_forests, random_llava
from realign import distributed
from realign.modeling.forest import build_batch
from realign.modeling.model import ForestModel
from realign.training import fsdp
from realign_kernels import objectives, ops, rdpo_loss, use_backend
from realign_kernels.backends.triton import exp_head
from realign_kernels.lm_head import HeadSettings

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
SIZES = {
    "usual": ((2048, 4096, 32000), (12, 32, 128)),
    "one row": ((1, 4096, 32000), (1, 16, 97)),
    "ragged": ((385, 4095, 32003), (7, 33, 131)),  # TMA cannot address these rows
    "wide": ((256, 2048, 151936), (5, 16, 300)),
    "tall": ((33792, 4096, 32000), (40, 32, 128)),
    "narrow": ((300, 512, 4000), (20, 16, 90)),
    "few rows": ((40, 4096, 32000), (3, 24, 150)),
}
"""N, H, V on the device, and in a rehearsal."""
CAPPED = {"bias": True, "softcap": 8.0, "temperature": 1.7}
HEADS: tuple[tuple[torch.dtype, str, str, str, dict], ...] = (
    (BF16, "usual", "hidden", "frozen", {}),
    (BF16, "usual", "all", "trained", {}),
    (BF16, "usual", "nothing", "no gradient", {}),
    (BF16, "ragged", "hidden", "frozen ragged", {}),
    (BF16, "ragged", "all", "trained ragged", {}),
    (BF16, "ragged", "nothing", "no gradient ragged", {}),
    (BF16, "usual", "hidden", "frozen tempered", {"temperature": 1.3}),
    (BF16, "usual", "hidden", "frozen capped", CAPPED),
    (BF16, "usual", "all", "trained capped", CAPPED),
    (BF16, "usual", "nothing", "no gradient capped", CAPPED),
    (BF16, "wide", "hidden", "frozen runner-up", {"rival": True}),
    (BF16, "usual", "hidden", "frozen strided", {"strided": True}),
    (BF16, "one row", "hidden", "frozen one row", {}),
    (BF16, "one row", "nothing", "no gradient one row", {}),
    (FP16, "usual", "hidden", "frozen", {}),
    (FP16, "usual", "all", "trained", {}),
    (FP16, "usual", "nothing", "no gradient", {}),
    (FP32, "usual", "hidden", "frozen", {}),
    (FP32, "usual", "all", "trained", {}),
    (FP32, "usual", "nothing", "no gradient", {}),
    (FP32, "ragged", "all", "trained ragged", {}),
    (FP32, "ragged", "nothing", "no gradient ragged", {}),
    (FP16, "ragged", "all", "trained capped ragged", CAPPED),
    (FP16, "wide", "all", "trained runner-up", {"rival": True}),
    (BF16, "wide", "nothing", "no gradient wide", {}),
    (BF16, "narrow", "nothing", "no gradient narrow", {}),
    (BF16, "few rows", "nothing", "no gradient few rows", {}),
    (BF16, "tall", "hidden", "frozen tall", {}),
    (BF16, "tall", "all", "trained tall", {}),
    (BF16, "tall", "nothing", "no gradient tall", {}),
)
"""dtype, size, inputs with gradients, name, options of `truth.make`."""
REPEATS = 50
POISON = 2**30
"""Numbers in the largest NaN-filled block (4 GiB), which the allocator reuses."""


def poison(device: str) -> None:
    """Fills the memory that CUDA's allocator will reuse with NaN. Call it after making inputs."""
    if device == "cuda":
        torch.cuda.empty_cache()
        blocks = [torch.full((POISON,), torch.nan, device=device)]
        blocks += [torch.full((2**17,), torch.nan, device=device) for _ in range(64)]
        torch.cuda.synchronize()
        del blocks


def backend(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Default backend on CUDA. On a CPU interpreted Triton, or torch for bf16 (rounding bug)."""
    if device == "cuda":
        return contextlib.nullcontext()
    return use_backend("torch" if dtype == BF16 else "triton")


def head(record: Record, dtype: torch.dtype, size: str, trains: str, options: dict) -> dict:
    """`linear_logprobs` against fp64."""
    problem = truth.make(SIZES[size][record.rehearse], dtype, record.device, **options)
    poison(record.device)
    with backend(record.device, dtype):
        value = truth.ours(problem, trains)
    return truth.check(problem, value)


def preference(record: Record, dtype: torch.dtype, trains: bool) -> dict:
    """`rdpo_loss`: loss and gradients against fp64, with reference log-probs of 0."""
    size = (2, 5, 16, 97) if record.rehearse else (8, 32, 4096, 32000)
    batch = truth.preference(*size, dtype, record.device)
    exact_loss, exact = truth.preference_truth(batch)

    def run(loss: Callable) -> truth.Result:
        value, hidden, weight = forward_backward(loss, *batch, trainable=trains)
        return truth.Result(value[None], hidden.flatten(0, -2), weight, None)

    zeros = torch.zeros(batch.labels.shape[:2], device=record.device)
    poison(record.device)
    with backend(record.device, dtype):
        value = run(lambda *given: rdpo_loss(*given, zeros).loss)
    exact = exact._replace(logps=exact_loss[None])
    return truth.within_budget(value, run(CONTESTANTS[EAGER]()), exact, dtype)


def by_kernel(record: Record, kernel: str, trains: bool) -> dict:
    """`preference` with a named kernel for E."""
    with patch.dict(os.environ, {exp_head.ENVIRONMENT: kernel}):
        return preference(record, BF16, trains)


def far_label(record: Record, kernel: str) -> dict:
    """`linear_logprobs` with a label 200 nats below another token, outside the range of E."""
    problem = truth.make(SIZES["usual"][record.rehearse], BF16, record.device)
    hidden, weight, _, labels, _ = problem.case
    row = int((labels != truth.IGNORE).nonzero()[0])
    logits = weight.double() @ hidden[row].double()
    hidden[row] *= 200 / (logits.max() - logits.min())
    labels[row] = logits.argmin()
    with patch.dict(os.environ, {exp_head.ENVIRONMENT: kernel}), backend(record.device, BF16):
        value = truth.ours(problem, "hidden")
    return truth.check(problem, value)


def repeats(record: Record, trains: str) -> dict:
    """Asserts that `REPEATS` calls on the same inputs give bitwise equal results."""
    problem = truth.make(SIZES["usual"][record.rehearse], BF16, record.device)
    first, different = truth.ours(problem, trains), set()
    times = 2 if record.rehearse else REPEATS
    for _ in range(times):
        again = zip(truth.Result._fields, first, truth.ours(problem, trains), strict=True)
        different |= {name for name, a, b in again if a is not None and not torch.equal(a, b)}
    assert not different, f"{sorted(different)} differ between {times} calls on the same inputs"
    return {"equal": times}


def second_device(record: Record) -> dict:
    """`linear_logprobs` on cuda:1 while cuda:0 is current, if there are two devices."""
    if record.rehearse or torch.cuda.device_count() < 2:
        return {"devices": 1}
    problem = truth.make(SIZES["ragged"][0], BF16, "cuda:1")
    return truth.check(problem, truth.ours(problem, "all"))


class _Calls(TorchDispatchMode):
    """Records the first call of each operator of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "realign":
            self.found.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def opcheck(record: Record) -> dict:
    """`torch.library.opcheck` of the operators of the loss, forward and backward."""
    g = torch.Generator(record.device).manual_seed(0)
    kind = {"generator": g, "device": record.device}
    hidden = torch.randn(3, 2, 4, 16, **kind).requires_grad_()
    weight = torch.randn(33, 16, **kind)
    labels = torch.randint(33, (3, 2, 4), **kind)
    table = torch.zeros(3, 2, device=record.device)
    ids = torch.arange(6, device=record.device).repeat_interleave(4)
    with _Calls() as calls:
        for trains in (False, True):
            head = (weight.detach().requires_grad_(trains), labels.flatten(), None, None)
            logps = ops.logprobs(hidden.flatten(0, 2), *head, HeadSettings())
            ops.sequence_sums(logps, head[1], ids, table, -100)[0].sum().backward()
    for operator, args in calls.found.items():
        differentiable = "backward" not in str(operator)
        fresh = [
            a.detach().clone().requires_grad_(a.requires_grad and differentiable)
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(operator, fresh)
    assert calls.found, "no operator was called"
    return {"operators": [str(operator) for operator in calls.found]}


def one_rank(record: Record) -> dict:
    """Gradients of an FSDP2 step of one rank against those of the plain model, in fp32."""
    vlm = random_llava(64, 128, 2, 4)
    plain, sharded = ForestModel(vlm), ForestModel(copy.deepcopy(vlm))
    examples, store = random_forests(2, prompt=12, response=9)
    batch = build_batch(examples, store, row_tokens=sum(e.longest_tree for e in examples))
    references = torch.full((3, 2), -90.0)
    device = distributed.start(single=True)
    try:
        plain.to(device)
        fsdp.shard(sharded, device, torch.float32)
        losses = []
        for model in (plain.train(), sharded.train()):
            loss = model(batch.to(device), objectives.rdpo(), references.to(device)).loss
            loss.backward()
            losses.append(loss.detach())
        pairs = [
            (b.grad.full_tensor(), a.grad)
            for a, b in zip(plain.parameters(), sharded.parameters(), strict=True)
            if a.grad is not None
        ]
        found = {
            "error": max(truth.error(value, exact) for value, exact in pairs),
            "loss": truth.error(losses[1][None], losses[0][None]),
        }
    finally:
        distributed.stop()
    assert max(found.values()) <= 1e-4, f"the sharded step differs by {found}"
    return found | {"parameters": len(pairs)}


def cases(record: Record) -> dict[str, Callable[[], dict]]:
    """All cases by name, the most valuable first."""
    heads = {
        f"linear_logprobs {NAMES[dtype]}/{name}": partial(head, record, dtype, *rest, options)
        for dtype, *rest, name, options in HEADS
    }
    kinds = {"frozen": False, "trained": True}
    losses = {
        f"rdpo_loss {NAMES[dtype]}/{kind}": partial(preference, record, dtype, trains)
        for dtype in NAMES
        for kind, trains in kinds.items()
    }
    equal = {
        f"repeats/{kind}": partial(repeats, record, kind) for kind in ("hidden", "all", "nothing")
    }
    by_name = {}
    for kernel in exp_head.CHOICES:
        if kernel == "cutlass" and not exp_head.built():
            continue
        for kind, trains in kinds.items():
            by_name[f"E by {kernel}/{kind}"] = partial(by_kernel, record, kernel, trains)
        by_name[f"E by {kernel}/far label"] = partial(far_label, record, kernel)
    first = dict(list(heads.items())[:6] + list(losses.items())[:2])
    return {
        **first,
        **by_name,
        **equal,
        "opcheck": partial(opcheck, record),
        "NCCL step of one rank": partial(one_rank, record),
        **heads,
        **losses,
        "second device": partial(second_device, record),
    }


def run(record: Record) -> None:
    """Runs all cases. A failed case does not stop the others."""
    record.each(cases(record))
