"""Correctness around the kernels: operator checks, a step of one NCCL rank."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import truth
from benchmarks.gpu.record import Record
from benchmarks.models import random_llava, random_pairs
from realign import distributed
from realign.modeling.forest import build_batch
from realign.modeling.model import ForestModel
from realign.training import fsdp
from realign_kernels import objectives, ops
from realign_kernels.lm_head import HeadSettings


class _Calls(TorchDispatchMode):
    """Keeps the first call of each operator of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "realign":
            self.found.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def opcheck(record: Record) -> dict:
    """`torch.library.opcheck` of the operators of a compiled loss, forward and backward."""
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
    """Gradients of a step under FSDP2 on a mesh of one against the plain model's, in fp32."""
    vlm = random_llava(64, 128, 2, 4)
    plain, sharded = ForestModel(vlm), ForestModel(copy.deepcopy(vlm))
    examples, store = random_pairs(2, prompt=12, response=9)
    batch = build_batch(examples, store, row_tokens=sum(e.longest_tree for e in examples))
    references = torch.full((3, 2), -90.0)
    device = distributed.start(alone=True)
    try:
        plain.to(device)
        fsdp.shard(sharded, device, torch.float32)
        losses = []
        for model in (plain.train(), sharded.train()):
            out = model(batch.to(device), objectives.rdpo(), references.to(device))
            out.loss.backward()
            losses.append(out.loss.detach())
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
    """Cases by name."""
    made = {"opcheck": opcheck, "NCCL step of one rank": one_rank}
    return {name: partial(case, record) for name, case in made.items()}
