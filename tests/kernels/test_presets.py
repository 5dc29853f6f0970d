"""Each preset against the formula of its paper, in 50-digit arithmetic.

`s` holds the log-ratios log pi - log pi_ref of one example, in the order of the preset's leaves.
The formulas are written in log-ratios, as in the papers. Gradients are derivatives of the formulas.
"""

import mpmath
import pytest
import torch

import realign_kernels as rk
from realign_kernels import objectives

mpmath.mp.dps = 50

W, L, V = ("chosen", "image"), ("rejected", "image"), ("chosen", "retrieved_image")
O = ("chosen", "blank_image")  # noqa: E741
MORE = tuple(("chosen", f"retrieved_image_{k}") for k in (2, 3))


def ell(z):
    """-log sigmoid(z)."""
    return mpmath.log(1 + mpmath.exp(-z))


def by_dpo(s, b):
    return ell(b * (s[0] - s[1]))


def by_cdpo(s, b):
    z = b * (s[0] - s[1])
    return mpmath.mpf("0.8") * ell(z) + mpmath.mpf("0.2") * ell(-z)


def by_ipo(s, b):
    return (s[0] - s[1] - 1 / (2 * b)) ** 2


def by_hinge(s, b):
    return max(mpmath.mpf(0), mpmath.mpf("1.5") - b * (s[0] - s[1]))


def by_rdpo(s, b):
    return by_dpo(s, b) + mpmath.mpf("0.6") * ell(b * (s[0] - s[2]))


def by_mdpo(s, b):
    return by_rdpo(s, b) + mpmath.mpf("0.3") * ell(b * s[0] - mpmath.mpf("0.25"))


def by_svco(s, b):
    w_v, w_o, w_u, r_u, r_o, r_v = s  # response w or r (for v'), image v, o, or u (= v')
    return ell(b * (w_v - w_o)) + ell(b * (w_o - w_u)) + ell(b * (r_u - r_o)) + ell(b * (r_o - r_v))


def by_symmpo(s, b):
    w_v, l_v, r_v, r_u, w_u = s
    d1, d2 = b * (w_v - r_v), b * (r_u - w_u)
    anchors = ell(b * w_v - mpmath.mpf("0.25")) + ell(b * r_u - mpmath.mpf("0.25"))
    loss = ell(b * (w_v - l_v)) + mpmath.mpf("0.75") * (ell(d1) + ell(d2))
    return loss + mpmath.mpf("0.125") * (d1 - d2) ** 2 + mpmath.mpf("0.3") * anchors


def by_ovip(s, b):
    w_v, l_v, w_o, w_u = s
    return ell(b * (w_v - l_v)) + ell(b * (w_v - w_o)) + ell(b * (w_o - w_u))


def by_adavip(s, b):
    total = mpmath.exp(b * (s[1] - s[0])) + mpmath.exp(b * (s[2] - s[0]))
    return ell(-mpmath.log(total))


def by_mispdpo(s, b):
    omegas = (mpmath.mpf("0.5"), 2, mpmath.mpf("0.25"))
    total = sum(o * mpmath.exp(b * (x - s[0])) for o, x in zip(omegas, s[2:], strict=True))
    return mpmath.mpf("0.7") * by_dpo(s, b) + ell(-mpmath.log(total))


def by_lpoi(s, b):
    ranked = [mpmath.exp(b * x) for x in (s[0], *s[2:])]
    order = sum(-mpmath.log(x / sum(ranked[k:])) for k, x in enumerate(ranked))
    anchor = mpmath.mpf("0.3") * ell(b * s[0] - mpmath.mpf("0.25"))
    return by_dpo(s, b) + mpmath.mpf("0.6") * order + anchor


def by_chip(s, b):
    return ell(b * ((s[0] - s[1]) + (s[0] - s[2])))


MDPO = {"visual_weight": 0.6, "anchor_weight": 0.3, "delta": 0.25}
SYMMPO = {"pair_weight": 0.75, "margin_weight": 0.125, "anchor_weight": 0.3, "delta": 0.25}
MISPDPO = {"negatives": 3, "text_weight": 0.7, "omegas": (0.5, 2.0, 0.25)}
SVCO = (W, O, V, ("retrieved_chosen", "retrieved_image"), ("retrieved_chosen", "blank_image"))
SYMMPO_LEAVES = (W, L, ("retrieved_chosen", "image"), ("retrieved_chosen", "retrieved_image"), V)
CASES = {  # name: formula, settings, leaves
    "dpo": (by_dpo, {}, (W, L)),
    "rdpo": (by_rdpo, {"visual_weight": 0.6}, (W, L, V)),
    "mdpo": (by_mdpo, MDPO, (W, L, V)),
    "mfpo": (by_mdpo, MDPO, (W, L, V)),
    "svco": (by_svco, {}, (*SVCO, ("retrieved_chosen", "image"))),
    "symmpo": (by_symmpo, SYMMPO, SYMMPO_LEAVES),
    "ovip": (by_ovip, {}, (W, L, O, V)),
    "adavip": (by_adavip, {}, (W, L, V)),
    "mispdpo": (by_mispdpo, MISPDPO, (W, L, V, *MORE)),
    "lpoi": (by_lpoi, MDPO | {"negatives": 3}, (W, L, V, *MORE)),
    "chip": (by_chip, {}, (W, L, V)),
    "cdpo": (by_cdpo, {"label_smoothing": 0.2}, (W, L)),
    "ipo": (by_ipo, {}, (W, L)),
    "hinge": (by_hinge, {"target": 1.5}, (W, L)),
    "released": (by_rdpo, {"visual_weight": 0.6}, (W, L, V)),
}
EXTREME = (1e4, -1e4, 9997.0, 0.0, -9984.0, 5000.0)  # differences are exact in fp32


