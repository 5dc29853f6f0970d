"""Each preset against the formula of its paper, in 50-digit arithmetic.

`s` holds one number of each leaf of an example, in the order of the preset's leaves. It is log pi -
log pi_ref, or log pi where the formula has no reference. `n` holds the token counts. The formulas
are written in these, as in the papers. Gradients are derivatives of the formulas.
"""

import mpmath
import pytest
import torch

import realign_kernels as rk
from realign_kernels import objectives

mpmath.mp.dps = 50

W, L, V = ("chosen", "image"), ("rejected", "image"), ("chosen", "retrieved_image")
O = ("chosen", "blank_image")  # noqa: E741
SHIFT = mpmath.mpf("0.375")
REFERENCE = mpmath.mpf("2.5")
"""Minus the chosen reference of objectives that use log-ratios and log-probs."""
MORE = tuple(("chosen", f"retrieved_image_{k}") for k in (2, 3))


def ell(z):
    """-log sigmoid(z)."""
    return mpmath.log(1 + mpmath.exp(-z))


def sig(z):
    return 1 / (1 + mpmath.exp(-z))


def by_dpo(s, b, n=None):
    return ell(b * (s[0] - s[1]))


def by_cdpo(s, b, n=None):
    z = b * (s[0] - s[1])
    return mpmath.mpf("0.8") * ell(z) + mpmath.mpf("0.2") * ell(-z)


def by_ipo(s, b, n=None):
    return (s[0] - s[1] - 1 / (2 * b)) ** 2


def by_hinge(s, b, n=None):
    return max(mpmath.mpf(0), mpmath.mpf("1.5") - b * (s[0] - s[1]))


def by_rdpo(s, b, n=None):
    return by_dpo(s, b) + mpmath.mpf("0.6") * ell(b * (s[0] - s[2]))


def by_mdpo(s, b, n=None):
    return by_rdpo(s, b) + mpmath.mpf("0.3") * ell(b * s[0] - mpmath.mpf("0.25"))


def by_svco(s, b, n=None):
    w_v, w_o, w_u, r_u, r_o, r_v = s  # response w or r (for v'), image v, o, or u (= v')
    return ell(b * (w_v - w_o)) + ell(b * (w_o - w_u)) + ell(b * (r_u - r_o)) + ell(b * (r_o - r_v))


def by_symmpo(s, b, n=None):
    w_v, l_v, r_v, r_u, w_u = s
    d1, d2 = b * (w_v - r_v), b * (r_u - w_u)
    anchors = ell(b * w_v - mpmath.mpf("0.25")) + ell(b * r_u - mpmath.mpf("0.25"))
    loss = ell(b * (w_v - l_v)) + mpmath.mpf("0.75") * (ell(d1) + ell(d2))
    return loss + mpmath.mpf("0.125") * (d1 - d2) ** 2 + mpmath.mpf("0.3") * anchors


def by_ovip(s, b, n=None):
    w_v, l_v, w_o, w_u = s
    return ell(b * (w_v - l_v)) + ell(b * (w_v - w_o)) + ell(b * (w_o - w_u))


def by_adavip(s, b, n=None):
    total = mpmath.exp(b * (s[1] - s[0])) + mpmath.exp(b * (s[2] - s[0]))
    return ell(-mpmath.log(total))


def by_mispdpo(s, b, n=None):
    omegas = (mpmath.mpf("0.5"), 2, mpmath.mpf("0.25"))
    total = sum(o * mpmath.exp(b * (x - s[0])) for o, x in zip(omegas, s[2:], strict=True))
    return mpmath.mpf("0.7") * by_dpo(s, b) + ell(-mpmath.log(total))


def by_lpoi(s, b, n=None):
    ranked = [mpmath.exp(b * x) for x in (s[0], *s[2:])]
    order = sum(-mpmath.log(x / sum(ranked[k:])) for k, x in enumerate(ranked))
    anchor = mpmath.mpf("0.3") * ell(b * s[0] - mpmath.mpf("0.25"))
    return by_dpo(s, b) + mpmath.mpf("0.6") * order + anchor


def by_chip(s, b, n=None):
    return ell(b * ((s[0] - s[1]) + (s[0] - s[2])))


