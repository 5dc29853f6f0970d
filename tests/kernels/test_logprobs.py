"""linear_logprobs: a matrix of backends, devices, dtypes, shapes and settings against fp64.

kernel_cases defines the error budget. test_preference.py tests the losses.
"""

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_cases as kc
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Case, check, error, make_case, ours, truth

import realign_kernels as rk
from realign_kernels import _extension, reference
from realign_kernels.backends import cpp as cpp_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INF, NAN = float("inf"), float("nan")
NEEDS = pytest.mark.parametrize("needs", ["h", "hwb"], ids=["frozen", "trainable"])
HEADS = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "softcap": {"bias": True, "temperature": 1.7, "softcap": 5.0},
}
HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
SHAPES = [(12, 16, 131), (5, 33, 97), (1, 64, 97), (33, 64, 1003)]


def split(head):
    return {"bias": head.get("bias", False)}, {k: v for k, v in head.items() if k != "bias"}


@HEAD
def test_values_and_gradients(setting, head):
    made, called = split(head)
    shapes = SHAPES
    if setting.backend == "triton":  # slow in the interpreter, and its kernels have separate tests
        shapes = SHAPES[:1] if setting.dtype == torch.float16 else SHAPES[1:2]
    for seed, shape in enumerate(shapes):
        case = setting.make_case(*shape, seed=seed, ignored=0.3 * (shape[0] > 1), **made)
        for needs in ("", "h", "hwb"):
            check(case, needs, least=1e-300, chunk_rows=5, **called)


@NEEDS
def test_rival_rows_score_the_strongest_other_token(setting, needs):
    """Against plain PyTorch. One-hot hidden states give exact logits, and so an exact choice."""
    g = torch.Generator().manual_seed(0)
    width, vocabulary = 9, 97
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    weight = weight.to(setting.device, setting.dtype)
    hidden = torch.eye(width, dtype=setting.dtype, device=setting.device)
    labels = weight.argmax(0)  # in every other row the label is the strongest token
    labels[1::2] = (labels[1::2] + 7) % vocabulary
    labels[3] = -100
    rival = torch.arange(width, device=setting.device) % 3 != 2
    upstream = torch.randn(width, generator=g, dtype=torch.float64).to(setting.device)
    top = (hidden.double() @ weight.double().T).topk(2, 1).indices
    strongest = torch.where(top[:, 0] == labels, top[:, 1], top[:, 0])
    target = torch.where(rival & (labels != -100), strongest, labels)
    exact = truth(Case(hidden, weight, None, target, upstream))
    found = ours(Case(hidden, weight, None, labels, upstream), needs, rival=rival, chunk_rows=4)
    for value, expected in zip(found[:3], exact, strict=False):
        assert value is None or error(value, expected) <= 4 * kc.FLOOR[setting.dtype]


def test_rival_may_be_ignore_index(cpu_backend):
    """ignore_index = 2 is a padding token, and also the strongest token of the first row."""
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


@HEAD
def test_the_specification_is_log_softmax(head):
    made, called = split(head)
    case = make_case(33, 5, 97, torch.float64, **made)
    logps = reference.linear_logprobs(*case[:2], case.labels, case.bias, **called)
    assert error(logps, truth(case, **called).logps) < 1e-14


# Memory and shapes


def test_zero_width(cpu_backend):
    """With H = 0 the logits are the bias."""
    case = make_case(4, 1, 6, torch.float32, bias=True, ignored=0)
    case = Case(case.hidden[:, :0], case.weight[:, :0], *case[2:])
    assert error(ours(case).logps, truth(case).logps) < 1e-6


