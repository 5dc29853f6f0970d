"""The Triton row kernel against fp64."""

import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, gap, rows

from realign_kernels.backends.base import score

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # numpy's, interpreted
]
NAN, INF = float("nan"), float("inf")
HALF_TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of E, whose entries are at most 1 / temperature. The interpreter cuts when it writes bf16."""


@pytest.fixture(autouse=True)
def interpreted():
    with tc.interpreted():
        yield


def expected(logits, labels, bias, softcap, temperature, rival):
    """fp64: target, logit, peak, total, slope (r,), and E (r, V)."""
    x = logits.double() if bias is None else logits.double() + bias.double()
    slope = torch.full_like(x, 1 / temperature)
    z = x / temperature
    if softcap is not None:
        tanh = torch.tanh(x / softcap)
        z = softcap * tanh / temperature
        slope *= 1 - tanh**2
    columns = torch.arange(x.shape[1], device=x.device)
    target = labels.clone()
    if rival is not None:
        no_label = z.masked_fill(columns == labels[:, None], -INF)
        if x.shape[1] > 1:
            target = torch.where(rival, no_label.argmax(1), labels)
        else:
            target = torch.where(rival, torch.where(labels == 0, -1, 0), labels)
    is_target = columns == target[:, None]
    others = z.masked_fill(is_target, -INF)
    peak = others.amax(1).clamp(min=torch.finfo(torch.float32).min)
    e = (others - peak[:, None]).exp()
    there = target >= 0
    picked = target.clamp(min=0)[:, None]
    logit = torch.where(there, z.gather(1, picked).squeeze(1), -INF)
    label_slope = torch.where(there, slope.gather(1, picked).squeeze(1), 0.0)
    return (target, logit, peak, e.sum(1), label_slope), e * slope


def make(count, vocabulary, dtype=torch.float32, bias=False, spread=4.0, pad=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.full((count, vocabulary + pad), NAN)
    wide[:, :vocabulary] = torch.randn(count, vocabulary, generator=g) * spread
    labels = torch.randint(vocabulary, (count,), generator=g)
    labels[1::4] = -1
    offset = torch.randn(vocabulary, generator=g).to(dtype) if bias else None
    logits = wide.to(dtype).to(DEVICE)[:, :vocabulary]
    return logits, labels.to(DEVICE), None if offset is None else offset.to(DEVICE)


def check(stats, others, truth, e, dtype):
    """A row that is shifted by its label's logit is compared as if by its peak."""
    assert stats.target.tolist() == truth[0].tolist() and stats.target.dtype == torch.int64
    assert all(value.dtype == torch.float32 for value in stats[1:])
    assert others is not None or torch.equal(stats.divisor, stats.total)
    by_label = stats.peak == stats.logit
    assert others is not None or not by_label.any()
    factor = torch.where(by_label, stats.peak.double() - truth[2], 0.0).exp()
    peak = torch.where(by_label, truth[2], stats.peak.double())
    found = stats._replace(peak=peak, total=stats.total * factor)
    for name, value, exact in zip(stats._fields[1:5], found[1:5], truth[1:], strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=3e-6, msg=name)
    if others is not None:
        error = (others.double() * factor[:, None] - e).abs().max()
        assert error <= HALF_TOLERANCE[dtype] * e.max().clamp(min=1), error
        here = stats.target >= 0
        assert not others[here, stats.target[here]].any()


@pytest.mark.parametrize("rival", [False, True], ids=["label", "rival"])
@pytest.mark.parametrize("vocabulary", [1, 2, 97, 1000, 4097])
@pytest.mark.parametrize(
    ("bias", "softcap", "temperature"),
    [(False, None, 1.0), (True, None, 0.7), (True, 5.0, 2.0)],
    ids=["plain", "bias", "softcap"],
)
def test_against_fp64(vocabulary, bias, softcap, temperature, rival):
    logits, labels, offset = make(6, vocabulary, bias=bias, pad=3)
    rival = torch.tensor([1, 1, 0, 0, 1, 1], device=DEVICE).bool() if rival else None
    truth, e = expected(logits, labels, offset, softcap, temperature, rival)
    others = torch.full_like(logits, NAN)
    stats = rows.read_rows(logits, labels, offset, softcap, temperature, rival, others)
    check(stats, others, truth, e, torch.float32)


