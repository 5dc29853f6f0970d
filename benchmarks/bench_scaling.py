"""Benchmark of the head's scaling with N, T, V and ranks.

It runs one forward and backward of the rDPO loss: ours and two common implementations, in fp32 on a
CPU and in bf16 on CUDA. Each axis changes one number of `case`:

- N (response rows) and V (vocabulary): every contestant gets only the response rows.
- T (length of a sequence with its image tokens): image and prompt rows precede the response. Each
  library treats them as it does for its users.
- ranks: 1 and 2 CPU processes of one thread, over gloo, share one batch. They split the vocabulary
  (`group=`), or the examples, and then average the weight's gradient. The time is that of the
  slower process. `speedup` has the quartiles of one process (without collectives) over the ranks.

`bytes` has the definition of `bench_memory.py`, with a process per point. The last point of an axis
has `slope`, for time (of the fastest rounds) and memory. It is the exponent of a power law, fitted
to all points. Losses and gradients are compared with fp64 before timing.
"""

import functools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import contestants
from benchmarks.bench_head import ALLOWED, PROMPT, RESPONSE, Case, Shape, make
from benchmarks.contestants import BETA, DEVICE, EAGER, OURS, TRL, relative
from benchmarks.race import race
from benchmarks.step_contestants import Worker
from realign_kernels import rdpo_loss

