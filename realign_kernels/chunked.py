"""The head by chunks: GEMM -> row kernel -> GEMM, over any backend's kernels.

Rows go through the head a chunk at a time, so the largest thing alive is a chunk's logits. Read
`rows` first: it says what happens to a row.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from realign_kernels.objectives import Objective
from realign_kernels.reference import wide_dtype
from realign_kernels.rows import Head, Kernels, Scores, score


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose fp32 logits fill 64 MiB (CUDA: 512 MiB), but not fewer than 256 (CUDA: 1024).

    The GEMMs are faster the taller the chunk: on 2 cores at H = 1024, V = 32000 in bf16, 768 rows
    through both GEMMs take 0.32 s in chunks of 32, 0.19 s of 128, 0.15 s of 256 and of 768. From
    256 rows the floor outweighs the budget: for V = 152k it is 150 MiB. CUDA is not measured.
    """
    budget, floor = (512 * 2**20, 1024) if device.type == "cuda" else (64 * 2**20, 256)
    return max(floor, budget // (4 * max(vocabulary, 1)))


def even_step(rows: int, limit: int) -> int:
    """The chunk, at most `limit`, that leaves no short, slow rest: 600 rows at 524 are 2 x 300."""
    return max(1, math.ceil(rows / math.ceil(max(rows, 1) / limit)))


TILE = 128, 256
"""Rows and columns of a GEMM's tile on Hopper."""


def default_fused_rows(vocabulary: int, memory: int) -> int:
    """Rows whose bf16 E fills a 64th of the device's memory, at most 1.25 GiB; at least 1024."""
    return max(1024, min(memory // 64, 5 * 2**28) // (2 * vocabulary))


def filling_step(rows: int, limit: int, width: int, processors: int) -> int:
    """The chunk, at most `limit`, whose product with the weight (a GEMM to `width` columns) leaves
    the fewest multiprocessors idle; of equals the smallest, which leaves the longest rest.

    2,048 x 4,096 are 16 x 16 tiles for 132 multiprocessors: 97 % of two rounds.
    """
    high, wide = TILE
    columns = math.ceil(width / wide)

    def rounds(chunk: int) -> int:
        return math.ceil(math.ceil(chunk / high) * columns / processors)

    least = even_step(rows, limit)
    if least >= rows:
        return max(rows, 1)
    steps = range(math.ceil(least / high) * high, limit + 1, high) or [least]
    return min(steps, key=lambda step: rows // step * rounds(step) + rounds(rows % step))


class _Chunks:
    """Reads chunks of at most `rows` rows with one set of buffers."""

    def __init__(
        self,
        kernels: Kernels,
        head: Head,
        rows: int,
        hidden: Tensor,
        derivative: bool,
        fused: bool = False,
    ) -> None:
        self.kernels, self.head, self.derivative, self.fused = kernels, head, derivative, fused
        vocabulary = len(head.weight)
        if fused:  # rows of 16 bytes, as tensor maps want them
            self.others = hidden.new_empty(rows, -(-vocabulary // 8) * 8)[:, :vocabulary]
        else:
            self.buffers = kernels.buffers(rows, hidden, vocabulary, derivative)

    def __enter__(self) -> "_Chunks":
        return self

    def __exit__(self, *_) -> None:
        if not self.fused:
            self.kernels.release(self.buffers[0])

    def read(self, hidden: Tensor, labels: Tensor, rival: Tensor | None) -> tuple[Scores, Tensor]:
        """One GEMM and the row kernel. `others` (none without derivative) lasts to the next."""
        head = self.head
        if self.fused:
            others = self.others[: len(hidden)]
            return self.kernels.fused(hidden, labels, head, others), others
        logits, others = self.buffers
        logits = logits[: len(hidden)]
        others = others[: len(hidden)] if self.derivative else None
        self.kernels.gemm(hidden, head.weight.T, out=logits)
        labels = local_labels(labels, head)
        settings = (head.bias, head.softcap, head.temperature)
        stats = self.kernels.read_rows(logits, labels, *settings, rival, others)
        return score(stats, head.shard), others

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
            wide = rows.to(factor.dtype)
            pushed = (wide * away[:, None]).to(rows.dtype)
            gemm(others.T, pushed, out=self.weight, accumulate=self.started)
            self.started = True
            add_rows(self.weight, target, wide * here[:, None])
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
        if self._fuses(hidden, head, rival):
            memory, _ = _device(hidden.device)
            # E of 2 H rows is as large as the fp32 sum of two gradients of the weight, which one
            # GEMM over all rows does not need.
            return max(default_fused_rows(len(head.weight), memory), 2 * hidden.shape[1])
        # Twice as tall: fewer examples fall apart, and fewer sums of a V x H gradient are needed.
        return 2 * _limit(head, None)

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
        step = chunk_rows
        if fused and step is None:
            memory, processors = _device(hidden.device)
            limit = default_fused_rows(len(head.weight), memory)
            step = filling_step(len(hidden), limit, hidden.shape[1], processors)
        parts = _parts(0, len(hidden), _limit(head, step), even=not fused)
        logps = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden.dtype))
        targets = torch.empty_like(labels)
        direction = hidden.new_empty(hidden.shape, dtype=logps.dtype) if keep_direction else None
        settings = (head, _longest(parts), hidden, keep_direction, fused)
        with _Chunks(self.kernels, *settings) as chunks:
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
        parts = _parts(0, len(hidden), _limit(head, chunk_rows))
        with _Chunks(self.kernels, head, _longest(parts), hidden, derivative=True) as chunks:
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
        fused = self._fuses(hidden, head, rival is not None)
        limit = self.span_rows(hidden, head, rival is not None, chunk_rows)
        groups = list(_groups(lengths, limit))
        longest = max((min(stop - start, limit) for _, _, start, stop in groups), default=0)
        logps = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden.dtype))
        targets = torch.empty_like(labels)
        with _Chunks(self.kernels, head, longest, hidden, True, fused) as chunks:
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
                for part in _parts(start, stop, limit):
                    read(part)
                grad = slopes(first, last, logps[span])
                for part in _parts(start, stop, limit):
                    gradients.add(part, *read(part), grad[part.start - start : part.stop - start])
        return logps, targets, gradients.results()


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Bytes of memory and multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return properties.total_memory, properties.multi_processor_count


def local_labels(labels: Tensor, head: Head) -> Tensor:
    """The labels in this rank's rows of the head; -1 for those of other ranks."""
    if head.shard is None:
        return labels
    local = labels - head.shard.start
    return local.masked_fill((local < 0) | (local >= len(head.weight)), -1)


def _at(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def _limit(head: Head, chunk_rows: int | None) -> int:
    vocabulary = len(head.weight) if head.shard is None else head.shard.largest
    return chunk_rows or default_chunk_rows(vocabulary, head.weight.device)


def _parts(start: int, stop: int, limit: int, even: bool = True) -> list[slice]:
    step = even_step(stop - start, limit) if even else limit
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _longest(parts: list[slice]) -> int:
    return max((part.stop - part.start for part in parts), default=0)


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