def test_labels_bias_and_leading_shape(cpu_backend):
    case = make_case(6, 5, 300, torch.float32, bias=True)
    case.labels[:] = torch.tensor([0, -100, 100, 3, 127, 100])
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        wide = case.labels.new_full((12,), 99, dtype=dtype)
        check(case, labels=wide[::2].copy_(case.labels))
    check(case._replace(bias=kc.stepped(case.bias)))
    case = case._replace(bias=case.bias[:1].expand(300), labels=torch.tensor(200).expand(6))
    check(case, labels=case.labels.to(torch.uint8))
    cube = case._replace(hidden=case.hidden.view(2, 3, 5), labels=case.labels.view(2, 3))
    result = ours(cube, chunk_rows=2)
    assert result.logps.shape == (2, 3)
    assert torch.equal(result.logps.flatten(), ours(case, chunk_rows=2).logps)
    turned = case.hidden.view(2, 3, 5).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ours(cube._replace(hidden=turned), chunk_rows=2).hidden, result.hidden)
    assert rk.linear_logprobs(case.hidden[0], case.weight, case.labels[0]).shape == ()


def test_nothing_to_score(cpu_backend):
    for rows, needs in itertools.product((0, 5), ("", "h", "hwb")):
        case = make_case(rows, 4, 6, torch.float32, bias=True, ignored=2)
        case.hidden.fill_(NAN)
        assert all(t is None or not t.any() for t in ours(case, needs))


def test_ignored_rows_may_hold_anything_and_get_zero(cpu_backend):
    case = make_case(33, 64, 97, torch.float32)
    ignored = case.labels == -100
    clean = ours(case)
    hidden = case.hidden.masked_fill(ignored[:, None], NAN)
    poisoned = case._replace(hidden=hidden, upstream=case.upstream.masked_fill(ignored, NAN))
    for needs in ("h", "hw"):
        result = ours(poisoned, needs)
        assert torch.equal(result.logps, clean.logps) and not result.logps[ignored].any()
        assert not result.hidden[ignored].any() and result.hidden.isfinite().all()
        assert needs == "h" or torch.equal(result.weight, clean.weight)


def test_chunks_and_needed_gradients_do_not_change_the_result():
    case = make_case(33, 64, 97, torch.float64, bias=True)
    whole = ours(case, softcap=8.0)
    for rows in (1, 5, 32, 1000):
        for value, expected in zip(ours(case, softcap=8.0, chunk_rows=rows), whole, strict=True):
            assert error(value, expected) < 1e-14
    half = make_case(33, 64, 97, torch.bfloat16)
    assert torch.equal(ours(half, "").logps, ours(half, "h").logps)
    assert torch.equal(ours(half, "").logps, ours(half, "hw").logps)


# Values at the limits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@NEEDS
@pytest.mark.parametrize("lead", [10, 16])
def test_gradient_of_confident_tokens(lead, needs, dtype):
    """1 - p is 2e-2 to 5e-5. One-hot hidden states keep the logits exact in half precision."""
    case = confident(lead, dtype)
    exact, result = truth(case), ours(case, needs)

    def relative(grad):
        return float(((grad.double() - exact.hidden).norm(dim=1) / exact.hidden.norm(dim=1)).max())

    assert relative(result.hidden) < 5e-3
    assert float((result.logps / exact.logps - 1).abs().max()) < 1e-5
    if lead == 16 and dtype == torch.bfloat16:
        p = F.softmax((case.hidden @ case.weight.T).float(), 1).to(dtype)
        assert relative(case.weight[case.labels] - p @ case.weight) > 0.3, "it no longer bites"


def confident(lead, dtype):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.arange(64)
    weight[labels, labels] = lead
    return Case(torch.eye(64, dtype=dtype), weight, None, labels, torch.ones(64).double())


