"""Estimate of the memory of a run, by fake tensors without storage.

The model is built without storage, and one real micro-batch runs forward and backward through it as
fake tensors. torch computes only shapes and dtypes, for any architecture, with or without LoRA.
Live bytes are counted per allocation, so no formula for a layer is needed.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from realign.modeling.forest import ForestBatch
from realign.modeling.model import ForestModel
from realign_kernels import workspace_bytes

READS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors of models that read the values of tensors, which fake tensors lack."""

HEAP = 1.5
"""Resident bytes per byte of live tensors in a step on a CPU. The excess is holes in the heap that
glibc 2.36 cannot reuse. Measured on a LLaVA of 60M parameters: 1.9 (LoRA, fp32), 1.7 (LoRA, bf16),
1.2 (full, fp32)."""
PROCESS = 80 * 2**20
"""Bytes of a process on a CPU besides tensors and imports: buffers, records and tokenizer."""


class Trace(TorchDispatchMode):
    """Records the allocations and frees of tensors in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (block, bytes), negative bytes for a free
        self._blocks = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage) -> None:
        if storage in self._blocks or storage.nbytes() == 0:
            return
        block = len(self.events)
        self._blocks[storage] = block
        self.events.append((block, storage.nbytes()))
        weakref.finalize(storage, self.events.append, (block, -storage.nbytes()))


def live_peak(events: Sequence[tuple[int, int]]) -> int:
    """Maximum bytes alive at one time."""
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return peak


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes of one rank besides weights and optimizer, by phase."""

    training: int
    """Activations and gradients in forward and backward."""
    gradients: int
    """All gradients, which `training` includes."""
    reference: int
    """A forward of the reference pass."""


@contextmanager
def fake_tensors(device: torch.device) -> Iterator[None]:
    """A context in which torch creates fake tensors. transformers' checks of values are off."""
    with (
        mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device(device),
    ):
        yield


def give_fake_storage(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace parameters and buffers on the meta device by fake tensors on `device`.

    Parameters become `dtype`. Buffers keep their dtype.
    """
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=dtype, device=device)
                module._parameters[name] = nn.Parameter(new, old.requires_grad)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)


def measure(
    model: ForestModel,
    batch: ForestBatch,
    device: torch.device,
    *,
    forwards: int,
    ranks: int,
    sharded: bool,
) -> StepMemory:
    """Run a micro-batch through a model of fake tensors. Call it inside `fake_tensors`.

    Args:
        model: the model after `give_fake_storage`, in its compute dtype.
        batch: the micro-batch, on the CPU.
        device: the device whose memory is measured.
        forwards: micro-batches in a step of one rank. Gradients exist before the second.
        ranks: number of ranks that gradients are sharded over.
        sharded: whether gradients are reduced to fp32 shards as they are computed.
    """
    batch = batch.to(device)
    with Trace() as trace, torch.no_grad():
        try:
            _loss(model, batch)
        except READS_VALUES:  # the tower reads its grids or masks
            if batch.images is None:
                raise
            batch = _with_features(model, batch)
            trace.events.clear()
            _loss(model, batch)
    reference = live_peak(trace.events)
    shards: list[torch.Tensor] = []

    def reduce(parameter: nn.Parameter) -> None:
        if len(shards) < len(trained):
            shards.append(torch.empty(-(-parameter.numel() // ranks), dtype=torch.float32))
        parameter.grad = None

    trained = [p for p in model.parameters() if p.requires_grad]
    if sharded:
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(reduce)
    with Trace() as trace:
        for _ in range(min(2, forwards)):
            loss, workspace = _loss(model, batch)
            loss.backward()
            del loss, workspace
    gradients = shards or [p.grad for p in trained if p.grad is not None]
    return StepMemory(live_peak(trace.events), sum(g.nbytes for g in gradients), reference)


def _with_features(model: ForestModel, batch: ForestBatch) -> ForestBatch:
    """The same batch with image features, as lists, so that the tower is skipped.

    Features for deeper layers are left out. Qwen3-VL adds them at places that it finds by value.
    """
    assert batch.images is not None
    width = model.vlm.config.get_text_config().hidden_size
    features = tuple(
        {"list": torch.empty(tokens, width, dtype=model.dtype)} for tokens in batch.images.tokens
    )
    return replace(batch, images=None, features=features)


def _loss(model: ForestModel, batch: ForestBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in for the loss that allocates as much as the head, and the head's workspace.

    The head reads values, which fake tensors lack. It keeps a direction (N, H) in fp32, fills a
    chunk of logits, and computes the gradient of a trained weight in the forward.
    """
    hidden = model._hidden(batch)
    head = model.vlm.get_output_embeddings()
    assert head is not None and isinstance(head.weight, torch.Tensor)
    weight = head.weight
    size = workspace_bytes(
        len(hidden), weight.shape[1], len(weight), weight.device, trains=weight.requires_grad
    )
    workspace = torch.empty(size, dtype=torch.uint8)
    loss = (hidden.float() * torch.empty_like(hidden, dtype=torch.float32)).sum()
    if weight.requires_grad:
        gradient = torch.empty(weight.numel(), dtype=weight.dtype)
        loss = loss + torch.dot(weight.flatten(), gradient)
    return loss, workspace
