"""The head, forward and backward: ours, other libraries, and the GEMMs alone, which are the limit.

Every contestant gets the labelled rows only: a trainer that also projects image and prompt rows
pays several times as much for them (the last group). Peers come with the extra `peers`.
"""

import contestants as rivals
import pytest
import torch
import torch.nn.functional as F

from realign_kernels import rdpo_loss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = {  # examples, response tokens, H, V
    "N=768 H=1024 V=32000": (4, 64, 1024, 32000),
    "N=512 H=2048 V=64000": (2, 85, 2048, 64000),
}
QUICK = ("ours", "ours, torch backend", "eager", "F.linear_cross_entropy", "TRL chunked log-prob")
CHUNK = 256


class Case:
    """Rows, head and labels of one shape and dtype; logits of standard deviation 2."""

    def __init__(self, shape: str, dtype: str) -> None:
        self.examples, length, width, vocabulary = SHAPES[shape]
        g = torch.Generator().manual_seed(0)
        rows = 3 * self.examples * length
        self.hidden = torch.randn(rows, width, generator=g).to(DTYPES[dtype])
        weight = torch.randn(vocabulary, width, generator=g) * 2 / width**0.5
        self.weight = weight.to(DTYPES[dtype])
        self.labels = torch.randint(vocabulary, (rows,), generator=g)
        self.name = f"{dtype} {shape}"
        self.truth = self._truth()

    def _truth(self) -> torch.Tensor:
        """Gradient of hidden in fp64."""
        hidden = self.hidden.double().requires_grad_()
        logps = F.log_softmax(hidden @ self.weight.double().T, -1)
        rivals.from_logps(logps.gather(-1, self.labels[:, None])[:, 0], self.examples).backward()
        return hidden.grad

    def step(self, loss, trainable=False):
        """One forward and backward; the gradient of hidden."""
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(trainable)
        loss(hidden, weight, self.labels, examples=self.examples).backward()
        return hidden.grad

    def gemms(self, trainable=False):
        """The products alone, chunk by chunk, into buffers."""
        logits = self.hidden.new_empty(CHUNK, len(self.weight))
        out, grad = torch.empty_like(self.hidden), torch.empty_like(self.weight)

        def call():
            for start in range(0, len(self.hidden), CHUNK):
                rows = self.hidden[start : start + CHUNK]
                z = torch.mm(rows, self.weight.T, out=logits[: len(rows)])
                torch.mm(z, self.weight, out=out[start : start + CHUNK])
                if trainable:
                    torch.mm(z.T, rows, out=grad)

        return call


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def case(request, dtype):
    return Case(request.param, dtype)


def make(name):
    """A contestant, or a skip that says what is missing."""
    try:
        return rivals.CONTESTANTS[name]()
    except ImportError as error:
        pytest.skip(f"{name}: {error}; pip install -c constraints.txt '.[peers]'")


def run(benchmark, group, call, case, rounds=5):
    benchmark.group = group
    grad = benchmark.pedantic(call, rounds=rounds, warmup_rounds=2, iterations=1)
    if grad is not None:
        error = (grad.double() - case.truth).norm() / case.truth.norm()
        benchmark.extra_info["error"] = float(error)


def test_two_gemms_alone(benchmark, case):
    run(benchmark, f"frozen head {case.name}", case.gemms(), case)


@pytest.mark.parametrize("name", QUICK)
def test_frozen(benchmark, case, name):
    loss = make(name)
    run(benchmark, f"frozen head {case.name}", lambda: case.step(loss), case)


def test_three_gemms_alone(benchmark, case):
    run(benchmark, f"trainable head {case.name}", case.gemms(trainable=True), case, rounds=7)


@pytest.mark.parametrize("name", ["ours", "eager", "TRL chunked log-prob"])
def test_trainable(benchmark, case, name):
    loss = make(name)
    run(benchmark, f"trainable head {case.name}", lambda: case.step(loss, True), case, rounds=7)


@pytest.mark.parametrize("name", ["ours", "Liger DPO, two calls", "CCE, torch.compile"])
def test_frozen_slow_peers(benchmark, dtype, name):
    loss, case = make(name), Case("N=768 H=1024 V=32000", dtype)
    run(benchmark, f"frozen head {dtype}, slow peers", lambda: case.step(loss), case, rounds=3)


@pytest.mark.parametrize("name", ["ours", "eager", "TRL chunked log-prob"])
def test_with_image_and_prompt_rows(benchmark, name):
    """128 of them per sequence beside 64 response tokens: what projecting every position costs."""
    make(name)
    case = Case("N=768 H=1024 V=32000", "bf16")
    prefix, sequences, length = 128, 3 * case.examples, 64
    image = torch.randn(sequences, prefix, case.hidden.shape[1]).bfloat16()
    rows = torch.cat([image, case.hidden.view(sequences, length, -1)], 1)
    labels = torch.full(rows.shape[:2], -100)
    labels[:, prefix:] = case.labels.view(sequences, length)
    tokens = {"eager": rivals.eager, "TRL chunked log-prob": rivals.trl}.get(name)
    tokens = tokens and tokens()

    def call():
        hidden = rows.detach().requires_grad_()
        if tokens is None:
            shape = (3, case.examples, prefix + length)
            zeros = torch.zeros(3, case.examples)
            padded = hidden.view(*shape, -1)
            rdpo_loss(padded, case.weight, labels.view(shape), zeros).loss.backward()
        else:
            logps = tokens(hidden.flatten(0, 1), case.weight, labels.clamp(min=0).flatten())
            logps = torch.where(labels == -100, 0, logps.view(labels.shape))
            rivals.from_logps(logps, case.examples).backward()
        return hidden.grad[:, prefix:].flatten(0, 1)

    run(benchmark, "frozen head bf16, image and prompt rows given too", call, case, rounds=3)
