"""Estimate of the memory of a run, by fake tensors without storage.

The model is built without storage, and one real micro-batch runs forward and backward through it as
fake tensors: torch computes shapes and dtypes only, for any architecture, with LoRA or without.
Live bytes are counted allocation by allocation, so no formula for a layer is needed.
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
"""Errors where a model reads the values of tensors, which fake tensors lack."""

HEAP = 1.5
"""Bytes that a CPU's process holds for a byte of live tensors in a step: glibc 2.36 keeps holes
that it cannot reuse. Measured on a LLaVA of 60M parameters: 1.9 (LoRA, fp32), 1.7 (LoRA, bf16), 1.2
(full, fp32)."""
PROCESS = 80 * 2**20
"""Bytes of a CPU's process besides tensors and imports: kernels' buffers, records, tokenizer."""


class Trace(TorchDispatchMode):
    """Records allocations and frees of tensors inside the context."""

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
    """Most bytes alive at one time."""
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return peak


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes of one rank beyond weights and optimizer, by phase."""

    training: int
    """Activations and gradients in forward and backward."""
    gradients: int
    """Gradients among them, when all exist."""
    reference: int
    """A forward of the reference pass."""


@contextmanager
def fake_tensors(device: torch.device) -> Iterator[None]:
    """Create fake tensors inside; transformers' checks that read values are off."""
    with (
        mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device(device),
    ):
        yield


def give_fake_storage(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace parameters and buffers on the meta device by fake ones in `dtype` on `device`."""
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
    """Send a micro-batch through a model of fake tensors; call inside `fake_tensors`.

    Args:
        model: after `give_fake_storage`, in its compute dtype.
        batch: the micro-batch, on the CPU.
        device: the device whose memory is measured.
        forwards: micro-batches in a step of one rank; from the second on gradients exist.
        ranks: number of ranks that gradients are sharded over.
        sharded: whether gradients are reduced to fp32 shards as they are computed.
    """
    batch = batch.to(device)
    with Trace() as trace, torch.no_grad():
        try:
            _loss(model, batch)
        except READS_VALUES:  # the tower reads its grids or masks
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
    """The same batch with features of its images, as lists, so the tower is skipped."""
    assert batch.images is not None
    config = model.vlm.config
    width = config.get_text_config().hidden_size
    levels = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    names = ["list", *(f"deepstack.{level}" for level in range(len(levels)))]
    features = tuple(
        {name: torch.empty(tokens, width, dtype=model.dtype) for name in names}
        for tokens in batch.images.tokens
    )
    return replace(batch, images=None, features=features)


def _loss(model: ForestModel, batch: ForestBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in for the loss that holds as much as the head does, and the head's workspace.

    The head reads its input's values, which fake tensors lack. It keeps a direction (N, H) in fp32,
    fills a chunk of logits, and computes the gradient of a trained weight in the forward.
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
