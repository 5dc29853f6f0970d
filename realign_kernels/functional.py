"""The public functions: validate, then call operators.

L is the number of leaves of the objective, B of examples, T of positions, N of rows, H the width
of hidden states, V the vocabulary. Rows whose label is ignore_index are dropped before the head:
they cost nothing, get gradient 0, and may hold anything. Keep the rows of one example adjacent if
you can; that is for speed, not for correctness.

Labels and sequence_ids may stay on the CPU while hidden is on a GPU, pinned if possible: they are
planned on the host. A call then waits for the device once, at its end, for one number that shows
whether its results are finite; with labels on the device it waits at its start, too, to learn how
many rows count. A `group` adds a wait for the sizes of its shards.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from realign_kernels import objectives, ops, preference_ops, row_plan, validation
from realign_kernels.eager import LogProbs, take_rows, trains, wants_direction
from realign_kernels.fused_preference import FusedPreference
from realign_kernels.lm_head import local_head
from realign_kernels.nonfinite import (
    check_rows,
    check_sequences,
    finite_rows,
    is_finite,
    sentinel,
)
from realign_kernels.objectives import Objective, PreferenceOutput, RDPOOutput, Term
from realign_kernels.reference import wide_dtype

_rdpo = lru_cache(objectives.rdpo)  # its checks take 17 us


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
    rival: Tensor | None = None,  # (...) bool
    group: ProcessGroup | None = None,
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
            gathered, once; its gradient is averaged over the ranks of its mesh, as FSDP does.
        labels: rows with ignore_index give 0 and are not read.
        bias: same dtype as weight.
        softcap: as in Gemma 2, applied before temperature.
        temperature: divides the logits.
        chunk_rows: rows that pass the head together; default by device and vocabulary.
        rival: rows that score, instead of the label, the strongest token that is not the label
            (`objectives.released` says what for). Not with `group`.
        group: the head is split by vocabulary over the ranks of this process group, in their order:
            weight and bias are this rank's rows (a DTensor sharded on axis 0 is one, too); hidden
            and labels are the same on all ranks, and so are the results and hidden's gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a label is outside [0, V).
        NonFiniteError: a log-prob is NaN or infinite.
    """
    hidden, weight, bias = validation.check_head(hidden, *local_head(weight, bias, group))
    validation.check_labels(labels, hidden)
    validation.check_settings(softcap, temperature, chunk_rows, ignore_index)
    validation.check_rival(rival, hidden, labels, weight, group)
    flat = labels.reshape(-1).long()
    flags = None if rival is None else rival.reshape(-1)
    if torch.compiler.is_compiling():
        # A graph cannot depend on the number of rows that count: the operator drops the others.
        dense = hidden.reshape(len(flat), hidden.shape[-1])
        logps = ops.logprobs(
            dense,
            weight,
            flat,
            bias,
            flags,
            ignore_index,
            softcap=softcap,
            temperature=temperature,
            chunk_rows=chunk_rows,
            group=group,
        )
        return logps.reshape(labels.shape)
    (known,) = row_plan.host_values(flat)
    head = ops.make_head(weight, bias, softcap, temperature, group)
    scored, rows = row_plan.scored_rows(known, head.vocabulary, ignore_index)
    scored, rows = row_plan.labels_on(hidden.device, flat, scored, rows)
    if flags is not None:
        flags = row_plan.to_device(flags, hidden.device)
        flags = flags if rows is None else flags[rows]
    keep = wants_direction(hidden, weight, bias)
    args = (scored, rows, flags, chunk_rows, keep)
    logps, direction = LogProbs.apply(hidden, weight, bias, head, *args)
    finite = is_finite(sentinel(logps.detach(), direction))
    if not finite and (again := head.again()):
        logps, direction = LogProbs.apply(hidden, weight, bias, again, *args)
        finite = is_finite(sentinel(logps.detach(), direction))
    if not finite:
        check_rows(finite_rows(logps, direction), rows, take_rows(hidden, None), head)
    if rows is not None:
        logps = logps.new_zeros(labels.numel()).index_copy(0, rows, logps)
    return logps.reshape(labels.shape)


