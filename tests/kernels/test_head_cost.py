"""Cost of the head: GEMMs, the rows in them, and the size of the workspace."""

import kernel_cases as kc
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import realign_kernels as rk
from realign_kernels import objectives
from realign_kernels.backends import chunk_plan
from realign_kernels.backends.chunk_plan import (
    default_chunk_rows,
    even_step,
    filling_step,
    kept_rows,
)
from realign_kernels.backends.chunked import _Chunks
from realign_kernels.backends.torch import TorchKernels
from realign_kernels.lm_head import Head

WIDTH, VOCABULARY, ROWS, CHUNK = 5, 97, 40, 8


def gemm_units(call):
    """GEMMs in call(), in units of valid rows x WIDTH x VOCABULARY multiply-adds."""
    with (
        rk.use_backend("torch"),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace,
    ):
        call()
    work = 0
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul"):
            matrices = event.input_shapes[event.name.startswith("aten::addmm") :]
            (rows, inner), (_, columns) = matrices[:2]
            work += rows * inner * columns
    return work


@pytest.fixture
def case():
    return kc.make_case(ROWS, WIDTH, VOCABULARY, torch.float32, bias=True)


# GEMM units in forward and backward. The bias takes two columns besides the WIDTH of a unit.
COSTS = {
    "no gradient": ((False, False, False), 1, 0),
    "frozen head": ((True, False, False), 2, 0),
    "only weight": ((False, True, False), 1, 2),
    "only bias": ((False, False, True), 1, 1),
    "hidden and bias": ((True, False, True), 1, 2),
    "everything": ((True, True, True), 1, 3),
}


@pytest.mark.parametrize(("needs", "forward", "backward"), COSTS.values(), ids=COSTS)
def test_gemm_units_over_scored_rows(case, needs, forward, backward):
    leaves = [t.clone().requires_grad_(need) for t, need in zip(case[:3], needs, strict=True)]
    unit = int((case.labels != -100).sum()) * WIDTH * VOCABULARY
    logps = []

    def run():
        hidden, weight, bias = leaves
        logps.append(rk.linear_logprobs(hidden, weight, case.labels, bias=bias, chunk_rows=CHUNK))

    assert gemm_units(run) == forward * unit
    with torch.no_grad():  # one unit, although the inputs require grad
        assert gemm_units(run) == unit
    if any(needs):
        loss = logps[0].sum()
        of_bias = 2 * unit // WIDTH if needs[2] else 0
        assert gemm_units(loss.backward) == backward * unit + of_bias


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_gemm_units_of_every_objective(name):
    """2 for a frozen head and 3 for a trained one, with examples that are scored one by one."""
    objective, g = objectives.get(name), torch.Generator().manual_seed(0)
    shape = len(objective.leaves), 6, 4
    hidden = torch.randn(*shape, WIDTH, generator=g, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g)
    labels = torch.randint(VOCABULARY, shape, generator=g)
    reference = torch.full(shape[:2], -15.0)
    unit = labels.numel() * WIDTH * VOCABULARY
    for trained, units in ((False, 2), (True, 3)):
        head = weight.clone().requires_grad_(trained)

        def step(head=head):
            args = (hidden, head, labels, reference, objective)
            rk.linear_preference_loss(*args, chunk_rows=4 * shape[0]).loss.backward()

        assert gemm_units(step) == units * unit


def test_no_tensor_of_all_logits(case):
    hidden = case.hidden.clone().requires_grad_()
    with (
        rk.use_backend("torch"),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace,
    ):
        rk.linear_logprobs(hidden, case.weight, case.labels, chunk_rows=CHUNK).sum().backward()
    shapes = [shape for event in trace.events() for shape in event.input_shapes]
    widest = max(shape[0] for shape in shapes if len(shape) == 2 and shape[1] == VOCABULARY)
    assert widest == CHUNK


def test_frozen_head_keeps_one_gradient_per_scored_row(case):
    hidden = case.hidden.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        rk.linear_logprobs(hidden, case.weight, case.labels)
    rows = int((case.labels != -100).sum())
    assert (rows, WIDTH) in saved and (ROWS, WIDTH) not in saved
    assert all(len(shape) < 2 for shape in saved if shape != (rows, WIDTH))


@pytest.mark.parametrize(("vocabulary", "rows"), [(32000, 524), (152064, 256), (0, 2**24)])
def test_default_chunk(vocabulary, rows):
    assert default_chunk_rows(vocabulary, torch.device("cpu")) == rows


@pytest.mark.parametrize(
    ("rows", "limit", "step"), [(600, 524, 300), (5, 8, 5), (9, 8, 5), (0, 8, 1)]
)
def test_chunks_are_even(rows, limit, step):
    assert even_step(rows, limit) == step


@pytest.mark.parametrize(
    ("rows", "limit", "width", "step"),
    [
        (8190, 6183, 4096, 4096),  # 512 of 528 twice, against 496 of 528
        (8192, 3533, 3584, 2944),  # 322 of 396 twice, 252 of 264
        (3072, 4096, 4096, 3072),
        (10, 4, 4096, 4),
        (0, 4, 4096, 1),
    ],
)
def test_a_chunk_fills_the_multiprocessors(rows, limit, width, step):
    """The counts of tiles of 128 x 256 for 132 multiprocessors are computed by hand."""
    assert filling_step(rows, limit, width, 132) == step


def test_chunks_on_cuda_by_memory(monkeypatch):
    """On an H100: 1.75 GiB of fp32 logits and E, or only of E."""
    monkeypatch.setattr(chunk_plan, "processor", lambda device: chunk_plan.H100)
    cuda = torch.device("cuda")
    assert default_chunk_rows(151936, cuda) == 2061 == 7 * 2**28 // (6 * 151936)
    assert default_chunk_rows(151936, cuda, size=2) == 6183
    assert default_chunk_rows(2**20, cuda) == 1024
    assert kept_rows(2061, 4096, cuda) == 8192  # as large as an fp32 gradient of the weight
    assert kept_rows(2061, 2048, cuda) == 4122
    assert kept_rows(256, 4096, torch.device("cpu")) == 512
    assert rk.workspace_bytes(9000, 4096, 151936, "cuda", trains=True) == 151936 * (
        4 * 2061 + 2 * 8192
    )
    assert rk.workspace_bytes(9000, 4096, 151936, cuda, trains=False) == 151936 * 6 * 2061
    assert rk.workspace_bytes(100, 4096, 151936, cuda, trains=False) == 151936 * 600
    assert rk.workspace_bytes(9000, 4096, 32000, "cpu", trains=True) == 32000 * 4 * 1048


def test_e_of_more_rows_than_a_chunk_of_logits():
    """12 rows with logits of 5 rows at a time, as on CUDA: log-probs and E against fp64."""
    hidden, weight = torch.randn(12, 8), torch.randn(31, 8)
    labels = torch.randint(31, (12,))
    with _Chunks(TorchKernels(), Head(weight, None, None, 1.0), 5, hidden, kept=12) as chunks:
        scores = chunks.score(hidden, labels, None)
    z = hidden.double() @ weight.double().T
    exact = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(scores.logps.double(), exact, rtol=1e-5, atol=1e-5)
    e = z.exp().scatter(1, labels[:, None], 0)
    exact = e / e.sum(1, keepdim=True)
    torch.testing.assert_close(
        (chunks.exp_logits / scores.sum_exp[:, None]).double(), exact, rtol=1e-4, atol=1e-6
    )
