"""Varlen attention over a forest: one operator call a layer for all trees of all rows.

A root with its first leaf is one causal sequence. Every further leaf is a sequence of queries. Its
keys are those of its root, then its own: query `i` of `n_q` sees key `j` of `n_k` where
`j - n_k <= i - n_q` (causal, aligned at the bottom right). `Sequences` holds the rows of all of
them. It is made with the batch, on the host, so that no layer waits for the device.

`realign::forest_attention` is the operator. On CUDA the flash kernel of torch computes it, in fp16
and bf16; elsewhere `reference` does, which is its definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Sequences(NamedTuple):
    """Sequences of a batch for varlen attention: S of them, Q queries and K keys in T rows.

    Attributes:
        queries: (Q,) int64, rows of the queries by sequence; None where all rows are, in order.
        keys: (K,) int64, rows of the keys by sequence; a root is listed once for each leaf.
        order: (K,) int64, the keys sorted by row.
        bags: (T,) int64, where each row's keys begin in `order`.
        query_ends: (S + 1,) int32, ends of the sequences in `queries`, a zero before them.
        key_ends: (S + 1,) int32, the same in `keys`.
        longest_query: queries of the longest sequence.
        longest_key: keys of the longest sequence.
    """

    queries: Tensor | None
    keys: Tensor
    order: Tensor
    bags: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int

    def to(self, device: torch.device | str) -> Sequences:
        """The same with its tensors on `device`; copies from pinned memory do not block."""
        return Sequences(
            *(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part
              for part in self)
        )  # fmt: skip


def sequences(trees: Sequence[Sequence[Sequence[int]]], columns: int) -> Sequences:
    """Lay out the sequences of trees that follow one another in rows.

    Args:
        trees: for each row its trees in order, each the lengths of its root and leaves.
        columns: tokens in a row, padding at its end included.
    """
    queries, keys = [], []
    for row, inside in enumerate(trees):
        start = row * columns
        for root, first, *more in inside:
            above = np.arange(start, start + root)
            for shared, size in [(above[:0], root + first), *((above, size) for size in more)]:
                own = np.arange(start, start + size)
                queries.append(own)
                keys.append(np.concatenate([shared, own]))
                start += size
    query_rows, key_rows = np.concatenate(queries), np.concatenate(keys)
    rows = len(trees) * columns
    listed = np.bincount(key_rows, minlength=rows)
    return Sequences(
        queries=None if len(query_rows) == rows else torch.from_numpy(query_rows),
        keys=torch.from_numpy(key_rows),
        order=torch.from_numpy(np.argsort(key_rows, kind="stable")),
        bags=torch.from_numpy(np.cumsum(listed) - listed),
        query_ends=_ends(queries),
        key_ends=_ends(keys),
        longest_query=max(map(len, queries)),
        longest_key=max(map(len, keys)),
    )


def _ends(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, parts)]).astype(np.int32))


# --- kernels: arguments as those of flash attention ---


def reference(
    query: Tensor,  # (Q, heads, D)
    key: Tensor,  # (K, groups, D)
    value: Tensor,  # (K, groups, D)
    query_ends: Tensor,  # (S + 1,) int32
    key_ends: Tensor,  # (S + 1,) int32
    longest_query: int,
    longest_key: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (Q, heads, D), (heads, Q)
    """Softmax attention of each sequence and its log-sum-exp, in fp32 at least: the definition."""
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1::-1], dtype=_wide(query.dtype))
    for q, k, scores in _scores(query, key, query_ends, key_ends, scale):
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
    query_ends: Tensor,  # (S + 1,) int32
    key_ends: Tensor,  # (S + 1,) int32
    longest_query: int,
    longest_key: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: dS = P (dP - sum(dO O)), as in arXiv 2205.14135."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for q, k, scores in _scores(query, key, query_ends, key_ends, scale):
        wide, groups = scores.dtype, key.shape[1]
        p = (scores - lse[:, q].unflatten(0, (groups, -1))[..., None]).exp()
        (dout, o, qs) = (t[q].to(wide).unflatten(1, (groups, -1)) for t in (grad, out, query))
        dp = torch.einsum("qgrd,kgd->grqk", dout, value[k].to(wide))
        ds = scale * p * (dp - torch.einsum("qgrd,qgrd->grq", dout, o)[..., None])
        grads[0][q] = torch.einsum("grqk,kgd->qgrd", ds, key[k].to(wide)).flatten(1, 2)
        grads[1][k] = torch.einsum("grqk,qgrd->kgd", ds, qs)
        grads[2][k] = torch.einsum("grqk,qgrd->kgd", p, dout)
    return grads


def _scores(
    query: Tensor, key: Tensor, query_ends: Tensor, key_ends: Tensor, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each sequence its queries, its keys, and its scores, (groups, heads / groups, q, k)."""
    spans = [[slice(*span) for span in zip(ends, ends[1:], strict=False)]
             for ends in (query_ends.tolist(), key_ends.tolist())]  # fmt: skip
    for q, k in zip(*spans, strict=True):
        wide, keys = _wide(query.dtype), key[k]
        grouped = query[q].unflatten(1, (key.shape[1], -1))
        scores = scale * torch.einsum("qgrd,kgd->grqk", grouped.to(wide), keys.to(wide))
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device)
        yield q, k, scores.masked_fill(~seen.tril(len(keys) - len(grouped)), -torch.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def flash(
    query: Tensor,  # (Q, heads, D) fp16 or bf16
    key: Tensor,  # (K, groups, D)
    value: Tensor,  # (K, groups, D)
    query_ends: Tensor,  # (S + 1,) int32
    key_ends: Tensor,  # (S + 1,) int32
    longest_query: int,
    longest_key: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (Q, heads, D), (heads, Q) fp32
    """torch's flash kernel, that of `torch.nn.attention.varlen.varlen_attn`.

    Its aten operators are called, as `varlen_attn` exposes its backward to its own autograd only,
    and needs `enable_gqa` in torch 2.13, which 2.11 lacks. They align causal masks at the bottom
    right (flash-attn 2.1 and later; `torch.nn.attention.bias.causal_lower_right` relies on it).
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, query_ends, key_ends, longest_query, longest_key,
        0.0, True, False, scale=scale,
    )  # fmt: skip
    return out, lse


def flash_backward(
    grad: Tensor,  # (Q, heads, D) fp16 or bf16
    query: Tensor,  # (Q, heads, D)
    key: Tensor,  # (K, groups, D)
    value: Tensor,  # (K, groups, D)
    out: Tensor,  # (Q, heads, D)
    lse: Tensor,  # (heads, Q) fp32
    query_ends: Tensor,  # (S + 1,) int32
    key_ends: Tensor,  # (S + 1,) int32
    longest_query: int,
    longest_key: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `flash`, in an order that repeats: a resumed run gives the same bits.

    By default the kernel adds up the gradient of the query with atomics.
    """
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)
    with _deterministic():
        return torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, query_ends, key_ends, longest_query, longest_key,
            0.0, True, *no_dropout, scale=scale,
        )  # fmt: skip


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's deterministic mode, process-wide, without its filling of fresh memory."""
    before, settings = torch.get_deterministic_debug_mode(), torch.utils.deterministic
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = filled


