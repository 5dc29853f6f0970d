"""Every separable loss of TRL 1.16: its own code on full logits against ours, with gradients.

The truth computes all logits in fp64, scores them by torch, and calls TRL's methods.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

import realign_kernels as rk
from realign_kernels import objectives

BETA, EXAMPLES, TOKENS, WIDTH, VOCABULARY = 0.3, 5, 7, 12, 31
SETTINGS = {"label_smoothing": 0.15, "discopop_tau": 0.2}
OURS = {  # loss type of TRL: our preset
    "sigmoid": objectives.get("sigmoid", beta=BETA),
    "hinge": objectives.hinge(BETA),
    "ipo": objectives.ipo_norm(BETA),
    "exo_pair": objectives.exo_pair(BETA, SETTINGS["label_smoothing"]),
    "nca_pair": objectives.nca_pair(BETA),
    "robust": objectives.robust(BETA, SETTINGS["label_smoothing"]),
    "bco_pair": objectives.bco_pair(BETA),  # TRL has no shift
    "sppo_hard": objectives.sppo_hard(BETA),
    "apo_zero": objectives.apo_zero(BETA),
    "apo_down": objectives.apo_down(BETA),
    "discopop": objectives.discopop(BETA, SETTINGS["discopop_tau"]),
    "sft": objectives.sft(),
    "sigmoid_norm": objectives.sigmoid_norm(BETA),
    "sigmoid+bco_pair+sft": objectives.mpo(BETA),
    "sigmoid+sft": objectives.rpo(BETA, nll_weight=0.7),
}
WEIGHTS = {"sigmoid+bco_pair+sft": [0.8, 0.2, 1.0], "sigmoid+sft": [1.0, 0.7]}
NOT_SEPARABLE = {"aot", "aot_unpaired"}  # they sort the examples of a batch


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    monkeypatch.setattr(torch, "set_default_dtype", torch.set_default_dtype)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[1.0, 40.0], ids=["near", "far"])
def batch(request):
    """Hidden states, head, labels of different lengths, and references.

    TRL averages the loss "sft" over the tokens of a batch, so chosen responses have equal lengths.
    """
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, EXAMPLES, TOKENS, WIDTH, generator=g)
    weight = request.param * torch.randn(VOCABULARY, WIDTH, generator=g)
    labels = torch.randint(VOCABULARY, (2, EXAMPLES, TOKENS), generator=g)
    labels[0, :, 5:] = -100
    for example in range(EXAMPLES):
        labels[1, example, 2 + example :] = -100
    reference = rk.reference.linear_logprobs(
        hidden.flatten(0, 2), weight * 0.8, labels.flatten()
    ).view(2, EXAMPLES, TOKENS)
    return hidden, weight, labels, reference.sum(-1)


def truth(batch, loss_of_tokens):
    """Loss, and gradients of hidden and weight, by autograd over all logits."""
    hidden, weight, labels, reference = batch
    hidden, weight = (t.clone().requires_grad_() for t in (hidden, weight))
    all_logps = torch.log_softmax(hidden @ weight.T, -1)
    logps = all_logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    loss = loss_of_tokens(logps * (labels >= 0), labels >= 0, reference)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def by_dpo_trainer(loss_type):
    """TRL's loss of token log-probs, computed by DPOTrainer._compute_loss."""
    gathered = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=torch.nn.Module().train(),
        accelerator=gathered,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_type.split("+"),
        loss_weights=WEIGHTS.get(loss_type, [1.0]),
        beta=BETA,
        label_smoothing=SETTINGS["label_smoothing"],
        args=SimpleNamespace(discopop_tau=SETTINGS["discopop_tau"]),
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def loss(logps, mask, reference):
        rows = logps.flatten(0, 1)
        first = torch.zeros(len(rows), 1, dtype=torch.bool)  # TRL shifts the mask by one
        completion_mask = torch.cat([first, mask.flatten(0, 1)], 1).long()
        outputs = SimpleNamespace(
            log_probs=rows,
            entropy=torch.zeros_like(rows),
            mean_logits=torch.zeros_like(rows),
            is_top1=torch.zeros_like(rows, dtype=torch.bool),
        )
        inputs = {
            "input_ids": torch.zeros_like(completion_mask),
            "attention_mask": torch.ones_like(completion_mask),
            "completion_mask": completion_mask,
            "ref_chosen_logps": reference[0],
            "ref_rejected_logps": reference[1],
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    return loss


def by_cpo_trainer(loss_type, nll_weight):
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=BETA,
        simpo_gamma=0.4,
        loss_type=loss_type,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )

    def loss(logps, mask, _):
        scores = logps.sum(-1) / (mask.sum(-1) if loss_type == "simpo" else 1)
        losses, *_ = CPOTrainer.cpo_loss(trainer, *scores)
        return losses.mean() - nll_weight * logps[0][mask[0]].mean()

    return loss


CASES = {name: (by_dpo_trainer(name), objective) for name, objective in OURS.items()} | {
    "cpo": (by_cpo_trainer("sigmoid", 0.6), objectives.cpo(BETA, nll_weight=0.6)),
    "simpo": (by_cpo_trainer("simpo", 0.0), objectives.simpo(BETA, gamma=0.4)),
}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_trl(name, trained, batch):
    loss_of_tokens, objective = CASES[name]
    if "sft" in name and len(objective.leaves) == 1:
        objective = rk.Objective("sft", objectives.dpo().leaves, objective.terms)
    loss, for_hidden, for_weight = truth(batch, loss_of_tokens)
    hidden, weight, labels, reference = batch
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    given = reference if objective.needs_reference else None
    # Chunks of one example, so that the trained head computes each without the others.
    out = rk.linear_preference_loss(hidden, weight, labels, given, objective, chunk_rows=16)
    out.loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-11, atol=1e-12)
    largest = for_hidden.abs().max()
    torch.testing.assert_close(hidden.grad, for_hidden, rtol=1e-9, atol=1e-11 * largest)
    if trained:
        torch.testing.assert_close(weight.grad, for_weight, rtol=1e-9, atol=1e-11 * largest)


def test_every_separable_loss_of_trl_has_a_case():
    """The message of TRL's loss lists its types."""
    trainer = by_dpo_trainer("no such loss")
    mask = torch.ones(2, 1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="Unknown loss type") as refused:
        trainer(torch.zeros(2, 1, 3), mask, torch.zeros(2, 1))
    listed = set(str(refused.value).split("[")[1].rstrip("']").strip("'").split("', '"))
    assert listed - NOT_SEPARABLE == {name for name in OURS if "+" not in name}
