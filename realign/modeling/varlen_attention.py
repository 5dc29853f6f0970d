"""Varlen attention over a forest: two kernel calls per layer for all trees of all rows.

The first call is causal. Its sequences are each root with its first leaf, and each further leaf. In
the second call the further leaves of a tree are queries and all tokens of its root are keys. The
two results of a further leaf are merged by their log-sum-exps. Each token is therefore a key once,
in place, and roots are not copied for their further leaves. `Sequences` holds the rows of both
calls. It is built with the batch on the host, so no layer waits for the device.

The operator is `realign::forest_attention`. On CUDA, torch's flash kernel computes it in fp16 and
bf16. On other devices `reference` computes it, which is its definition.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import index_select as select


class Sequences(NamedTuple):
    """Sequences of a batch for varlen attention: S sequences over Q real tokens in T rows.

    Further leaves follow the first leaf of their tree. They have M tokens, and their roots K.

    Attributes:
        real: (Q,) int64, rows without padding, in order; None if no row is padding.
        ends: (S + 1,) int32, ends of the causal sequences in the real rows, after a zero.
        more: (M,) int64, indices of the further leaves' tokens among the real rows.
        roots: (K,) int64, indices of their roots' tokens among the real rows.
        more_ends: (S' + 1,) int32, ends in `more` of the S' trees with further leaves, after a
            zero.
        root_ends: (S' + 1,) int32, ends in `roots` of these trees, after a zero.
        longest: tokens of the longest causal sequence.
        longest_more: maximum number of tokens of further leaves in a tree.
        longest_root: tokens of the longest root in `roots`.
    """

    real: Tensor | None
    ends: Tensor
    more: Tensor
    roots: Tensor
    more_ends: Tensor
    root_ends: Tensor
    longest: int
    longest_more: int
    longest_root: int

    def to(self, device: torch.device | str) -> Sequences:
        """The same with its tensors on `device`. Copies from pinned memory do not block."""
        return self._make(
            part.to(device, non_blocking=True) if isinstance(part, Tensor) else part
            for part in self
        )


def sequences(trees: Sequence[Sequence[Sequence[int]]], columns: int) -> Sequences:
    """Build `Sequences` from the lengths of trees that follow one another in rows.

    Args:
        trees: for each row its trees in order, each the lengths of its root and leaves.
        columns: tokens in a row, including the padding at its end.
    """
    real, causal, more, roots, start = [], [], [], [], 0
    for row, row_trees in enumerate(trees):
        real.append(row * columns + np.arange(sum(map(sum, row_trees))))
        for root, first, *further in row_trees:
            causal += [root + first, *further]
            leaf_start = start + root + first
            if further:
                roots.append(np.arange(start, start + root))
                more.append(np.arange(leaf_start, leaf_start + sum(further)))
            start = leaf_start + sum(further)
    padded = start < len(trees) * columns
    return Sequences(
        real=_joined(real) if padded else None,
        ends=_ends(causal),
        more=_joined(more),
        roots=_joined(roots),
        more_ends=_ends(map(len, more)),
        root_ends=_ends(map(len, roots)),
        longest=max(causal),
        longest_more=max(map(len, more), default=0),
        longest_root=max(map(len, roots), default=0),
    )


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.arange(0), *parts]))


def _ends(lengths: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


# --- kernels, with the arguments of flash attention ---


class Spans(NamedTuple):
    """The S sequences of one kernel call. Causal ones have equal numbers of queries and keys."""

    query_ends: Tensor  # (S + 1,) int32
    key_ends: Tensor  # (S + 1,) int32
    longest_query: int
    longest_key: int


def reference(
    query: Tensor,  # (Q, heads, D)
    key: Tensor,  # (K, groups, D)
    value: Tensor,  # (K, groups, D)
    spans: Spans,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # (Q, heads, D), (heads, Q)
    """Softmax attention and log-sum-exp of each sequence, in fp32 or wider: the definition."""
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1::-1], dtype=_acc_dtype(query.dtype))
    for q, k, scores in _scores(query, key, spans, scale, causal):
        lse[:, q] = scores.logsumexp(-1).flatten(0, 1)
        seen = torch.einsum("grqk,kgd->qgrd", scores.softmax(-1), value[k].to(scores.dtype))
        out[q] = seen.flatten(1, 2)
    return out, lse


def reference_backward(
    grad: Tensor,  # (Q, heads, D)
    query: Tensor,  # (Q, heads, D)
    key: Tensor,  # (K, groups, D)
    value: Tensor,  # (K, groups, D)
    out: Tensor,  # (Q, heads, D)
    lse: Tensor,  # (heads, Q)
    spans: Spans,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: dS = P (dP - sum(dO O)), as in arXiv 2205.14135."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for q, k, scores in _scores(query, key, spans, scale, causal):
        acc_dtype, groups = scores.dtype, key.shape[1]
        p = (scores - lse[:, q].unflatten(0, (groups, -1))[..., None]).exp()
        (dout, o, qs) = (t[q].to(acc_dtype).unflatten(1, (groups, -1)) for t in (grad, out, query))
        dp = torch.einsum("qgrd,kgd->grqk", dout, value[k].to(acc_dtype))
        ds = scale * p * (dp - torch.einsum("qgrd,qgrd->grq", dout, o)[..., None])
        grads[0][q] = torch.einsum("grqk,kgd->qgrd", ds, key[k].to(acc_dtype)).flatten(1, 2)
        grads[1][k] = torch.einsum("grqk,qgrd->kgd", ds, qs)
        grads[2][k] = torch.einsum("grqk,qgrd->kgd", p, dout)
    return grads


def _scores(
    query: Tensor, key: Tensor, spans: Spans, scale: float, causal: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, keys and scores of each sequence. Scores are (groups, heads / groups, q, k)."""
    slices = [itertools.starmap(slice, itertools.pairwise(ends.tolist())) for ends in spans[:2]]
    for q, k in zip(*slices, strict=True):
        acc_dtype = _acc_dtype(query.dtype)
        grouped = query[q].unflatten(1, (key.shape[1], -1))
        scores = scale * torch.einsum("qgrd,kgd->grqk", grouped.to(acc_dtype), key[k].to(acc_dtype))
        if causal:
            seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device)
            scores = scores.masked_fill(~seen.tril(), -torch.inf)
        yield q, k, scores


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def flash(
    query: Tensor,  # (Q, heads, D) fp16 or bf16
    key: Tensor,  # (K, groups, D)
    value: Tensor,  # (K, groups, D)
    spans: Spans,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # (Q, heads, D), (heads, Q) fp32
    """torch's flash kernel, which `torch.nn.attention.varlen.varlen_attn` also uses.

    The aten operators are called directly for two reasons. `varlen_attn` gives access to its
    backward only by autograd, and it needs `enable_gqa` in torch 2.13, which 2.11 lacks.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *spans, 0.0, causal, False, scale=scale
    )
    return out, lse


def flash_backward(
    grad: Tensor,  # (Q, heads, D) fp16 or bf16
    query: Tensor,  # (Q, heads, D)
    key: Tensor,  # (K, groups, D)
    value: Tensor,  # (K, groups, D)
    out: Tensor,  # (Q, heads, D)
    lse: Tensor,  # (heads, Q) fp32
    spans: Spans,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic backward of `flash`, so that a resumed run gives the same bits.

    By default the kernel sums the gradient of the query with atomics.
    """
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)
    with _deterministic():
        return torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, *spans, 0.0, causal, *no_dropout, scale=scale
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Turn on torch's deterministic mode, process-wide, without filling new memory."""
    settings: Any = torch.utils.deterministic
    old_mode = torch.get_deterministic_debug_mode()
    old_fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(old_mode)
        settings.fill_uninitialized_memory = old_fill


KERNELS = {"cpu": (reference, reference_backward), "cuda": (flash, flash_backward)}
"""Forward and backward by the type of the device."""


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `flash` cannot run on `device` in `dtype`, or None."""
    if device.type != "cuda":
        return "there is no GPU"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash kernel"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None if dtype in (torch.float16, torch.bfloat16) else f"dtype is {dtype}"


def supports_width(width: int) -> bool:
    """Whether the flash kernel supports heads of this width."""
    return width <= 256 and width % 8 == 0


# --- the operator ---


@torch.library.custom_op("realign::forest_attention", mutates_args=())
def forest_attention(
    query: Tensor,  # (T, heads, D)
    key: Tensor,  # (T, groups, D)
    value: Tensor,  # (T, groups, D)
    real: Tensor | None,  # the parts of `Sequences`
    ends: Tensor,
    more: Tensor,
    roots: Tensor,
    more_ends: Tensor,
    root_ends: Tensor,
    longest: int,
    longest_more: int,
    longest_root: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, heads, D), (heads, Q)
    """Attention within each tree, with zeros on padding, and the log-sum-exp of the scores."""
    forward, _ = KERNELS[query.device.type]
    q, k, v = (_real(states, real) for states in (query, key, value))
    out, lse = forward(q, k, v, Spans(ends, ends, longest, longest), scale, True)
    if len(more):
        spans = Spans(more_ends, root_ends, longest_more, longest_root)
        states = select(q, 0, more), select(k, 0, roots), select(v, 0, roots)
        root_out, root_lse = forward(*states, spans, scale, False)
        own_out, own_lse = select(out, 0, more), select(lse, 1, more)
        own_weight = (own_lse - root_lse).sigmoid().t()[..., None]  # of a leaf's own keys
        merged = root_out.to(own_weight.dtype).lerp_(own_out.to(own_weight.dtype), own_weight)
        out.index_copy_(0, more, merged.to(out.dtype))
        lse.index_copy_(1, more, torch.logaddexp(own_lse, root_lse))
    return _with_padding(out, real, query), lse


@torch.library.custom_op("realign::forest_attention_backward", mutates_args=())
def forest_attention_backward(
    grad: Tensor,  # (T, heads, D)
    query: Tensor,  # (T, heads, D)
    key: Tensor,  # (T, groups, D)
    value: Tensor,  # (T, groups, D)
    out: Tensor,  # (T, heads, D)
    lse: Tensor,  # (heads, Q)
    real: Tensor | None,  # the parts of `Sequences`
    ends: Tensor,
    more: Tensor,
    roots: Tensor,
    more_ends: Tensor,
    root_ends: Tensor,
    longest: int,
    longest_more: int,
    longest_root: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, (T, ...).

    Both calls get the merged output and log-sum-exp, so their probabilities cover all keys.
    """
    _, backward = KERNELS[query.device.type]
    g, q, k, v, o = (_real(states, real) for states in (grad, query, key, value, out))
    grads = backward(g, q, k, v, o, lse, Spans(ends, ends, longest, longest), scale, True)
    if len(more):
        spans = Spans(more_ends, root_ends, longest_more, longest_root)
        states = select(g, 0, more), select(q, 0, more), select(k, 0, roots), select(v, 0, roots)
        merged = select(o, 0, more), select(lse, 1, more)
        added = backward(*states, *merged, spans, scale, False)
        # Every row occurs once, so the order of CUDA's atomic additions has no effect.
        for total, rows, part in zip(grads, (more, roots, roots), added, strict=True):
            total.index_add_(0, rows, part)
    dq, dk, dv = (_with_padding(total, real, query) for total in grads)
    return dq, dk, dv


def _real(states: Tensor, real: Tensor | None) -> Tensor:
    return states.contiguous() if real is None else states.index_select(0, real)


def _with_padding(states: Tensor, real: Tensor | None, like: Tensor) -> Tensor:
    if real is None:
        return states
    return states.new_zeros(like.shape[0], *states.shape[1:]).index_copy_(0, real, states)


@forest_attention.register_fake
def _(query, key, value, real, *rest):
    rows = query.shape[0] if real is None else real.shape[0]
    lse = query.new_empty((query.shape[1], rows), dtype=_acc_dtype(query.dtype))
    return query.new_empty(query.shape), lse


@forest_attention_backward.register_fake
def _(grad, *states_and_more):
    return tuple(states.new_empty(states.shape) for states in states_and_more[:3])


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    *tensors, ctx.longest, ctx.longest_more, ctx.longest_root, ctx.scale = inputs
    query, key, value, *parts = tensors
    ctx.save_for_backward(query, key, value, *output, *parts)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    settings = ctx.longest, ctx.longest_more, ctx.longest_root, ctx.scale
    grads = forest_attention_backward(grad, *ctx.saved_tensors, *settings)
    return *grads, *(None for _ in range(10))


forest_attention.register_autograd(_gradients, setup_context=_save)
