"""The public functions: arguments are validated here, and only here.

L is the number of leaves of the objective, B of examples, T of positions, N of rows, H the width
of hidden states, V the vocabulary. Rows whose label is ignore_index are dropped before the head:
they cost nothing, get gradient 0, and may hold any values. Keep the rows of one example adjacent if
you can; that is for speed, not for correctness.

Labels and sequence_ids may stay on the CPU while hidden is on a GPU, pinned if possible: they are
planned on the host. A call then waits for the device once, at its end, for one number that shows
whether its results are finite; with labels on the device it also waits at its start, for the
number of rows that count. A `group` adds a wait for the sizes of its shards.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from realign_kernels import objectives, ops, row_plan, validation
from realign_kernels.autograd import (
    FusedPreference,
    LogProbs,
    LossInputs,
    from_tokens,
    keeps_dlogp_dh,
    trains,
)
from realign_kernels.lm_head import Head, HeadSettings, local_head
from realign_kernels.nonfinite import (
    check_rows,
    check_sequences,
    check_tables,
    finite_rows,
    is_finite,
    sentinel,
)
from realign_kernels.objectives import Objective, PreferenceOutput, RDPOOutput, Term
from realign_kernels.reference import acc_dtype

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
    """Log-prob of each label under a linear head, without holding all logits.

    log softmax(cap(hidden @ weight.T + bias) / temperature)[label], cap(z) = softcap *
    tanh(z / softcap). Differentiable once, in hidden, weight and bias, for any loss on top.
    Row i of hidden predicts labels[i]: shift before you call.

    With u = one GEMM over the rows that are not ignored, it costs 1u without gradient, 2u with
    gradient only to hidden (backward is then free), 3u only to weight, 4u to both.

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
            (for `objectives.released`). Not with `group`.
        group: the head is split by vocabulary over the ranks of this process group, in their order:
            weight and bias are this rank's rows (a DTensor sharded on axis 0 works as well); hidden
            and labels are the same on all ranks, and so are the results and hidden's gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a label is outside [0, V).
        NonFiniteError: a log-prob is NaN or infinite.
    """
    hidden, weight, bias = validation.check_head(hidden, *local_head(weight, bias, group))
    validation.check_labels(labels, hidden)
    validation.check_settings(softcap, temperature, chunk_rows, ignore_index)
    validation.check_rival(rival, hidden, labels, weight, group)
    settings = HeadSettings(softcap, temperature, ignore_index, chunk_rows, group)
    flat, runner_up = labels.reshape(-1).long(), None if rival is None else rival.reshape(-1)
    return _linear_logprobs(hidden, weight, flat, bias, runner_up, settings).reshape(labels.shape)


def _linear_logprobs(
    hidden: Tensor,  # (..., H), N rows
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    runner_up: Tensor | None,  # (N,) bool
    settings: HeadSettings,
) -> Tensor:  # (N,)
    """linear_logprobs of validated arguments."""
    if torch.compiler.is_compiling():
        # A graph cannot depend on the number of scored rows: the operator drops ignored rows.
        dense = hidden.reshape(len(labels), hidden.shape[-1])
        return ops.logprobs(dense, weight, labels, bias, runner_up, settings)
    head, ignore_index = settings.head(weight, bias), settings.ignore_index
    rows = row_plan.drop_ignored(labels, runner_up, hidden.device, head.vocabulary, ignore_index)
    keep = keeps_dlogp_dh(hidden, weight, bias)
    logps, _ = LogProbs.apply(hidden, weight, bias, head, rows, settings.chunk_rows, keep, True)
    if rows.index is None:
        return logps
    return logps.new_zeros(len(labels)).index_copy(0, rows.index, logps)


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
    validation.check_leaf_logps(leaf_logps, reference_logps, token_counts)
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
        ValueError: as these functions; also if a sequence has no label to score.
        NonFiniteError: as these functions.
    """
    objective = objectives.as_objective(terms, beta)
    validation.check_reference(reference_logps, objective, reduction)
    validation.check_batch(hidden, labels, reference_logps, objective, sequence_ids, token_weights)
    hidden, weight, bias = validation.check_head(hidden, *local_head(weight, bias, group))
    validation.check_settings(softcap, temperature, chunk_rows, ignore_index)
    validation.check_labels(labels, hidden)
    settings = HeadSettings(softcap, temperature, ignore_index, chunk_rows, group)
    leaves, examples = reference_logps.shape
    ids = None if sequence_ids is None else sequence_ids.long()
    if token_weights is not None:
        token_weights = token_weights.reshape(-1).to(acc_dtype(hidden.dtype))
    if torch.compiler.is_compiling():
        if ids is None:
            ids = torch.arange(leaves * examples, device="cpu").repeat_interleave(hidden.shape[2])
        flat, ids = labels.reshape(-1).long().to(hidden.device), ids.to(hidden.device)
        rivals = row_plan.scores_runner_ups(objective)
        runner_up = row_plan.runner_up_rows(objective, ids, examples) if rivals else None
        logps = _linear_logprobs(hidden, weight, flat, bias, runner_up, settings)
        if token_weights is not None:
            logps = logps * token_weights.masked_fill(flat == ignore_index, 0)
        sums, counts = ops.sequence_sums(logps, flat, ids, reference_logps, ignore_index)
        return objective.__call__(sums, reference_logps, reduction, counts)
    head = settings.head(weight, bias)
    shape = (leaves, examples)
    plan = row_plan.RowPlan(labels, ids, hidden.device, head.vocabulary, ignore_index, shape)
    loss = LossInputs(plan, token_weights, reference_logps, objective, reduction)
    # In fp16 gradients made in the forward would underflow before a loss scale reaches them.
    early = reduction != "none" and hidden.dtype != torch.float16
    if early and trains(weight, bias) and torch.is_grad_enabled():
        output = FusedPreference.apply(hidden, weight, bias, head, loss, chunk_rows)
        return PreferenceOutput(*output)
    return _preference_of_logprobs(hidden, head, loss, chunk_rows)