def preference_loss(
    leaf_logps: Tensor,  # (L, B)
    reference_logps: Tensor,  # (L, B) fp32 or fp64
    terms: Objective | Sequence[Term],
    *,
    beta: float | None = None,
    reduction: str = "mean",
    token_counts: Tensor | None = None,  # (L, B) integer
) -> PreferenceOutput:
    """An objective over log-probs of whole responses, summed over their tokens.

    Args:
        leaf_logps: fp32 or fp64; axis 0 in the order of the objective's leaves.
        reference_logps: the same under the reference model; constants.
        terms: an Objective (`objectives.rdpo()`), or a list of terms over leaf indices.
        beta: with a list of terms only (default 0.1); an Objective brings its own.
        reduction: over examples, "mean", "sum" or "none".
        token_counts: tokens of each response; for objectives that average over them.

    Raises:
        ValueError: shapes or dtypes do not fit the objective.
        NonFiniteError: an input holds NaN or infinity (checked outside of compiled graphs).
    """
    objective = objectives.as_objective(terms, beta)
    validation.check_reference(reference_logps, objective, reduction)
    if leaf_logps.shape != reference_logps.shape:
        raise ValueError(
            f"leaf_logps {tuple(leaf_logps.shape)} and reference_logps "
            f"{tuple(reference_logps.shape)} must have one shape, (leaves, examples)"
        )
    validation.check_wide("leaf_logps", leaf_logps)
    validation.check_device(leaf_logps, reference_logps=reference_logps, token_counts=token_counts)
    if token_counts is not None:
        validation.check_integer("token_counts", token_counts)
        if token_counts.shape != leaf_logps.shape:
            raise ValueError(
                f"token_counts {tuple(token_counts.shape)} must have the shape of leaf_logps "
                f"{tuple(leaf_logps.shape)}"
            )
    eager = not torch.compiler.is_compiling()
    if eager and not is_finite(sentinel(leaf_logps.detach() - reference_logps)):
        check_sequences("leaf_logps", leaf_logps)
        check_sequences("reference_logps", reference_logps)
    return objective.__call__(leaf_logps, reference_logps, reduction, token_counts)


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
    token_weights: Tensor | None = None,  # of the shape of labels
    group: ProcessGroup | None = None,
) -> PreferenceOutput:
    """An objective from hidden states: linear_logprobs, sums per sequence, preference_loss.

    The arguments are those of these two functions. sequence_ids and token_weights of ignored rows
    are not read. A head that trains costs 3u here, and not 4u: the gradients are made in the
    forward, by whole examples. Examples of more than chunk_rows rows take 4u; so does everything
    under torch.compile, in fp16 and with reduction="none".

    Args:
        token_weights: factor of each token's log-prob in the sum of its sequence; constants.
            reference_logps must be weighted alike. An objective that averages divides by the
            number of tokens, not by the sum of their weights.

    Raises:
        ValueError: as there; also if a sequence has no label to score.
        NonFiniteError: as there.
    """
    objective = objectives.as_objective(terms, beta)
    validation.check_reference(reference_logps, objective, reduction)
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
        ids = None
    else:
        if hidden.dim() != 2 or sequence_ids.shape != hidden.shape[:1]:
            raise ValueError(
                f"with sequence_ids {tuple(sequence_ids.shape)} hidden must be (N, H) and "
                f"sequence_ids (N,), got hidden {tuple(hidden.shape)}"
            )
        validation.check_integer("sequence_ids", sequence_ids)
        ids = sequence_ids.long()
    validation.check_device(hidden, host=True, sequence_ids=ids)
    validation.check_device(hidden, reference_logps=reference_logps, token_weights=token_weights)
    if token_weights is not None:
        if token_weights.shape != labels.shape or token_weights.requires_grad:
            raise ValueError(
                f"token_weights {tuple(token_weights.shape)} must have the shape of labels "
                f"{tuple(labels.shape)} and be constants: detach() them"
            )
        token_weights = token_weights.reshape(-1).to(wide_dtype(hidden.dtype))
    # Once, though two functions want it.
    hidden, weight, bias = validation.check_head(hidden, *local_head(weight, bias, group))
    validation.check_settings(softcap, temperature, chunk_rows, ignore_index)
    validation.check_labels(labels, hidden)
    if torch.compiler.is_compiling():
        if ids is None:
            ids = torch.arange(leaves * examples, device="cpu").repeat_interleave(hidden.shape[2])
        labels, ids = labels.to(hidden.device), ids.to(hidden.device)
        rival = preference_ops.rival_rows(objective, ids, examples)
        logps = linear_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            chunk_rows=chunk_rows,
            rival=None if rival is None else rival.reshape(labels.shape),
            group=group,
        ).reshape(-1)
        flat = labels.reshape(-1).long()
        if token_weights is not None:
            logps = logps * token_weights.masked_fill(flat == ignore_index, 0)
        sums, counts = preference_ops.sequence_sums(logps, flat, ids, reference_logps, ignore_index)
        return objective.__call__(sums, reference_logps, reduction, counts)
    head = ops.make_head(weight, bias, softcap, temperature, group)
    shape = (leaves, examples)
    plan = row_plan.RowPlan(labels, ids, hidden.device, head.vocabulary, ignore_index, shape)
    inputs = (hidden, weight, bias, head, plan, token_weights, reference_logps)
    # In fp16 gradients made in the forward would underflow before a loss scale reaches them.
    early = reduction != "none" and hidden.dtype != torch.float16
    if early and trains(weight, bias) and torch.is_grad_enabled():
        inputs = (*inputs, objective, reduction, chunk_rows)
        return PreferenceOutput(*FusedPreference.apply(*inputs))
    return preference_ops.planned_preference(*inputs, objective, reduction, chunk_rows)


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
    token_weights: Tensor | None = None,  # of the shape of labels
    group: ProcessGroup | None = None,
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
    plain = type(beta) is float and type(visual_weight) is float
    known = plain and not torch.compiler.is_compiling()  # Dynamo warns of caches
    output = linear_preference_loss(
        hidden,
        weight,
        labels,
        reference_logps,
        (_rdpo if known else objectives.rdpo)(beta, visual_weight),
        sequence_ids=sequence_ids,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
        reduction=reduction,
        token_weights=token_weights,
        group=group,
    )
    return RDPOOutput(output.loss, output.logps, output.rewards, output.token_counts)


class RDPOLoss(nn.Module):
    """rdpo_loss with its settings given once. They are checked here, not at the first batch.

    Raises:
        ValueError: a setting is out of range.
    """

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
        validation.check_settings(softcap, temperature, chunk_rows, ignore_index)
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
        token_weights: Tensor | None = None,  # of the shape of labels
        group: ProcessGroup | None = None,
    ) -> RDPOOutput:
        """rdpo_loss with these settings; it says what it raises."""
        others = {"bias": bias, "token_weights": token_weights, "group": group}
        inputs = (hidden, weight, labels, reference_logps)
        return rdpo_loss(*inputs, sequence_ids=sequence_ids, **others, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
