"""Head benchmark, forward and backward: ours, other libraries, and the limit (bare GEMMs).

Shapes are named after models. A CPU runs a quarter of the width H by default. The models' real
sizes run with `-m full`, and always on CUDA. docs/benchmarks.md explains the rows of a contestant
and "blocks kept". Each contestant's loss and gradients are compared with fp64 before timing.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import contestants
from benchmarks.contestants import CONTESTANTS, DEVICE, EAGER, OURS, TRL, from_sums, relative
from benchmarks.race import race
from benchmarks.results import LIMIT
from benchmarks.step_contestants import allocate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALLOWED = {"bf16": 2e-2, "fp32": 2e-5}
"""Largest relative error of ours."""
BOUND = 0.1
"""Largest relative error of the others, whose measured error is shown beside the time."""
PROMPT, RESPONSE = 64, 64
LIGER, CCE, LINEAR = "Liger DPO, two calls", "CCE", "F.linear_cross_entropy"
FAST = tuple(name for name in CONTESTANTS if name not in (LIGER, CCE))
CALLED = (OURS, EAGER, TRL, CCE)
TRAINABLE = (LIMIT, OURS, EAGER, TRL, LIGER, CCE)


@dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark. `group` and `case` describe them in the results."""

    model: str
    H: int
    V: int
    examples: int
    dtype: str = "bf16"
    head: str = "frozen"
    image_tokens: int = 0
    kept: bool = False  # malloc keeps freed blocks

    @property
    def rows(self) -> str:
        return "as called" if self.image_tokens else "equal"

    @property
    def group(self) -> str:
        image = f", {self.image_tokens} image tokens" if self.image_tokens else ""
        kept = ", blocks kept" if self.kept else ""
        return f"head, {self.head}, {self.dtype}, {self.model} {self.H}x{self.V}{image}{kept}"

    @property
    def case(self) -> dict:
        return asdict(self) | {"rows": self.rows, "N": 3 * self.examples * RESPONSE}


LLAVA = Shape("LLaVA-1.5-7B, H / 4", 1024, 32000, 4)
QWEN = Shape("Qwen2.5-VL-3B, H / 4", 512, 151936, 1)
GEMMA = Shape("Gemma-3-4B, H / 4", 640, 262144, 1)
TALL = Shape("H / 2 of LLaVA-1.5-7B, twice its V", 2048, 64000, 2)
WHOLE = (
    Shape("LLaVA-1.5-7B", 4096, 32000, 1),
    Shape("Qwen2.5-VL-3B", 2048, 151936, 1),
    Shape("Qwen2.5-VL-7B", 3584, 152064, 1),
    Shape("Gemma-3-4B", 2560, 262144, 1),
)
if DEVICE == "cuda":  # as many rows as a real batch
    WHOLE = tuple(replace(shape, examples=16) for shape in WHOLE)


def cases():
    """(shape, contestant) of every benchmark; those marked `slow` need `-m full`."""
    slow = () if DEVICE == "cuda" else (pytest.mark.slow,)
    for dtype in DTYPES:
        small = replace(LLAVA, dtype=dtype)
        yield from entries(small, (LIMIT, *FAST))
        yield from entries(small, (LIGER, CCE), () if dtype == "bf16" else slow)
        # Half the rows in fp32: a round of all contestants takes 10 s with them.
        rows = {} if dtype == "bf16" else {"examples": 2}
        yield from entries(replace(small, head="trainable", **rows), TRAINABLE)
        for shape in (replace(QWEN, dtype=dtype), replace(GEMMA, dtype=dtype)):
            quick = shape == QWEN
            yield from entries(shape, (LIMIT, *FAST), () if quick else slow)
            yield from entries(shape, (LIGER, CCE), slow)
        for shape in (TALL, *WHOLE):
            yield from entries(replace(shape, dtype=dtype), (LIMIT, *CONTESTANTS), slow)
        whole = replace(WHOLE[0], dtype=dtype, head="trainable")
        yield from entries(whole, (LIMIT, OURS, EAGER, TRL), slow)
    if DEVICE == "cpu":
        yield from entries(replace(LLAVA, kept=True), (LIMIT, *FAST, CCE))
    for tokens in (576, 2880):
        masked = replace(LLAVA, examples=1, image_tokens=tokens)
        yield from entries(masked, CALLED, slow if tokens > 576 else ())
        yield from entries(masked, (LIGER, LINEAR), slow)


