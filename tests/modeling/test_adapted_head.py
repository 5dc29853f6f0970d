"""ForestModel with an adapted head: LoRA on the head, or a trained copy of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_forest import LOGP_TOLERANCE, make_examples, separate_logps
from torch import nn

from realign.digits import ASSETS
from realign.modeling.forest import build_batch
from realign.modeling.loading import load_model
from realign.modeling.model import ForestModel
from realign_kernels import objectives, preference_loss

CONFIGS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tied tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [*range(3, 20)]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_adapted_head_counts_and_learns(processor, config):
    vlm = load_model(ASSETS)
    if "trainable_token_indices" in config:  # PEFT also adapts the head if it is tied
        vlm.lm_head.weight = vlm.get_input_embeddings().weight
        vlm.config.tie_word_embeddings = vlm.config.text_config.tie_word_embeddings = True
    adapted = get_peft_model(vlm, LoraConfig(r=4, **config)).eval()
    ends = ("lm_head", "tokens_delta")
    learns = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    trained = {n: p for n, p in learns if any(end in n for end in ends)}
    torch.manual_seed(0)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.3)
    objective = objectives.rdpo()
    examples, store = make_examples(processor, 3, objective)
    batch, model = build_batch(examples, store, row_tokens=100), ForestModel(vlm)

    reference = torch.full((3, 3), -20.0)
    logps = separate_logps(vlm, examples, store)
    expected = preference_loss(logps, reference.double(), objective, reduction="sum").loss
    expected = torch.autograd.grad(expected, trained.values())
    loss = model(batch, objective, reference).loss
    found = torch.autograd.grad(loss, trained.values())
    for name, value, exact in zip(trained, found, expected, strict=True):
        assert (value - exact).abs().max() < 1e-4 * exact.abs().max(), name
    with torch.no_grad():
        # Log-probs of a random head are about 10 times as large.
        assert (batch.leaf_sums(model.logps(batch)) - logps).abs().max() < 10 * LOGP_TOLERANCE
        with adapted.disable_adapter():
            assert (batch.leaf_sums(model.logps(batch)) - logps).abs().max() > 1
            base = separate_logps(vlm, examples, store)
            assert (batch.leaf_sums(model.logps(batch)) - base).abs().max() < LOGP_TOLERANCE