def truth(formula, ratios, beta):
    """Values (B,) and gradients (L, B) of a formula, computed per example."""
    values, gradients = [], []
    for column in ratios.double().T.tolist():
        s = tuple(mpmath.mpf(x) for x in column)
        values.append(float(formula(s, mpmath.mpf(beta))))
        orders = [tuple(int(i == leaf) for i in range(len(s))) for leaf in range(len(s))]
        of_leaves = lambda *x: formula(x, mpmath.mpf(beta))  # noqa: E731
        gradients.append([float(mpmath.diff(of_leaves, s, order)) for order in orders])
    return torch.tensor(values).double(), torch.tensor(gradients).double().T


def computed(objective, logps, reference):
    logps = logps.clone().requires_grad_()
    out = rk.preference_loss(logps, reference, objective, reduction="none")
    (gradient,) = torch.autograd.grad(out.loss.sum(), logps)
    return out, gradient


@pytest.fixture(autouse=True, scope="module")
def doubles():
    """The loss of a preset. Lists of Python floats become fp64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_preset_has_a_case():
    assert list(CASES) == list(objectives.PRESETS)


@pytest.mark.parametrize("name", CASES)
def test_leaves(name):
    leaves = CASES[name][2]
    objective = objectives.get(name, **CASES[name][1])
    assert tuple((leaf.response, leaf.image) for leaf in objective.leaves) == leaves
    assert [leaf.rival for leaf in objective.leaves] == [
        name == "released" and leaf != W for leaf in leaves
    ]
    assert not any(leaf.detached for leaf in objective.leaves)
    assert objective.name == name and objective.beta == 0.1 and not objective.average


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_preset_is_its_formula(name, beta):
    formula, settings, leaves = CASES[name]
    objective = objectives.get(name, beta=beta, **settings)
    g = torch.Generator().manual_seed(1)
    logps = -20 + 3 * torch.randn(len(leaves), 3, generator=g)
    reference = -20 + 3 * torch.randn(len(leaves), 3, generator=g)
    out, gradient = computed(objective, logps, reference)
    values, gradients = truth(formula, logps - reference, beta)
    torch.testing.assert_close(out.loss, values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, gradients, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.rewards, beta * (logps - reference))
    weights = torch.tensor([[term.weight] for term in objective.terms])
    torch.testing.assert_close((weights * out.term_losses).sum(0), out.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_large_rewards(name, dtype):
    """Rewards of +-1e4, with pairs 3 and 16 apart, where an exp or a sum would lose precision."""
    formula, settings, leaves = CASES[name]
    objective = objectives.get(name, beta=1.0, **settings)
    columns = [[EXTREME[(i * step + i) % 6] for i in range(len(leaves))] for step in range(6)]
    logps = torch.tensor(columns).T.contiguous()
    out, gradient = computed(objective, logps.to(dtype), torch.zeros_like(logps, dtype=dtype))
    values, gradients = truth(formula, logps, 1.0)
    allowed = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.loss.double(), values, rtol=allowed, atol=1e-30)
    size = gradients.abs().amax(0).clamp(min=1e-30)  # per example
    assert ((gradient.double() - gradients).abs() / size).max() < allowed


@pytest.mark.parametrize("name", CASES)
def test_examples_are_independent(name):
    """The fused head needs the coefficients of an example before it computes the others."""
    objective = objectives.get(name)
    logps = torch.randn(len(objective.leaves), 4)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: objective(x, torch.zeros_like(x), "none").loss, logps
    )
    for example in range(4):
        others = [i for i in range(4) if i != example]
        assert (jacobian[example][:, others] == 0).all()
        assert (jacobian[example][:, example] != 0).any()


def test_the_average_of_ipo_is_per_token():
    """TRL's IPO divides the log-prob sums of policy and reference by the lengths."""
    objective = objectives.ipo(beta=0.5, average=True)
    logps = torch.tensor([[-6.0, -8.0], [-10.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[-9.0, -4.0], [-5.0, -6.0]])
    counts = torch.tensor([[3, 4], [5, 1]])
    out = objective(logps, reference, "none", counts)
    # s(w) = -2 + 3, -2 + 1 and s(l) = -2 + 1, -3 + 6; target 1 / (2 beta) = 1
    torch.testing.assert_close(out.loss, torch.tensor([(1.0 + 1 - 1) ** 2, (-1.0 - 3 - 1) ** 2]))
    torch.testing.assert_close(out.rewards, torch.tensor([[0.5, -0.5], [-0.5, 1.5]]))
    assert torch.equal(out.logps, logps) and torch.equal(out.token_counts, counts)
    out.loss.sum().backward()
    expected = torch.tensor([[2 / 3, -10 / 4], [-2 / 5, 10 / 1]])  # 2 m / tokens, signed
    torch.testing.assert_close(logps.grad, expected)
