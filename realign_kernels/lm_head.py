"""The language-model head: `Head`, vocabulary shards, and heads with LoRA or sharded weights."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Shard

from realign_kernels.reference import acc_dtype
from realign_kernels.validation import DTYPES


class VocabularyShard(NamedTuple):
    """The rows of the head that this rank holds."""

    group: ProcessGroup
    start: int
    total: int
    """Vocabulary over all ranks."""
    largest: int
    """Rows of the largest shard: all ranks size their chunks by it, so that they agree."""


class Head(NamedTuple):
    """z = cap(hidden @ weight.T + bias) / temperature, cap(x) = softcap * tanh(x / softcap)."""

    weight: Tensor  # (V, H); with a shard, this rank's rows
    bias: Tensor | None  # (V,)
    softcap: float | None
    temperature: float
    shard: VocabularyShard | None = None
    shift_by_max: bool = False
    """Without `TorchKernels.fused`, for which labels may be too far below other tokens."""

    @property
    def vocabulary(self) -> int:
        """Tokens of the whole head, over all shards."""
        return len(self.weight) if self.shard is None else self.shard.total

    def retry(self) -> "Head | None":
        """The head for a second try where results are not finite; None if it changes nothing.

        Shards never fuse, and their ranks must not differ in the kernels that they run.
        """
        final = self.shift_by_max or self.shard is not None
        return None if final else self._replace(shift_by_max=True)


class HeadSettings(NamedTuple):
    """Settings of a call, in the order of the operators' schemas."""

    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    chunk_rows: int | None = None
    group: Any = None  # ProcessGroup or, in an operator, its name; "" for none

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head; with a process group, whose ranks each hold rows of it in turn."""
        group: Any = self.group or None
        if type(group) is str:
            group = _resolve_process_group(self.group)
        shard = None if group is None else shard_of(weight, group)
        softcap = None if self.softcap is None else float(self.softcap)
        return Head(weight, bias, softcap, float(self.temperature), shard)


def shard_of(weight: Tensor, group: ProcessGroup) -> VocabularyShard:
    """The rows of the whole head that `weight` is: shards are in the order of the ranks.

    Raises:
        ValueError: when a rank has no row.
    """
    size = torch.tensor([len(weight)], device=weight.device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group)
    counts = torch.cat(sizes).tolist()
    if min(counts) == 0:
        raise ValueError(
            f"weight has {counts} rows on the ranks of group: each needs one, use fewer ranks"
        )
    return VocabularyShard(group, sum(counts[: group.rank()]), sum(counts), max(counts))


def local_head(
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    """Plain tensors: a DTensor gathered, or with a group its local rows.

    Raises:
        ValueError: for a group that this rank is not in.
    """
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(
            f"group is {group!r}, not a process group that this rank is in: call on its ranks only"
        )
    bias = None if bias is None else _local("bias", bias, group)
    return _local("weight", weight, group), bias


def _local(name: str, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    if group is None:
        # Ranks see different examples, each with the mean of its own loss: like FSDP, average.
        return tensor.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)
    if mesh.ndim != 1 or mesh.get_group().group_name != group.group_name:
        raise ValueError(
            f"{name} is a DTensor on {mesh}, not on the ranks of group: pass the group of its "
            "mesh, mesh.get_group(), or leave group out to gather it"
        )
    if tensor.placements != (Shard(0),):
        raise ValueError(
            f"{name} is a DTensor placed {tensor.placements}: a head split by vocabulary is "
            "Shard(0); leave group out to gather any other"
        )
    return tensor.to_local()


def head_inputs(
    lm_head: nn.Module,
    hidden: Tensor,  # (..., H)
) -> tuple[Tensor, Tensor, Tensor | None]:  # (..., H'), (V, H'), (V,)
    """hidden, weight and bias whose product is the output of a language-model head.

    nn.Linear gives its own weight and bias, with hidden as it came; so does the trained copy in
    PEFT's modules_to_save, and the weight with trainable tokens in it where the head shares the
    embedding's. A PEFT LoRA layer appends its rank to both:

        [h, s A h] [W, B]^T = W h + s B A h

    so gradients reach A and B, LoRA dropout is applied as the layer does, and an adapter that is
    small beside W keeps its digits in bf16, which a merged weight (`head_parameters`) rounds away.
    It costs a copy of the weight, V x (H + r), each call.

    Args:
        lm_head: the module, V outputs of H inputs.
        hidden: (..., H) its input.

    Returns:
        hidden (..., H'), weight (V, H') and bias (V,) or None, H' = H + the ranks of the adapters.

    Raises:
        ValueError: the module is of another kind, or an active adapter is not LoRA.
    """
    base, adapters = _layers(lm_head)
    if not adapters:
        return hidden, base.weight, base.bias
    inputs, columns, bias = [hidden], [base.weight], base.bias
    for adapter in adapters:
        down, up = adapter.down, adapter.up
        low = down(adapter.dropout(hidden.to(down.weight.dtype))) * adapter.scaling
        inputs.append(low.to(hidden.dtype))
        columns.append(up.weight.to(base.weight.dtype))
        bias = adapter.add_bias(bias, base.weight.dtype)
    return torch.cat(inputs, -1), torch.cat(columns, 1), bias


def head_parameters(lm_head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The effective weight (V, H) and bias (V,) of a language-model head.

    As `head_inputs`, for code without hidden states: LoRA is merged, W + sum over
    active adapters of scaling * B A, as a function of A and B, so that gradients reach them. The
    merged weight is a copy of V x H, made by each call and rounded once to the dtype of W: in bf16
    a change below 1/512 of an entry of W is lost.

    Raises:
        ValueError: as head_inputs, and for LoRA dropout while training.
    """
    base, adapters = _layers(lm_head)
    if not adapters:
        return base.weight, base.bias
    kept, bias = base.weight.dtype, base.bias
    wide = acc_dtype(kept)
    weight = base.weight.to(wide)
    for adapter in adapters:
        rate = getattr(adapter.dropout, "p", 0.0)
        if lm_head.training and rate > 0:
            raise ValueError(
                f"adapter {adapter.name!r} of lm_head has dropout {rate}, which no merged weight "
                "can express: use head_inputs, or set lora_dropout=0"
            )
        up, down = adapter.up.weight.to(wide), adapter.down.weight.to(wide)
        weight = torch.addmm(weight, up, down, alpha=adapter.scaling)
        bias = adapter.add_bias(bias, kept)
    return weight.to(kept), bias


