"""Objectives: leaves, terms and invalid settings. test_presets.py tests the formulas."""

import math
from dataclasses import replace

import pytest
import torch

import realign_kernels as rk
from realign_kernels import objectives, reference
from realign_kernels.objectives import AnchorSigmoid, PairSigmoid


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_gradient_of_outputs(name):
    objective = objectives.get(name)
    logps = (-torch.rand(len(objective.leaves), 3, dtype=torch.float64)).requires_grad_()
    ref = torch.randn(len(objective.leaves), 3, dtype=torch.float64)
    counts = torch.ones_like(ref, dtype=torch.long)
    out = rk.preference_loss(logps, ref, objective, token_counts=counts)
    assert out.loss.requires_grad and out.logps.requires_grad
    assert not out.rewards.requires_grad and not out.term_losses.requires_grad
    each, total = (
        rk.preference_loss(logps, ref, objective, reduction=how, token_counts=counts).loss
        for how in ("none", "sum")
    )
    torch.testing.assert_close((each.mean(), each.sum()), (out.loss, total))


def test_rdpo_is_the_specification_and_lowers_both_negatives():
    logps = torch.tensor([[-3.0], [-4.0], [-5.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-3.5], [-3.0], [-7.0]], dtype=torch.float64)
    out = rk.preference_loss(logps, ref, objectives.rdpo(0.2, 0.5))
    torch.testing.assert_close(out.loss, reference.rdpo_loss(logps, ref, 0.2, 0.5))
    out.loss.backward()
    chosen, rejected, visual = logps.grad.squeeze(1).tolist()
    assert chosen < 0 < visual and rejected > 0


def test_a_detached_leaf_is_a_constant():
    """A detached leaf has its full reward, but no gradient."""
    plain = objectives.rdpo(beta=0.3)
    leaves = (plain.leaves[0], plain.leaves[1]._replace(detached=True), plain.leaves[2])
    stopped = replace(plain, leaves=leaves)
    logps = torch.randn(2, 3, 4, dtype=torch.float64)
    results = []
    for objective in (plain, stopped):
        x = logps[0].clone().requires_grad_()
        out = rk.preference_loss(x, logps[1], objective)
        results.append((out.loss, out.rewards, torch.autograd.grad(out.loss, x)[0]))
    (loss, rewards, gradient), (same_loss, same_rewards, without) = results
    assert torch.equal(loss, same_loss) and torch.equal(rewards, same_rewards)
    assert (without[1] == 0).all() and (gradient[1] != 0).all()
    assert torch.equal(without[[0, 2]], gradient[[0, 2]])


def test_averaging_counts_tokens_from_hidden_states():
    """linear_preference_loss passes token counts, which preference_loss cannot derive."""
    hidden = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    weight = torch.randn(7, 5, dtype=torch.float64)
    labels = torch.tensor([[[1, 2, -100], [3, 4, 5]], [[6, -100, -100], [0, 1, -100]]])
    ref = torch.tensor([[-4.0, -5.0], [-2.0, -6.0]], dtype=torch.float64)
    objective = objectives.sigmoid_norm(beta=0.4)
    out = rk.linear_preference_loss(hidden, weight, labels, ref, objective)
    sums = rk.linear_logprobs(hidden, weight, labels).sum(-1)
    s = (sums - ref) / torch.tensor([[2, 3], [1, 2]])
    expected = -torch.nn.functional.logsigmoid(0.4 * (s[0] - s[1])).mean()
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(
        ValueError, match="token_counts is None, but objective 'sigmoid_n.*averages"
    ):
        objective(sums, ref)


def test_objectives_are_values():
    made = [objectives.get(name) for name in objectives.PRESETS]
    table = {objective: objective.name for objective in made}
    assert len(table) == len(objectives.PRESETS)
    for name in objectives.PRESETS:
        assert table[objectives.get(name)] == name
    assert objectives.rdpo(beta=0.2) not in table
    assert objectives.dpo().at(0.5) in table  # the shift is no part of the value


def test_a_list_of_terms_is_an_objective():
    terms = [PairSigmoid(name="text", positive=0, negative=1), AnchorSigmoid(name="hold", leaf=0)]
    logps, ref = torch.randn(2, 4), torch.randn(2, 4)
    out = rk.preference_loss(logps, ref, terms, beta=0.5)
    named = rk.Objective("mine", objectives.dpo().leaves, tuple(terms), beta=0.5)
    assert torch.equal(out.loss, rk.preference_loss(logps, ref, named).loss)


def numbers(leaves, examples=4, seed=0):
    """Log-probs, references (L, B) fp64, and token counts."""
    g = torch.Generator().manual_seed(seed)
    draws = -10 * torch.rand(2, leaves, examples, generator=g, dtype=torch.float64)
    return *draws, torch.randint(1, 9, (leaves, examples), generator=g)


def loss_of(objective, logps, ref, counts):
    return rk.preference_loss(logps, ref, objective, reduction="none", token_counts=counts).loss


