"""The head against its limit and its peers: forward and backward of rDPO, and log-probs only.

Times are in u, one GEMM of 2 N H V FLOP at the rate that this card reaches. Ours and the limit come
first for all shapes, then the peers, so that a cut costs peers. A peer takes turns with ours, and
its `ratio` is the median of theirs / ours.
"""

from collections.abc import Container
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.contestants import CONTESTANTS, EAGER, OURS, Loss, gemms
from benchmarks.contestants import LIMIT as GEMMS
from benchmarks.gpu import truth
from benchmarks.gpu.measure import GEMM_SIZE, figures, gemm_rate, ratio
from benchmarks.gpu.record import Record

LIMIT = 120.0
FROZEN, TRAINED, LOGPS = "frozen", "trained", "log-probs"
PEERS = {kind: [name for name in CONTESTANTS if name != OURS] for kind in (FROZEN, TRAINED)} | {
    LOGPS: ["ours, torch backend", EAGER]
}


class Shape(NamedTuple):
    """Examples of three sequences, tokens in each; width and vocabulary of the head."""

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
"""8192 and 4096 rows of published results, in whole examples."""
SHAPES = TO_BEAT + tuple(
    Shape(roofline.EXAMPLES, roofline.RESPONSE, *head) for head in roofline.SHAPES.values()
)
TOYS = (Shape(2, 4, 16, 97), Shape(1, 3, 8, 61))


def absent() -> dict[str, str]:
    """Contestants that this machine lacks, with the reason."""
    found = {}
    for name, make in CONTESTANTS.items():
        try:
            make()
        except (ImportError, AttributeError) as error:
            found[name] = str(error)
    return found


def cases(shapes: tuple[Shape, ...], without: Container[str]) -> dict[str, tuple[Shape, str, str]]:
    """(shape, kind, contestant) by name, most valuable first."""
    kinds = (FROZEN, TRAINED, LOGPS)
    order = [(s, k, name) for s in shapes for k in kinds for name in (GEMMS, OURS)]
    peers = {kind: [name for name in PEERS[kind] if name not in without] for kind in kinds}
    order += [(s, k, name) for s in shapes for k in kinds for name in peers[k]]
    return {f"{s.name} {kind}/{name}": (s, kind, name) for s, kind, name in order}


@lru_cache(1)
def batch_of(shape: Shape, device: str) -> truth.Preference:
    """The inputs of a shape; the last ones are kept, as cases come shape by shape."""
    return truth.preference(*shape, torch.bfloat16, device)


@lru_cache(1)
@torch.enable_grad()  # a case of log-probs may be the first to ask
def truth_of(shape: Shape, device: str) -> tuple[Tensor, truth.Answer]:
    """Loss and gradients of a shape in fp64."""
    return truth.preference_truth(batch_of(shape, device))


def step(batch: truth.Preference, loss: Loss, kind: str) -> truth.Answer:
    """One forward and, but for log-probs, backward."""
    hidden = batch.hidden.detach().requires_grad_(kind != LOGPS)
    weight = batch.weight.detach().requires_grad_(kind == TRAINED)
    value = loss(hidden, weight, batch.labels)
    if kind != LOGPS:
        value.backward()
    return truth.Answer(value.detach(), hidden.grad, weight.grad)


def errors(value: truth.Answer, exact_loss: Tensor, exact: truth.Answer) -> dict[str, float]:
    """Relative errors of the loss and, in norm, of the gradients."""
    found = {"loss_error": float((value.logps.double() - exact_loss).abs() / exact_loss.abs())}
    for name in ("hidden", "weight"):
        if (grad := getattr(value, name)) is not None:
            true = getattr(exact, name).view(grad.shape)
            found[f"{name}_error"] = float((grad.double() - true).norm() / true.norm())
    return found


def measure(device: str, unit: float, shape: Shape, kind: str, name: str) -> dict[str, float]:
    """Time in units, milliseconds, memory and errors of one contestant."""
    batch = batch_of(shape, device)
    if name == GEMMS:
        rows = batch.hidden.flatten(0, -2)
        settings = {"trainable": kind == TRAINED, "derivative": kind != LOGPS}
        call, found = gemms(rows, batch.weight, **settings), {}
    else:
        call = partial(step, batch, CONTESTANTS[name](), kind)
        found = errors(call(), *truth_of(shape, device))
        if name != OURS:
            found["ratio"] = ratio(call, partial(step, batch, CONTESTANTS[OURS](), kind), device)
    times = figures(call, device)
    return {"u": times["ms"] / 1e3 / unit} | times | found


def run(record: Record) -> None:
    """A peer that is not installed is named in the case "absent" and has no other."""
    if record.rehearse:
        torch._dynamo.config.disable = True  # Liger and CCE compile for a minute on a CPU
    rate = gemm_rate(record.device, GEMM_SIZE[record.device])
    lacking = absent()
    if lacking and not record.done("absent"):
        record("absent", **lacking)
    todo = cases(TOYS if record.rehearse else SHAPES, lacking)
    for case in record.missing(todo):
        shape, kind, name = todo[case]
        unit = 2 * shape.rows * shape.H * shape.V / rate
        with record.attempt(case), torch.set_grad_enabled(kind != LOGPS):
            record(case, **measure(record.device, unit, shape, kind, name))