NAMES = (OURS, EAGER, TRL)
BASE = Shape("random", 256, 8192, 1, dtype="bf16" if DEVICE == "cuda" else "fp32")
AXES = {  # changes of the shape at a value, values of the default run, more of `-m full`
    "N": (lambda n: {"examples": n // (3 * RESPONSE)}, [192, 384, 768], [1536, 3072]),
    "T": (lambda t: {"image_tokens": t - PROMPT - RESPONSE}, [192, 384, 768], [1536, 3072]),
    "V": (lambda v: {"V": v}, [4096, 8192, 16384], [65536, 262144]),
}
SPLIT = replace(BASE, examples=4, dtype="fp32")
"""Batch that the ranks share."""
RANKS, HEADS, KINDS = (1, 2), ("trainable", "frozen"), ("vocabulary-parallel", "data-parallel")


def points():
    """(axis, value, contestant) of every benchmark, except those of ranks."""
    for axis, (_, small, large) in AXES.items():
        for value in (*small, *large):
            slow = () if value in small or DEVICE == "cuda" else pytest.mark.slow
            for name in NAMES:
                yield pytest.param(axis, value, name, marks=slow, id=f"{axis}-{value}-{name}")


case_of = functools.lru_cache(maxsize=1)(Case)


@pytest.fixture(scope="module")
def fit():
    """fit(benchmark, value): fits the contestant's slope and stores it at this point."""
    found: dict[tuple, list] = {}

    def of(benchmark, value):
        if benchmark.stats is None:  # --benchmark-disable
            return
        info = benchmark.extra_info
        line = found.setdefault(
            (info["case"]["axis"], info["case"]["head"], info["contestant"]), []
        )
        line.append((value, benchmark.stats.stats.min, info))
        if len(line) > 1:
            line[-2][2].pop("slope", None)
            values, seconds, infos = zip(*line, strict=True)
            measured = {"time": seconds, "memory": [one.get("bytes") for one in infos]}
            info["slope"] = {
                what: float(np.polyfit(np.log(values), np.log(numbers), 1)[0])
                for what, numbers in measured.items()
                if None not in numbers
            }

    return of


@pytest.mark.parametrize(("axis", "value", "name"), list(points()))
def test_scaling(benchmark, fit, peak_of, axis, value, name):
    shape = replace(BASE, **AXES[axis][0](value))
    loss, mine = make(name, shape.dtype), contestants.ours()
    case = case_of(shape)
    error = case.error(loss)
    if name == OURS:
        assert max(error.values()) < ALLOWED[shape.dtype], error
    race(
        benchmark,
        f"scaling, {axis} = {value}",
        case=shape.case | {"T": case.labels.shape[-1], "axis": axis, "value": value},
        contestant=name,
        call=lambda: case.step(loss),
        ours=lambda: case.step(mine),
        budget=0.6,
        error=error,
        bytes=peak_of(name, shape),
    )
    fit(benchmark, value)


class Share:
    """Part of the batch on this rank. A single rank has all of it and calls no collectives."""

    def __init__(self, kind: str, head: str, rank: int, size: int) -> None:
        self.group = None if size == 1 else dist.group.WORLD
        self.size, self.vocabulary = size, kind == "vocabulary-parallel"
        whole = case_of(replace(SPLIT, head=head))
        loss, of_hidden, of_weight = (None if t is None else t.cpu() for t in whole.truth)
        examples, words = slice(rank, None, size), slice(None)
        if self.vocabulary:
            share = SPLIT.V // size
            examples, words = slice(None), slice(rank * share, (rank + 1) * share)
        self.hidden, self.labels = (t.cpu()[:, examples] for t in (whole.hidden, whole.labels))
        self.hidden, self.labels = self.hidden.contiguous(), self.labels.contiguous()
        self.weight, self.trainable = whole.weight.cpu()[words].contiguous(), whole.trainable
        of_hidden = of_hidden.view(whole.hidden.shape)[:, examples]
        self.truth = loss, of_hidden, None if of_weight is None else of_weight[words]
        self.references = torch.zeros(self.labels.shape[:2])

    def step(self):
        """Loss of the batch, and gradients of this rank's hidden states and weight."""
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(self.trainable)
        group = self.group if self.vocabulary else None
        inputs = (hidden, weight, self.labels, self.references)
        loss = rdpo_loss(*inputs, beta=BETA, group=group).loss
        loss.backward()
        if self.group is not None and not self.vocabulary and self.trainable:
            dist.all_reduce(weight.grad)
            weight.grad /= self.size
        return loss.detach(), hidden.grad, weight.grad

    def error(self) -> dict[str, float]:
        """Relative errors as in `bench_head`, after the mean over examples of all ranks."""
        loss, hidden, weight = self.step()
        if self.group is not None and not self.vocabulary:
            dist.all_reduce(loss)
            loss, hidden = loss / self.size, hidden / self.size
        pairs = zip((loss, hidden, weight), self.truth, strict=True)
        off = [relative(a, b) for a, b in pairs if b is not None]
        return {"loss": off[0], "gradient": max(off[1:])}

    def seconds(self) -> float:
        if self.group is not None:
            dist.barrier()
        began = time.perf_counter()
        self.step()
        return time.perf_counter() - began


def serve_rank(rank: int, store: str, pipe) -> None:
    """Worker process: calls a method of `Share` per message (method, kind, head, size)."""
    torch.set_num_threads(1)
    store = dist.FileStore(store, max(RANKS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=max(RANKS))
    share = functools.lru_cache(maxsize=2)(Share)  # one rank and all ranks alternate
    while True:
        method, kind, head, size = pipe.recv()
        pipe.send(getattr(share(kind, head, rank, size), method)())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks(method, kind, head, size): answers of `size` ranks."""
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    workers = [Worker(serve_rank, rank, store) for rank in range(max(RANKS))]

    def call(*message):
        for worker in workers[: message[-1]]:
            worker.pipe.send(message)
        return [worker.read() for worker in workers[: message[-1]]]

    yield call
    for worker in workers:
        worker.close()


@pytest.mark.parametrize(
    ("kind", "head", "size"),
    [
        pytest.param(kind, head, size, marks=pytest.mark.slow if head == "frozen" else ())
        for head in HEADS
        for kind in KINDS
        for size in RANKS
    ],
)
def test_ranks(benchmark, fit, ranks, kind, head, size):
    errors = ranks("error", kind, head, size)
    error = {what: max(one[what] for one in errors) for what in errors[0]}
    assert all(value < ALLOWED["fp32"] for value in error.values()), error
    seconds = {n: lambda n=n: max(ranks("seconds", kind, head, n)) for n in RANKS}
    race(
        benchmark,
        f"scaling, ranks = {size}, {kind}, {head}",
        case=replace(SPLIT, head=head).case | {"T": RESPONSE, "axis": "ranks", "value": size},
        contestant=f"ours, {kind}",
        role="ours",
        call=seconds[size],
        ours=None if size == 1 else seconds[1],
        budget=1.5,
        error=error,
    )
    ratio = benchmark.extra_info.pop("ratio", None)  # ours over ours
    if ratio is not None:
        benchmark.extra_info["speedup"] = [1 / r for r in reversed(ratio)]
    fit(benchmark, size)
