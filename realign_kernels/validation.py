"""Argument validation for the public functions. Errors name argument, value and remedy."""

import math
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from realign_kernels import objectives
from realign_kernels.objectives import Objective
from realign_kernels.reference import acc_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check hidden, weight and bias, and cast them under autocast.

    Raises:
        ValueError: the head does not support their shapes, dtypes, devices or placements.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        _check_tensor(name, tensor, optional=name == "bias")
    if isinstance(hidden, DTensor):
        raise ValueError(
            f"hidden is a DTensor placed {hidden.placements}, but must be a plain tensor. Pass "
            "hidden.to_local() if ranks hold different examples, or hidden.full_tensor()."
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be (..., H) and weight {tuple(weight.shape)} must "
            "be (V, H), with the same H. Pass lm_head.weight, not its transpose."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} must be ({weight.shape[0]},), one entry per row of weight"
        )
    if hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden must be float32, float64, bfloat16 or float16, got {hidden.dtype}"
        )
    check_device(hidden, weight=weight, bias=bias)
    device = hidden.device.type
    # Dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and hidden is {hidden.dtype}. Cast one of them "
                f"({name}.to(hidden.dtype)), or call under torch.autocast."
            )
    return hidden, weight, bias


def _check_tensor(name: str, tensor: object, optional: bool = False) -> None:
    if optional and tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name} must be a dense torch.Tensor, got {kind}. For a module, pass its .weight."
        )
    compiling = torch.compiler.is_compiling()
    if not compiling and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name} carries a tangent, but the head does not support forward-mode "
            "differentiation. Use backward()."
        )


def checked_reference(
    reference_logps: Tensor | None, objective: Objective, reduction: str, like: Tensor
) -> Tensor:
    """The references, checked to be (L, B) constants for this objective.

    Args:
        reference_logps: the references. None is zeros, for an objective without a reference.
        objective: the objective.
        reduction: reduction over examples.
        like: a tensor (L, B, ...) with the device of the references.

    Raises:
        ValueError: their shape, dtype or requires_grad is wrong, they are missing, or the reduction
            is unknown.
    """
    leaves = len(objective.leaves)
    if reference_logps is None:
        if objective.needs_reference:
            raise ValueError(
                f"reference_logps is None, but objective {objective.name!r} compares with a "
                f"reference. Pass its log-probs, ({leaves}, B)."
            )
        if like.dim() < 2 or like.shape[0] != leaves:
            raise ValueError(
                "reference_logps is None, but its shape gives the number of examples of packed "
                f"rows. Pass torch.zeros({leaves}, B). Objective {objective.name!r} does not use "
                "the values."
            )
        reference_logps = torch.zeros(
            like.shape[:2], dtype=acc_dtype(like.dtype), device=like.device
        )
    if reference_logps.dim() != 2 or reference_logps.shape[0] != leaves:
        raise ValueError(
            f"reference_logps {tuple(reference_logps.shape)} must be ({leaves}, B), because "
            f"objective {objective.name!r} has {leaves} leaves"
        )
    check_not_half("reference_logps", reference_logps)
    if reference_logps.requires_grad:
        raise ValueError("reference_logps requires grad, but must be a constant. detach() it.")
    objectives.check_reduction(reduction)
    if reduction == "mean" and reference_logps.shape[1] == 0:
        raise ValueError(
            'reference_logps has no examples, so the mean is undefined. Use reduction="sum".'
        )
    return reference_logps


def check_not_half(name: str, values: Tensor) -> None:
    """Check that log-probs are fp32 or fp64.

    Raises:
        ValueError: they are half precision.
    """
    if values.dtype != acc_dtype(values.dtype):
        raise ValueError(
            f"{name} must be float32 or float64, got {values.dtype}. In bfloat16 a sum of "
            "log-probs near -200 is off by up to 0.5."
        )