KERNELS = {"cpu": (reference, reference_backward), "cuda": (flash, flash_backward)}
"""Forward and backward by the type of the device."""


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `flash` cannot run on `device` in `dtype`; None where it can."""
    if device.type != "cuda":
        return "there is no GPU"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash kernel"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None if dtype in (torch.float16, torch.bfloat16) else f"dtype is {dtype}"


def takes(width: int) -> bool:
    """Whether the flash kernel computes heads of this width."""
    return width <= 256 and width % 8 == 0


# --- the operator ---


@torch.library.custom_op("realign::forest_attention", mutates_args=())
def forest_attention(
    query: Tensor,  # (T, heads, D)
    key: Tensor,  # (T, groups, D)
    value: Tensor,  # (T, groups, D)
    queries: Tensor | None,  # the parts of `Sequences`
    keys: Tensor,
    order: Tensor,
    bags: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, heads, D), (heads, Q)
    """Attention within each sequence, zeros on padding; and the log-sum-exp of the scores."""
    forward, _ = KERNELS[query.device.type]
    out, lse = forward(
        _real(query, queries),
        key.index_select(0, keys),
        value.index_select(0, keys),
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scale,
    )
    return _with_padding(out, queries, query), lse


@torch.library.custom_op("realign::forest_attention_backward", mutates_args=())
def forest_attention_backward(
    grad: Tensor,  # (T, heads, D)
    query: Tensor,  # (T, heads, D)
    key: Tensor,  # (T, groups, D)
    value: Tensor,  # (T, groups, D)
    out: Tensor,  # (T, heads, D)
    lse: Tensor,  # (heads, Q)
    queries: Tensor | None,  # the parts of `Sequences`
    keys: Tensor,
    order: Tensor,
    bags: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, (T, ...); those of a root's copies are added up."""
    _, backward = KERNELS[query.device.type]
    found, *copies = backward(
        _real(grad, queries),
        _real(query, queries),
        key.index_select(0, keys),
        value.index_select(0, keys),
        _real(out, queries),
        lse,
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scale,
    )
    # A sum for each row in one order, with one thread an element and in fp32 on CUDA; index_add
    # would add copies in any order, and index_put sorts the index in every layer.
    sums = (F.embedding_bag(order, grads.flatten(1), bags, mode="sum") for grads in copies)
    return _with_padding(found, queries, query), *(s.view_as(key) for s in sums)


def _real(states: Tensor, queries: Tensor | None) -> Tensor:
    return states.contiguous() if queries is None else states.index_select(0, queries)


def _with_padding(states: Tensor, queries: Tensor | None, like: Tensor) -> Tensor:
    if queries is None:
        return states
    return like.new_zeros(like.shape).index_copy_(0, queries, states)


@forest_attention.register_fake
def _(query, key, value, queries, *rest):
    real = query.shape[0] if queries is None else queries.shape[0]
    lse = query.new_empty((query.shape[1], real), dtype=_wide(query.dtype))
    return query.new_empty(query.shape), lse


@forest_attention_backward.register_fake
def _(grad, *states_and_more):
    return tuple(states.new_empty(states.shape) for states in states_and_more[:3])


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    *tensors, ctx.longest_query, ctx.longest_key, ctx.scale = inputs
    query, key, value, *parts = tensors
    ctx.save_for_backward(query, key, value, *output, *parts)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    settings = ctx.longest_query, ctx.longest_key, ctx.scale
    found = forest_attention_backward(grad, *ctx.saved_tensors, *settings)
    return *found, *(None for _ in range(9))


forest_attention.register_autograd(_gradients, setup_context=_save)
