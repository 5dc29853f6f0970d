"""Host time of a head call, by its parts: operations, transfers, evaluations of terms."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import realign_kernels as rk
from realign_kernels import nonfinite, objectives, row_plan

FREE = {"view", "slice", "select", "detach", "t", "transpose", "unsqueeze", "_unsafe_view"}
FREE |= {"permute", "empty", "new_empty", "empty_like"}
"""torch operations that launch nothing on a GPU."""
INF = float("inf")


class Launches(TorchDispatchMode):
    """Names of the operations that would launch a kernel or a copy, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def batch(ignored, trains, examples=4):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, examples, 8, 16, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=g).bfloat16().requires_grad_(trains)
    labels = torch.randint(50, (3, examples, 8), generator=g)
    if ignored:
        labels[..., :3] = -100
    return hidden, weight, labels, torch.zeros(3, examples)


SPREAD = ["new_zeros", "index_copy_"]
"""Operations that spread the scored rows over all rows."""


@pytest.mark.parametrize("ignored", [False, True], ids=["none ignored", "some ignored"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_a_backward_only_scales(monkeypatch, trains, ignored):
    """The GPU is idle between the read at the end of the forward and these launches."""
    cases = pytest.importorskip("triton_cases")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, weight, *rest = batch(ignored, trains)
    if not trains:  # the loss is one kernel, and the interpreter does not support bf16
        hidden, weight = hidden.detach().float().requires_grad_(), weight.float()
    with cases.interpreted(), rk.use_backend("torch" if trains else "triton"):
        loss = rk.rdpo_loss(hidden, weight, *rest).loss * 2
        with Launches() as launches:
            loss.backward()
    outside = launches.names[:2]  # a gradient of 1, and its product with 2
    of_hidden = ["mul", "mul"] if not trains else ["mul"]  # the frozen head has a factor per row
    spread = SPREAD if ignored else []
    # On a CPU the scalar is read before the gradient of the weight is scaled.
    of_weight = ["_local_scalar_dense", "mul_"] if trains else []
    assert outside == ["ones_like", "mul"]
    assert launches.names[2:] == of_hidden + spread + of_weight


@pytest.mark.parametrize("call", ["frozen", "trained", "log-probs"])
def test_no_operation_is_before_the_first_gemm(call):
    hidden, weight, labels, references = batch(ignored=False, trains=call == "trained")
    with rk.use_backend("torch"), Launches() as launches:
        if call == "log-probs":
            rk.linear_logprobs(hidden, weight, labels)
        else:
            rk.rdpo_loss(hidden, weight, labels, references)
    assert launches.names[0] == "mm"


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_hidden_states_with_gaps_are_not_copied(trains):
    """With hidden[:, :, :-1] of a model, only scored rows are copied."""
    hidden, weight, labels, references = batch(ignored=True, trains=trains)
    apart = torch.cat([hidden, hidden[:, :, :1]], 2).detach().requires_grad_()[:, :, :-1]
    with rk.use_backend("torch"), Launches() as launches:
        rk.rdpo_loss(apart, weight, labels, references)
    assert "index" in launches.names and not {"clone", "_reshape_copy"} & {*launches.names[:5]}


@pytest.mark.parametrize("chunk_rows", [None, 48, 24])
def test_terms_are_evaluated_once_per_chunk(chunk_rows):
    """With more than one chunk, terms are evaluated once more over all examples."""
    calls = []

    class Counted(objectives.PairSigmoid):
        def __call__(self, values):
            calls.append(values.rewards.shape[1])
            return super().__call__(values)

    hidden, weight, labels, references = batch(ignored=False, trains=True)
    term = Counted(name="pair", positive=0, negative=1)
    inputs = (hidden[:2], weight, labels[:2], references[:2], [term])
    rk.linear_preference_loss(*inputs, chunk_rows=chunk_rows).loss.backward()
    assert calls == {None: [4], 48: [3, 1, 4], 24: [1, 1, 1, 1, 4]}[chunk_rows]


def test_indices_are_copied_in_one_transfer_to_addresses_that_triton_aligns(monkeypatch):
    arrays = [np.arange(3), None, np.arange(5), np.arange(0), np.arange(8)]
    transfers = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: transfers.append(t) or original(t))
    found = row_plan.indices_to_device(*arrays, device=torch.device("cpu"))
    assert len(transfers) == 1
    for array, tensor in zip(arrays, found, strict=True):
        if array is None:
            assert tensor is None
            continue
        assert torch.equal(tensor, torch.from_numpy(array)) and tensor.dtype == torch.int64
        assert (tensor.data_ptr() - transfers[0].data_ptr()) % 16 == 0
        array += 1
    assert found[0].tolist() == [0, 1, 2] and found[4].tolist() == list(range(8))


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF, (INF, -INF)], ids=str)
def test_a_sentinel_shows_one_value_among_many(bad):
    values = torch.full((3, 1000), -3e34)
    assert nonfinite.is_finite(nonfinite.sentinel(values, None, values[0]))
    values[1, :2] = torch.tensor(bad)
    assert not nonfinite.is_finite(nonfinite.sentinel(values))
    assert not nonfinite.is_finite(nonfinite.sentinel(values[0], values))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_log_probs_whose_sum_overflows_are_finite(frozen):
    hidden = torch.full((2, 1), 1.5e308, dtype=torch.float64).requires_grad_()
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64).requires_grad_(not frozen)
    logps = rk.linear_logprobs(hidden, weight, torch.tensor([1, 1]))
    assert (logps == -1.5e308).all()
    (grad,) = torch.autograd.grad(logps[0], hidden)
    assert grad.tolist() == [[-1.0], [0.0]]