def check_batch(
    hidden: Tensor,
    labels: Tensor,
    reference_logps: Tensor,
    objective: Objective,
    sequence_ids: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    """Check that the rows are sequences of this objective, and that token weights match them.

    Raises:
        ValueError: a shape, dtype or device does not match.
    """
    leaves, examples = reference_logps.shape
    if sequence_ids is None:
        names = ", ".join(f"{leaf.response} under {leaf.image}" for leaf in objective.leaves)
        if hidden.dim() != 4 or hidden.shape[:2] != (leaves, examples):
            raise ValueError(
                f"hidden {tuple(hidden.shape)} must be (L, B, T, H) with (L, B) = "
                f"({leaves}, {examples}), because objective {objective.name!r} has {leaves} leaves "
                f"({names}) and reference_logps has {examples} examples. "
                "Packed rows (N, H) need sequence_ids."
            )
    else:
        if hidden.dim() != 2 or sequence_ids.shape != hidden.shape[:1]:
            raise ValueError(
                f"with sequence_ids, hidden must be (N, H) and sequence_ids (N,), got hidden "
                f"{tuple(hidden.shape)} and sequence_ids {tuple(sequence_ids.shape)}"
            )
        check_integer("sequence_ids", sequence_ids)
    check_device(hidden, host=True, sequence_ids=sequence_ids)
    check_device(hidden, reference_logps=reference_logps, token_weights=token_weights)
    if token_weights is not None and (
        token_weights.shape != labels.shape or token_weights.requires_grad
    ):
        raise ValueError(
            f"token_weights {tuple(token_weights.shape)} must have the shape of labels "
            f"{tuple(labels.shape)} and be constants. detach() them if they require grad."
        )


def check_leaf_logps(
    leaf_logps: Tensor, reference_logps: Tensor, token_counts: Tensor | None
) -> None:
    """Check that log-probs and token counts match the references.

    Raises:
        ValueError: a shape, dtype or device does not match.
    """
    if leaf_logps.shape != reference_logps.shape:
        raise ValueError(
            f"leaf_logps {tuple(leaf_logps.shape)} and reference_logps "
            f"{tuple(reference_logps.shape)} must have the same shape, (leaves, examples)"
        )
    check_not_half("leaf_logps", leaf_logps)
    check_device(leaf_logps, reference_logps=reference_logps, token_counts=token_counts)
    if token_counts is not None:
        check_integer("token_counts", token_counts)
        on_host = token_counts.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and (token_counts < 1).any():
            raise ValueError("token_counts must be at least 1. Leave out sequences without tokens.")
        if token_counts.shape != leaf_logps.shape:
            raise ValueError(
                f"token_counts {tuple(token_counts.shape)} must have the shape of leaf_logps "
                f"{tuple(leaf_logps.shape)}"
            )


def check_integer(name: str, values: Tensor) -> None:
    """Check that a tensor has an integer dtype.

    Raises:
        ValueError: it has a different dtype.
    """
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {values.dtype}. Use .long().")


def check_device(hidden: Tensor, *, host: bool = False, **tensors: Tensor | None) -> None:
    """Check that tensors are on the device of hidden, or with `host` on the CPU.

    Raises:
        ValueError: a tensor is on a different device.
    """
    for name, tensor in tensors.items():
        if tensor is None or tensor.device == hidden.device:
            continue
        if not (host and tensor.device.type == "cpu"):
            also = ", or leave it on the CPU" if host else ""
            raise ValueError(f"{name} is on {tensor.device}. Move it to {hidden.device}{also}.")


def check_settings(
    softcap: float | None, temperature: float, chunk_rows: int | None, ignore_index: int
) -> None:
    """Check the settings of the head: types, and finite positive values.

    Raises:
        ValueError: a setting has the wrong type or is out of range.
    """
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{name} must be a number, got {value!r}")
    for name, value in (("chunk_rows", chunk_rows), ("ignore_index", ignore_index)):
        optional = name == "chunk_rows" and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and > 0, got {softcap}. None means no cap.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        # Kernels hold the value and its reciprocal in fp32, where a softcap of 0 means no cap.
        if value is not None and not 1e-30 <= value <= 1e30:
            raise ValueError(f"{name} must be between 1e-30 and 1e30, got {value}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}. None is the default.")


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    """Check that labels are one integer per row of hidden.

    Raises:
        ValueError: their shape, dtype or device is wrong.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have one entry per row of hidden "
            f"{tuple(hidden.shape)}, so shape {tuple(hidden.shape[:-1])}"
        )
    check_integer("labels", labels)
    check_device(hidden, host=True, labels=labels)


def check_rival(
    rival: Tensor | None,
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    group: ProcessGroup | None,
) -> None:
    """Check that rival is a mask over the labels, and that the head supports rival rows.

    Raises:
        ValueError: the mask does not match the labels, or the head is sharded or has one token.
    """
    if rival is None:
        return
    if rival.shape != labels.shape or rival.dtype != torch.bool:
        raise ValueError(
            f"rival {tuple(rival.shape)} {rival.dtype} must be bool and have the shape of labels "
            f"{tuple(labels.shape)}"
        )
    check_device(hidden, host=True, rival=rival)
    if group is not None:
        raise ValueError("rival rows need the whole head. Gather it, and omit group.")
    if len(weight) < 2:
        raise ValueError(
            f"rival rows need a vocabulary of at least 2, but weight has {len(weight)} rows"
        )