def by_robust(s, b, n=None):
    z, e = b * (s[0] - s[1]), mpmath.mpf("0.2")
    return ((1 - e) * ell(z) - e * ell(-z)) / (1 - 2 * e)


def by_ipo_norm(s, b, n):
    return (s[0] / n[0] - s[1] / n[1] - 1 / (2 * b)) ** 2


def by_sigmoid_norm(s, b, n):
    return ell(b * (s[0] / n[0] - s[1] / n[1]))


def by_exo_pair(s, b, n=None):
    q, e = sig(b * (s[0] - s[1])), mpmath.mpf("0.01")
    rest = sig(b * (s[1] - s[0]))
    return q * mpmath.log(q / (1 - e)) + rest * mpmath.log(rest / e)


def by_nca_pair(s, b, n=None):
    return ell(b * s[0]) + ell(-b * s[0]) / 2 + ell(-b * s[1]) / 2


def by_bco_pair(s, b, n=None, shift=SHIFT):
    return ell(b * s[0] - shift) + ell(shift - b * s[1])


def by_sppo_hard(s, b, n=None):
    return (s[0] - 1 / (2 * b)) ** 2 + (s[1] + 1 / (2 * b)) ** 2


def by_apo_zero(s, b, n=None):
    return 1 - sig(b * s[0]) + sig(b * s[1])


def by_apo_down(s, b, n=None):
    return sig(b * s[0]) + 1 - sig(b * (s[0] - s[1]))


def by_discopop(s, b, n=None):
    z = b * (s[0] - s[1])
    mixed = sig(z / mpmath.mpf("0.05"))
    return (1 - mixed) * ell(z) + mixed * mpmath.exp(-z)


def by_sft(s, b, n):
    return -s[0] / n[0]


def by_rpo(s, b, n):
    return ell(b * (s[0] + REFERENCE - s[1])) + mpmath.mpf("0.7") * by_sft(s, b, n)


def by_mpo(s, b, n):
    ratios = (s[0] + REFERENCE, s[1])
    first = mpmath.mpf("0.8") * by_dpo(ratios, b) + mpmath.mpf("0.25") * by_bco_pair(ratios, b)
    return first + mpmath.mpf("0.5") * by_sft(s, b, n)


def by_simpo(s, b, n):
    return ell(b * (s[0] / n[0] - s[1] / n[1]) - mpmath.mpf("0.75"))


def by_cpo(s, b, n):
    return by_dpo(s, b) + mpmath.mpf("0.7") * by_sft(s, b, n)


def by_orpo(s, b, n):
    p, q = (mpmath.exp(x / m) for x, m in zip(s, n, strict=True))
    return by_sft(s, b, n) + b * ell(mpmath.log(p / (1 - p)) - mpmath.log(q / (1 - q)))


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
    "robust": (by_robust, {"label_smoothing": 0.2}, (W, L)),
    "ipo": (by_ipo, {}, (W, L)),
    "ipo_norm": (by_ipo_norm, {}, (W, L)),
    "hinge": (by_hinge, {"target": 1.5}, (W, L)),
    "sigmoid_norm": (by_sigmoid_norm, {}, (W, L)),
    "exo_pair": (by_exo_pair, {"label_smoothing": 0.01}, (W, L)),
    "nca_pair": (by_nca_pair, {}, (W, L)),
    "bco_pair": (by_bco_pair, {}, (W, L)),
    "sppo_hard": (by_sppo_hard, {}, (W, L)),
    "apo_zero": (by_apo_zero, {}, (W, L)),
    "apo_down": (by_apo_down, {}, (W, L)),
    "discopop": (by_discopop, {}, (W, L)),
    "rpo": (by_rpo, {"nll_weight": 0.7}, (W, L)),
    "mpo": (by_mpo, {"quality_weight": 0.25, "nll_weight": 0.5}, (W, L)),
    "simpo": (by_simpo, {"gamma": 0.75}, (W, L)),
    "cpo": (by_cpo, {"nll_weight": 0.7}, (W, L)),
    "orpo": (by_orpo, {}, (W, L)),
    "sft": (by_sft, {}, (W,)),
    "released": (by_rdpo, {"visual_weight": 0.6}, (W, L, V)),
}
EXTREME = (1e4, -1e4, 9997.0, 0.0, -9984.0, 5000.0)  # differences are exact in fp32