def _preference_of_logprobs(
    hidden: Tensor,  # (..., H), N rows
    head: Head,
    loss: LossInputs,
    chunk_rows: int | None,
) -> PreferenceOutput:
    """The objective over log-probs of scored rows, for a head that does not train: 2 GEMMs.

    Raises:
        NonFiniteError: a log-prob, its derivative or a reference is NaN or infinite.
    """
    plan, token_weights, reference_logps, objective, reduction = loss
    weight, bias, rows = head.weight, head.bias, plan.scored(objective)
    keep = keeps_dlogp_dh(hidden, weight, bias)
    logps, dlogp_dh = LogProbs.apply(hidden, weight, bias, head, rows, chunk_rows, keep, False)
    used = logps if token_weights is None else logps * rows.of(token_weights)
    sequences = plan.ids_on_device, plan.counts
    output = from_tokens(used, *sequences, reference_logps, objective, reduction)
    # One wait for the device, at the end.
    if not is_finite(sentinel(output.logps.detach() - reference_logps, dlogp_dh)):
        if retry := head.retry():
            return _preference_of_logprobs(hidden, retry, loss, chunk_rows)
        dense = row_plan.take_rows(hidden, rows.index)
        check_rows(finite_rows(logps, dlogp_dh), rows.index, dense, head)
        check_tables(used, rows.index, output.logps, reference_logps)
    return output


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
    assert output.token_counts is not None
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
        self.settings: dict[str, Any] = {
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
        """rdpo_loss with these settings."""
        return rdpo_loss(
            hidden,
            weight,
            labels,
            reference_logps,
            sequence_ids=sequence_ids,
            bias=bias,
            token_weights=token_weights,
            group=group,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