@pytest.mark.parametrize("cpu_backend", ["torch", "cpp"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lead", [10.5, 15, 20])
def test_confident_tokens_before_rounding(lead, dtype, cpu_backend):
    """1 - p and d logp / d hidden, before rounding to bf16, at 1 - p from 2e-2 to 1e-6."""
    hidden, weight, _, labels, _ = confident(lead, dtype)
    wide = weight.double()
    others = wide.T.clone()
    others[labels, labels] = -torch.inf
    miss = torch.sigmoid(others.logsumexp(1) - wide[labels, labels])
    direction = miss[:, None] * (wide[labels] - others.softmax(1) @ wide)
    head = (hidden, weight, labels, None, None, None, 1.0, -100, None, "", True)
    logps, found, _ = torch.ops.realign.linear_logprobs(*head)
    relative = (found.double() - direction).norm(dim=1) / direction.norm(dim=1)
    # The torch backend rounds E W to bf16 on the CPU.
    half = 2e-4 if cpu_backend == "cpp" else 1e-3
    assert float(relative.max()) < (half if dtype == torch.bfloat16 else 5e-6)
    assert float((-torch.expm1(logps.double()) / miss - 1).abs().max()) < 5e-6


def test_very_likely_and_unlikely_labels(cpu_backend):
    logits = torch.tensor([[60.0, 0.0, 1.0], [-500.0, 0.0, 1.0], [30.0, 0.0, 1.0]])
    logps = rk.linear_logprobs(logits, torch.eye(3), torch.zeros(3, dtype=torch.int64))
    exact = F.logsigmoid(logits[:, 0].double() - logits[:, 1:].double().logsumexp(1))
    rtol = 1e-5
    if cpu_backend == "reference":  # fp32 log_softmax has no precision below 1e-7
        logps, exact, rtol = logps[1:2], exact[1:2], 1e-6
    torch.testing.assert_close(logps.double(), exact, rtol=rtol, atol=0)


@NEEDS
def test_masked_tokens(cpu_backend, needs):
    """A bias of -inf masks a token, or all tokens except the label."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(6, 8, 37, dtype, bias=True)
        case.labels[:] = 5
        case.bias[torch.arange(37) % 3 == 0] = -INF
        check(case, needs, chunk_rows=4, temperature=0.8)
        case.bias[torch.arange(37) != 5] = -INF
        result = ours(case, needs)
        assert result.logps.abs().max() == 0 and result.hidden.abs().max() == 0
        assert needs == "h" or result.weight.abs().max() == result.bias.abs().max() == 0


@NEEDS
def test_extreme_settings(cpu_backend, needs):
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(5, 6, 9, dtype, bias=True)
        for settings in ({"temperature": 1e30}, {"softcap": 1e-30}):
            result = ours(case, needs, **settings)
            kept = case.labels != -100
            assert (result.logps[kept] + math.log(9)).abs().max() < 1e-6
            assert all(g is None or g.abs().max() < 1e-25 for g in result[1:])
        check(case, needs, softcap=1e30)
        check(case, needs, softcap=1e-3, temperature=1e-2)
        for factor in (1e-2, 1e2):
            check(case, needs, temperature=factor)
        with pytest.raises(rk.NonFiniteError, match="logits overflow"):
            ours(case._replace(hidden=case.hidden * 1e10), needs, temperature=1e-30)
    for name, value in itertools.product(("softcap", "temperature"), (1e-46, 1e300)):
        message = re.escape(f"{name} must be between 1e-30 and 1e30, got {value}")
        with pytest.raises(ValueError, match=message):
            ours(case, needs, **{name: value})


@pytest.mark.parametrize("place", ["hidden", "weight", "bias", "NaN"])
def test_not_finite(cpu_backend, place):
    for value, needs in itertools.product((NAN, INF, -INF), ("", "h", "hwb")):
        case = make_case(5, 6, 9, torch.float32, bias=True, ignored=0)
        case.labels[:] = torch.tensor([0, -100, 2, 3, 2])
        tensors = {"hidden": case.hidden[2], "weight": case.weight[4], "bias": case.bias[2:3]}
        for name, tensor in tensors.items():
            if place in (name, "NaN"):
                tensor[0] = value
        rows = [2] if place == "hidden" else [0, 2, 3, 4]
        with pytest.raises(rk.NonFiniteError, match=place) as caught:
            ours(case, needs, chunk_rows=2)
        found = caught.value.rows
        assert f"in rows {found}. " in str(caught.value)
        # An infinite logit is an error only in some rows, because -inf means probability 0.
        assert found == rows if math.isnan(value) else {*found} <= {*rows} and found


def test_infinite_logits_with_softcap_have_no_finite_gradient(cpu_backend):
    """tanh of an infinite logit is 1, with slope 0 as in fp64. The weight's gradient is NaN."""
    case = make_case(3, 4, 6, torch.float32, ignored=0)
    case.hidden[1], case.weight[:] = INF, case.weight.abs() + 0.1
    exact = truth(case, softcap=5.0)
    assert exact.logps.isfinite().all() and exact.weight.isnan().any()
    with contextlib.suppress(rk.NonFiniteError):
        result = ours(case, softcap=5.0)
        torch.testing.assert_close(result.logps, exact.logps.float())
        assert torch.equal(result.weight.isnan().any(1), exact.weight.isnan().any(1))


def test_a_weight_of_minus_infinity_has_no_finite_gradient(cpu_backend):
    """If hidden states push a token to -inf, the log-prob is finite but dz / dh is not."""
    case = make_case(3, 4, 6, torch.float32, ignored=0)
    case.hidden[:] = case.hidden.abs() + 0.1
    case.labels[:] = 0
    case.weight[4] = -INF
    with pytest.raises(rk.NonFiniteError, match="weight holds NaN or inf"):
        ours(case, "h")
    assert not ours(case).hidden.isfinite().any()  # as in eager mode


@NEEDS
def test_half_precision_overflow_is_an_error(cpu_backend, needs):
    case = make_case(4, 16, 33, torch.float16, ignored=0)
    if cpu_backend == "cpp":
        with pytest.raises(ValueError, match="'cpp' does not support float16 on cpu"):
            ours(case, needs)
        return
    case.hidden[:], case.weight[:] = 60000, case.weight.abs()
    if cpu_backend == "reference":  # computes in fp32
        assert error(ours(case, needs).logps, truth(case).logps) < 1e-6
    else:
        with pytest.raises(rk.NonFiniteError, match="overflow torch.float16"):
            ours(case, needs)
    calm = make_case(4, 16, 33, torch.float16)
    check(calm._replace(hidden=calm.hidden * 30), needs)  # certain, or nearly impossible


@pytest.mark.parametrize("cpu_backend", ["torch", "cpp"], indirect=True)
@NEEDS
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
def test_bf16_errs_no_more_than_eager_bf16(spread, needs, cpu_backend):
    """Logits have standard deviations 1, 2 and 4. With -s it prints the table of docs/kernels.md.

    REALIGN_ROWS=256,512,8000 gives the sizes of the table.
    """
    shape = map(int, os.environ.get("REALIGN_ROWS", "96,256,4000").split(","))
    case = make_case(*shape, torch.bfloat16, ignored=0, spread=spread)
    exact = truth(case)

    def errors(result):
        logps = (result.logps.double() - exact.logps).abs()
        gradient = (result.hidden.double() - exact.hidden).norm() / exact.hidden.norm()
        return torch.stack([logps.mean(), logps.max(), gradient])

    eager = errors(kc.eager(case, torch.bfloat16))
    found = errors(ours(case, needs))
    print(f"\nstd {spread} {cpu_backend}: log-prob mean, max, dH", *(f"{x:.1e}" for x in found))
    print(f"std {spread} eager: log-prob mean, max, dH  ", *(f"{x:.1e}" for x in eager))
    assert (found <= eager * (1 + 1e-4)).all(), (found, eager)
    if cpu_backend == "cpp":
        # fp32 sums: log-probs as exact as in fp32, the gradient as its rounding to bf16 allows.
        assert found[1] < 2e-5 < eager[1] / 100
        rounding = (exact.hidden.bfloat16().double() - exact.hidden).norm() / exact.hidden.norm()
        assert found[2] < 1.03 * rounding


# Callers


@pytest.mark.parametrize("trainable", [True, False])
def test_autocast_casts_like_a_linear_layer(cpu_backend, trainable):
    """Autocast has no effect in a backend: results equal those of bf16 inputs without autocast."""
    case = make_case(33, 64, 97, torch.float32, bias=True)
    needs = "hw" if trainable else "h"
    half = ours(case._replace(**{n: getattr(case, n).bfloat16() for n in case._fields[:3]}), needs)
    hidden = case.hidden.bfloat16().requires_grad_()
    weight = case.weight.clone().requires_grad_(trainable)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = rk.linear_logprobs(hidden, weight, case.labels, bias=case.bias)
        (logps * case.upstream.float()).sum().backward()
    assert torch.equal(logps, half.logps) and torch.equal(hidden.grad, half.hidden)
    if trainable:
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, half.weight.float())
    if cpu_backend != "cpp":
        double = make_case(9, 8, 11, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rk.linear_logprobs(*double[:2], double.labels).dtype == torch.float64


@NEEDS
def test_second_derivative_is_refused(needs):
    case = make_case(7, 5, 11, torch.float64)
    hidden = case.hidden.requires_grad_()
    loss = rk.linear_logprobs(hidden, case.weight.requires_grad_("w" in needs), case.labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss.square().sum(), hidden, create_graph=True)


@pytest.mark.parametrize("own_gemm", [True, False])
def test_inference_mode_does_not_affect_later_calls(cpu_backend, own_gemm, monkeypatch):
    """torch could not write a buffer made in inference mode outside that mode."""
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

    with ThreadPoolExecutor(1) as fresh:  # each thread has its own buffer
        fresh.submit(calls).result()


def test_threads_do_not_share_memory(cpu_backend):
    cases = [make_case(5 + i, 8 + i, 40 + 7 * i, torch.float32, seed=i) for i in range(4)]
    expected = [ours(case, "hw", chunk_rows=3) for case in cases]

    def many(i):
        with rk.use_backend(cpu_backend):
            return [ours(cases[i], "hw", chunk_rows=3) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for results, once in zip(pool.map(many, range(4)), expected, strict=True):
            for result in results:
                assert all(torch.equal(a, b) for a, b in zip(result[:3], once[:3], strict=True))


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 5e-3, 2e-2)]
)
def test_half_precision_gemm_in_fp32_blocks(dtype, rtol, atol, monkeypatch):
    """The path for CPUs without bf16 arithmetic is exact except for the last rounding."""
    monkeypatch.setattr(cpp_backend, "BLOCK", 64)  # several blocks, with a partial last one
    shapes = ((5, 7, 90), (90, 7, 5), (5, 90, 7))
    for (m, k, n), accumulate in itertools.product(shapes, (False, True)):
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16().T
        out = torch.randn(m, n).to(dtype)
        exact = a.double() @ b.double() + (out.double() if accumulate else 0)
        cpp_backend._gemm_in_fp32(a, b, out, accumulate)
        torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)