def truth(formula, ratios, beta, counts):
    """Values (B,) and gradients (L, B) of a formula, computed per example."""
    values, gradients = [], []
    for column, n in zip(ratios.double().T.tolist(), counts.T.tolist(), strict=True):
        s = tuple(mpmath.mpf(x) for x in column)
        values.append(float(formula(s, mpmath.mpf(beta), n)))
        orders = [tuple(int(i == leaf) for i in range(len(s))) for leaf in range(len(s))]
        of_leaves = lambda *x: formula(x, mpmath.mpf(beta), n)  # noqa: E731, B023
        gradients.append([float(mpmath.diff(of_leaves, s, order)) for order in orders])
    return torch.tensor(values).double(), torch.tensor(gradients).double().T


def computed(objective, logps, reference, counts):
    logps = logps.clone().requires_grad_()
    objective = objective.at(float(SHIFT))
    settings = {"reduction": "none", "token_counts": counts}
    out = rk.preference_loss(logps, reference, objective, **settings)
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
    assert objective.name == name


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_preset_is_its_formula(name, beta):
    formula, settings, leaves = CASES[name]
    objective = objectives.get(name, **({"beta": beta} if name != "sft" else {}), **settings)
    g = torch.Generator().manual_seed(1)
    logps = -20 + 3 * torch.randn(len(leaves), 3, generator=g)
    reference, numbers = references(name, logps, -20 + 3 * torch.randn(len(leaves), 3, generator=g))
    counts = torch.randint(1, 9, (len(leaves), 3), generator=g)
    out, gradient = computed(objective, logps, reference, counts)
    values, gradients = truth(formula, numbers, beta, counts)
    torch.testing.assert_close(out.loss, values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, gradients, rtol=1e-11, atol=1e-12)
    scores = logps if reference is None else logps - reference
    scores = scores / counts if objective.reward.startswith("mean") else scores
    torch.testing.assert_close(out.rewards, objective.beta * scores)
    weights = torch.tensor([[term.weight] for term in objective.terms])
    torch.testing.assert_close((weights * out.term_losses).sum(0), out.loss)


def references(name, logps, drawn):
    """References of a preset, and the numbers that its formula takes."""
    if not objectives.get(name).needs_reference:
        return None, logps
    if name in ("rpo", "mpo"):  # log-ratios and log-probs in one formula
        fixed = torch.zeros_like(drawn)
        fixed[0] = -float(REFERENCE)
        return fixed, logps
    return drawn, logps - drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_large_rewards(name, dtype):
    """Rewards of +-1e4, with pairs 3 and 16 apart, where an exp or a sum would lose precision."""
    formula, settings, leaves = CASES[name]
    objective = objectives.get(name, **({"beta": 1.0} if name != "sft" else {}), **settings)
    columns = [[EXTREME[(i * step + i) % 6] for i in range(len(leaves))] for step in range(6)]
    logps = torch.tensor(columns).T.contiguous()
    if name == "orpo":  # log-probs
        logps = -logps.abs() - 2.0**-8
    counts = torch.ones_like(logps, dtype=torch.long)
    counts[:, ::2] = 4
    reference = None
    if objective.needs_reference:
        reference, logps = references(name, logps, torch.zeros_like(logps))
        reference = reference.to(dtype)
    out, gradient = computed(objective, logps.to(dtype), reference, counts)
    values, gradients = truth(formula, logps, 1.0, counts)
    allowed = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.loss.double(), values, rtol=allowed, atol=1e-30)
    size = gradients.abs().amax(0).clamp(min=1e-30)  # per example
    assert ((gradient.double() - gradients).abs() / size).max() < allowed


@pytest.mark.parametrize("name", CASES)
def test_examples_are_independent(name):
    """The fused head needs the coefficients of an example before it computes the others."""
    objective = objectives.get(name)
    logps = -torch.rand(len(objective.leaves), 4)
    counts = torch.ones_like(logps)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: objective(x, torch.zeros_like(x), "none", counts).loss, logps
    )
    for example in range(4):
        others = [i for i in range(4) if i != example]
        assert (jacobian[example][:, others] == 0).all()
        assert (jacobian[example][:, example] != 0).any()
