"""The public functions: validate, then call operators.

L is the number of leaves of the objective, B of examples, T of positions, N of rows, H the width
of hidden states, V the vocabulary. Rows whose label is ignore_index are dropped before the head:
they cost nothing, get gradient 0, and may hold anything. Keep the rows of one example adjacent if
you can; that is for speed, not for correctness.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from realign_kernels import objectives, ops
from realign_kernels.objectives import Objective, PreferenceOutput, RDPOOutput, Term
from realign_kernels.reference import wide_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...) integer
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> Tensor:  # (...) fp32; fp64 for fp64 inputs
    """Log-prob of each label under a linear head, without ever holding all logits.

    log softmax(cap(hidden @ weight.T + bias) / temperature)[label], cap(z) = softcap *
    tanh(z / softcap). Differentiable once, in hidden, weight and bias, for any loss on top.
    Row i of hidden predicts labels[i]: shift before you call.

    With u = one GEMM over the rows that are not ignored, it costs 1u without gradient, 2u with
    gradient to hidden alone (backward is then free), 3u to weight alone, 4u to both.

    Args:
        hidden: fp32, fp64, bf16 or fp16; any strides.
        weight: same dtype. Under autocast all three are cast as F.linear casts them. A DTensor is
            gathered; its gradient is that of one replica, so data-parallel training of the head
            needs a weight that FSDP has gathered.
        labels: rows with ignore_index give 0 and are not read.
        bias: same dtype as weight.
        softcap: as in Gemma 2, applied before temperature.
        temperature: divides the logits.
        chunk_rows: rows that pass the head together; default by device and vocabulary.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a label is outside [0, V).
        NonFiniteError: a log-prob is NaN or infinite.
    """
    hidden, weight, bias = _check_head(hidden, weight, bias)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have one entry per row of hidden "
            f"{tuple(hidden.shape)}, that is {tuple(hidden.shape[:-1])}"
        )
    _check_integer("labels", labels)
    _check_device(hidden, labels=labels)
    _check_settings(softcap, temperature, chunk_rows)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    logps, _ = ops.linear_logprobs(
        hidden.reshape(labels.numel(), hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        bias,
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        chunk_rows,
        torch.is_grad_enabled() and hidden.requires_grad and not head_trains,
    )
    return logps.reshape(labels.shape)


def preference_loss(
    leaf_logps: Tensor,  # (L, B)
    reference_logps: Tensor,  # (L, B) fp32 or fp64
    terms: Objective | Sequence[Term],
    *,
    beta: float | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """An objective over log-probs of whole responses, summed over their tokens.

    Args:
        leaf_logps: fp32 or fp64; axis 0 in the order of the objective's leaves.
        reference_logps: the same under the reference model; constants.
        terms: an Objective (`objectives.rdpo()`), or a list of terms over leaf indices.
        beta: with a list of terms only (default 0.1); an Objective brings its own.
        reduction: over examples, "mean", "sum" or "none".

    Raises:
        ValueError: shapes or dtypes do not fit the objective.
        NonFiniteError: an input holds NaN or infinity (checked outside of compiled graphs).
    """
    objective = objectives.as_objective(terms, beta)
    _check_reference(reference_logps, objective, reduction)
    if leaf_logps.shape != reference_logps.shape:
        raise ValueError(
            f"leaf_logps {tuple(leaf_logps.shape)} and reference_logps "
            f"{tuple(reference_logps.shape)} must have one shape, (leaves, examples)"
        )
    _check_wide("leaf_logps", leaf_logps)
    _check_device(leaf_logps, reference_logps=reference_logps)
    if not torch.compiler.is_compiling():
        for name, values in (("leaf_logps", leaf_logps), ("reference_logps", reference_logps)):
            if not values.isfinite().all():
                raise ops.non_finite_sequences(name, values)
    return objective(leaf_logps, reference_logps, reduction)


def linear_preference_loss(
    hidden: Tensor,  # (L, B, T, H), or (N, H) with sequence_ids
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (L, B, T), or (N,)
    reference_logps: Tensor,  # (L, B) fp32 or fp64
    terms: Objective | Sequence[Term],
    *,
    sequence_ids: Tensor | None = None,  # (N,) integer, leaf * B + example
    beta: float | None = None,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """An objective from hidden states: linear_logprobs, sums per sequence, preference_loss.

    The arguments are those of these two functions. sequence_ids of ignored rows are not read.

    Raises:
        ValueError: as there; also if a sequence has no label to score.
        NonFiniteError: as there.
    """
    objective = objectives.as_objective(terms, beta)
    _check_reference(reference_logps, objective, reduction)
    leaves, examples = reference_logps.shape
    if sequence_ids is None:
        names = ", ".join(f"{leaf.response} under {leaf.image}" for leaf in objective.leaves)
        if hidden.dim() != 4 or hidden.shape[:2] != (leaves, examples):
            raise ValueError(
                f"hidden {tuple(hidden.shape)} must be (L, B, T, H) with (L, B) = "
                f"({leaves}, {examples}): objective {objective.name!r} has {leaves} leaves "
                f"({names}) and reference_logps has {examples} examples. "
                "Packed rows (N, H) need sequence_ids"
            )
        ids = torch.arange(leaves * examples, device=labels.device)
        ids = ids.repeat_interleave(hidden.shape[2])
    else:
        if hidden.dim() != 2 or sequence_ids.shape != hidden.shape[:1]:
            raise ValueError(
                f"with sequence_ids {tuple(sequence_ids.shape)} hidden must be (N, H) and "
                f"sequence_ids (N,), got hidden {tuple(hidden.shape)}"
            )
        _check_integer("sequence_ids", sequence_ids)
        ids = sequence_ids.long()
    _check_device(hidden, reference_logps=reference_logps, sequence_ids=ids)
    logps = linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
    )
    sums, counts = ops.sequence_sums(
        logps.reshape(-1), labels.reshape(-1).long(), ids, reference_logps, ignore_index
    )
    return objective(sums, reference_logps, reduction, counts)


def rdpo_loss(
    hidden: Tensor,  # (3, B, T, H), or (N, H) with sequence_ids
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (3, B, T), or (N,)
    reference_logps: Tensor,  # (3, B) fp32 or fp64
    *,
    sequence_ids: Tensor | None = None,  # (N,) integer, variant * B + example
    beta: float = 0.1,
    visual_weight: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    reduction: str = "mean",
) -> RDPOOutput:
    """rDPO, the loss of Re-Align (arXiv 2502.13146): linear_preference_loss with objectives.rdpo.

    With s = log pi - log pi_ref of a response (w chosen, l rejected) under an image (v, or v'
    retrieved), summed over its tokens:

        -log sigmoid(beta (s(w,v) - s(l,v))) - visual_weight log sigmoid(beta (s(w,v) - s(w,v')))

    Axis 0 is chosen, rejected, visual (w under v'). The other arguments are those of
    linear_preference_loss.

    Raises:
        ValueError, NonFiniteError: as linear_preference_loss does.
    """
    output = linear_preference_loss(
        hidden,
        weight,
        labels,
        reference_logps,
        objectives.rdpo(beta, visual_weight),
        sequence_ids=sequence_ids,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
        reduction=reduction,
    )
    return RDPOOutput(output.loss, output.logps, output.rewards, output.token_counts)


class RDPOLoss(nn.Module):
    """rdpo_loss with its settings given once. They are checked here, not at the first batch."""

    def __init__(
        self,
        *,
        beta: float = 0.1,
        visual_weight: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        chunk_rows: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        objectives.rdpo(beta, visual_weight)
        _check_settings(softcap, temperature, chunk_rows)
        objectives.check_reduction(reduction)
        self.settings = {
            "beta": beta,
            "visual_weight": visual_weight,
            "softcap": softcap,
            "temperature": temperature,
            "ignore_index": ignore_index,
            "chunk_rows": chunk_rows,
            "reduction": reduction,
        }

    def forward(
        self,
        hidden: Tensor,  # (3, B, T, H), or (N, H) with sequence_ids
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (3, B, T), or (N,)
        reference_logps: Tensor,  # (3, B)
        *,
        sequence_ids: Tensor | None = None,  # (N,)
        bias: Tensor | None = None,  # (V,)
    ) -> RDPOOutput:
        inputs = (hidden, weight, labels, reference_logps)
        return rdpo_loss(*inputs, sequence_ids=sequence_ids, bias=bias, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked, gathered if DTensor, and cast if autocast is on."""
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must end in H and weight {tuple(weight.shape)} be "
            "(V, H), with one H: weight is lm_head.weight, not its transpose"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} must be ({weight.shape[0]},), one entry per row of weight"
        )
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be float32, float64, bfloat16 or float16: {hidden.dtype}")
    head = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (weight, bias)]
    tensors = [hidden, *head]
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    hidden, weight, bias = tensors
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and hidden {hidden.dtype}: cast one of them "
                f"({name}.to(hidden.dtype)), or call under torch.autocast"
            )
    _check_device(hidden, weight=weight, bias=bias)
    return hidden, weight, bias


