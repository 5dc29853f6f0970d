"""Inputs that break kernels: the answer is right, or a ValueError says why there is none."""

import contextlib
import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hostile_cases import LAYOUTS, check, ours, stepped
from kernel_cases import Case, error, make_case, truth

import realign_kernels as rk
from realign_kernels.backends import cpp as cpp_backend

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("wanted", ["h", "hwb"], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("which", ["hidden", "weight", "both"])
def test_any_layout(cpu_backend, which, layout, dtype, wanted):
    for ignored, shape in itertools.product((0.0, 0.3), ((7, 9, 21), (5, 1, 4), (1, 6, 3))):
        case = make_case(*shape, dtype, bias=True, ignored=ignored, seed=3)
        case.labels[0] = 1
        changed = ["hidden", "weight"] if which == "both" else [which]
        case = case._replace(**{name: layout(getattr(case, name)) for name in changed})
        check(case, wanted, chunk_rows=3)


def test_labels_and_bias_may_lie_anyhow(cpu_backend):
    case = make_case(6, 5, 300, torch.float32, bias=True)
    case.labels[:] = torch.tensor([0, -100, 100, 3, 127, 100])
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        check(case, labels=stepped_labels(case.labels.to(dtype)))
    case = case._replace(bias=case.bias[:1].expand(300), labels=torch.tensor(200).expand(6))
    check(case)
    check(case, labels=case.labels.to(torch.uint8))
    check(case._replace(bias=stepped(make_case(6, 5, 300, torch.float32, bias=True).bias)))
    image = case._replace(hidden=case.hidden.view(2, 3, 5), labels=case.labels.view(2, 3))
    result = ours(image, chunk_rows=2)
    assert result.logps.shape == (2, 3)
    assert torch.equal(result.logps.flatten(), ours(case, chunk_rows=2).logps)


def stepped_labels(labels):
    wide = labels.new_full((2 * len(labels),), 99)
    return wide[::2].copy_(labels)


@pytest.mark.parametrize("wanted", ["", "h", "hwb"], ids=["no grad", "frozen", "trainable"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["hidden", "weight", "bias of a label", "all"])
def test_not_finite(cpu_backend, place, value, wanted):
    case = make_case(5, 6, 9, torch.float32, bias=True, ignored=0)
    case.labels[:] = torch.tensor([0, 1, 2, 3, 2])
    tensors = [case.hidden[2], case.weight[4], case.bias[2:3]]
    places = ["hidden", "weight", "bias of a label"]
    for name, tensor in zip(places, tensors, strict=True):
        if place in (name, "all"):
            tensor[0] = value
    with pytest.raises(rk.NonFiniteError, match=place.split()[0] if place != "all" else "NaN"):
        ours(case, wanted, chunk_rows=2)


@pytest.mark.parametrize("wanted", ["h", "hwb"], ids=["frozen", "trainable"])
def test_masked_tokens(cpu_backend, wanted):
    """A bias of -inf takes a token out of the vocabulary, or all but the label."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(6, 8, 37, dtype, bias=True)
        case.labels[:] = 5
        case.bias[torch.arange(37) % 3 == 0] = -INF
        check(case, wanted, chunk_rows=4, temperature=0.8)
        case.bias[torch.arange(37) != 5] = -INF
        result = ours(case, wanted)
        assert result.logps.abs().max() == 0 and result.hidden.abs().max() == 0
        assert wanted == "h" or result.weight.abs().max() == result.bias.abs().max() == 0


def test_an_infinite_value_behind_a_softcap_is_no_finite_gradient(cpu_backend):
    """tanh makes 1 of an infinite logit. Its slope is 0, as in fp64; weight's gradient is NaN."""
    case = make_case(3, 4, 6, torch.float32, ignored=0)
    case.hidden[1], case.weight[:] = INF, case.weight.abs() + 0.1
    exact = truth(case, softcap=5.0)
    assert exact.logps.isfinite().all() and exact.weight.isnan().any()
    with contextlib.suppress(rk.NonFiniteError):
        result = ours(case, softcap=5.0)
        torch.testing.assert_close(result.logps, exact.logps.float())
        assert torch.equal(result.weight.isnan().any(1), exact.weight.isnan().any(1))


def test_a_weight_of_minus_infinity_is_no_silent_gradient(cpu_backend):
    """The log-prob is finite where every hidden state pushes the token to -inf; dz / dh is not."""
    case = make_case(3, 4, 6, torch.float32, ignored=0)
    case.hidden[:] = case.hidden.abs() + 0.1
    case.labels[:] = 0
    case.weight[4] = -INF
    with pytest.raises(rk.NonFiniteError, match="weight holds NaN or inf"):
        ours(case, "h")
    assert not ours(case, "hwb").hidden.isfinite().any()  # as in eager


@pytest.mark.parametrize("wanted", ["h", "hwb"], ids=["frozen", "trainable"])
def test_extreme_settings(cpu_backend, wanted):
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(5, 6, 9, dtype, bias=True)
        for settings in ({"temperature": 1e30}, {"softcap": 1e-30}):
            result = ours(case, wanted, **settings)
            kept = case.labels != -100
            assert (result.logps[kept] + math.log(9)).abs().max() < 1e-6
            assert all(g is None or g.abs().max() < 1e-25 for g in result[1:])
        check(case, wanted, softcap=1e30)
        check(case, wanted, softcap=1e-3, temperature=1e-2)
        for factor in (1e-2, 1e2):
            check(case, wanted, temperature=factor)
        with pytest.raises(rk.NonFiniteError, match="logits overflow"):
            ours(case._replace(hidden=case.hidden * 1e10), wanted, temperature=1e-30)
    for name, value in itertools.product(("softcap", "temperature"), (1e-46, 1e300)):
        message = re.escape(f"{name} must be between 1e-30 and 1e30, got {value}")
        with pytest.raises(ValueError, match=message):
            ours(case, wanted, **{name: value})


@pytest.mark.parametrize("wanted", ["h", "hwb"], ids=["frozen", "trainable"])
def test_half_overflows_loudly_or_not_at_all(cpu_backend, wanted):
    case = make_case(4, 16, 33, torch.float16, ignored=0)
    if cpu_backend == "cpp":
        with pytest.raises(ValueError, match="'cpp' cannot take float16 on cpu"):
            ours(case, wanted)
        return
    case.hidden[:], case.weight[:] = 60000, case.weight.abs()
    if cpu_backend == "reference":  # computes in fp32
        assert error(ours(case, wanted).logps, truth(case).logps) < 1e-6
    else:
        with pytest.raises(rk.NonFiniteError, match="overflow torch.float16"):
            ours(case, wanted)
    calm = make_case(4, 16, 33, torch.float16)
    check(calm._replace(hidden=calm.hidden * 30), wanted)  # certain, or nearly impossible


@pytest.mark.parametrize("wanted", ["", "h", "w", "b", "hw", "hwb"])
@pytest.mark.parametrize(
    "shape", [(4, 3, 1), (4, 1, 5), (1, 1, 1), (3, 65, 2), (2, 7, 129), (13, 3, 17)], ids=str
)
def test_small_and_odd_shapes(cpu_backend, shape, wanted):
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(*shape, dtype, bias=True, ignored=0.2)
        case.labels[0] = 0
        for chunk_rows in (1, 3, None):
            result = check(case, wanted, chunk_rows=chunk_rows)
            if shape[2] == 1:
                assert all(t is None or t.abs().max() == 0 for t in result)


@pytest.mark.parametrize("wanted", ["", "h", "hwb"], ids=["no grad", "frozen", "trainable"])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_score(cpu_backend, rows, wanted):
    case = make_case(rows, 4, 6, torch.float32, bias=True, ignored=2)
    case.hidden.fill_(NAN)
    result = ours(case, wanted)
    assert all(t is None or not t.any() for t in result)
    shape = (3, 0, 2)
    hidden = torch.zeros(*shape, 4, requires_grad="h" in wanted)
    weight = case.weight.requires_grad_("w" in wanted)
    labels = torch.zeros(shape, dtype=torch.long)
    for reduction in ("sum", "none"):
        out = rk.rdpo_loss(hidden, weight, labels, torch.zeros(3, 0), reduction=reduction)
        assert out.loss.sum() == 0 and out.logps.shape == (3, 0)
        if wanted:
            out.loss.sum().backward()
            assert hidden.grad.shape == hidden.shape


def test_rows_of_no_width(cpu_backend):
    """H = 0: the bias alone decides."""
    case = make_case(4, 1, 6, torch.float32, bias=True, ignored=0)
    case = Case(case.hidden[:, :0], case.weight[:, :0], *case[2:])
    assert error(ours(case, "hwb").logps, truth(case).logps) < 1e-6


MIXED = {
    "dtype": ({"weight": torch.zeros(3, 4).bfloat16()}, "weight is torch.bfloat16 and hidden"),
    "complex": ({"hidden": torch.zeros(2, 4).cfloat()}, "hidden must be float32"),
    "weight on meta": ({"weight": torch.zeros(3, 4, device="meta")}, "weight is on meta"),
    "hidden on meta": ({"hidden": torch.zeros(2, 4, device="meta")}, "weight is on cpu: move"),
    "bias on meta": ({"bias": torch.zeros(3, device="meta")}, "bias is on meta"),
    "label V": ({"labels": torch.tensor([3, 0])}, r"labels: 1 outside \[0, 3\)"),
    "no tokens": ({"weight": torch.zeros(0, 4)}, r"labels: 2 outside \[0, 0\)"),
    "scalar": ({"hidden": torch.tensor(1.0)}, r"hidden \(\) must end in H"),
}


@pytest.mark.parametrize(("change", "message"), MIXED.values(), ids=MIXED)
def test_what_does_not_fit(cpu_backend, change, message):
    inputs = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4)}
    inputs["labels"] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=message):
        rk.linear_logprobs(**{**inputs, **change})


