"""E without logits against fp64, with labels near, above and far below the other tokens."""

import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, epilogue, exp_head, problem

import realign_kernels as rk
from realign_kernels import ops
from realign_kernels.backends.base import Scores
from realign_kernels.backends.triton.logits import assume_device
from realign_kernels.lm_head import Head, HeadSettings

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:.*encountered:RuntimeWarning"
    ),  # from numpy in the interpreter
]
BITS = 2.0**58


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Interpreted, with tiles of 16 x 32, so that small problems have several."""
    small = exp_head.EXP_HEADS[90]._replace(rows=16, columns=32, group=2)
    monkeypatch.setitem(exp_head.EXP_HEADS, 90, small)
    with tc.interpreted(), assume_device(90, 132):
        yield


def run(hidden, weight, labels, temperature=1.0, dtype=None):
    """Scores and E from the Triton kernels. Rows of E are padded to 16 bytes."""
    head, vocabulary = Head(weight, None, None, temperature), len(weight)
    exp_logits = hidden.new_empty(len(hidden), -(-vocabulary // 8) * 8, dtype=dtype)[:, :vocabulary]
    logit, shift, narrow = exp_head.label_logits(hidden, labels, head)
    sums = exp_head.exp_rows(hidden, head, narrow, shift, exp_logits)
    logps, one_minus_p, sum_exp = exp_head.score_sums(sums, logit, temperature)
    dz_dlogit = torch.full_like(logit, 1 / temperature)
    return Scores(logps, one_minus_p, labels, sum_exp, dz_dlogit), exp_logits


def truth(hidden, weight, labels, temperature=1.0):
    """Log-probs, their derivatives by hidden, and unscaled E, in fp64."""
    hidden = hidden.double().requires_grad_()
    z = hidden @ weight.double().T / temperature
    logps = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    e = (z - z.gather(1, labels[:, None])).exp().scatter(1, labels[:, None], 0).detach()
    return logps.detach(), grad, e / temperature


@pytest.mark.parametrize(
    ("spread", "lift", "temperature"),
    [(1, 0, 1), (6, 0, 1.7), (1, 30, 1.7), (6, 14, 1), (2, -40, 1.7)],
)
def test_scores_and_gradient_against_fp64(spread, lift, temperature):
    given = *problem(spread=spread, lift=lift), temperature
    scores, exp_logits = run(*given)
    logps, grad, e = truth(*given)
    torch.testing.assert_close(scores.logps.double(), logps, rtol=2e-6, atol=1e-5)
    confident = -torch.expm1(logps)
    torch.testing.assert_close(scores.one_minus_p.double(), confident, rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(exp_logits.double() * BITS, e, rtol=1e-4, atol=float(e.max()) * 1e-8)
    out = torch.empty_like(given[0])
    epilogue.hidden_grad_epilogue(exp_logits @ given[1], given[1], scores, scores.one_minus_p, out)
    rows = (out.double() - grad).norm(dim=1) / grad.norm(dim=1)
    assert rows.max() < 1e-4, rows


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 16, 1), (1, 8, 2), (16, 16, 32), (33, 24, 65)]
)
def test_shapes(rows, width, vocabulary):
    given = problem(rows, width, vocabulary)
    scores, exp_logits = run(*given)
    logps, _, e = truth(*given)
    torch.testing.assert_close(scores.logps.double(), logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exp_logits.double() * BITS, e, rtol=1e-4, atol=1e-30)
    assert scores.sum_exp.isfinite().all() and (scores.sum_exp > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_rows_that_overflow_are_not_finite_and_others_are_right(value):
    """NaN, inf and 1e4 in hidden states. 1e4 puts a token thousands of nats above the label."""
    hidden, weight, labels = problem()
    exact, _, _ = truth(hidden, weight, labels)
    hidden[3] = value * hidden[3]
    labels[3] = (hidden[3] @ weight.T).argmin()
    scores, _ = run(hidden, weight, labels)
    finite = scores.logps.isfinite()
    assert finite.tolist() == [row != 3 for row in range(len(hidden))]
    torch.testing.assert_close(scores.logps[finite].double(), exact[finite], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_products_are_divided_by_the_sum_of_e_as_rounded(temperature):
    given = problem(spread=6.0)
    scores, exp_logits = run(*given, temperature, dtype=torch.bfloat16)
    exact = exp_logits.double().sum(1) * temperature
    torch.testing.assert_close(scores.sum_exp.double(), exact, rtol=1e-6, atol=0)
    wide, _ = run(*given, temperature)
    assert torch.equal(scores.logps, wide.logps), "the log-prob is of the fp32 sum"
    assert ((scores.sum_exp / wide.sum_exp - 1).abs() > 1e-4).any()


@pytest.fixture
def fused(monkeypatch):
    """Makes public functions use the fused kernels, as on Hopper. Returns the rows of each call."""
    calls, plain = [], exp_head.fused

    def record(hidden, *rest):
        calls.append(len(hidden))
        return plain(hidden, *rest)

    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(exp_head, "fused", record)
    monkeypatch.setattr(exp_head, "choice", lambda hidden, head: "triton")
    with rk.use_backend("triton"):
        yield calls


def preference(hidden, weight, labels, dtype=torch.float32, trains=True):
    """rDPO's loss and gradients for two examples of three sequences."""
    leaves = [t.to(dtype, copy=True) for t in (hidden, weight)]
    for leaf in leaves[: 1 + trains]:
        leaf.requires_grad_()
    batch = leaves[0].view(3, 2, 6, -1)
    references = torch.linspace(-20, -10, 6, device=DEVICE).view(3, 2).to(dtype)
    loss = rk.rdpo_loss(batch, leaves[1], labels.view(3, 2, 6), references).loss
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves[: 1 + trains])


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_rdpo_loss_by_fused_kernels(fused, trains, far):
    """Loss and gradients against fp64. A label 200 nats below another token repeats the call."""
    hidden, weight, labels = problem(36, 40, 203)
    if far:
        hidden[5] *= 40
        labels[5] = (hidden[5] @ weight.T).argmin()
    with rk.use_backend("reference"):
        exact = preference(hidden, weight, labels, torch.float64)
    found = preference(hidden, weight, labels, trains=trains)
    assert fused == [36]
    for value, true in zip(found, exact, strict=False):
        torch.testing.assert_close(value.double(), true, rtol=1e-4, atol=1e-6)