def entries(shape, names, marks=()):
    """One benchmark per contestant of a shape."""
    for name in names:
        yield pytest.param(shape, name, marks=marks, id=f"{shape.group}, {name}")


class Case:
    """Hidden states, head and labels of a shape. Logits have a standard deviation of 2."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.trainable = shape, shape.head == "trainable"
        g = torch.Generator().manual_seed(0)
        before = PROMPT + shape.image_tokens if shape.image_tokens else 0
        size = (3, shape.examples, before + RESPONSE)
        kind = {"dtype": DTYPES[shape.dtype], "device": DEVICE}
        self.hidden = torch.randn(*size, shape.H, generator=g).to(**kind)
        weight = torch.randn(shape.V, shape.H, generator=g).mul_(2 / shape.H**0.5)
        self.weight = weight.to(**kind)
        self.labels = torch.randint(shape.V, size, generator=g).to(DEVICE)
        self.labels[..., :before] = -100

    @cached_property
    def truth(self):
        """fp64 loss and gradients of the labelled rows."""
        rows = self.labels != -100

        def exact(hidden, weight, labels):
            logps = F.log_softmax(hidden @ weight.T, -1).gather(-1, labels[:, None])
            return from_sums(logps.view(3, self.shape.examples, -1).sum(-1))

        inputs = self.hidden[rows].double(), self.weight.double(), self.labels[rows]
        return contestants.forward_backward(exact, *inputs, trainable=self.trainable)

    def step(self, loss):
        """Loss and both gradients of one forward and backward."""
        inputs = self.hidden, self.weight, self.labels
        return contestants.forward_backward(loss, *inputs, trainable=self.trainable)

    def error(self, loss) -> dict[str, float]:
        """Relative errors of the loss and (in norm, the larger of both) of the gradients."""
        value, hidden, weight = self.step(loss)
        true, *truths = self.truth
        assert not hidden[self.labels == -100].any(), "unlabelled rows have a gradient"
        pairs = zip((hidden[self.labels != -100], weight), truths, strict=True)
        off = [relative(a, b) for a, b in pairs if b is not None]
        return {"loss": relative(value, true), "gradient": float(np.max(off))}  # np.max keeps NaN

    def gemms(self):
        """Bare GEMMs of the labelled rows."""
        hidden = self.hidden[self.labels != -100]
        return contestants.gemms(hidden, self.weight, trainable=self.trainable)


@pytest.fixture(scope="module")
def case_of():
    """Function that builds the case of a shape and keeps the last one for the next benchmark."""
    kept = []

    def of(shape):
        if not kept or kept[0].shape != shape:
            kept.clear()
            kept.append(Case(shape))
        return kept[0]

    return of


def make(name, dtype):
    """Makes a contestant, or skips the benchmark with the reason."""
    if name == CCE and DEVICE == "cuda" and dtype == "fp32":
        pytest.skip("CCE 25.1 has no fp32 backward on CUDA. Remove this once a release has it.")
    try:
        return CONTESTANTS[name]()
    except ImportError as error:
        pytest.skip(f"{error}. Run pip install -c constraints.txt '.[peers]'")


@pytest.mark.parametrize(("shape", "name"), list(cases()))
def test_head(benchmark, case_of, request, shape, name):
    if shape.kept:
        allocate("keep")
        request.addfinalizer(lambda: allocate("usual"))
    loss = None if name == LIMIT else make(name, shape.dtype)
    case = case_of(shape)
    mine = contestants.ours()
    error = None if loss is None else case.error(loss)
    if name == OURS:
        assert all(value < ALLOWED[shape.dtype] for value in error.values()), error
    elif error is not None:
        assert all(value < BOUND for value in error.values()), error
    race(
        benchmark,
        shape.group,
        case=shape.case,
        contestant=name,
        role="limit" if name == LIMIT else None,
        call=case.gemms() if loss is None else lambda: case.step(loss),
        ours=lambda: case.step(mine),
        error=error,
    )