@pytest.mark.parametrize("own_gemm", [True, False])
def test_inference_mode_leaves_nothing_behind(cpu_backend, own_gemm, monkeypatch):
    """A buffer that was made in inference mode could not be written by torch outside of it."""
    if cpu_backend == "cpp" and not own_gemm:
        monkeypatch.setattr(cpp_backend, "_own_gemm", lambda dtype: False)
    small, large = (make_case(4, 5, v, torch.float32) for v in (11, 4001))

    def calls():
        with rk.use_backend(cpu_backend):
            with torch.inference_mode():
                rk.linear_logprobs(large.hidden, large.weight, large.labels)
            for case in (small, large):
                check(case, "h")
                check(case, "hw")
            shape = (3, 1, 1)
            rk.rdpo_loss(
                large.hidden[:3].view(*shape, 5),
                large.weight.requires_grad_(),
                torch.zeros(shape, dtype=torch.long),
                torch.zeros(3, 1),
            ).loss.backward()

    with ThreadPoolExecutor(1) as fresh:  # buffers belong to a thread
        fresh.submit(calls).result()


def test_threads_do_not_share_memory(cpu_backend):
    cases = [make_case(5 + i, 8 + i, 40 + 7 * i, torch.float32, seed=i) for i in range(8)]
    expected = [ours(case, "hw", chunk_rows=3) for case in cases]

    def many(i):
        with rk.use_backend(cpu_backend):
            return [ours(cases[i], "hw", chunk_rows=3) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for results, once in zip(pool.map(many, range(8)), expected, strict=True):
            for result in results:
                assert all(torch.equal(a, b) for a, b in zip(result[:3], once[:3], strict=True))


def test_rival_may_be_the_token_that_marks_ignored_rows(cpu_backend):
    """ignore_index = 2, a padding token; it is also the strongest token of the first row."""
    hidden = torch.eye(3, requires_grad=True)
    weight = torch.tensor([[0.0, 0, 0], [1, 0, 3], [5, 0, 0], [0, 2, 0]])
    labels, rival = torch.tensor([1, 1, 2]), torch.tensor([True, True, True])
    for trains in (False, True):
        head = weight.clone().requires_grad_(trains)
        logps = rk.linear_logprobs(hidden, head, labels, rival=rival, ignore_index=2)
        (value,) = torch.autograd.grad(logps.sum(), hidden)
        scores = (hidden @ weight.T).log_softmax(1)
        (expected,) = torch.autograd.grad(scores[0, 2] + scores[1, 3], hidden)
        torch.testing.assert_close(value, expected)
