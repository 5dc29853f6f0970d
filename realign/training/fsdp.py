"""FSDP2, HSDP, CPU offload, and wrapping of layers for compilation and checkpointing.

A layer is wrapped by setting `forward` on the instance. Classes and names in state dicts do not
change. FSDP2's hooks, which gather a layer's weights, stay outside of compiled and checkpointed
code.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint

from realign.config import ScaleConfig, TrainConfig
from realign.distributed import broadcast_from_rank0, log_rank0, rank, world_size
from realign.modeling.model import ForestModel
from realign.training import liger


def check(scale: ScaleConfig, device: torch.device, ranks: int) -> None:
    """Check that these ranks can run the settings; called before a model is loaded.

    Raises:
        ValueError: for a setting that they cannot run.
    """
    if ranks % scale.replicas:
        raise ValueError(
            f"--replicas is {scale.replicas}, which does not divide {ranks} ranks. Choose a "
            f"divisor of {ranks}."
        )
    if scale.cpu_offload and device.type == "cpu":
        raise ValueError(
            "--cpu-offload would have no effect: there is no GPU, so all tensors are in host "
            "memory already. Leave it out."
        )
    if scale.liger:
        liger.check(device)


def place(model: ForestModel, config: TrainConfig, device: torch.device) -> None:
    """Wrap the trained layers according to the settings, and move the model to `device`."""
    scale, layers = config.scale, trained_layers(model)
    if scale.liger:
        log_rank0(liger.use(layers, device))
    wrap_layers(layers, compiled=scale.compile, checkpointed=bool(scale.activation_checkpointing))
    if config.sharded:
        offload, replicas = scale.cpu_offload, scale.replicas
        shard(model, device, model.dtype, replicas=replicas, cpu_offload=offload)
    else:
        model.to(device)


def trained_layers(model: ForestModel) -> list[nn.Module]:
    """The layers with a trained parameter. Layers of a frozen tower save nothing for backward."""
    return [m for m in model.layers if any(p.requires_grad for p in m.parameters())]


def wrap_layers(layers: Iterable[nn.Module], *, compiled: bool, checkpointed: bool) -> None:
    """Compile layers, or recompute their activations in backward, or both.

    Sizes are dynamic from the first call, so batches of other shapes do not recompile.
    """
    for layer in layers:
        if compiled:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if checkpointed:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def unsharded_parameters(
    model: nn.Module, dtype: torch.dtype, ranks: int, cpu_offload: bool
) -> set[nn.Parameter]:
    """Frozen parameters in the compute `dtype`, which FSDP2 ignores on a single rank.

    They need no gather, cast or reduction. FSDP2 would still copy each at every unshard: 27 GB in
    forward and backward of a 7B model in bf16 (torch 2.11 and 2.13).
    """
    if ranks > 1 or cpu_offload:
        return set()
    return {p for p in model.parameters() if p.dtype == dtype and not p.requires_grad}


def shard(
    model: ForestModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    replicas: int = 1,
    cpu_offload: bool = False,
) -> None:
    """Shard a model in place with FSDP2 on `device`: each layer, then all other parts.

    Parameters are gathered and computed in `dtype`. Gradients are averaged over all ranks in fp32.
    Every rank receives the parameters and buffers of rank 0, so only rank 0 needs them.

    Args:
        model: the model. On rank 0 it is whole and in host memory. On other ranks it may be on the
            meta device. At most one layer is unsharded on a `device` at a time.
        device: device of this rank.
        dtype: compute dtype, fp32 or bf16.
        replicas: copies of the model, each over `ranks / replicas` consecutive ranks (HSDP).
        cpu_offload: keep sharded parameters in host memory.
    """
    shards = world_size() // replicas
    shape = {"replicate": replicas, "shard": shards} if replicas > 1 else {"shard": shards}
    mesh = init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    unsharded = unsharded_parameters(model, dtype, world_size(), cpu_offload)
    for parameter in unsharded:  # FSDP2 moves only the parameters that it manages
        parameter.data = parameter.data.to(device)
    options = {
        "mesh": mesh,
        "ignored_params": unsharded,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype if dtype != torch.float32 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if cpu_offload
        else OffloadPolicy(),
    }
    done: set[nn.Module] = set()
    for unit in [*model.layers, model]:
        modules = [module for module in unit.modules() if module not in done]
        _receive_from_rank0(modules, device)
        if unit is model or not unsharded.issuperset(unit.parameters()):
            fully_shard(unit, **options)
        done.update(modules)
    for method in ("logps", "image_features", "plain_logits", "head_logps"):
        # They gather weights as `forward` does.
        register_fsdp_forward_method(model, method)


def _receive_from_rank0(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Replace the own tensors of these modules by exact copies of rank 0's.

    This includes buffers outside the state dict, such as rotary frequencies. All ranks tie the
    tensors that rank 0 ties, since merging an adapter there may untie ends that the configuration
    ties.
    """
    if world_size() == 1:
        return
    tables: list[dict[str, Any]] = [
        table for m in modules for table in (m._parameters, m._buffers, vars(m))
    ]
    slots = [(t, name) for t in tables for name in t if isinstance(t[name], torch.Tensor)]
    first: dict[torch.Tensor, int] = {}
    local = [
        (name, table[name].shape, table[name].dtype, first.setdefault(table[name], place))
        for place, (table, name) in enumerate(slots)
    ]
    replaced: dict[int, torch.Tensor] = {}
    for (table, name), entry in zip(slots, broadcast_from_rank0(lambda: local), strict=True):
        expected, shape, dtype, place = entry
        assert name == expected, f"rank {rank()} holds {name} where rank 0 holds {expected}"
        if place not in replaced:
            old = table[name]
            new = (
                old.detach().to(device).contiguous()
                if rank() == 0
                else torch.empty(shape, dtype=dtype, device=device)
            )
            dist.broadcast(new.view(-1).view(torch.uint8), src=0)  # gloo supports few dtypes
            replaced[place] = (
                nn.Parameter(new, requires_grad=old.requires_grad)
                if isinstance(old, nn.Parameter)
                else new
            )
        table[name] = replaced[place]


def sync_gradients(model: nn.Module, reduce: bool) -> None:
    """Set whether the next backward reduces gradients, or accumulates them unreduced."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)