def test_labels_out_of_range_are_found_in_each_place():
    for labels, found in (
        ([3, 50, 0, -1], "2 labels are outside .0, 50.. The first is 50, in flat row 1"),
        ([3, -100, 0, -1], "1 label is outside .0, 50.. The first is -1, in flat row 3"),
        (
            [-100, -(2**63), 7, 2**63 - 1],
            f"2 labels are outside .0, 50.. The first is -{2**63}, in flat row 1",
        ),
    ):
        with pytest.raises(ValueError, match=found):
            row_plan.scored_rows(np.array(labels), 50, -100)
    scored, rows = row_plan.scored_rows(np.array([3, 7, 5]), 50, 7)  # ignore_index is a token
    assert scored.tolist() == [3, 5] and rows.tolist() == [0, 2]
    assert row_plan.scored_rows(np.array([3, 7, 5]), 50, -100)[1] is None


@pytest.mark.parametrize(("backend", "trains"), [("torch", True), ("triton", False)])
def test_numbers_and_counts_are_checked_by_each_route(monkeypatch, trains, backend):
    """The loss kernel counts tokens itself, and skips numbers out of range."""
    cases = pytest.importorskip("triton_cases")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, weight, labels, references = batch(ignored=False, trains=False)
    inputs = hidden.detach().float().flatten(0, 2), weight.float().requires_grad_(trains)
    flat, ids = labels.flatten(), torch.arange(12).repeat_interleave(8)
    with cases.interpreted(), rk.use_backend(backend):
        for change, found in (((5, 12), "sequence_ids.5. is 12, outside"), ((5, -1), "5. is -1")):
            wrong = ids.clone()
            wrong[change[0]] = change[1]
            with pytest.raises(ValueError, match=found):
                rk.rdpo_loss(*inputs, flat, references, sequence_ids=wrong)
        with pytest.raises(ValueError, match="leaf 1, example 1. has no token to score"):
            few = flat.masked_fill(ids == 5, -100)
            rk.rdpo_loss(*inputs, few, references, sequence_ids=ids)