def _check_reference(reference_logps: Tensor, objective: Objective, reduction: str) -> None:
    leaves = len(objective.leaves)
    if reference_logps.dim() != 2 or reference_logps.shape[0] != leaves:
        raise ValueError(
            f"reference_logps {tuple(reference_logps.shape)} must be ({leaves}, B): objective "
            f"{objective.name!r} has {leaves} leaves"
        )
    _check_wide("reference_logps", reference_logps)
    if reference_logps.requires_grad:
        raise ValueError("reference_logps requires grad, but is a constant: detach() it")
    objectives.check_reduction(reduction)
    if reduction == "mean" and reference_logps.shape[1] == 0:
        raise ValueError(
            'reference_logps has no examples, whose mean is undefined: use reduction="sum"'
        )


def _check_wide(name: str, values: Tensor) -> None:
    if values.dtype != wide_dtype(values.dtype):
        raise ValueError(
            f"{name} must be float32 or float64, got {values.dtype}: a sum of log-probs near -200 "
            "is off by up to 0.5 in bfloat16"
        )


def _check_integer(name: str, values: Tensor) -> None:
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {values.dtype}: use .long()")


def _check_device(hidden: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}: move it to {hidden.device}")


def _check_settings(softcap: float | None, temperature: float, chunk_rows: int | None) -> None:
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be finite and > 0, got {softcap}; None means no cap")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}; None chooses")
