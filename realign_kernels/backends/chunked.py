"""The head by chunks: GEMM -> row kernel -> GEMM, over any backend's kernels.

Rows go through the head a chunk at a time, so the largest thing alive is a chunk's logits. Read
`rows` first: it says what happens to a row.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from realign_kernels.backends.base import Head, Kernels, RowStats, Scores, scaled, score
from realign_kernels.backends.chunk_plan import (
    LOGIT,
    E,
    chunk_step,
    default_chunk_rows,
    even_step,
    kept_rows,
)
from realign_kernels.objectives import Objective
from realign_kernels.reference import wide_dtype


class _Chunks:
    """Reads up to `kept` rows, at most `rows` at a time, with one set of buffers."""

    def __init__(
        self,
        kernels: Kernels,
        head: Head,
        rows: int,
        hidden: Tensor,
        *,
        kept: int = 0,  # rows of E; 0: no derivative is wanted
        fused: bool = False,
    ) -> None:
        self.kernels, self.head, self.rows, self.fused = kernels, head, rows, fused
        vocabulary = len(head.weight)
        if fused:  # rows of 16 bytes, as tensor maps want them
            self.logits = None
            self.others = hidden.new_empty(kept, -(-vocabulary // 8) * 8)[:, :vocabulary]
            return
        apart = kept > rows
        self.logits, self.others = kernels.buffers(rows, hidden, vocabulary, kept > 0 and not apart)
        if apart:
            self.others = hidden.new_empty(kept, vocabulary)

    def __enter__(self) -> "_Chunks":
        return self

    def __exit__(self, *_) -> None:
        if self.logits is not None:
            self.kernels.release(self.logits)

    def read(
        self, hidden: Tensor, labels: Tensor, rival: Tensor | None
    ) -> tuple[Scores, Tensor | None]:
        """Scores of the rows and their `others`, which last to the next call."""
        others = None if self.others is None else self.others[: len(hidden)]
        if self.fused:
            return self.kernels.fused(hidden, labels, self.head, others), others
        labels = local_labels(labels, self.head)
        parts = _parts(0, len(hidden), even_step(len(hidden), self.rows))
        found = [
            self._read_rows(hidden[part], labels[part], _at(rival, part), _at(others, part))
            for part in parts
        ]
        stats = found[0] if len(found) == 1 else RowStats(*map(torch.cat, zip(*found, strict=True)))
        return score(stats, self.head.shard), others

    def _read_rows(
        self, hidden: Tensor, labels: Tensor, rival: Tensor | None, others: Tensor | None
    ) -> RowStats:
        """One GEMM and the row kernel."""
        head, logits = self.head, self.logits[: len(hidden)]
        self.kernels.gemm(hidden, head.weight.T, out=logits)
        settings = (head.bias, head.softcap, head.temperature)
        return self.kernels.read_rows(logits, labels, *settings, rival, others)

    def hidden_gradient(self, scores: Scores, others: Tensor, factor: Tensor, out: Tensor) -> None:
        """out = factor * (slope * W[target] - (others W) / total), in fp32 but for the inputs."""
        weight, shard = self.head.weight, self.head.shard
        pull = factor.new_empty(out.shape)
        self.kernels.gemm(others, weight, out=pull)
        if shard is None:
            self.kernels.finish(pull, weight, scores, factor, out)
        else:
            part = torch.empty_like(pull)
            self.kernels.finish(pull, weight, scores, factor, part)
            dist.all_reduce(part, group=shard.group)
            out.copy_(part)


class _Gradients:
    """Sums of the gradients over chunks, in fp32 or wider."""

    def __init__(
        self,
        chunks: _Chunks,
        hidden: Tensor,  # (n, H)
        wanted: tuple[bool, bool, bool],
        one_chunk: bool,
        hidden_dtype: torch.dtype,
    ) -> None:
        weight, bias, wide = chunks.head.weight, chunks.head.bias, wide_dtype(hidden.dtype)
        self.chunks, self.source, self.started = chunks, hidden, False
        want_hidden, want_weight, want_bias = wanted
        self.hidden = hidden.new_empty(hidden.shape, dtype=hidden_dtype) if want_hidden else None
        # A single product is rounded once, as its sum would be: no fp32 copy is needed.
        dtype = weight.dtype if one_chunk else wide
        empty = chunks.kernels.empty
        self.weight = empty(weight.shape, dtype, weight.device) if want_weight else None
        self.bias = bias.new_zeros(len(bias), 2, dtype=wide) if want_bias else None

    def add(self, part: slice, scores: Scores, others: Tensor, grad: Tensor) -> None:
        """Adds what the rows `part` contribute; grad (r,) is d loss / d logp."""
        rows, factor = self.source[part], grad * scores.miss
        gemm, add_rows = self.chunks.kernels.gemm, self.chunks.kernels.add_rows
        if self.hidden is not None:
            self.chunks.hidden_gradient(scores, others, factor, self.hidden[part])
        here = (factor * scores.slope).masked_fill(scores.target < 0, 0)
        target, away = scores.target, -factor / scores.total
        if self.weight is not None:
            pushed = scaled(rows, away, rows.dtype)
            gemm(others.T, pushed, out=self.weight, accumulate=self.started)
            self.started = True
            add_rows(self.weight, target, scaled(rows, here, factor.dtype))
        if self.bias is not None:
            add_rows(self.bias[:, :1], target, here[:, None])
            # Two columns, so that a half-precision factor keeps 16 bits instead of 8.
            high = away.to(rows.dtype)
            columns = torch.stack([high, (away - high).to(rows.dtype)], 1)
            gemm(others.T, columns, out=self.bias, accumulate=True)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of the inputs, but for hidden's; None where not wanted."""
        head, weight = self.chunks.head, self.weight
        if weight is not None and not self.started:
            weight.zero_()
        if weight is not None and weight.dtype != head.weight.dtype:
            narrow = self.chunks.kernels.empty(weight.shape, head.weight.dtype, weight.device)
            weight = narrow.copy_(weight)
        bias = None if self.bias is None else self.bias.sum(1).to(head.bias.dtype)
        return self.hidden, weight, bias