def test_a_sum_of_presets_is_the_sum_of_their_losses():
    """Also of presets whose leaves are in another order, and with a leaf that only one reads."""
    logps, ref, counts = numbers(4)
    order = objectives.ovip().leaves  # chosen, rejected, blank, visual
    objective = objectives.get("ovip+rdpo+simpo+sft", (0.5, 2, 3, 0.25), beta=0.4, gamma=0.3)
    assert objective.leaves == order and objective.beta == 0.4
    parts = [
        objectives.ovip(0.4),
        objectives.rdpo(0.4),
        objectives.simpo(0.4, 0.3),
        objectives.sft(),
    ]
    expected = 0
    for weight, part in zip((0.5, 2, 3, 0.25), parts, strict=True):
        rows = [order.index(leaf) for leaf in part.leaves]
        expected = expected + weight * loss_of(part, logps[rows], ref[rows], counts[rows])
    torch.testing.assert_close(loss_of(objective, logps, ref, counts), expected)
    names = [term.name for term in objective.terms]
    assert names == [
        "ovip_text",
        "ovip_attend",
        "ovip_reject",
        "rdpo_text",
        "rdpo_visual",
        "simpo",
        "sft",
    ]


def test_mpo_is_a_sum_of_names():
    named = objectives.get("sigmoid+bco_pair+sft", (0.8, 0.2, 1))
    mpo = objectives.mpo().at(0.7)
    inputs = numbers(2)
    assert torch.equal(loss_of(named.at(0.7), *inputs), loss_of(mpo, *inputs))
    assert [(t.weight, type(t)) for t in named.terms] == [(t.weight, type(t)) for t in mpo.terms]


def test_the_visual_term_over_other_links():
    """Each link is repeated with the chosen response under the retrieved image."""
    logps, ref, counts = numbers(3)
    counts[2] = counts[0]
    text, visual = [0, 1], [0, 2]
    parts = lambda t, rows: t(logps[rows], ref[rows], counts[rows])  # noqa: E731
    simpo = objectives.simpo(beta=1.5, gamma=0.2)
    found = loss_of(objectives.with_visual(simpo, 0.5), logps, ref, counts)
    link = lambda *args: loss_of(simpo, *args)  # noqa: E731
    torch.testing.assert_close(found, parts(link, text) + 0.5 * parts(link, visual))
    assert objectives.with_visual(objectives.dpo(0.2), 0.5) == objectives.rdpo(0.2, 0.5)
    # Terms of the chosen response only are not repeated.
    mpo = objectives.mpo(beta=0.3).at(0.4)
    found = loss_of(objectives.with_visual(mpo, 0.5), logps, ref, counts)
    r = 0.3 * (logps - ref)
    ell = lambda m: torch.log1p(torch.exp(-m))  # noqa: E731
    again = 0.8 * ell(r[0] - r[2]) + 0.2 * ell(0.4 - r[2])
    torch.testing.assert_close(found, parts(lambda *args: loss_of(mpo, *args), text) + 0.5 * again)


def test_the_visual_counterpart_of_a_term_has_a_name_of_its_own():
    terms = (
        PairSigmoid(name="text", positive=0, negative=1),
        AnchorSigmoid(name="rejected", leaf=1, below=True),
    )
    made = objectives.with_visual(rk.Objective("both", TWO, terms))
    assert [term.name for term in made.terms] == ["text", "rejected", "visual", "rejected_visual"]


def test_a_sum_keeps_the_shift_of_its_parts():
    made = objectives.weighted_sum([objectives.bco_pair().at(1.5), objectives.sft()])
    assert made.shift == 1.5 and objectives.with_visual(made).shift == 1.5


def test_the_running_mean_is_the_mean_of_all_rewards():
    objective = objectives.with_visual(objectives.bco_pair())
    assert objective.shifted_leaves == (0, 1, 2)
    batches = [torch.randn(3, count, dtype=torch.float64) for count in (4, 1, 7)]
    mean = objectives.RunningMean()
    for rewards in batches:
        mean.update(objective, rewards)
    assert mean.value == pytest.approx(torch.cat(batches, 1).mean().item()) and mean.count == 12
    again = objectives.RunningMean(mean.value, mean.count)
    again.add(2.0, 4)
    again.add(math.nan, 0)  # no examples
    assert again.value == pytest.approx((mean.value * 12 + 8) / 16)


def test_a_reference_is_optional_without_a_need():
    simpo, inputs = objectives.simpo(), numbers(2)
    hidden, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 5)
    labels = torch.randint(6, (2, 3, 4))
    zeros = torch.zeros(2, 3)
    absent, given = (
        rk.linear_preference_loss(hidden, weight, labels, reference, simpo).loss
        for reference in (None, zeros)
    )
    assert torch.equal(absent, given)
    assert torch.equal(loss_of(simpo, inputs[0], None, inputs[2]), loss_of(simpo, *inputs))
    with pytest.raises(ValueError, match="'rpo' compares with a reference. Pass its log-probs"):
        rk.linear_preference_loss(hidden, weight, labels, None, objectives.rpo())
    packed = (hidden.flatten(0, 2), weight, labels.flatten(), None, simpo)
    with pytest.raises(ValueError, match=r"Pass torch.zeros\(2, B\). Objective 'simpo' does not"):
        rk.linear_preference_loss(*packed, sequence_ids=torch.arange(6).repeat_interleave(4))