@pytest.mark.parametrize("alias", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, alias):
    """The interpreter's bf16 is right in loads and cut, not rounded, in stores."""
    logits, labels, offset = make(5, 1001, dtype, bias=True, pad=7)
    truth, e = expected(logits, labels, offset, 10.0, 0.9, None)
    given = logits.clone()
    others = given if alias else torch.full_like(given, NAN)
    stats = rows.read_rows(given, labels, offset, 10.0, 0.9, None, others)
    check(stats, others, truth, e, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rival", [False, True], ids=["label", "rival"])
def test_fp32_logits_with_half_precision_others(dtype, rival):
    logits, labels, _ = make(5, 4500)
    rival = torch.ones(5, device=DEVICE).bool() if rival else None
    truth, e = expected(logits, labels, None, None, 1.0, rival)
    others = torch.full_like(logits, NAN, dtype=dtype)
    check(rows.read_rows(logits, labels, None, None, 1.0, rival, others), others, truth, e, dtype)


def test_in_place_over_several_blocks_and_with_rivals():
    logits, labels, _ = make(4, 9000)
    rival = torch.tensor([True, False, True, False], device=DEVICE)
    truth, e = expected(logits, labels, None, 20.0, 1.0, rival)
    stats = rows.read_rows(logits, labels, None, 20.0, 1.0, rival, logits)
    check(stats, logits, truth, e, torch.float32)


def test_without_others_nothing_is_written():
    logits, labels, _ = make(4, 200)
    before = logits.clone()
    truth, _ = expected(logits, labels, None, None, 1.0, None)
    check(rows.read_rows(logits, labels, None, None, 1.0), None, truth, None, torch.float32)
    assert torch.equal(logits, before)


def test_memory_between_rows_is_left_alone():
    wide = torch.full((3, 130), 7.0, device=DEVICE)
    labels = torch.tensor([0, 5, 96], device=DEVICE)
    rows.read_rows(wide[:, :97], labels, None, None, 1.0, None, wide[:, :97])
    assert (wide[:, 97:] == 7).all() and (wide[:, :97] != 7).all()


def test_ties_go_to_the_first_index_also_across_blocks():
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[0, [7, 4100]] = 3.0
    logits[1, [4099, 4100]] = 3.0
    logits[2, [2, 3, 4100]] = 3.0
    labels = torch.tensor([0, 4099, 2, 0], device=DEVICE)
    stats = rows.read_rows(logits, labels, None, None, 1.0, torch.ones(4, device=DEVICE).bool())
    assert stats.target.tolist() == [7, 4100, 3, 1]


def test_rivals_that_later_blocks_displace():
    """The best of the first block is the peak of the others, or most of their sum, in the end."""
    logits = torch.full((2, 9000), -30.0, device=DEVICE)
    logits[0, [10, 4200, 8500]] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    logits[1, [10, 5000]] = torch.tensor([2.0, 2.5], device=DEVICE)
    labels = torch.tensor([0, 20], device=DEVICE)
    every = torch.ones(2, device=DEVICE).bool()
    truth, e = expected(logits, labels, None, None, 1.0, every)
    assert truth[0].tolist() == [8500, 5000] and truth[2].tolist() == [2, 2]
    others = torch.full_like(logits, NAN)
    stats = rows.read_rows(logits, labels, None, None, 1.0, every, others)
    check(stats, others, truth, e, torch.float32)


def test_rival_among_banned_tokens():
    """All others have probability 0: the first of them is the rival, as argmax has it."""
    logits = torch.full((1, 40), -INF, device=DEVICE)
    logits[0, 0] = 1.0
    every = torch.ones(1, device=DEVICE).bool()
    stats = rows.read_rows(logits, torch.tensor([0], device=DEVICE), None, None, 1.0, every)
    assert stats.target.tolist() == [1] and stats.logit.tolist() == [-INF]
    assert stats.peak.tolist() == [1.0] and stats.total.tolist() == [1.0]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("rival", [False, True], ids=["label", "rival"])
def test_non_finite_logits_end_as_nan(value, softcap, rival):
    """At the label, at the largest other token, in the first block or in the ragged last one."""
    logits, labels, _ = make(6, 4100)
    labels = labels.clamp(min=0)
    largest = logits.argmax(1)
    for row, column in enumerate([int(labels[0]), int(largest[1]), 0, 4099, 4096]):
        logits[row, column] = value
    every = torch.ones(6, device=DEVICE).bool() if rival else None
    finite = gap(rows.read_rows(logits, labels, None, softcap, 1.0, every)).isfinite()
    assert finite.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("value", [NAN, INF])
def test_rows_of_nothing_else(value):
    logits = torch.full((2, 70), value, device=DEVICE)
    labels = torch.tensor([3, 0], device=DEVICE)
    for rival in (None, torch.ones(2, device=DEVICE).bool()):
        assert gap(rows.read_rows(logits, labels, None, None, 1.0, rival)).isnan().all()


def test_a_banned_token_is_no_error():
    """A bias of -inf, on others or on the last of them, leaves finite log-probs."""
    logits = torch.zeros(2, 3, device=DEVICE)
    bias = torch.tensor([0.0, -INF, -INF], device=DEVICE)
    stats = rows.read_rows(logits, torch.tensor([0, 0], device=DEVICE), bias, None, 1.0)
    assert stats.total.tolist() == [0, 0] and (gap(stats) == INF).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_confident_tokens(softcap):
    """1 - p from 1e-2 to 1e-6, relative error at most 1e-3: see torch_backend on why."""
    miss = torch.logspace(-2, -6, 9, dtype=torch.float64)
    logits, labels, _ = make(9, 2000, spread=2.0, seed=1)
    labels = labels.clamp(min=0)
    rest = logits.double().scatter(1, labels[:, None], -INF).logsumexp(1).cpu()
    raise_to = (rest + torch.log1p(-miss) - miss.log()).float()
    logits.scatter_(1, labels[:, None], raise_to[:, None].to(DEVICE))
    (_, logit, peak, total, _), _ = expected(logits, labels, None, softcap, 1.0, None)
    exact = torch.sigmoid(-(logit - peak - total.log()))
    stats = rows.read_rows(logits, labels, None, softcap, 1.0)
    relative = (torch.sigmoid(-gap(stats)).double() - exact).abs() / exact
    assert relative.max() < 1e-3, relative


def test_extreme_logits_neither_overflow_nor_vanish():
    logits = torch.full((3, 300), -1e4, device=DEVICE)
    logits[0, 3], logits[1, 4], logits[2, :] = 1e4, 1e4, 3e38
    labels = torch.tensor([3, 3, 3], device=DEVICE)
    e = torch.full_like(logits, NAN)
    stats = rows.read_rows(logits, labels, None, None, 1.0, None, e)
    assert stats.total.tolist() == [299, 1, 299] and stats.peak.tolist()[:2] == [-1e4, 1e4]
    assert e.isfinite().all() and e[1, 4] == 1


@pytest.mark.parametrize("below", [50, 80, 120])
def test_labels_far_below_and_above_the_others(below):
    """Shifted by the label's logit at 50 nats, by the peak and read again at 80 and 120."""
    logits, labels, _ = make(4, 3000, spread=1.0)
    labels = labels.clamp(min=0)
    far = torch.tensor([-below, below, -below, below], device=DEVICE)
    logits.scatter_add_(1, labels[:, None], far[:, None].float())
    truth, e = expected(logits, labels, None, None, 1.0, None)
    others = torch.full_like(logits, NAN)
    stats = rows.read_rows(logits, labels, None, None, 1.0, None, others)
    assert (stats.peak == stats.logit).tolist() == [below < 70] * 4
    check(stats, others, truth, e, torch.float32)


def test_an_empty_chunk():
    stats = rows.read_rows(
        torch.empty(0, 5, device=DEVICE), torch.empty(0, device=DEVICE).long(), None, None, 1.0
    )
    assert [len(field) for field in stats] == [0] * 6


def test_what_is_not_supported_says_what_to_do():
    labels = torch.zeros(2, device=DEVICE).long()
    with pytest.raises(ValueError, match="logits is torch.float64.*cast it"):
        rows.read_rows(torch.zeros(2, 3, device=DEVICE).double(), labels, None, None, 1.0)
    with pytest.raises(ValueError, match=r"logits \(2, 3\) with strides \(1, 2\).*contiguous"):
        rows.read_rows(torch.zeros(3, 2, device=DEVICE).T, labels, None, None, 1.0)


@pytest.mark.parametrize("lift", [0, 14, -30])
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0, 6.0])
def test_one_read_errs_little_more_than_two(spread, lift):
    """Gradients of hidden by rows in norm against fp64, E rounded to bf16 as a GPU rounds it.

    One read may err more than two by a quarter of the last rounding to bf16.
    """
    hidden, weight, labels = tc.problem(
        rows=48, width=128, vocabulary=4001, spread=spread, lift=lift
    )
    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
    exact = hidden.double().requires_grad_()
    z = exact @ weight.double().T
    z.log_softmax(1).gather(1, labels[:, None]).sum().backward()

    def error(found):
        return ((found.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)).mean()

    errors, logits = [], hidden @ weight.T
    for one in (True, False):
        others = torch.empty_like(logits)
        stats = rows.read_rows(logits.clone(), labels, None, None, 1.0, None, others)
        if not one:  # as if shifted by the peak
            peak = logits.scatter(1, labels[:, None], -INF).amax(1)
            others = others * (stats.peak - peak)[:, None].exp()
            stats = stats._replace(peak=peak, total=stats.total * (stats.peak - peak).exp())
        rounded = others.bfloat16().float()
        divisor = stats.total + (rounded - others).sum(1) if one else stats.total
        scores = score(stats._replace(divisor=divisor), None)
        pull = rounded @ weight / scores.total[:, None]
        errors.append(error((weight[labels] - pull) * scores.miss[:, None]))
    assert errors[0] <= errors[1] + error(exact.grad.bfloat16()) / 4, errors


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_products_are_divided_by_the_sum_of_e_as_rounded(temperature):
    logits, labels, _ = make(5, 4500)
    labels = labels.clamp(min=0)
    others = torch.full_like(logits, NAN, dtype=torch.bfloat16)
    stats = rows.read_rows(logits, labels, None, None, temperature, None, others)
    exact = others.double().sum(1) * temperature
    torch.testing.assert_close(stats.divisor.double(), exact, rtol=1e-6, atol=0)
    assert ((stats.divisor - stats.total).abs() > 1e-4 * stats.total).any()
