"""The Triton row kernel against fp64."""

import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, logit_gap, row_kernel

from realign_kernels.backends.base import score

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:.*encountered:RuntimeWarning"
    ),  # from numpy in the interpreter
]
NAN, INF = float("nan"), float("inf")
HALF_TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Tolerance of E, whose entries are at most 1 / temperature.

The interpreter truncates when it stores bf16."""


@pytest.fixture(autouse=True)
def interpreted():
    with tc.interpreted():
        yield


def make(count, vocabulary, dtype=torch.float32, bias=False, spread=4.0, pad=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.full((count, vocabulary + pad), NAN)
    wide[:, :vocabulary] = torch.randn(count, vocabulary, generator=g) * spread
    labels = torch.randint(vocabulary, (count,), generator=g)
    labels[1::4] = -1
    offset = torch.randn(vocabulary, generator=g).to(dtype) if bias else None
    logits = wide.to(dtype).to(DEVICE)[:, :vocabulary]
    return logits, labels.to(DEVICE), None if offset is None else offset.to(DEVICE)


def check(stats, exp_logits, truth, e, dtype):
    """Compares with fp64. A row shifted by its label's logit is first shifted to its maximum."""
    assert stats.target.tolist() == truth[0].tolist() and stats.target.dtype == torch.int64
    assert all(value.dtype == torch.float32 for value in stats[1:])
    assert exp_logits is not None or torch.equal(stats.divisor, stats.sum_exp)
    by_label = stats.max_logit == stats.logit
    assert exp_logits is not None or not by_label.any()
    factor = torch.where(by_label, stats.max_logit.double() - truth[2], 0.0).exp()
    max_logit = torch.where(by_label, truth[2], stats.max_logit.double())
    found = stats._replace(max_logit=max_logit, sum_exp=stats.sum_exp * factor)
    for name, value, exact in zip(stats._fields[1:5], found[1:5], truth[1:], strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=3e-6, msg=name)
    if exp_logits is not None:
        error = (exp_logits.double() * factor[:, None] - e).abs().max()
        assert error <= HALF_TOLERANCE[dtype] * e.max().clamp(min=1), error
        here = stats.target >= 0
        assert not exp_logits[here, stats.target[here]].any()


@pytest.mark.parametrize("runner_up", [False, True], ids=["label", "runner_up"])
@pytest.mark.parametrize("vocabulary", [1, 2, 97, 1000, 4097])
@pytest.mark.parametrize(
    ("bias", "softcap", "temperature"),
    [(False, None, 1.0), (True, None, 0.7), (True, 5.0, 2.0)],
    ids=["plain", "bias", "softcap"],
)
def test_against_fp64(vocabulary, bias, softcap, temperature, runner_up):
    logits, labels, offset = make(6, vocabulary, bias=bias, pad=3)
    runner_up = torch.tensor([1, 1, 0, 0, 1, 1], device=DEVICE).bool() if runner_up else None
    truth, e = tc.row_truth(logits, labels, offset, softcap, temperature, runner_up)
    exp_logits = torch.full_like(logits, NAN)
    stats = row_kernel.row_stats(
        logits, labels, offset, softcap, temperature, runner_up, exp_logits
    )
    check(stats, exp_logits, truth, e, torch.float32)


@pytest.mark.parametrize("runner_up", [False, True], ids=["label", "runner_up"])
@pytest.mark.parametrize(
    ("of_logits", "of_exp", "vocabulary", "softcap"),
    [
        (torch.float16, torch.float16, 1001, 10.0),
        (torch.bfloat16, torch.bfloat16, 1001, 10.0),
        (torch.float32, torch.float16, 4500, None),
        (torch.float32, torch.bfloat16, 4500, None),
        (torch.float16, "in place", 1001, 10.0),
        (torch.bfloat16, "in place", 1001, 10.0),
        (torch.float32, "in place", 9000, 20.0),
    ],
    ids=str,
)
def test_dtypes_in_place_and_apart(of_logits, of_exp, vocabulary, softcap, runner_up):
    """The interpreter loads bf16 correctly, but truncates in stores."""
    logits, labels, offset = make(5, vocabulary, of_logits, bias=softcap == 10.0, pad=7)
    every = torch.tensor([True, False, True, False, True], device=DEVICE) if runner_up else None
    truth, e = tc.row_truth(logits, labels, offset, softcap, 0.9, every)
    dtype = of_logits if of_exp == "in place" else of_exp
    exp_logits = logits if of_exp == "in place" else torch.full_like(logits, NAN, dtype=dtype)
    stats = row_kernel.row_stats(logits, labels, offset, softcap, 0.9, every, exp_logits)
    check(stats, exp_logits, truth, e, dtype)