class _Adapter(NamedTuple):
    name: str
    down: nn.Linear  # A (r, H)
    up: nn.Linear  # B (V, r)
    scaling: float
    dropout: nn.Module

    def add_bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """With PEFT's lora_bias B has a bias, which is scaled as well."""
        if self.up.bias is None:
            return bias
        extra = self.scaling * self.up.bias
        return (extra if bias is None else bias + extra).to(dtype)


def _layers(lm_head: nn.Module) -> tuple[nn.Linear | SimpleNamespace, list[_Adapter]]:
    """The linear layer that runs now, and the LoRA adapters that are added to it."""
    layer = _trained_copy(lm_head)
    tokens = getattr(layer, "token_adapter", layer)
    if hasattr(tokens, "trainable_tokens_delta"):  # of a head that shares the embedding's weight
        names = () if tokens.disable_adapters else tokens.active_adapters
        base = _plain(tokens.base_layer)
        return SimpleNamespace(weight=tokens.get_merged_weights(names), bias=base.bias), []
    if isinstance(layer, nn.Linear) and not hasattr(layer, "base_layer"):
        return _plain(layer), []
    return _lora_layers(layer)


def _trained_copy(lm_head: Any) -> Any:
    """The module that runs: with PEFT's modules_to_save the trained copy, if it is active.

    PEFT is recognised by its attributes, as this package does not import it; they are untyped.
    """
    if not (hasattr(lm_head, "modules_to_save") and hasattr(lm_head, "original_module")):
        return lm_head
    copies: Any = lm_head.modules_to_save
    names = [] if lm_head.disable_adapters else list(lm_head.active_adapters)
    trained = len(names) > 0 and all(name in copies for name in names)
    return copies[names[0]] if trained else lm_head.original_module


def _lora_layers(lm_head: Any) -> tuple[nn.Linear, list[_Adapter]]:
    """The base layer and the active adapters of a PEFT LoRA layer."""
    base = getattr(lm_head, "base_layer", None)
    if not isinstance(base, nn.Linear) or not hasattr(lm_head, "lora_A"):
        raise ValueError(
            f"lm_head is {type(lm_head).__name__}: pass nn.Linear or a PEFT LoRA layer around one, "
            "or compute weight and bias yourself"
        )
    if lm_head.disable_adapters:
        if lm_head.merged:
            lm_head.unmerge()  # as its forward does
        return _plain(base), []
    adapters = []
    for name in () if lm_head.merged else lm_head.active_adapters:
        if name not in lm_head.lora_A:
            continue
        down, up = lm_head.lora_A[name], lm_head.lora_B[name]
        linear = isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        if not linear or name in getattr(lm_head, "lora_variant", {}):
            raise ValueError(
                f"adapter {name!r} of lm_head is not plain LoRA (DoRA?): merge it, or leave the "
                "head out of target_modules"
            )
        dropout = lm_head.lora_dropout[name]
        adapters.append(_Adapter(name, down, up, lm_head.scaling[name], dropout))
    return _plain(base), adapters


def _plain(linear: nn.Linear) -> nn.Linear:
    """Quantized layers also are nn.Linear, and their weight has no meaning without its scales."""
    weight = linear.weight
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"lm_head holds a {tuple(weight.shape)} weight of {weight.dtype}: leave the head out "
            "of quantization, or pass its dequantized weight"
        )
    return linear
