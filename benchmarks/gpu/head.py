"""Head benchmark of the GPU check: rDPO forward and backward, and log-probs only.

The limit is the same GEMMs by torch, in the same chunks. Ours and the limit run first for all
shapes, so that the time limit cuts only peers. Limit and peers alternate with rounds of ours, so
that all run at the same clock. `ratio` is the median of theirs / ours.
"""

from collections.abc import Container
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.contestants import CONTESTANTS, EAGER, OURS, forward_backward, gemms, relative
from benchmarks.gpu import truth
from benchmarks.gpu.measure import figures
from benchmarks.gpu.record import Record
from benchmarks.results import LIMIT

ROUNDS = 0.2
"""Seconds for the rounds of a contestant, of which it runs at least three."""
FROZEN, TRAINED, LOGPS = "frozen", "trained", "log-probs"
PEERS = {kind: [name for name in CONTESTANTS if name != OURS] for kind in (FROZEN, TRAINED)} | {
    LOGPS: ["ours, torch backend", EAGER]
}


class Shape(NamedTuple):
    """Examples (three sequences each), response tokens, and the head's width and vocabulary."""

    examples: int
    response: int
    H: int
    V: int

    @property
    def rows(self) -> int:
        return 3 * self.examples * self.response

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.H}x{self.V}"


TO_BEAT = (Shape(42, 65, 4096, 151936), Shape(21, 65, 4096, 128256))
"""The 8192 and 4096 rows of published results, rounded to whole examples."""
SHAPES = TO_BEAT + tuple(
    Shape(roofline.EXAMPLES, roofline.RESPONSE, *head) for head in roofline.SHAPES.values()
)
TOYS = (Shape(2, 4, 16, 97), Shape(1, 3, 8, 61))


def absent() -> dict[str, str]:
    """Contestants that cannot be made on this machine, with the reason."""
    found = {}
    for name, make in CONTESTANTS.items():
        try:
            make()
        except (ImportError, AttributeError) as error:
            found[name] = str(error)
    return found


def cases(shapes: tuple[Shape, ...], without: Container[str]) -> dict[str, tuple[Shape, str, str]]:
    """(shape, kind, contestant) by case name, most valuable first."""
    kinds = (FROZEN, TRAINED, LOGPS)
    order = [(s, k, name) for s in shapes for k in kinds for name in (LIMIT, OURS)]
    peers = {kind: [name for name in PEERS[kind] if name not in without] for kind in kinds}
    order += [(s, k, name) for s in shapes for k in kinds for name in peers[k]]
    return {f"{s.name} {kind}/{name}": (s, kind, name) for s, kind, name in order}


@cache
def batch_of(shape: Shape, device: str) -> truth.Preference:
    """Inputs of a shape. The cache of all shapes takes 6 GB."""
    return truth.preference(*shape, torch.bfloat16, device)


@cache
@torch.enable_grad()  # the first caller may be a log-probs case without gradients
def truth_of(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 loss and gradients of a shape, cached in fp32 (12 GB for all shapes).

    bf16 gradients have errors of 1.6e-3, and rounding the exact ones to fp32 adds 6e-8.
    """
    batch = batch_of(shape, device)
    loss, exact = truth.preference_truth(batch)
    return loss, exact.hidden.float().view(batch.hidden.shape), exact.weight.float()


def measure(device: str, shape: Shape, kind: str, name: str) -> dict[str, float]:
    """Time, memory and errors of one contestant."""
    batch = batch_of(shape, device)
    settings = {"trainable": kind == TRAINED, "derivative": kind != LOGPS}
    ours = partial(forward_backward, CONTESTANTS[OURS](), *batch, **settings)
    if name == LIMIT:
        call, found = gemms(batch.hidden.flatten(0, -2), batch.weight, **settings), {}
    else:
        call = partial(forward_backward, CONTESTANTS[name](), *batch, **settings)
        pairs = zip(("loss", "hidden", "weight"), call(), truth_of(shape, device), strict=True)
        found = {f"{what}_error": relative(a, b) for what, a, b in pairs if a is not None}
    return figures(call, device, ROUNDS, None if name == OURS else ours) | found


def run(record: Record) -> None:
    """Runs all cases. The case "absent" lists peers that are not installed."""
    if record.rehearse:
        torch._dynamo.config.disable = True  # Liger and CCE compile for a minute on a CPU
    lacking = absent()
    if lacking:
        record.each({"absent": lambda: lacking})
    todo = cases(TOYS if record.rehearse else SHAPES, lacking)
    for case in record.missing(todo):
        shape, kind, name = todo[case]
        with record.attempt(case), torch.set_grad_enabled(kind != LOGPS):
            record(case, **measure(record.device, shape, kind, name))