def test_without_exp_logits_nothing_is_written():
    logits, labels, _ = make(4, 200)
    before = logits.clone()
    truth, _ = tc.row_truth(logits, labels, None, None, 1.0, None)
    check(row_kernel.row_stats(logits, labels, None, None, 1.0), None, truth, None, torch.float32)
    assert torch.equal(logits, before)


def test_memory_between_rows_is_left_alone():
    wide = torch.full((3, 130), 7.0, device=DEVICE)
    labels = torch.tensor([0, 5, 96], device=DEVICE)
    row_kernel.row_stats(wide[:, :97], labels, None, None, 1.0, None, wide[:, :97])
    assert (wide[:, 97:] == 7).all() and (wide[:, :97] != 7).all()


def test_ties_go_to_the_first_index_also_across_blocks():
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[0, [7, 4100]] = 3.0
    logits[1, [4099, 4100]] = 3.0
    logits[2, [2, 3, 4100]] = 3.0
    labels = torch.tensor([0, 4099, 2, 0], device=DEVICE)
    stats = row_kernel.row_stats(
        logits, labels, None, None, 1.0, torch.ones(4, device=DEVICE).bool()
    )
    assert stats.target.tolist() == [7, 4100, 3, 1]


def test_rivals_that_later_blocks_displace():
    """The best token of the first block ends as the largest of the others or most of their sum."""
    logits = torch.full((2, 9000), -30.0, device=DEVICE)
    logits[0, [10, 4200, 8500]] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    logits[1, [10, 5000]] = torch.tensor([2.0, 2.5], device=DEVICE)
    labels = torch.tensor([0, 20], device=DEVICE)
    every = torch.ones(2, device=DEVICE).bool()
    truth, e = tc.row_truth(logits, labels, None, None, 1.0, every)
    assert truth[0].tolist() == [8500, 5000] and truth[2].tolist() == [2, 2]
    exp_logits = torch.full_like(logits, NAN)
    stats = row_kernel.row_stats(logits, labels, None, None, 1.0, every, exp_logits)
    check(stats, exp_logits, truth, e, torch.float32)


def test_rival_among_masked_tokens():
    """All other tokens have probability 0. The first is the runner-up, as with argmax."""
    logits = torch.full((1, 40), -INF, device=DEVICE)
    logits[0, 0] = 1.0
    every = torch.ones(1, device=DEVICE).bool()
    stats = row_kernel.row_stats(logits, torch.tensor([0], device=DEVICE), None, None, 1.0, every)
    assert stats.target.tolist() == [1] and stats.logit.tolist() == [-INF]
    assert stats.max_logit.tolist() == [1.0] and stats.sum_exp.tolist() == [1.0]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("runner_up", [False, True], ids=["label", "runner_up"])
def test_non_finite_logits_end_as_nan(value, softcap, runner_up):
    """Non-finite at the label, at the largest other token, in the first or partial last block."""
    logits, labels, _ = make(6, 4100)
    labels = labels.clamp(min=0)
    largest = logits.argmax(1)
    for row, column in enumerate([int(labels[0]), int(largest[1]), 0, 4099, 4096]):
        logits[row, column] = value
    every = torch.ones(6, device=DEVICE).bool() if runner_up else None
    finite = logit_gap(row_kernel.row_stats(logits, labels, None, softcap, 1.0, every)).isfinite()
    assert finite.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("value", [NAN, INF])
def test_rows_without_other_tokens(value):
    logits = torch.full((2, 70), value, device=DEVICE)
    labels = torch.tensor([3, 0], device=DEVICE)
    for runner_up in (None, torch.ones(2, device=DEVICE).bool()):
        stats = row_kernel.row_stats(logits, labels, None, None, 1.0, runner_up)
        assert logit_gap(stats).isnan().all()


