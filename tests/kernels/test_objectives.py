"""Objectives: each preset against its formula, and how to add one."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import realign_kernels as rk
from realign_kernels import objectives, reference
from realign_kernels.objectives import AnchorSigmoid, PairSigmoid, Term


def nll(z: float) -> float:
    """-log sigmoid, in plain floats."""
    return math.log1p(math.exp(-z))


def by_hand(name, s, beta):
    """s: scores of one example, logp - reference, one per leaf. Settings are those of PRESETS."""
    loss = nll(beta * (s[0] - s[1]))
    if name in ("rdpo", "mdpo"):
        loss += 0.6 * nll(beta * (s[0] - s[2]))
    if name == "mdpo":
        loss += 0.3 * nll(beta * s[0] - 0.2)
    return loss


SETTINGS = {
    "dpo": {},
    "rdpo": {"visual_weight": 0.6},
    "mdpo": {"visual_weight": 0.6, "anchor_weight": 0.3, "delta": 0.2},
}


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", objectives.PRESETS)
def test_preset_is_its_formula(name, beta):
    objective = objectives.get(name, beta=beta, **SETTINGS[name])
    g = torch.Generator().manual_seed(1)
    logps = -20 + torch.randn(len(objective.leaves), 5, generator=g, dtype=torch.float64)
    ref = -20 + torch.randn(len(objective.leaves), 5, generator=g, dtype=torch.float64)
    out = rk.preference_loss(logps, ref, objective, reduction="none")
    expected = [by_hand(name, (logps - ref)[:, i].tolist(), beta) for i in range(5)]
    torch.testing.assert_close(out.loss, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(out.rewards, beta * (logps - ref))
    weights = torch.tensor([[term.weight] for term in objective.terms], dtype=torch.float64)
    torch.testing.assert_close((weights * out.term_losses).sum(0), out.loss)
    for reduction, reduced in (("mean", out.loss.mean()), ("sum", out.loss.sum())):
        again = rk.preference_loss(logps, ref, objective, reduction=reduction)
        torch.testing.assert_close(again.loss, reduced)


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_preset_gradient(name):
    objective = objectives.get(name, **SETTINGS[name])
    logps = torch.randn(len(objective.leaves), 3, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(len(objective.leaves), 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rk.preference_loss(x, ref, objective).loss, logps)
    out = rk.preference_loss(logps, ref, objective)
    assert out.loss.requires_grad and out.logps.requires_grad
    assert not out.rewards.requires_grad and not out.term_losses.requires_grad


def test_rdpo_is_the_specification_and_lowers_both_negatives():
    logps = torch.tensor([[-3.0], [-4.0], [-5.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-3.5], [-3.0], [-7.0]], dtype=torch.float64)
    out = rk.preference_loss(logps, ref, objectives.rdpo(0.2, 0.5))
    torch.testing.assert_close(out.loss, reference.rdpo_loss(logps, ref, 0.2, 0.5))
    out.loss.backward()
    chosen, rejected, visual = logps.grad.squeeze(1).tolist()
    assert chosen < 0 < visual and rejected > 0


def test_far_margins_stay_finite():
    logps = torch.tensor([[-1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    out = rk.preference_loss(logps, torch.zeros(2, 2), objectives.dpo(beta=1.0), reduction="none")
    assert out.loss.tolist() == [1e4, 0.0]
    out.loss.sum().backward()
    assert logps.grad.isfinite().all()


def test_visual_weight_zero_is_dpo():
    logps, ref = torch.randn(3, 4), torch.randn(3, 4)
    text_alone = rk.preference_loss(logps, ref, objectives.rdpo(visual_weight=0))
    dpo = rk.preference_loss(logps[:2], ref[:2], objectives.dpo())
    assert torch.equal(text_alone.loss, dpo.loss)


def test_leaves_of_the_presets():
    names = [("chosen", "image"), ("rejected", "image"), ("chosen", "retrieved_image")]
    assert list(objectives.rdpo().leaves) == list(objectives.mdpo().leaves) == names
    assert list(objectives.dpo().leaves) == names[:2]


def test_a_list_of_terms_is_an_objective():
    terms = [PairSigmoid(name="text", positive=0, negative=1), AnchorSigmoid(name="hold", leaf=0)]
    logps, ref = torch.randn(2, 4), torch.randn(2, 4)
    out = rk.preference_loss(logps, ref, terms, beta=0.5)
    named = rk.Objective("mine", objectives.dpo().leaves, tuple(terms), beta=0.5)
    assert torch.equal(out.loss, rk.preference_loss(logps, ref, named).loss)


def test_a_new_link_is_one_class():
    @dataclass(frozen=True, kw_only=True)
    class Hinge(Term):
        positive: int
        negative: int

        @property
        def leaves(self) -> tuple[int, ...]:
            return (self.positive, self.negative)

        def __call__(self, rewards: Tensor) -> Tensor:
            return torch.relu(1 - (rewards[self.positive] - rewards[self.negative]))

    logps = torch.tensor([[0.0, 2.0], [0.5, 0.0]])
    term = Hinge(name="hinge", positive=0, negative=1)
    out = rk.preference_loss(logps, torch.zeros(2, 2), [term], beta=1.0)
    assert out.term_losses.tolist() == [[1.5, 0.0]]


MISTAKES = [
    (lambda: objectives.get("rdop"), r"unknown objective 'rdop': choose one of dpo, rdpo, mdpo"),
    (
        lambda: objectives.get("dpo", visual_weight=1),
        r"'dpo' has no setting visual_weight: .* beta",
    ),
    (lambda: objectives.rdpo(beta=0), r"beta must be finite and > 0, got 0"),
    (lambda: objectives.rdpo(beta=float("nan")), r"beta must be finite and > 0, got nan"),
    (lambda: objectives.rdpo(visual_weight=-1), r"weight of term 'visual' .* got -1"),
    (lambda: rk.Objective("x", objectives.dpo().leaves, ()), r"'x' has no terms"),
    (
        lambda: rk.Objective("x", objectives.dpo().leaves, objectives.rdpo().terms),
        r"term 'visual' reads leaf 2, but objective 'x' has 2 leaves",
    ),
    (
        lambda: rk.Objective("x", objectives.dpo().leaves, objectives.dpo().terms * 2),
        r"two terms of one name",
    ),
    (
        lambda: rk.preference_loss(torch.zeros(2, 1), torch.zeros(2, 1), objectives.dpo(), beta=1),
        r"beta=1 beside objective 'dpo', whose beta is 0.1",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