def test_settings_of_a_preset():
    assert objectives.settings("rdpo") == {"beta": 0.1, "visual_weight": 1.0}
    assert objectives.settings("lpoi")["negatives"] == 4


TWO = objectives.dpo().leaves
MISTAKES = [
    (
        lambda: objectives.get("rdop"),
        r"unknown objective 'rdop'. Choose one of dpo, rdpo, mdpo, .*, released",
    ),
    (lambda: objectives.settings("rdop"), r"unknown objective 'rdop'"),
    (
        lambda: objectives.get("dpo", visual_weight=1),
        r"'dpo' has no setting visual_weight. Its settings are beta",
    ),
    (lambda: objectives.get("dpo+rdop"), r"unknown objective 'rdop'"),
    (lambda: objectives.get("dpo+sft", (1,)), r"2 objectives need as many weights, got 1"),
    (lambda: objectives.get("dpo+sft", (1, -1)), r"weights must be finite and >= 0, got -1"),
    (lambda: objectives.get("dpo+sigmoid"), r"the sum 'dpo\+sigmoid' has an objective twice"),
    (lambda: objectives.get("dpo+simpo"), r"defaults of beta: 0.1 of dpo, 2.0 of simpo. Give beta"),
    (lambda: objectives.get("orpo+simpo"), r"different defaults of beta: 0.1 of orpo"),
    (
        lambda: objectives.weighted_sum([objectives.dpo(), objectives.simpo()]),
        r"different betas, 0.1, 2.0. Give all the same beta",
    ),
    (
        lambda: objectives.weighted_sum([objectives.bco_pair().at(1), objectives.mpo()]),
        r"different shifts. Call `at` on their sum instead",
    ),
    (lambda: objectives.get("dpo+sft", (0, 0)), r"weights of a sum are all 0"),
    (lambda: objectives.get("dpo+sft", gamma=1), r"'dpo\+sft' has no setting gamma"),
    (lambda: objectives.with_visual(objectives.rdpo()), r"'rdpo' reads chosen under image, "),
    (lambda: objectives.with_visual(objectives.sft()), r"'sft' reads chosen under image\."),
    (lambda: objectives.bco_pair().at(math.nan), r"shift must be a finite number or a tensor"),
    (
        lambda: rk.Objective(
            "x",
            TWO,
            (
                PairSigmoid(name="text", positive=0, negative=1),
                AnchorSigmoid(name="a", leaf=0, shifted=True, reward="mean_logp"),
            ),
        ),
        r"'a' subtracts the running mean of mean_logp rewards, but objective 'x' reports log_ratio",
    ),
    (lambda: objectives.rdpo(beta=0), r"beta must be finite and > 0, got 0"),
    (lambda: objectives.rdpo(beta="0.1"), r"beta must be finite and > 0, got '0.1'"),
    (lambda: objectives.ipo(beta=0), r"beta must be finite and > 0, got 0"),
    (lambda: objectives.ipo(beta=1e-200), r"weight of term 'text' must be finite, got inf"),
    (lambda: objectives.rdpo(visual_weight=-1), r"weight of term 'visual' .* got -1"),
    (lambda: objectives.mdpo(delta=math.nan), r"delta of term 'anchor' must be finite, got nan"),
    (lambda: objectives.lpoi(negatives=0), r"negatives must be an int, 1 or more, got 0"),
    (lambda: objectives.mispdpo(negatives=2.0), r"negatives must be an int, 1 or more, got 2.0"),
    (lambda: objectives.mispdpo(omegas=(1.0,)), r"omegas of term 'visual' must be .* 4 numbers"),
    (lambda: rk.Objective("x", TWO, ()), r"'x' has no terms"),
    (
        lambda: rk.Objective("x", TWO, objectives.rdpo().terms),
        r"term 'visual' reads leaf 2, but objective 'x' has 2 leaves",
    ),
    (lambda: rk.Objective("x", TWO, objectives.dpo().terms * 2), r"two terms with the same name"),
    (lambda: rk.Objective("x", TWO + TWO, objectives.dpo().terms), r"lists a leaf twice"),
    (
        lambda: rk.Objective("x", list(TWO), objectives.dpo().terms),
        r"leaves of objective 'x' must be a tuple of Leaf, got \[Leaf",
    ),
    (
        lambda: rk.Objective("x", (("chosen", "image"),) * 2, objectives.dpo().terms),
        r"leaves of objective 'x' must be a tuple of Leaf",
    ),
    (
        lambda: rk.Objective("x", TWO, list(objectives.dpo().terms)),
        r"terms of objective 'x' must be a tuple of Term",
    ),
    (
        lambda: rk.preference_loss(torch.zeros(2, 1), torch.zeros(2, 1), objectives.dpo(), beta=1),
        r"beta=1 is given, but objective 'dpo' has its own beta, 0.1",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
