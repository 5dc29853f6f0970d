"""The scatter-add of rows against fp64: the Triton kernel, and torch for half-precision sums."""

import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, scatter

from realign_kernels.backends.torch import TorchKernels

ADDERS = {"triton": scatter.add_rows, "torch": TorchKernels().add_rows}
DTYPES = {"triton": (torch.float32, torch.float16), "torch": (torch.float32, torch.bfloat16)}
CASES = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]
if DEVICE == "cuda":  # the interpreter truncates when it stores bf16
    CASES.append(("triton", torch.bfloat16))


@pytest.fixture(autouse=True)
def interpreted():
    with tc.interpreted():
        yield


@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 40), (37, 5), (64, 1030)])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_equal_targets_are_summed_before_they_are_rounded(name, dtype, count, width):
    g = torch.Generator().manual_seed(count)
    wide = torch.randn(7, width + 3, generator=g).to(dtype).to(DEVICE)
    total = wide[:, :width]  # rows are not adjacent in memory
    index = torch.randint(-1, 5, (count,), generator=g).to(DEVICE)  # two rows have no target
    rows = torch.randn(width, count, generator=g).to(DEVICE).T  # columns are not adjacent
    rows[index < 0] = 0
    exact = total.double().index_add_(0, index.clamp(min=0), rows.double())
    before = wide.clone()
    ADDERS[name](total, index, rows)
    # One rounding of the result, after fp32 sums of at most 64 rows.
    error = (total.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 2e-5).all()
    assert torch.equal(total[5:], before[5:, :width])
    assert torch.equal(wide[:, width:], before[:, width:])
    first = total.clone()
    wide.copy_(before)
    ADDERS[name](total, index, rows)
    assert torch.equal(total, first)