def test_chunks_of_fused_rows(fused):
    """Log-probs of 37 rows in chunks of 16. A row of NaN is still an error."""
    hidden, weight, labels = problem()
    exact, grad, _ = truth(hidden, weight, labels)
    leaf = hidden.clone().requires_grad_()
    logps = rk.linear_logprobs(leaf, weight, labels, chunk_rows=16)
    logps.sum().backward()
    assert fused == [13, 13, 11]
    torch.testing.assert_close(logps.double(), exact, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-6)
    bad = hidden.clone()
    bad[7] = float("nan")
    with pytest.raises(
        rk.NonFiniteError, match="hidden holds NaN or inf in these rows. Check the inputs"
    ):
        rk.linear_logprobs(bad.requires_grad_(), weight, labels)


def test_gradient_of_the_loss_and_of_log_probs_together(fused):
    """The loss is one kernel in this case, and its backward adds both gradients."""
    hidden, weight, labels = problem(36, 40, 203)
    slopes, grads = torch.linspace(-1, 2, 6, dtype=torch.float64, device=DEVICE).view(3, 2), []
    for backend_name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        references = torch.full_like(slopes, -20.0)
        batch, targets = leaf.view(3, 2, 6, -1), labels.view(3, 2, 6)
        with rk.use_backend(backend_name):
            out = rk.rdpo_loss(batch, weight.to(dtype), targets, references.to(dtype))
        of_logps = (out.logps * slopes.to(dtype)).sum()
        for value in (of_logps, of_logps + 1.7 * out.loss):
            grads.append(torch.autograd.grad(value, leaf, retain_graph=True)[0].double())
    assert fused == [36]
    torch.testing.assert_close(grads[:2], grads[2:], rtol=1e-4, atol=1e-5)


def test_the_operator_of_compiled_graphs_repeats_a_call_that_overflows(fused):
    hidden, weight, labels = problem()
    hidden[5] *= 40
    labels[5] = (hidden[5] @ weight.T).argmin()
    exact, grad, _ = truth(hidden, weight, labels)
    leaf = hidden.clone().requires_grad_()
    logps = ops.logprobs(leaf, weight, labels, None, None, HeadSettings())
    logps.sum().backward()
    assert fused == [37] and exact.min() < -150
    torch.testing.assert_close(logps.double(), exact, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-6)


