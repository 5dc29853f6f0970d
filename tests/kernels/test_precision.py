"""How exact bf16 is: against fp64 and beside eager torch, and on tokens the model is sure of."""

import kernel_cases as kc
import pytest
import torch

import realign_kernels as rk
from realign_kernels import _extension
from realign_kernels.backends import cpp as cpp_backend

BACKENDS = [
    "torch",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            _extension.missing_reason() is not None, reason="the C++ extension is not built"
        ),
    ),
]


def errors(result, exact):
    """Mean and largest error of log-probs, and of the gradient of hidden relative to its norm."""
    logps = (result.logps.double() - exact.logps).abs()
    gradient = (result.hidden.double() - exact.hidden).norm() / exact.hidden.norm()
    return torch.stack([logps.mean(), logps.max(), gradient])


@pytest.mark.skipif(
    _extension.missing_reason() is not None, reason="the C++ extension is not built"
)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7, 90), (90, 7, 5), (5, 90, 7)], ids=["n", "m", "k"])
def test_halves_multiplied_in_fp32_by_blocks(shape, dtype, accumulate, monkeypatch):
    """As on a CPU without bf16 arithmetic: exact but for the last rounding, along each axis."""
    monkeypatch.setattr(cpp_backend, "BLOCK", 64)  # several blocks, the last one ragged
    m, k, n = shape
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16().T
    out = torch.randn(m, n).to(dtype)
    exact = a.double() @ b.double() + (out.double() if accumulate else 0)
    cpp_backend._gemm_in_fp32(a, b, out, accumulate)
    rounding = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 2e-2}
    )
    torch.testing.assert_close(out.double(), exact, **rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
def test_bf16_errs_no_more_than_eager_bf16(spread, frozen, backend, capsys):
    """At logits of standard deviation 1, 2 and 4; run with -s to see the table."""
    case = kc.make_case(256, 512, 8000, torch.bfloat16, ignored=0, spread=spread)
    exact, eager = kc.truth(case), errors(kc.eager(case, torch.bfloat16), kc.truth(case))
    with rk.use_backend(backend):
        ours = errors(kc.ours(case, frozen=frozen), exact)
    print(f"\nstd {spread} {backend}: log-prob mean, max, dH of ours", *(f"{x:.1e}" for x in ours))
    print(f"std {spread} eager: log-prob mean, max, dH         ", *(f"{x:.1e}" for x in eager))
    assert (ours <= eager * (1 + 1e-4)).all(), (ours, eager)
    if backend == "cpp":
        # fp32 sums: log-probs as exact as in fp32, the gradient as its rounding to bf16 allows.
        assert ours[1] < 2e-5 < eager[1] / 100
        rounding = (exact.hidden.bfloat16().double() - exact.hidden).norm() / exact.hidden.norm()
        assert ours[2] < 1.03 * rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lead", [10.5, 13, 15, 17.5, 20])
def test_confident_tokens(lead, dtype, backend):
    """1 - p from 2e-2 to 1e-6: 1 - p, and d logp / d hidden before it is rounded to bf16.

    One-hot hidden states, so that the logits are entries of the weight and exact in bf16.
    """
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=g, dtype=torch.float64).to(dtype)
    weight[torch.arange(64), torch.arange(64)] = lead
    hidden, labels = torch.eye(64, dtype=dtype), torch.arange(64)

    wide = weight.double()
    others = wide.T.clone()
    others[labels, labels] = -torch.inf
    miss = torch.sigmoid(others.logsumexp(1) - wide[labels, labels])
    direction = miss[:, None] * (wide[labels] - others.softmax(1) @ wide)
    with rk.use_backend(backend):
        head = (hidden, weight, labels, None, None, None, 1.0, -100, None, "", True)
        logps, found, _ = torch.ops.realign.linear_logprobs(*head)
    relative = (found.double() - direction).norm(dim=1) / direction.norm(dim=1)
    # The torch backend rounds E W to bf16 on the CPU.
    half = 2e-4 if backend == "cpp" else 1e-3
    assert float(relative.max()) < (half if dtype == torch.bfloat16 else 5e-6)
    assert float((-torch.expm1(logps.double()) / miss - 1).abs().max()) < 5e-6
