"""Presets of published objectives.

Notation of the formulas:

- r(y, u) is the reward of response y under image u, beta times its log-ratio of policy and
  reference.
- p(y, u) is the log-prob of response y under image u, summed over its n(y) tokens.
- w and l are the chosen and the rejected response.
- v is the image, and v' the retrieved one (v1, v2, ... if there are several).
- w' is the response preferred for v'.
- o is a blank image.
- l(m) = -log sigmoid(m), and s(m) = sigmoid(m).

The source of a method's negative image (a crop, noise, a diffusion model) does not change the loss.
Every such image is `retrieved_image` here. POVID (2402.11411) is `dpo` on other data.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from realign_kernels.objectives.objective import (
    CHOSEN,
    REJECTED,
    VISUAL,
    Leaf,
    Objective,
    weighted_sum,
)
from realign_kernels.objectives.terms import (
    AnchorProbability,
    AnchorSigmoid,
    AnchorSquared,
    LinearSigmoid,
    MarginDifference,
    NegativeLogLikelihood,
    OddsRatio,
    PairDiscoPOP,
    PairExo,
    PairHinge,
    PairProbability,
    PairRobust,
    PairSigmoid,
    PairSquared,
    PlackettLuce,
    SoftmaxNegatives,
    Term,
)


def dpo(beta: float = 0.1) -> Objective:
    """DPO: Rafailov et al., arXiv 2305.18290, eq. 7.

    l(r(w,v) - r(l,v))
    """
    return _of_text("dpo", PairSigmoid, beta)


def cdpo(beta: float = 0.1, label_smoothing: float = 0.1) -> Objective:
    """Conservative DPO: Mitchell, A note on DPO with noisy preferences, 2023.

    (1 - e) l(m) + e l(-m), m = r(w,v) - r(l,v)

    e is label_smoothing.
    """
    return _of_text("cdpo", PairSigmoid, beta, label_smoothing=label_smoothing)


def hinge(beta: float = 0.1, target: float = 1.0) -> Objective:
    """SLiC's hinge over DPO's margin: Zhao et al., arXiv 2305.10425; Liu et al., arXiv 2309.06657.

    max(0, target - (r(w,v) - r(l,v)))
    """
    return _of_text("hinge", PairHinge, beta, target=target)


def ipo(beta: float = 0.1) -> Objective:
    """IPO: Azar et al., arXiv 2310.12036, eq. 17. beta is the paper's tau.

    ((r(w,v) - r(l,v)) / beta - 1 / (2 beta))^2

    In rewards that is (r(w,v) - r(l,v) - 1/2)^2 / beta^2. The paper sums log-probs over tokens.
    TRL's loss "ipo" is `ipo_norm`.
    """
    return _of_text("ipo", PairSquared, beta, weight=_inverse_square(beta))


def ipo_norm(beta: float = 0.1) -> Objective:
    """IPO with log-ratios per token: Azar et al., arXiv 2310.12036, eq. 17, as in TRL.

    ((r(w,v) / n(w) - r(l,v) / n(l)) / beta - 1 / (2 beta))^2
    """
    weight = _inverse_square(beta)
    return _of_text("ipo_norm", PairSquared, beta, weight=weight, reward="mean_log_ratio")


def sigmoid_norm(beta: float = 0.1) -> Objective:
    """DPO with log-ratios per token: Lambert et al., Tulu 3, arXiv 2411.15124.

    l(r(w,v) / n(w) - r(l,v) / n(l))
    """
    return _of_text("sigmoid_norm", PairSigmoid, beta, reward="mean_log_ratio")


def robust(beta: float = 0.1, label_smoothing: float = 0.1) -> Objective:
    """Robust DPO: Chowdhury et al., arXiv 2403.00409.

    [(1 - e) l(m) - e l(-m)] / (1 - 2 e), m = r(w,v) - r(l,v)

    e is label_smoothing, the assumed share of flipped pairs.
    """
    return _of_text("robust", PairRobust, beta, label_smoothing=label_smoothing)


def exo_pair(beta: float = 0.1, label_smoothing: float = 1e-3) -> Objective:
    """EXO for pairs: Ji et al., arXiv 2402.00856, eq. 16.

    s(m) log [s(m) / (1 - e)] + s(-m) log [s(-m) / e], m = r(w,v) - r(l,v)

    e is label_smoothing. The paper recommends 1e-3.
    """
    return _of_text("exo_pair", PairExo, beta, label_smoothing=label_smoothing)


def nca_pair(beta: float = 0.1) -> Objective:
    """NCA for pairs: Chen et al., arXiv 2402.05369.

    l(r(w,v)) + 1/2 l(-r(w,v)) + 1/2 l(-r(l,v))
    """
    terms = (
        AnchorSigmoid(name="chosen", leaf=0),
        AnchorSigmoid(name="chosen_below", weight=0.5, leaf=0, below=True),
        AnchorSigmoid(name="rejected", weight=0.5, leaf=1, below=True),
    )
    return Objective("nca_pair", (CHOSEN, REJECTED), terms, beta)


def bco_pair(beta: float = 0.1) -> Objective:
    """BCO for pairs: Jung et al., arXiv 2404.04656.

    l(r(w,v) - d) + l(d - r(l,v))

    d is `Objective.shift`, the running mean of the rewards of w and l (`RunningMean`). The trainers
    keep it in checkpoints. TRL's loss "bco_pair" has no shift, which is d = 0.
    """
    terms = (
        AnchorSigmoid(name="chosen", leaf=0, shifted=True),
        AnchorSigmoid(name="rejected", leaf=1, below=True, shifted=True),
    )
    return Objective("bco_pair", (CHOSEN, REJECTED), terms, beta)


def sppo_hard(beta: float = 0.1) -> Objective:
    """SPPO with hard probabilities: Wu et al., arXiv 2405.00675, eq. 4.7.

    (r(w,v) / beta - 1 / (2 beta))^2 + (r(l,v) / beta + 1 / (2 beta))^2

    beta is 1 / eta of the paper.
    """
    weight = _inverse_square(beta)
    terms = (
        AnchorSquared(name="chosen", weight=weight, leaf=0, target=0.5),
        AnchorSquared(name="rejected", weight=weight, leaf=1, target=-0.5),
    )
    return Objective("sppo_hard", (CHOSEN, REJECTED), terms, beta)


def apo_zero(beta: float = 0.1) -> Objective:
    """APO-zero: D'Oosterlinck et al., arXiv 2408.06266, eq. 7.

    s(-r(w,v)) + s(r(l,v))

    For chosen responses that are better than the model's own.
    """
    terms = (
        AnchorProbability(name="chosen", leaf=0),
        AnchorProbability(name="rejected", leaf=1, below=True),
    )
    return Objective("apo_zero", (CHOSEN, REJECTED), terms, beta)


def apo_down(beta: float = 0.1) -> Objective:
    """APO-down: D'Oosterlinck et al., arXiv 2408.06266, eq. 8.

    s(r(w,v)) + s(-(r(w,v) - r(l,v)))

    For chosen responses that are worse than the model's own.
    """
    terms = (
        AnchorProbability(name="chosen", leaf=0, below=True),
        PairProbability(name="text", positive=0, negative=1),
    )
    return Objective("apo_down", (CHOSEN, REJECTED), terms, beta)


def discopop(beta: float = 0.05, discopop_tau: float = 0.05) -> Objective:
    """DiscoPOP: Lu et al., arXiv 2406.08414, eq. 5. Both defaults are the paper's.

    (1 - a) l(m) + a exp(-m), a = s(m / discopop_tau), m = r(w,v) - r(l,v)
    """
    return _of_text("discopop", PairDiscoPOP, beta, tau=discopop_tau)


def sft() -> Objective:
    """Supervised fine-tuning on the chosen response, as a part of a sum. It needs no reference.

    -p(w,v) / n(w)
    """
    return Objective("sft", (CHOSEN,), (NegativeLogLikelihood(name="nll", leaf=0),))


def rpo(beta: float = 0.1, nll_weight: float = 1.0) -> Objective:
    """RPO: Pang et al., Iterative reasoning preference optimization, arXiv 2404.19733, eq. 1.

    l(r(w,v) - r(l,v)) + nll_weight (-p(w,v) / n(w))

    nll_weight is the paper's alpha.
    """
    terms = (_text(), NegativeLogLikelihood(name="nll", weight=nll_weight, leaf=0))
    return Objective("rpo", (CHOSEN, REJECTED), terms, beta)


def mpo(
    beta: float = 0.1,
    preference_weight: float = 0.8,
    quality_weight: float = 0.2,
    nll_weight: float = 1.0,
) -> Objective:
    """MPO: Wang et al., arXiv 2411.10442. The default weights are those of InternVL's code.

    preference_weight l(r(w,v) - r(l,v)) + quality_weight [l(r(w,v) - d) + l(d - r(l,v))]
    + nll_weight (-p(w,v) / n(w))

    d is that of `bco_pair`.
    """
    weights = (preference_weight, quality_weight, nll_weight)
    parts = (replace(dpo(beta), name="preference"), bco_pair(beta), sft())
    return weighted_sum(parts, weights, "mpo")


def simpo(beta: float = 2.0, gamma: float = 1.0) -> Objective:
    """SimPO: Meng et al., arXiv 2405.14734, eq. 6. It needs no reference.

    l(beta p(w,v) / n(w) - beta p(l,v) / n(l) - gamma)

    The authors start from beta 2 and gamma / beta 0.5. TRL's default is beta 0.1, gamma 0.5.
    """
    return _of_text("simpo", PairSigmoid, beta, reward="mean_logp", target=gamma)


def cpo(beta: float = 0.1, nll_weight: float = 1.0) -> Objective:
    """CPO: Xu et al., arXiv 2401.08417, eq. 3, with an NLL part. It needs no reference.

    l(beta p(w,v) - beta p(l,v)) + nll_weight (-p(w,v) / n(w))

    nll_weight is `cpo_alpha` of TRL.
    """
    terms = (_text("logp"), NegativeLogLikelihood(name="nll", weight=nll_weight, leaf=0))
    return Objective("cpo", (CHOSEN, REJECTED), terms, beta)


def orpo(beta: float = 0.1) -> Objective:
    """ORPO: Hong et al., arXiv 2403.07691, eq. 6. It needs no reference.

    -p(w,v) / n(w) + beta l(o(w) - o(l)), o(y) = p(y,v) / n(y) - log(1 - exp(p(y,v) / n(y)))

    beta is the paper's lambda, as in TRL. TRL's first part also covers the prompt.
    """
    terms = (
        NegativeLogLikelihood(name="nll", leaf=0),
        OddsRatio(name="odds_ratio", weight=beta, positive=0, negative=1),
    )
    return Objective("orpo", (CHOSEN, REJECTED), terms, beta)


def rdpo(beta: float = 0.1, visual_weight: float = 1.0) -> Objective:
    """rDPO: Xing et al., Re-Align, arXiv 2502.13146.

    l(r(w,v) - r(l,v)) + visual_weight l(r(w,v) - r(w,v'))
    """
    terms = (_text(), _visual(visual_weight))
    return Objective("rdpo", (CHOSEN, REJECTED, VISUAL), terms, beta)


def with_visual(link: Objective, visual_weight: float = 1.0) -> Objective:
    """rDPO over another link: each term with the rejected response is repeated for the image.

    The repeated term has the chosen response under the retrieved image (VISUAL) in place of the
    rejected response. Over DPO's link this is `rdpo`. Over SimPO's it is

    l(beta p(w,v) / n(w) - beta p(l,v) / n(l) - gamma)
    + visual_weight l(beta p(w,v) / n(w) - beta p(w,v') / n(w) - gamma)

    Args:
        link: an objective of chosen and rejected responses under the image, such as `simpo()`.
        visual_weight: weight of the repeated terms.

    Raises:
        ValueError: the objective has other leaves, or no term with the rejected response.
    """
    known = {CHOSEN, REJECTED}
    if not set(link.leaves) <= known or REJECTED not in link.leaves:
        raise ValueError(
            f"the visual term needs an objective that compares chosen and rejected responses under "
            f"the image. {link.name!r} reads "
            f"{', '.join(f'{leaf.response} under {leaf.image}' for leaf in link.leaves)}."
        )
    rejected, visual = link.leaves.index(REJECTED), len(link.leaves)
    repeated, names = [], {term.name for term in link.terms}
    for term in link.terms:
        if rejected in term.leaves:
            own = _visual_name(term.name)
            own = f"{term.name}_visual" if own in names else own
            names.add(own)
            moved = term.moved({rejected: visual})
            repeated.append(replace(moved, name=own, weight=visual_weight * term.weight))
    name = "rdpo" if link.name == "dpo" else f"rdpo_{link.name}"
    return replace(link, name=name, leaves=(*link.leaves, VISUAL), terms=(*link.terms, *repeated))


def mdpo(
    beta: float = 0.1, visual_weight: float = 1.0, anchor_weight: float = 1.0, delta: float = 0.0
) -> Objective:
    """mDPO: Wang et al., arXiv 2406.11839. The paper's v' is a random crop of v.

    l(r(w,v) - r(l,v)) + visual_weight l(r(w,v) - r(w,v')) + anchor_weight l(r(w,v) - delta)
    """
    terms = (_text(), _visual(visual_weight), _anchor(0, anchor_weight, delta))
    return Objective("mdpo", (CHOSEN, REJECTED, VISUAL), terms, beta)


def mfpo(
    beta: float = 0.1, visual_weight: float = 1.0, anchor_weight: float = 1.0, delta: float = 0.0
) -> Objective:
    """MFPO: Jiang et al., arXiv 2410.15334. It has mDPO's terms. v' is v with noise on key regions.

    l(r(w,v) - r(l,v)) + visual_weight l(r(w,v) - r(w,v')) + anchor_weight l(r(w,v) - delta)
    """
    return replace(mdpo(beta, visual_weight, anchor_weight, delta), name="mfpo")


def svco(beta: float = 0.1) -> Objective:
    """S-VCO: Wu et al., arXiv 2502.13928.

    l(r(w,v) - r(w,o)) + l(r(w,o) - r(w,v')) + l(r(w',v') - r(w',o)) + l(r(w',o) - r(w',v))

    The authors' code has no image in place of o. A blank image lets all responses share a prompt.
    This preset has one beta instead of the authors' four.
    """
    leaves = (
        CHOSEN,
        Leaf("chosen", "blank_image"),
        VISUAL,
        Leaf("retrieved_chosen", "retrieved_image"),
        Leaf("retrieved_chosen", "blank_image"),
        Leaf("retrieved_chosen", "image"),
    )
    terms = (
        PairSigmoid(name="attend", positive=0, negative=1),
        PairSigmoid(name="reject", positive=1, negative=2),
        PairSigmoid(name="retrieved_attend", positive=3, negative=4),
        PairSigmoid(name="retrieved_reject", positive=4, negative=5),
    )
    return Objective("svco", leaves, terms, beta)


def symmpo(
    beta: float = 0.1,
    pair_weight: float = 0.5,
    margin_weight: float = 1e-4,
    anchor_weight: float = 1.0,
    delta: float = 0.0,
) -> Objective:
    """SymMPO: Liu et al., arXiv 2506.11712. The weights are the paper's lambda, gamma and eta.

    l(r(w,v) - r(l,v)) + pair_weight [l(d1) + l(d2)] + margin_weight (d1 - d2)^2
    + anchor_weight [l(r(w,v) - delta) + l(r(w',v') - delta)],
    d1 = r(w,v) - r(w',v), d2 = r(w',v') - r(w,v')

    The image is the same within each pair, so partition functions cancel, unlike in rDPO.
    """
    leaves = (
        CHOSEN,
        REJECTED,
        Leaf("retrieved_chosen", "image"),
        Leaf("retrieved_chosen", "retrieved_image"),
        VISUAL,
    )
    terms = (
        _text(),
        PairSigmoid(name="pair", weight=pair_weight, positive=0, negative=2),
        PairSigmoid(name="retrieved_pair", weight=pair_weight, positive=3, negative=4),
        MarginDifference(name="margin", weight=margin_weight, first=(0, 2), second=(3, 4)),
        _anchor(0, anchor_weight, delta),
        _anchor(3, anchor_weight, delta, name="retrieved_anchor"),
    )
    return Objective("symmpo", leaves, terms, beta)


def ovip(beta: float = 0.1) -> Objective:
    """OViP: Liu et al., arXiv 2505.15963. Only its loss, without the online sampling of data.

    l(r(w,v) - r(l,v)) + l(r(w,v) - r(w,o)) + l(r(w,o) - r(w,v'))
    """
    terms = (
        _text(),
        PairSigmoid(name="attend", positive=0, negative=2),
        PairSigmoid(name="reject", positive=2, negative=3),
    )
    return Objective("ovip", (CHOSEN, REJECTED, Leaf("chosen", "blank_image"), VISUAL), terms, beta)


def adavip(beta: float = 0.1) -> Objective:
    """AdaViP: Lu et al., arXiv 2504.15619.

    -log sigmoid(-log [exp(r(l,v) - r(w,v)) + exp(r(w,v') - r(w,v))])
    """
    both = SoftmaxNegatives(name="text_and_visual", positive=0, negatives=(1, 2))
    return Objective("adavip", (CHOSEN, REJECTED, VISUAL), (both,), beta)


def mispdpo(
    beta: float = 0.1,
    negatives: int = 4,
    text_weight: float = 1.0,
    omegas: tuple[float, ...] | None = None,
) -> Objective:
    """MISP-DPO: Li et al., arXiv 2509.25717.

    text_weight l(r(w,v) - r(l,v)) - log sigmoid(-log sum_i omega_i exp(r(w,vi) - r(w,v)))

    i runs over the negatives, and text_weight is the paper's lambda. The paper's omegas are
    importance weights of sampled images. Here they are constants, 1 by default. The default of
    four negatives is not from the paper.
    """
    leaves = (CHOSEN, REJECTED, *_visuals(negatives))
    several = tuple(range(2, 2 + negatives))
    terms = (
        PairSigmoid(name="text", weight=text_weight, positive=0, negative=1),
        SoftmaxNegatives(name="visual", positive=0, negatives=several, omegas=omegas),
    )
    return Objective("mispdpo", leaves, terms, beta)


def lpoi(
    beta: float = 0.1,
    negatives: int = 4,
    visual_weight: float = 1.0,
    anchor_weight: float = 1.0,
    delta: float = 0.0,
) -> Objective:
    """LPOI: Pesaran Zadeh et al., arXiv 2505.21061. K is negatives, 4 in the authors' code.

    l(r(w,v) - r(l,v)) + anchor_weight l(r(w,v) - delta)
    - visual_weight sum_k log(exp r(w,vk) / sum_{j >= k} exp r(w,vj)), k = 0 .. K-1, v0 = v

    The retrieved images are listed by rank: v1 is the nearest to v, vK the farthest. In the paper
    the object becomes less visible from one image to the next.
    """
    leaves = (CHOSEN, REJECTED, *_visuals(negatives))
    ranking = (0, *range(2, 2 + negatives))
    terms = (
        _text(),
        PlackettLuce(name="visual", weight=visual_weight, ranking=ranking),
        _anchor(0, anchor_weight, delta),
    )
    return Objective("lpoi", leaves, terms, beta)


def chip(beta: float = 0.1) -> Objective:
    """CHiP: Fu et al., arXiv 2501.16629, without its token-level KL and its segment weights.

    -log sigmoid([r(w,v) - r(l,v)] + [r(w,v) - r(w,v')])

    The KL term, kappa (KL_l - sg KL_w), needs complete distributions, but a term only has the
    log-probs of labels.
    """
    both = LinearSigmoid(name="text_and_visual", coefficients=((0, 2.0), (1, -1.0), (2, -1.0)))
    return Objective("chip", (CHOSEN, REJECTED, VISUAL), (both,), beta)


def released(beta: float = 0.1, visual_weight: float = 1.0) -> Objective:
    """The loss of the code released with Re-Align (arXiv 2502.13146), only for reproduction.

    l(r(w,v) - R(l,v)) + visual_weight l(r(w,v) - R(w,v'))

    R sums the log-prob of the strongest token that is *not* the label over the positions of the
    response. That is top-1, or top-2 if top-1 is the label.

    It is not the default, because it differs from the paper's loss:

    - Neither the rejected response nor the chosen one under the retrieved image is scored.
    - A lower R raises the label's own probability, to first order. The paper's loss lowers it.
    - Policy and reference may pick different tokens. R is then not a log-ratio, and margins have no
      meaning.
    """
    rivals = tuple(leaf._replace(rival=True) for leaf in (REJECTED, VISUAL))
    terms = (_text(), _visual(visual_weight))
    return Objective("released", (CHOSEN, *rivals), terms, beta)


def _of_text(name: str, link: Callable[..., Term], beta: float, **settings: Any) -> Objective:
    """An objective of one link over the margin of chosen and rejected response."""
    text = link(name="text", positive=0, negative=1, **settings)
    return Objective(name, (CHOSEN, REJECTED), (text,), beta)


def _text(reward: str = "log_ratio") -> Term:
    return PairSigmoid(name="text", reward=reward, positive=0, negative=1)


def _visual_name(name: str) -> str:
    """Name of the visual counterpart of a term."""
    for part in ("text", "rejected"):
        if part in name:
            return name.replace(part, "visual")
    return f"{name}_visual"


def _visual(weight: float) -> Term:
    return PairSigmoid(name="visual", weight=weight, positive=0, negative=2)


def _anchor(leaf: int, weight: float, delta: float, name: str = "anchor") -> Term:
    return AnchorSigmoid(name=name, weight=weight, leaf=leaf, delta=delta)


def _visuals(negatives: int) -> tuple[Leaf, ...]:
    """The chosen response under retrieved_image, retrieved_image_2, ..."""
    if not isinstance(negatives, int) or isinstance(negatives, bool) or negatives < 1:
        raise ValueError(f"negatives must be an int, 1 or more, got {negatives!r}")
    more = (Leaf("chosen", f"retrieved_image_{k}") for k in range(2, negatives + 1))
    return (VISUAL, *more)


def _inverse_square(beta: float) -> float:
    """1 / beta^2, or 1 for a beta that Objective will reject."""
    inverse = 1 / beta if beta > 0 else 1.0
    return inverse * inverse