def test_a_masked_token_is_no_error():
    """With a bias of -inf on other tokens, or on the last of them, log-probs stay finite."""
    logits = torch.zeros(2, 3, device=DEVICE)
    bias = torch.tensor([0.0, -INF, -INF], device=DEVICE)
    stats = row_kernel.row_stats(logits, torch.tensor([0, 0], device=DEVICE), bias, None, 1.0)
    assert stats.sum_exp.tolist() == [0, 0] and (logit_gap(stats) == INF).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_confident_tokens(softcap):
    """At 1 - p from 1e-2 to 1e-6 the relative error is at most 1e-3."""
    one_minus_p = torch.logspace(-2, -6, 9, dtype=torch.float64)
    logits, labels, _ = make(9, 2000, spread=2.0, seed=1)
    labels = labels.clamp(min=0)
    rest = logits.double().scatter(1, labels[:, None], -INF).logsumexp(1).cpu()
    raise_to = (rest + torch.log1p(-one_minus_p) - one_minus_p.log()).float()
    logits.scatter_(1, labels[:, None], raise_to[:, None].to(DEVICE))
    (_, logit, max_logit, sum_exp, _), _ = tc.row_truth(logits, labels, None, softcap, 1.0, None)
    exact = torch.sigmoid(-(logit - max_logit - sum_exp.log()))
    stats = row_kernel.row_stats(logits, labels, None, softcap, 1.0)
    relative = (torch.sigmoid(-logit_gap(stats)).double() - exact).abs() / exact
    assert relative.max() < 1e-3, relative


def test_extreme_logits_neither_overflow_nor_vanish():
    logits = torch.full((3, 300), -1e4, device=DEVICE)
    logits[0, 3], logits[1, 4], logits[2, :] = 1e4, 1e4, 3e38
    labels = torch.tensor([3, 3, 3], device=DEVICE)
    e = torch.full_like(logits, NAN)
    stats = row_kernel.row_stats(logits, labels, None, None, 1.0, None, e)
    assert stats.sum_exp.tolist() == [299, 1, 299] and stats.max_logit.tolist()[:2] == [-1e4, 1e4]
    assert e.isfinite().all() and e[1, 4] == 1


@pytest.mark.parametrize("below", [50, 80, 120])
def test_labels_far_below_and_above_the_others(below):
    """At 50 nats the shift is the label's logit. At 80 and 120 it is the maximum, in two reads."""
    logits, labels, _ = make(4, 3000, spread=1.0)
    labels = labels.clamp(min=0)
    far = torch.tensor([-below, below, -below, below], device=DEVICE)
    logits.scatter_add_(1, labels[:, None], far[:, None].float())
    truth, e = tc.row_truth(logits, labels, None, None, 1.0, None)
    exp_logits = torch.full_like(logits, NAN)
    stats = row_kernel.row_stats(logits, labels, None, None, 1.0, None, exp_logits)
    assert (stats.max_logit == stats.logit).tolist() == [below < 70] * 4
    check(stats, exp_logits, truth, e, torch.float32)


def test_an_empty_chunk():
    stats = row_kernel.row_stats(
        torch.empty(0, 5, device=DEVICE), torch.empty(0, device=DEVICE).long(), None, None, 1.0
    )
    assert [len(field) for field in stats] == [0] * 6


@pytest.mark.parametrize(("spread", "lift"), [(1.0, -30), (2.0, 14), (4.0, 0), (6.0, 14)])
def test_error_of_one_read_is_close_to_that_of_two(spread, lift):
    """Errors of hidden gradients per row, in norm against fp64, with E rounded to bf16 as on a GPU.

    The error of one read may exceed that of two by a quarter of the last rounding to bf16.
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
        exp_logits = torch.empty_like(logits)
        stats = row_kernel.row_stats(logits.clone(), labels, None, None, 1.0, None, exp_logits)
        if not one:  # equivalent to a shift by the maximum
            max_logit = logits.scatter(1, labels[:, None], -INF).amax(1)
            exp_logits = exp_logits * (stats.max_logit - max_logit)[:, None].exp()
            stats = stats._replace(
                max_logit=max_logit, sum_exp=stats.sum_exp * (stats.max_logit - max_logit).exp()
            )
        rounded = exp_logits.bfloat16().float()
        divisor = stats.sum_exp + (rounded - exp_logits).sum(1) if one else stats.sum_exp
        scores = score(stats._replace(divisor=divisor), None)
        exp_w = rounded @ weight / scores.sum_exp[:, None]
        errors.append(error((weight[labels] - exp_w) * scores.one_minus_p[:, None]))
    assert errors[0] <= errors[1] + error(exact.grad.bfloat16()) / 4, errors


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_products_are_divided_by_the_sum_of_e_as_rounded(temperature):
    logits, labels, _ = make(5, 4500)
    labels = labels.clamp(min=0)
    exp_logits = torch.full_like(logits, NAN, dtype=torch.bfloat16)
    stats = row_kernel.row_stats(logits, labels, None, None, temperature, None, exp_logits)
    exact = exp_logits.double().sum(1) * temperature
    torch.testing.assert_close(stats.divisor.double(), exact, rtol=1e-6, atol=0)
    assert ((stats.divisor - stats.sum_exp).abs() > 1e-4 * stats.sum_exp).any()