HEADS = {
    "triton": ({}, {}),
    "temperature": ({}, {"temperature": 1.5}),
    "sharper": ({}, {"temperature": 0.9}),
    "bias": ({}, {"bias": torch.zeros(64, dtype=torch.bfloat16)}),
    "softcap": ({}, {"softcap": 30.0}),
    "fp16": ({"dtype": torch.float16}, {}),
    "odd width": ({"width": 20}, {}),
    "odd vocabulary": ({"vocabulary": 63}, {}),
    "transposed": ({"transposed": True}, {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_take_the_fused_kernel(monkeypatch, name):
    """Conditions on Hopper: bf16, rows of 16 bytes, no bias or softcap, temperature 1 or above.

    CUTLASS also needs rows of E in multiples of 16 bytes: its `can_implement` rejects V = 32003.
    """
    shape, settings = HEADS[name]
    dtype, width = shape.get("dtype", torch.bfloat16), shape.get("width", 16)
    hidden = torch.zeros(4, width, dtype=dtype)
    weight = torch.zeros(shape.get("vocabulary", 64), width, dtype=dtype)
    if "transposed" in shape:
        weight = weight.T.contiguous().T
    head = Head(weight, *({"bias": None, "softcap": None, "temperature": 1.0} | settings).values())
    with assume_device(90, 132):
        assert exp_head.choice(hidden, head) == exp_head.DEFAULT == "rows"
        monkeypatch.setenv("REALIGN_HEAD", "triton")
        takes = ("triton", "temperature", "odd vocabulary")
        assert (exp_head.choice(hidden, head) == "triton") == (name in takes)
        monkeypatch.setattr(exp_head, "built", lambda: True)
        monkeypatch.setenv("REALIGN_HEAD", "cutlass")
        other = dict.fromkeys(("temperature", "odd vocabulary"), "triton")
        wanted = ({"triton": "cutlass"} | other).get(name, "rows")
        assert exp_head.choice(hidden, head) == wanted
        with assume_device(100, 148):
            assert exp_head.choice(hidden, head) == ("rows" if wanted == "rows" else "triton")
    with assume_device(80, 108):
        assert exp_head.choice(hidden, head) == "rows"


def test_a_missing_kernel(monkeypatch):
    head = Head(torch.zeros(8, 8), None, None, 1.0)
    monkeypatch.setenv("REALIGN_HEAD", "fast")
    with pytest.raises(
        ValueError, match="REALIGN_HEAD is 'fast'. Use one of cutlass, triton, rows"
    ):
        exp_head.choice(head.weight, head)
    monkeypatch.setenv("REALIGN_HEAD", "cutlass")
    monkeypatch.setattr(exp_head, "built", lambda: False)
    with pytest.raises(ValueError, match="built without CUTLASS. Install nvidia-cutlass"):
        exp_head.choice(head.weight, head)


@pytest.mark.parametrize("transposed", [False, True])
def test_finish_without_a_target_and_into_half(transposed):
    g = torch.Generator().manual_seed(0)
    exp_w, weight = torch.randn(5, 70, generator=g), torch.randn(9, 70, generator=g)
    weight = weight.T.contiguous().T if transposed else weight
    target = torch.tensor([8, -1, 0, 3, -1])
    sum_exp, dz_dlogit, factor = torch.rand(3, 5, generator=g) + 0.5
    scores = Scores(sum_exp, sum_exp, target, sum_exp, dz_dlogit)
    given = [t.to(DEVICE) for t in (exp_w, weight)]
    scores = Scores(*(t.to(DEVICE) for t in scores))
    w = weight[target.clamp(min=0)] * (target >= 0)[:, None] * dz_dlogit[:, None]
    exact = factor[:, None].double() * (w.double() - exp_w.double() / sum_exp[:, None].double())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        out = torch.empty(5, 80, dtype=dtype, device=DEVICE)[:, :70]
        epilogue.hidden_grad_epilogue(*given, scores, factor.to(DEVICE), out)
        torch.testing.assert_close(out.double().cpu(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan")])
def test_scale(factor):
    values = torch.randn(3, 9001, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = values * factor
    epilogue.scale(values, torch.tensor(factor, device=DEVICE))
    assert torch.equal(values.nan_to_num(), exact.nan_to_num())