class ChunkedBackend:
    """A backend (`dispatch.Backend`) made of a module's kernels (`rows.Kernels`)."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def fused_loss(self, objective: Objective) -> Callable | None:
        """The kernel that computes this objective from tokens, if there is one."""
        supports = getattr(self.kernels, "supports", None)
        return self.kernels.preference_sums if supports and supports(objective) else None

    def scale(self, values: Tensor, factor: Tensor) -> None:
        """See `rows.Kernels.scale`."""
        self.kernels.scale(values, factor)

    def _fuses(self, hidden: Tensor, head: Head, rival: bool) -> bool:
        fuses = getattr(self.kernels, "fuses", None)
        return fuses is not None and not rival and not head.peak and fuses(hidden, head)

    def span_rows(self, hidden: Tensor, head: Head, rival: bool, chunk_rows: int | None) -> int:
        """Rows that `by_spans` reads at once; a span of more is computed twice."""
        if chunk_rows is not None:
            return chunk_rows
        size = E if self._fuses(hidden, head, rival) else LOGIT + E
        return kept_rows(_limit(head, size), hidden.shape[1], hidden.device)

    def forward(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,)
        rival: Tensor | None,  # (n,) bool
        *,
        chunk_rows: int | None,
        keep_direction: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # (n,), (n,), (n, H)
        """1 GEMM, or 2 with the direction."""
        if not keep_direction and rival is None and hasattr(self.kernels, "head_stats"):
            local = local_labels(labels, head)
            settings = (head.bias, head.softcap, head.temperature)
            scores = score(
                self.kernels.head_stats(hidden, head.weight, local, *settings), head.shard
            )
            return scores.logps, labels, None
        fused = keep_direction and self._fuses(hidden, head, rival is not None)
        limit = chunk_rows or _limit(head, E if fused else LOGIT + E)
        step = chunk_step(len(hidden), limit, hidden.shape[1], hidden.device)
        parts = _parts(0, len(hidden), step)
        logps = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden.dtype))
        targets = torch.empty_like(labels)
        direction = hidden.new_empty(hidden.shape, dtype=logps.dtype) if keep_direction else None
        kept = step if keep_direction else 0
        with _Chunks(self.kernels, head, step, hidden, kept=kept, fused=fused) as chunks:
            for part in parts:
                scores, others = chunks.read(hidden[part], labels[part], _at(rival, part))
                logps[part], targets[part] = scores.logps, scores.target
                if direction is not None:
                    chunks.hidden_gradient(scores, others, scores.miss, direction[part])
        return logps, targets, direction

    def backward(
        self,
        grad: Tensor,  # (n,)
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,) the targets
        *,
        chunk_rows: int | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Recomputes the logits: 1 GEMM, and 1 each for hidden and weight."""
        limit = chunk_rows or _limit(head, LOGIT + E)
        step = chunk_step(len(hidden), limit, hidden.shape[1], hidden.device)
        parts = _parts(0, len(hidden), step)
        with _Chunks(self.kernels, head, step, hidden, kept=step) as chunks:
            gradients = _Gradients(chunks, hidden, wanted, len(parts) == 1, hidden.dtype)
            for part in parts:
                scores, others = chunks.read(hidden[part], labels[part], None)
                gradients.add(part, scores, others, grad[part])
        return gradients.results()

    def by_spans(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,)
        rival: Tensor | None,  # (n,) bool
        lengths: list[int],  # sum n
        slopes: Callable[[int, int, Tensor], Tensor],
        *,
        chunk_rows: int | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Log-probs, targets and gradients in one go, for a loss that is a sum over spans of rows.

        slopes(first, last, logps) is d loss / d logp of the rows of the spans [first, last), from
        their log-probs. The gradient of hidden is wide: it can still be scaled before it is
        rounded. Spans share a chunk as long as they fit; their logits are then computed
        once (3 GEMMs with hidden and weight), those of a longer span twice.
        """
        limit = self.span_rows(hidden, head, rival is not None, chunk_rows)
        fused = self._fuses(hidden, head, rival is not None)
        rows = limit if fused or hidden.device.type != "cuda" else _limit(head, LOGIT + E)
        groups = list(_groups(lengths, limit))
        longest = max((min(stop - start, limit) for _, _, start, stop in groups), default=0)
        logps = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden.dtype))
        targets = torch.empty_like(labels)
        rows = min(rows, longest)
        with _Chunks(self.kernels, head, rows, hidden, kept=longest, fused=fused) as chunks:
            one_chunk = len(groups) == 1 and longest == len(hidden)
            gradients = _Gradients(chunks, hidden, wanted, one_chunk, logps.dtype)

            def read(part: slice) -> tuple[Scores, Tensor]:
                scores, others = chunks.read(hidden[part], labels[part], _at(rival, part))
                logps[part], targets[part] = scores.logps, scores.target
                return scores, others

            for first, last, start, stop in groups:
                span = slice(start, stop)
                if stop - start <= limit:
                    scores, others = read(span)
                    gradients.add(span, scores, others, slopes(first, last, logps[span]))
                    continue
                parts = _parts(start, stop, even_step(stop - start, limit))
                for part in parts:
                    read(part)
                grad = slopes(first, last, logps[span])
                for part in parts:
                    gradients.add(part, *read(part), grad[part.start - start : part.stop - start])
        return logps, targets, gradients.results()


def local_labels(labels: Tensor, head: Head) -> Tensor:
    """The labels in this rank's rows of the head; -1 for those of other ranks."""
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


def _groups(lengths: list[int], limit: int) -> Iterator[tuple[int, int, int, int]]:
    """(first span, last span, first row, last row), ends excluded: together at most `limit` rows.

    A span that is longer stands alone.
    """
    first = start = stop = 0
    for index, length in enumerate(lengths):
        if stop > start and stop - start + length > limit:
            yield first, index, start, stop
            first, start = index, stop
        stop += length
    if stop > start:
        yield first, len(lengths), start, stop
