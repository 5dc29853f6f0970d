"""The public functions: log-probs and preference losses over a linear head.

Arguments are validated here, and only here. In shapes, L is the number of leaves of the objective,
B of examples, T of positions and N of rows. H is the width of hidden states, V the vocabulary.

Rows whose label is ignore_index are dropped before the head. They cost nothing, get gradient 0, and
may hold any values. Keep the rows of one example adjacent if possible. This affects speed, not
correctness.

Labels and sequence_ids may stay on the CPU, pinned if possible, while hidden is on a GPU, because
the host plans the rows. A call then waits for the device once, at its end, for one number that
shows whether its results are finite. With labels on the device it also waits at its start, for the
number of scored rows. A `group` adds a wait for the sizes of its shards.
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

_rdpo = lru_cache(objectives.rdpo)  # saves the checks of the constructor, 17 us


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
    """Log-prob of each label under a linear head, without holding all logits in memory.

    Computes log softmax(cap(hidden @ weight.T + bias) / temperature)[label], where cap(z) is
    softcap * tanh(z / softcap). The result is differentiable once, in hidden, weight and bias, for
    any loss. Row i of hidden predicts labels[i], so shift the labels before the call.

    With u the cost of one GEMM over the rows that are not ignored, a call without gradient costs
    1u. Forward and backward cost 2u with gradient only to hidden (backward is then free), 3u only
    to weight, and 4u to both.

    Args:
        hidden: fp32, fp64, bf16 or fp16, with any strides.
        weight: same dtype. Under autocast, hidden, weight and bias are cast as in F.linear. A
            DTensor is gathered once. Its gradient is averaged over the ranks of its mesh, as in
            FSDP.
        labels: rows with ignore_index give 0 and are not read.
        bias: same dtype as weight.
        softcap: as in Gemma 2, applied before temperature.
        temperature: divides the logits.
        chunk_rows: rows per chunk. The default depends on device and vocabulary.
        rival: rows that score the strongest token except the label (for `objectives.released`).
            Not supported with `group`.
        group: process group over whose ranks the head is split by vocabulary, in rank order.
            weight and bias are this rank's rows, or DTensors sharded on axis 0. hidden and labels
            must be the same on all ranks. Results and the gradient of hidden then are the same too.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a label is outside [0, V).
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
        # A graph cannot depend on the number of scored rows, so the operator drops ignored rows.
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
    reference_logps: Tensor | None,  # (L, B) fp32 or fp64
    terms: Objective | Sequence[Term],
    *,
    beta: float | None = None,
    reduction: str = "mean",
    token_counts: Tensor | None = None,  # (L, B) integer
) -> PreferenceOutput:
    """Preference loss of response log-probs, which are sums over tokens.

    Args:
        leaf_logps: fp32 or fp64, with axis 0 in the order of the objective's leaves.
        reference_logps: the same under the reference model, without gradient. None for an
            objective without a reference, such as `objectives.simpo()`.
        terms: an Objective (`objectives.rdpo()`), or a list of terms over leaf indices.
        beta: only for a list of terms, 0.1 by default. An Objective has its own beta.
        reduction: over examples, "mean", "sum" or "none".
        token_counts: tokens of each response, for objectives with values per token.

    Raises:
        ValueError: shapes or dtypes do not match the objective.
        NonFiniteError: an input holds NaN or infinity (not checked in compiled graphs).
    """
    objective = objectives.as_objective(terms, beta)
    reference_logps = validation.checked_reference(
        reference_logps, objective, reduction, leaf_logps
    )
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
    reference_logps: Tensor | None,  # (L, B) fp32 or fp64
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
    """Preference loss of hidden states: linear_logprobs, sums per sequence, preference_loss.

    The arguments are those of linear_logprobs and preference_loss. sequence_ids and token_weights
    of ignored rows are not read. Without a reference, packed rows still need reference_logps, whose
    shape gives the number of examples. Zeros are enough.

    A head that trains costs 3u instead of 4u, because the forward computes the gradients, in whole
    examples. It costs 4u for examples of more than chunk_rows rows, under torch.compile, in fp16,
    and with reduction="none".

    Args:
        sequence_ids: number of each row's sequence, leaf * B + example.
        token_weights: factor of each token's log-prob in the sum of its sequence, without gradient.
            reference_logps must be weighted in the same way. An objective that averages divides by
            the number of tokens, not by the sum of their weights.

    Raises:
        ValueError: as for these functions, or a sequence has no label to score.
        NonFiniteError: as for these functions.
    """
    objective = objectives.as_objective(terms, beta)
    reference_logps = validation.checked_reference(reference_logps, objective, reduction, hidden)
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
    # In fp16 the gradients of the forward would underflow before a loss scale is applied.
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
    """The objective over log-probs of scored rows, in 2 GEMMs for a frozen head.

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
    # The only wait for the device.
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

    s(y, u) is log pi - log pi_ref of response y under image u, summed over tokens. w is the chosen
    and l the rejected response, v the image and v' the retrieved one:

        -log sigmoid(beta (s(w,v) - s(l,v))) - visual_weight log sigmoid(beta (s(w,v) - s(w,v')))

    Args:
        hidden: (3, B, T, H) hidden states in fp32, fp64, bf16 or fp16. Axis 0 is chosen, rejected,
            visual (w under v'). With sequence_ids, (N, H) rows in any order.
        weight: (V, H) weight of the head, of the same dtype.
        labels: (3, B, T) or (N,) next token of each row. Rows with ignore_index are skipped.
        reference_logps: (3, B) log-prob of each response under the reference model, without
            gradient.
        sequence_ids: (N,) number of each row's sequence, variant * B + example.
        beta: factor of the log-ratios s, above 0.
        visual_weight: weight of the visual term. 0 leaves DPO.
        bias: (V,) bias of the head.
        softcap: cap of the logits, softcap * tanh(logits / softcap), as in Gemma 2.
        temperature: divides the logits.
        ignore_index: label of rows to skip.
        chunk_rows: rows per chunk of logits. The default depends on device and vocabulary.
        reduction: over examples, "mean", "sum" or "none".
        token_weights: factor of each token's log-prob, of the shape of labels.
        group: process group over whose ranks the head is split by vocabulary, as in
            linear_logprobs.

    Returns:
        The loss, and the log-probs, rewards and token counts of the responses, each (3, B).

    Raises:
        ValueError: shapes, dtypes, devices or settings are invalid, a label is outside [0, V), or a
            sequence has no label to score.
        NonFiniteError: a log-prob, its derivative or a reference is NaN or infinite.
    """
    plain = type(beta) is float and type(visual_weight) is float
    known = plain and not torch.compiler.is_compiling()  # Dynamo warns about lru_cache
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
    """rdpo_loss as a module with fixed settings. The constructor checks them.

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
