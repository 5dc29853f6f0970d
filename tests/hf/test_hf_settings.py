"""Settings of RDPOConfig: which are refused before work, the best checkpoint, and the card."""

from pathlib import Path

import pytest
import torch
from hf_runs import LORA, config, history
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer
from realign.modeling.loading import load_model
from realign_kernels import objectives

EACH_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.fixture(scope="module")
def records(pairs_file):
    return read_pairs(pairs_file)[:8]


@pytest.mark.parametrize(
    ("metric", "best"),
    [("loss", 3), ("loss/visual", 3), ("eval_loss/text", None), ("rewards/visual_margins", 3)],
)
def test_the_better_direction_of_a_metric(metric, best, records, tmp_path):
    settings = config(
        tmp_path, max_steps=3, learning_rate=1e-3, metric_for_best_model=metric, **EACH_STEP
    )
    assert settings.greater_is_better == ("margins" in metric)
    trainer = RDPOTrainer(
        str(ASSETS), settings, records, records[:4], peft_config=LoraConfig(**LORA),
        callbacks=[EarlyStoppingCallback(3)],
    )  # fmt: skip
    trainer.train()
    name = "eval_" + metric.removeprefix("eval_")
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    right = max(values) if "margins" in metric else min(values)
    assert trainer.state.best_metric == right and trainer.evaluate()[name] == pytest.approx(right)
    assert best is None or trainer.state.best_global_step == best


def test_metrics_of_several_sets_and_unknown_ones(tmp_path):
    for metric in ("a_loss/visual", "eval_a_loss", "eval_b_rewards/accuracies"):
        found = config(tmp_path, metric_for_best_model=metric).greater_is_better
        assert found == metric.endswith("accuracies")
    with pytest.raises(ValueError, match="'rewards/chosen', which is neither .* greater_is_better"):
        config(tmp_path, metric_for_best_model="rewards/chosen")
    given = config(tmp_path, metric_for_best_model="rewards/chosen", greater_is_better=False)
    assert given.greater_is_better is False


def test_the_card_describes_the_weights_of_the_best(records, tmp_path):
    best = {"metric_for_best_model": "rewards/margins", "greater_is_better": False}
    settings = config(tmp_path, max_steps=3, learning_rate=1e-3, **EACH_STEP, **best)
    trainer = RDPOTrainer(
        str(ASSETS), settings, records, records[:4], peft_config=LoraConfig(**LORA)
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    assert "## The last step (1)" in card and "4 further records were not trained on" in card
    assert "step 1, which has the best `rewards/margins`" in card
    log = trainer.state.log_history
    (loss,) = (entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"] == 1)
    assert f"| {loss:.4g} |" in card
    assert "peak learning rate of the projector" not in card


def test_lists_paths_and_numbers_are_taken(tmp_path, monkeypatch):
    found = config(tmp_path, objective=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1])
    expected = objectives.get("sigmoid+bco_pair+sft", (0.8, 0.2, 1))
    assert found.loss.build() == expected and found.objective == "sigmoid+bco_pair+sft"
    monkeypatch.chdir(ASSETS.parent)
    found = config(tmp_path, reference_model=Path(ASSETS.name))
    assert found.reference_model == str(ASSETS.resolve())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector_learning_rate": -0.1}, "projector_learning_rate is -0.1; it must be finite"),
        ({"projector_learning_rate": float("nan")}, "projector_learning_rate is nan; it must be"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be finite and not negative"),
        ({"reference_model": ""}, "reference_model is empty. Give a value, or leave it out"),
        ({"image_folder": ""}, "image_folder is empty"),
        ({"reference_model": torch.nn.Linear(1, 1)}, "reference_model is a Linear. Give a name"),
        ({"loss_weights": 2.0}, "loss_weights would have no effect: rdpo is no sum"),
        ({"objective": "dpo+sft", "loss_weights": 2.0}, "loss_weights is '2.0'; it must have 2"),
        ({"link": "sft"}, "link is 'sft'; it must be an objective that compares"),
    ],
)
def test_bad_settings_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_a_rate_of_the_projector_needs_a_projector_and_our_optimizer(
    records, tmp_path, monkeypatch
):
    monkeypatch.setattr(RDPOTrainer, "_fill_references", None)  # refused before
    settings = config(tmp_path, projector_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"is frozen.*save=\['model.multi_modal_proj"):
        RDPOTrainer(str(ASSETS), settings, records, peft_config=LoraConfig(**LORA))
    model = load_model(ASSETS)
    given = torch.optim.SGD(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="no effect on the given optimizer"):
        RDPOTrainer(model, settings, records, optimizers=(given, None))
    with pytest.raises(ValueError, match="eval_dataset is an empty dict"):
        RDPOTrainer(model, config(tmp_path), records, {})


def test_ref_model_none_is_trls_default(records, tmp_path):
    trainer = RDPOTrainer(
        str(ASSETS), config(tmp_path, max_steps=1, projector_learning_rate=1e-3), records,
        ref_model=None,
    )  # fmt: skip
    trainer.train()
    assert history(trainer)[0] == pytest.approx(1.386294, abs=1e-5)
    assert "| peak learning rate of the projector | 0.001 |" in trainer._card()


@pytest.mark.parametrize("kind", ["sdpa", "eager", "tree"])
def test_a_reference_computes_as_the_policy(kind, records, tmp_path):
    """With the policy's own weights as the reference, bf16 log-probs are the same bits."""
    found = []
    for path in (None, str(ASSETS)):
        model = load_model(ASSETS, torch.bfloat16, kind)
        settings = config(tmp_path / str(bool(path)), reference_model=path, max_steps=1)
        trainer = RDPOTrainer(model, settings, records, peft_config=LoraConfig(**LORA))
        trainer._fill_references()
        found.append((trainer.references, trainer._fingerprint))
    (ours, about), (theirs, same) = found
    assert torch.equal(ours, theirs) and about == same


@pytest.mark.parametrize("path", ["/nope/model", "text"])
def test_errors_of_a_reference_name_it(path, records, tmp_path):
    if path == "text":
        path = tmp_path / "text"
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "llama"}')
    settings = config(tmp_path, reference_model=str(path))
    with pytest.raises(ValueError, match=f"reference_model {path} cannot be used: .*{path}"):
        RDPOTrainer(str(ASSETS), settings, records, peft_config=LoraConfig(**LORA))