def lesser_levels():
    """Levels of REALIGN_CPU for this machine, without the one that the matrix above used."""
    if _extension.missing_reason() or "REALIGN_CPU" in os.environ:
        return []
    features, levels = _extension.require_extension().cpu_features(), ["scalar", "avx2", "avx512"]
    if features["level"] == "neon":
        return ["scalar"]
    return levels[: levels.index(features["level"]) + features["amx"]]


FORKS = """
import os, sys, pytest, torch
torch.use_deterministic_algorithms(False)  # what it imports is then in every child
for level in sys.argv[1].split():
    os.environ["REALIGN_CPU"] = level
    if (child := os.fork()) == 0:
        code = pytest.main(sys.argv[2:])
        sys.stdout.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, level
"""


@pytest.mark.skipif(not lesser_levels(), reason="the matrix ran on the least level")
def test_the_matrix_on_lower_cpu_levels():
    """Runs the matrix without tests/conftest.py, which imports transformers."""
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_logprobs.py", "test_preference.py")]
    numerics = "cpp and (values or rival or shorter or objectives or masked or finite or confident)"
    command = [sys.executable, "-c", FORKS, " ".join(lesser_levels()), "-q", "-k", numerics]
    command += ["-p", "no:cacheprovider", f"--confcutdir={here}", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == len(lesser_levels()) and "skipped" not in done.stdout
