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
    """Rows of the largest shard, from which all ranks derive the same chunk size."""


class Head(NamedTuple):
    """z = cap(hidden @ weight.T + bias) / temperature, cap(x) = softcap * tanh(x / softcap)."""

    weight: Tensor  # (V, H); with a shard, this rank's rows
    bias: Tensor | None  # (V,)
    softcap: float | None
    temperature: float
    shard: VocabularyShard | None = None
    shift_by_max: bool = False
    """Excludes `TorchKernels.fused`, in which E overflows for labels far below other tokens."""

    @property
    def vocabulary(self) -> int:
        """Tokens of the whole head, over all shards."""
        return len(self.weight) if self.shard is None else self.shard.total

    def retry(self) -> "Head | None":
        """The head for a second attempt after non-finite results, or None if nothing would change.

        Shards never use `fused`, and all their ranks must run the same kernels.
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
        """The head with these settings. A process group makes it a vocabulary shard."""
        group: Any = self.group or None
        if type(group) is str:
            group = _resolve_process_group(self.group)
        shard = None if group is None else shard_of(weight, group)
        softcap = None if self.softcap is None else float(self.softcap)
        return Head(weight, bias, softcap, float(self.temperature), shard)


def shard_of(weight: Tensor, group: ProcessGroup) -> VocabularyShard:
    """The position of this rank's `weight` in the whole head. Shards are in rank order.

    Raises:
        ValueError: a rank has no rows.
    """
    size = torch.tensor([len(weight)], device=weight.device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group)
    counts = torch.cat(sizes).tolist()
    if min(counts) == 0:
        raise ValueError(
            f"weight has {counts} rows on the ranks of group, but each rank needs at least one. "
            "Use fewer ranks."
        )
    return VocabularyShard(group, sum(counts[: group.rank()]), sum(counts), max(counts))


def local_head(
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as plain tensors: a DTensor is gathered, or gives its local rows to a group.

    Raises:
        ValueError: this rank is not in the group, or a DTensor is not sharded over it by rows.
    """
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(
            f"group is {group!r}, not a process group that includes this rank. Call only on its "
            "ranks."
        )
    bias = None if bias is None else _local("bias", bias, group)
    return _local("weight", weight, group), bias


def _local(name: str, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    if group is None:
        # Each rank has different examples and the mean of their losses, so average as FSDP does.
        return tensor.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)
    if mesh.ndim != 1 or mesh.get_group().group_name != group.group_name:
        raise ValueError(
            f"{name} is a DTensor on {mesh}, not on the ranks of group. Pass the group of its "
            "mesh, mesh.get_group(), or omit group to gather the DTensor."
        )
    if tensor.placements != (Shard(0),):
        raise ValueError(
            f"{name} is a DTensor placed {tensor.placements}, but a head split by vocabulary must "
            "be Shard(0). Omit group to gather it."
        )
    return tensor.to_local()


def head_inputs(
    lm_head: nn.Module,
    hidden: Tensor,  # (..., H)
) -> tuple[Tensor, Tensor, Tensor | None]:  # (..., H'), (V, H'), (V,)
    """hidden, weight and bias whose product is the output of a language-model head.

    For nn.Linear these are hidden unchanged, and its weight and bias. The same holds for the
    trained copy in PEFT's modules_to_save. If the head shares the embedding's weight, trainable
    tokens are merged into it. A PEFT LoRA layer appends its rank to hidden and weight:

        [h, s A h] [W, B]^T = W h + s B A h

    Gradients thus reach A and B, and LoRA dropout applies as in the layer. A small adapter keeps
    its precision in bf16, which the merged weight of `head_parameters` loses by rounding. Each call
    copies the weight, V x (H + r).

    Args:
        lm_head: the module, V outputs of H inputs.
        hidden: (..., H), the input of the module.

    Returns:
        hidden (..., H'), weight (V, H') and bias (V,) or None. H' is H plus the adapters' ranks.

    Raises:
        ValueError: the type of the module is not supported, or an active adapter is not LoRA.
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
    """The effective weight (V, H) and bias (V,) of a language-model head, with LoRA merged.

    It is an alternative to `head_inputs` for code without hidden states. The weight is W + the sum
    over active adapters of scaling * B A. Gradients reach A and B. Each call makes a V x H copy,
    rounded once to the dtype of W. In bf16, changes below 1/512 of an entry of W are lost.

    Raises:
        ValueError: as for head_inputs, or an adapter has LoRA dropout while training.
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
                f"adapter {adapter.name!r} of lm_head has dropout {rate}, which a merged weight "
                "cannot express. Use head_inputs, or set lora_dropout=0."
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
        """The bias plus that of B, which PEFT's lora_bias adds and scales."""
        if self.up.bias is None:
            return bias
        extra = self.scaling * self.up.bias
        return (extra if bias is None else bias + extra).to(dtype)


def _layers(lm_head: nn.Module) -> tuple[nn.Linear | SimpleNamespace, list[_Adapter]]:
    """The active linear layer, and the LoRA adapters that are added to it."""
    layer = _trained_copy(lm_head)
    tokens = getattr(layer, "token_adapter", layer)
    if hasattr(tokens, "trainable_tokens_delta"):  # the head shares the embedding's weight
        names = () if tokens.disable_adapters else tokens.active_adapters
        base = _plain(tokens.base_layer)
        return SimpleNamespace(weight=tokens.get_merged_weights(names), bias=base.bias), []
    if isinstance(layer, nn.Linear) and not hasattr(layer, "base_layer"):
        return _plain(layer), []
    return _lora_layers(layer)


def _trained_copy(lm_head: Any) -> Any:
    """The module that runs: PEFT's active trained copy from modules_to_save, if any.

    PEFT modules are recognized by their untyped attributes, because this package does not import
    PEFT.
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
            f"lm_head is {type(lm_head).__name__}. Pass nn.Linear or a PEFT LoRA layer around one, "
            "or compute weight and bias yourself."
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
                f"adapter {name!r} of lm_head is not plain LoRA (maybe DoRA). Merge it, or remove "
                "the head from target_modules."
            )
        dropout = lm_head.lora_dropout[name]
        adapters.append(_Adapter(name, down, up, lm_head.scaling[name], dropout))
    return _plain(base), adapters


def _plain(linear: nn.Linear) -> nn.Linear:
    """Returns `linear` if it is not quantized. A quantized layer may be an nn.Linear as well."""
    weight = linear.weight
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"lm_head has a weight {tuple(weight.shape)} of dtype {weight.dtype}. Exclude the head "
            "from quantization, or pass its dequantized weight."
        )
    return linear
