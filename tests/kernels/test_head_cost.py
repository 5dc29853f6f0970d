"""What the head costs: GEMMs, rows that enter them, and the size of the workspace."""

import kernel_cases as kc
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import realign_kernels as rk
from realign_kernels.chunked import default_chunk_rows, even_step

WIDTH, VOCABULARY, ROWS, CHUNK = 5, 97, 40, 8


def gemm_units(call):
    """GEMMs that run in call(), in units of valid rows x WIDTH x VOCABULARY multiply-adds."""
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


# Units of GEMM in forward and backward; the bias takes two columns beside the WIDTH of a unit.
COSTS = {
    "no gradient": ((False, False, False), 1, 0),
    "frozen head": ((True, False, False), 2, 0),
    "weight alone": ((False, True, False), 1, 2),
    "bias alone": ((False, False, True), 1, 1),
    "hidden and bias": ((True, False, True), 1, 2),
    "everything": ((True, True, True), 1, 3),
}


@pytest.mark.parametrize(("needs", "forward", "backward"), COSTS.values(), ids=COSTS)
def test_gemm_units_over_the_rows_that_count(case, needs, forward, backward):
    leaves = [t.clone().requires_grad_(need) for t, need in zip(case[:3], needs, strict=True)]
    unit = int((case.labels != -100).sum()) * WIDTH * VOCABULARY
    logps = []

    def run():
        hidden, weight, bias = leaves
        logps.append(rk.linear_logprobs(hidden, weight, case.labels, bias=bias, chunk_rows=CHUNK))

    assert gemm_units(run) == forward * unit
    if any(needs):
        loss = logps[0].sum()
        of_bias = 2 * unit // WIDTH if needs[2] else 0
        assert gemm_units(loss.backward) == backward * unit + of_bias


def test_no_grad_costs_one_unit_although_the_inputs_train(case):
    hidden, weight, bias = (t.clone().requires_grad_() for t in case[:3])
    unit = int((case.labels != -100).sum()) * WIDTH * VOCABULARY
    with torch.no_grad():
        work = gemm_units(lambda: rk.linear_logprobs(hidden, weight, case.labels, bias=bias))
    assert work == unit


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


def test_frozen_head_keeps_a_direction_per_row_that_counts_and_no_matrix_else(case):
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
