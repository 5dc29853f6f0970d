"""The fused head against fp64 and against the row kernel, and its division of work."""

import contextlib
import itertools

import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, TRITON_DTYPES, forward, logit_gap, row_kernel

from realign_kernels.backends.triton import configs
from realign_kernels.backends.triton.configs import GemmConfig
from realign_kernels.backends.triton.logits import assume_device

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:.*encountered:RuntimeWarning"
    ),  # from numpy in the interpreter
]
NAN, INF = float("nan"), float("inf")
POINTERS = GemmConfig(16, 32, 16, 4, 2, 2, False)
DESCRIPTORS = GemmConfig(16, 64, 32, 4, 2, 2, True)
CONFIGS = {"pointers": POINTERS, "descriptors": DESCRIPTORS}
TOLERANCE = 5e-6 if DEVICE == "cpu" else 2e-5
"""Tensor cores truncate sums to fp32, and multiply fp32 as three tf32 products."""


@pytest.fixture(autouse=True)
def interpreted():
    """Assumes five processors, so that small cases have several splits."""
    assumed = assume_device(90, 5) if DEVICE == "cpu" else contextlib.nullcontext()
    with tc.interpreted(), assumed:
        yield


def make(count, width, vocabulary, dtype, bias=False, spread=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(count, width, generator=g) * spread).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).to(dtype)
    offset = torch.randn(vocabulary, generator=g).to(dtype) if bias else None
    labels = torch.randint(vocabulary, (count,), generator=g)
    labels[1::4] = -1
    return [None if t is None else t.to(DEVICE) for t in (hidden, weight, labels, offset)]


