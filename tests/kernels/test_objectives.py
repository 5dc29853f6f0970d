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
    logps = torch.randn(len(objective.leaves), 3, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(len(objective.leaves), 3, dtype=torch.float64)
    out = rk.preference_loss(logps, ref, objective)
    assert out.loss.requires_grad and out.logps.requires_grad
    assert not out.rewards.requires_grad and not out.term_losses.requires_grad
    each = rk.preference_loss(logps, ref, objective, reduction="none").loss
    total = rk.preference_loss(logps, ref, objective, reduction="sum").loss
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
    objective = replace(objectives.dpo(beta=0.4), average=True)
    out = rk.linear_preference_loss(hidden, weight, labels, ref, objective)
    sums = rk.linear_logprobs(hidden, weight, labels).sum(-1)
    s = (sums - ref) / torch.tensor([[2, 3], [1, 2]])
    expected = -torch.nn.functional.logsigmoid(0.4 * (s[0] - s[1])).mean()
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(ValueError, match="token_counts is None, but objective 'dpo' averages"):
        objective(sums, ref)


def test_objectives_are_values():
    made = [objectives.get(name) for name in objectives.PRESETS]
    table = {objective: objective.name for objective in made}
    assert len(table) == len(objectives.PRESETS)
    for name in objectives.PRESETS:
        assert table[objectives.get(name)] == name
    assert objectives.rdpo(beta=0.2) not in table
    assert replace(objectives.dpo(), average=True) not in table


def test_a_list_of_terms_is_an_objective():
    terms = [PairSigmoid(name="text", positive=0, negative=1), AnchorSigmoid(name="hold", leaf=0)]
    logps, ref = torch.randn(2, 4), torch.randn(2, 4)
    out = rk.preference_loss(logps, ref, terms, beta=0.5)
    named = rk.Objective("mine", objectives.dpo().leaves, tuple(terms), beta=0.5)
    assert torch.equal(out.loss, rk.preference_loss(logps, ref, named).loss)


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
