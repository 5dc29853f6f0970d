"""The chunked head: GEMM -> row kernel -> GEMM over the kernels of any backend.

It processes one chunk of rows at a time, so the largest live tensor is the logits of one chunk.
`base` defines the statistics of a row.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from realign_kernels.backends.base import (
    Backend,
    Gradients,
    NeedsGrad,
    RowStats,
    Scores,
    scaled,
    score,
)
from realign_kernels.backends.chunk_plan import (
    LOGIT,
    E,
    chunk_step,
    default_chunk_rows,
    even_step,
    kept_rows,
)
from realign_kernels.backends.torch import TorchKernels
from realign_kernels.lm_head import Head
from realign_kernels.objectives import Objective
from realign_kernels.reference import acc_dtype


class _Chunks:
    """Scores up to `kept` rows, at most `rows` at a time, with one set of buffers."""

    def __init__(
        self,
        kernels: TorchKernels,
        head: Head,
        rows: int,
        hidden: Tensor,
        *,
        kept: int = 0,  # rows of E; 0: no derivative is needed
        fused: bool = False,
    ) -> None:
        self.kernels, self.head, self.rows, self.fused = kernels, head, rows, fused
        vocabulary = len(head.weight)
        self.logits: Tensor | None = None
        self.exp_logits: Tensor | None = None
        if fused:  # tensor maps need rows that are a multiple of 16 bytes
            padded = hidden.new_empty(kept, -(-vocabulary // 8) * 8)
            self.exp_logits = padded[:, :vocabulary]
            return
        apart = kept > rows
        derivative = kept > 0 and not apart
        self.logits, self.exp_logits = kernels.buffers(rows, hidden, vocabulary, derivative)
        if apart:
            self.exp_logits = hidden.new_empty(kept, vocabulary)

    def __enter__(self) -> "_Chunks":
        return self

    def __exit__(self, *_) -> None:
        if self.logits is not None:
            self.kernels.release(self.logits)

    def score(self, hidden: Tensor, labels: Tensor, runner_up: Tensor | None) -> Scores:
        """Scores of the rows. `exp_logits` holds their E until the next call."""
        if self.fused:
            assert self.exp_logits is not None
            return self.kernels.fused(hidden, labels, self.head, self.exp_logits[: len(hidden)])
        labels = local_labels(labels, self.head)
        parts = _parts(0, len(hidden), even_step(len(hidden), self.rows))
        stats = [
            self._row_stats(
                hidden[part], labels[part], _at(runner_up, part), _at(self.exp_logits, part)
            )
            for part in parts
        ]
        whole = stats[0] if len(stats) == 1 else RowStats(*map(torch.cat, zip(*stats, strict=True)))
        return score(whole, self.head.shard)

    def _row_stats(
        self, hidden: Tensor, labels: Tensor, runner_up: Tensor | None, exp_logits: Tensor | None
    ) -> RowStats:
        """One GEMM and the row kernel."""
        assert self.logits is not None
        head, logits = self.head, self.logits[: len(hidden)]
        self.kernels.gemm(hidden, head.weight.T, out=logits)
        settings = (head.bias, head.softcap, head.temperature)
        return self.kernels.row_stats(logits, labels, *settings, runner_up, exp_logits)

    def hidden_grad(self, scores: Scores, factor: Tensor, out: Tensor) -> None:
        """Gradient of the hidden states that were scored last, computed in fp32 from its inputs.

        out = factor * (dz_dlogit * W[target] - (E W) / sum_exp)
        """
        weight, shard = self.head.weight, self.head.shard
        exp_w = factor.new_empty(out.shape)
        self.kernels.gemm(self.exp_logits_of(scores), weight, out=exp_w)
        if shard is None:
            self.kernels.hidden_grad_epilogue(exp_w, weight, scores, factor, out)
        else:
            part = torch.empty_like(exp_w)
            self.kernels.hidden_grad_epilogue(exp_w, weight, scores, factor, part)
            dist.all_reduce(part, group=shard.group)
            out.copy_(part)

    def exp_logits_of(self, scores: Scores) -> Tensor:
        """E of the rows that were scored last."""
        assert self.exp_logits is not None
        return self.exp_logits[: len(scores.logps)]


class _Sums:
    """Sums of the gradients over chunks, in fp32 or wider."""

    def __init__(
        self,
        chunks: _Chunks,
        hidden: Tensor,  # (n, H)
        needs_grad: NeedsGrad,
        one_chunk: bool,
        hidden_dtype: torch.dtype,
    ) -> None:
        weight, bias, acc = chunks.head.weight, chunks.head.bias, acc_dtype(hidden.dtype)
        self.chunks, self.source, self.started = chunks, hidden, False
        self.hidden = hidden.new_empty(hidden.shape, dtype=hidden_dtype) if needs_grad[0] else None
        # One chunk is a single product, rounded once. It needs no fp32 sum.
        dtype = weight.dtype if one_chunk else acc
        empty = chunks.kernels.empty
        self.weight = empty(tuple(weight.shape), dtype, weight.device) if needs_grad[1] else None
        self.bias: Tensor | None = None
        if needs_grad[2]:
            assert bias is not None
            self.bias = bias.new_zeros(len(bias), 2, dtype=acc)

    def add(self, part: slice, scores: Scores, grad_logps: Tensor) -> None:
        """Add the gradients of the rows `part`, which were scored last."""
        rows, factor = self.source[part], grad_logps * scores.one_minus_p
        kernels, exp_logits = self.chunks.kernels, self.chunks.exp_logits_of(scores)
        if self.hidden is not None:
            self.chunks.hidden_grad(scores, factor, self.hidden[part])
        here = (factor * scores.dz_dlogit).masked_fill(scores.target < 0, 0)
        target, away = scores.target, -factor / scores.sum_exp
        if self.weight is not None:
            pushed = scaled(rows, away, rows.dtype)
            kernels.gemm(exp_logits.T, pushed, out=self.weight, accumulate=self.started)
            self.started = True
            kernels.add_rows(self.weight, target, scaled(rows, here, factor.dtype))
        if self.bias is not None:
            kernels.add_rows(self.bias[:, :1], target, here[:, None])
            # Two columns give a half-precision factor 16 bits of precision instead of 8.
            high = away.to(rows.dtype)
            columns = torch.stack([high, (away - high).to(rows.dtype)], 1)
            kernels.gemm(exp_logits.T, columns, out=self.bias, accumulate=True)

    def gradients(self) -> Gradients:
        """Gradients in the dtypes of the inputs, except that of hidden, which is wide."""
        weight, dtype = self.weight, self.chunks.head.weight.dtype
        if weight is not None and not self.started:
            weight.zero_()
        if weight is not None and weight.dtype != dtype:
            weight = self.chunks.kernels.empty(tuple(weight.shape), dtype, weight.device).copy_(
                weight
            )
        bias = None if self.bias is None else self.bias.sum(1).to(dtype)
        return self.hidden, weight, bias


class ChunkedBackend(Backend):
    """The backend over the kernels of torch, C++ or Triton."""

    def __init__(self, kernels: TorchKernels) -> None:
        self.kernels = kernels

    def fused_loss(self, objective: Objective) -> Callable | str:
        return self.kernels.fused_loss(objective)

    def scale(self, values: Tensor, factor: Tensor) -> None:
        self.kernels.scale(values, factor)

    def _fuses(self, hidden: Tensor, head: Head, runner_up: bool) -> bool:
        return not runner_up and not head.shift_by_max and self.kernels.fuses(hidden, head)

    def example_rows(
        self, hidden: Tensor, head: Head, runner_up: bool, chunk_rows: int | None
    ) -> int:
        """Number of rows scored at once by example. A longer example is scored twice."""
        if chunk_rows is not None:
            return chunk_rows
        size = E if self._fuses(hidden, head, runner_up) else LOGIT + E
        return kept_rows(_limit(head, size), hidden.shape[1], hidden.device)

    def forward(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,)
        runner_up: Tensor | None,  # (n,) bool
        *,
        chunk_rows: int | None,
        keep_dlogp_dh: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # (n,), (n,), (n, H)
        """Log-probs, targets and dlogp_dh: 1 GEMM, or 2 with dlogp_dh."""
        if not keep_dlogp_dh and runner_up is None:
            stats = self.kernels.head_stats(hidden, local_labels(labels, head), head)
            if stats is not None:
                return score(stats, head.shard).logps, labels, None
        fused = keep_dlogp_dh and self._fuses(hidden, head, runner_up is not None)
        limit = chunk_rows or _limit(head, E if fused else LOGIT + E)
        step = chunk_step(len(hidden), limit, hidden.shape[1], hidden.device)
        logps = hidden.new_empty(len(hidden), dtype=acc_dtype(hidden.dtype))
        targets = torch.empty_like(labels)
        dlogp_dh = hidden.new_empty(hidden.shape, dtype=logps.dtype) if keep_dlogp_dh else None
        kept = step if keep_dlogp_dh else 0
        with _Chunks(self.kernels, head, step, hidden, kept=kept, fused=fused) as chunks:
            for part in _parts(0, len(hidden), step):
                scores = chunks.score(hidden[part], labels[part], _at(runner_up, part))
                logps[part], targets[part] = scores.logps, scores.target
                if dlogp_dh is not None:
                    chunks.hidden_grad(scores, scores.one_minus_p, dlogp_dh[part])
        return logps, targets, dlogp_dh

    def backward(
        self,
        grad: Tensor,  # (n,)
        hidden: Tensor,  # (n, H)
        head: Head,
        targets: Tensor,  # (n,)
        *,
        chunk_rows: int | None,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        """Gradients from recomputed logits: 1 GEMM, and 1 each for hidden and weight."""
        limit = chunk_rows or _limit(head, LOGIT + E)
        step = chunk_step(len(hidden), limit, hidden.shape[1], hidden.device)
        parts = _parts(0, len(hidden), step)
        with _Chunks(self.kernels, head, step, hidden, kept=step) as chunks:
            sums = _Sums(chunks, hidden, needs_grad, len(parts) == 1, hidden.dtype)
            for part in parts:
                scores = chunks.score(hidden[part], targets[part], None)
                sums.add(part, scores, grad[part])
        return sums.gradients()

    def forward_backward_by_example(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,)
        runner_up: Tensor | None,  # (n,) bool
        lengths: list[int],  # rows of each example, sum n
        grad_logps_fn: Callable[[int, int, Tensor], Tensor],
        *,
        chunk_rows: int | None,
        needs_grad: NeedsGrad,
    ) -> tuple[Tensor, Tensor, Gradients]:  # (n,), (n,)
        """Log-probs, targets and gradients in one pass: 3 GEMMs with hidden and weight.

        Examples share a chunk if they fit. An example longer than a chunk needs a second GEMM for
        its logits.
        """
        limit = self.example_rows(hidden, head, runner_up is not None, chunk_rows)
        fused = self._fuses(hidden, head, runner_up is not None)
        groups = list(_groups(lengths, limit))
        longest = max((min(rows.stop - rows.start, limit) for _, _, rows in groups), default=0)
        step = limit if fused or hidden.device.type != "cuda" else _limit(head, LOGIT + E)
        logps = hidden.new_empty(len(hidden), dtype=acc_dtype(hidden.dtype))
        targets = torch.empty_like(labels)
        one_chunk = len(groups) == 1 and longest == len(hidden)
        with _Chunks(
            self.kernels, head, min(step, longest), hidden, kept=longest, fused=fused
        ) as chunks:
            sums = _Sums(chunks, hidden, needs_grad, one_chunk, logps.dtype)
            for first, last, rows in groups:
                size = rows.stop - rows.start
                parts = _parts(rows.start, rows.stop, even_step(size, limit))
                for part in parts:
                    scores = chunks.score(hidden[part], labels[part], _at(runner_up, part))
                    logps[part], targets[part] = scores.logps, scores.target
                grad_logps = grad_logps_fn(first, last, logps[rows])
                for part in parts:
                    if len(parts) > 1:  # a later part has overwritten this E
                        scores = chunks.score(hidden[part], labels[part], _at(runner_up, part))
                    here = slice(part.start - rows.start, part.stop - rows.start)
                    sums.add(part, scores, grad_logps[here])
        return logps, targets, sums.gradients()


def local_labels(labels: Tensor, head: Head) -> Tensor:
    """Labels as indices into this rank's rows of the head, -1 for labels of other ranks."""
    if head.shard is None:
        return labels
    local = labels - head.shard.start
    return local.masked_fill((local < 0) | (local >= len(head.weight)), -1)


def _at(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def _limit(head: Head, size: int) -> int:
    vocabulary = len(head.weight) if head.shard is None else head.shard.largest
    return default_chunk_rows(vocabulary, head.weight.device, size)


def _parts(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _groups(lengths: list[int], limit: int) -> Iterator[tuple[int, int, slice]]:
    """Groups of consecutive examples with at most `limit` rows, ends excluded.

    Yields (first example, last example, rows). A longer example is a separate group.
    """
    first = start = stop = 0
    for index, length in enumerate(lengths):
        if stop > start and stop - start + length > limit:
            yield first, index, slice(start, stop)
            first, start = index, stop
        stop += length
    if stop > start:
        yield first, len(lengths), slice(start, stop)