def check(stats, hidden, weight, labels, bias, softcap, temperature):
    logits = hidden.double() @ weight.double().T
    truth, _ = tc.row_truth(logits, labels, bias, softcap, temperature, None)
    assert torch.equal(stats.target, labels)
    for name, value, exact in zip(stats._fields[1:5], stats[1:5], truth[1:], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_whose_columns_are_not_adjacent(name):
    hidden, *rest = make(9, 48, 101, torch.float32)
    apart = torch.stack([hidden, torch.full_like(hidden, NAN)], -1)[..., 0]
    stats = forward.head_stats(apart, *rest, None, 1.0, config=CONFIGS[name])
    check(stats, hidden, *rest, None, 1.0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(
    ("bias", "softcap", "temperature"),
    [(False, None, 1.0), (True, None, 0.7), (True, 5.0, 2.0)],
    ids=["plain", "bias", "softcap"],
)
def test_against_fp64(config, dtype, bias, softcap, temperature):
    hidden, weight, labels, offset = make(37, 40, 331, dtype, bias)
    args = (hidden, weight, labels, offset, softcap, temperature)
    check(forward.head_stats(*args, config=config), *args)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("count", "width", "vocabulary"), [(1, 8, 1), (3, 16, 2), (16, 72, 97)])
def test_odd_shapes(config, count, width, vocabulary):
    hidden, weight, labels, _ = make(count, width, vocabulary, torch.float16)
    args = (hidden, weight, labels, None, None, 1.0)
    check(forward.head_stats(*args, config=config), *args)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("width", [24, 23])
def test_tiles_of_the_tables(dtype, width):
    """Uses the tiles of the tables. A width that descriptors cannot address uses pointers."""
    hidden, weight, labels, offset = make(20, width, 300, dtype, bias=True)
    args = (hidden, weight, labels, offset, None, 1.0)
    check(forward.head_stats(*args), *args)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_strided_inputs(config):
    hidden, weight, labels, _ = make(37, 32, 200, torch.float32)
    wide = [torch.full((len(t), 40), NAN, device=DEVICE) for t in (hidden, weight)]
    for target, source in zip(wide, (hidden, weight), strict=True):
        target[:, 4:36] = source
    args = (wide[0][:, 4:36], wide[1][:, 4:36], labels, None, None, 1.0)
    check(forward.head_stats(*args, config=config), *args)


def test_against_the_row_kernel_over_shards_of_the_vocabulary():
    """Two shards, with a label in one of them and -1 in the other."""
    hidden, weight, labels, _ = make(20, 24, 150, torch.float32)
    for shard, start in ((weight[:60], 0), (weight[60:], 60)):
        local = labels - start
        local = torch.where((local >= 0) & (local < len(shard)) & (labels >= 0), local, -1)
        fused = forward.head_stats(hidden, shard, local, None, None, 1.0, config=POINTERS)
        read = row_kernel.row_stats(hidden @ shard.T, local, None, None, 1.0)
        for one, other in zip(fused, read, strict=True):
            torch.testing.assert_close(one, other, rtol=2 * TOLERANCE, atol=2 * TOLERANCE)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("value", [NAN, INF])
def test_non_finite_inputs_end_as_nan(config, softcap, value):
    hidden, weight, labels, _ = make(20, 32, 130, torch.float32)
    labels = labels.clamp(min=0)
    hidden[3, 5] = hidden[17, 31] = value
    stats = forward.head_stats(hidden, weight, labels, None, softcap, 1.0, config=config)
    bad = (~logit_gap(stats).isfinite()).nonzero().squeeze(1)
    assert bad.tolist() == [3, 17]
    hidden, weight, labels, _ = make(20, 32, 130, torch.float32)
    weight[129, 0] = value
    hidden[:, 0] = 1
    stats = forward.head_stats(hidden, weight, labels.clamp(min=0), None, softcap, 1.0)
    assert logit_gap(stats).isnan().all()


def test_confident_tokens():
    """1 - p from 1e-2 to 1e-6. Column 16 + i of the weight lifts only the label of row i."""
    hidden, weight, _, _ = make(12, 32, 500, torch.float32)
    labels = torch.arange(12, device=DEVICE)
    hidden[:, 16:], weight[:, 16:] = torch.eye(12, 16), 0
    one_minus_p = torch.logspace(-2, -6, 12, dtype=torch.float64, device=DEVICE)
    rest = (hidden @ weight.T).double().scatter(1, labels[:, None], -INF).logsumexp(1)
    own = (hidden * weight[:12]).sum(1).double()
    weight[labels, 16 + labels] = (rest + torch.special.logit(1 - one_minus_p) - own).float()
    stats = forward.head_stats(hidden, weight, labels, None, None, 1.0, config=POINTERS)
    exact = 1 - (hidden.double() @ weight.double().T).softmax(1).diagonal()
    relative = (torch.sigmoid(-logit_gap(stats)).double() - exact).abs() / exact
    assert relative.max() < 1e-3, relative


def test_no_rows():
    hidden, weight, labels, _ = make(4, 16, 50, torch.float32)
    stats = forward.head_stats(hidden[:0], weight, labels[:0], None, None, 1.0)
    assert [len(field) for field in stats] == [0] * 6


def test_splits_cover_the_vocabulary_and_balance_the_work():
    cases = itertools.product((0, 1, 8, 31, 133, 1000), (1, 2, 97, 593), (1, 5, 108, 132))
    for row_blocks, tiles, processors in cases:
        splits, per_split = configs.choose_splits(row_blocks, tiles, processors)
        assert 1 <= splits <= configs.MOST_SPLITS
        assert (splits - 1) * per_split < tiles <= splits * per_split, "an empty or a short split"
        busiest = -(-row_blocks * splits // processors) * per_split
        ideal = row_blocks * tiles / processors
        assert busiest <= max(1.34 * ideal, ideal + 3)


def test_tables_and_their_fallback():
    nearest = {75: 80, 80: 80, 86: 80, 89: 80, 90: 90, 103: 100, 121: 120}
    for architecture, expected in nearest.items():
        assert configs.listed(architecture) == expected
    wide = configs.gemm_config(90, torch.bfloat16, 4096, 4096, 128256)
    assert (wide.rows, wide.columns, wide.descriptors) == (128, 256, True)
    assert not configs.gemm_config(90, torch.bfloat16, 4096, 4095, 128256, False).descriptors
    assert configs.gemm_config(90, torch.bfloat16, 64, 4096, 128256).rows == 64
    assert configs.row_config(90, 128256) == (1024, 8) and configs.row_config(80, 9000) == (4096, 8)
    assert configs.row_config(0, 97) == (128, 1) and configs.row_config(90, 1).block == 32


def test_a_transposed_weight_is_refused():
    hidden, weight, labels = tc.problem()
    with pytest.raises(ValueError, match="weight .* the last stride must be 1. Call contiguous"):
        forward.head_stats(hidden, weight.T.contiguous().T, labels, None, None, 1.0)
