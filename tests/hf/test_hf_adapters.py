"""Reference of a model with adapters under RDPOTrainer, and models that it rejects."""

import math

import datasets
import pytest
import torch
from family_cases import made
from hf_runs import LORA, config, history
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_vlms import make
from transformers import AutoModelForImageTextToText

from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer, adapters
from realign.hf.records import records_of
from realign.modeling import lora_targets
from realign.modeling.loading import load_model, load_trained

EQUAL = 2 * math.log(2)  # the loss of rdpo if policy and reference are equal


@pytest.fixture(scope="module")
def records(pairs_file):
    return read_pairs(pairs_file)[:8]


@pytest.fixture
def adapted():
    """A model with a trained adapter."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(ASSETS), LoraConfig(**LORA))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    return model


def test_a_trained_adapter_is_part_of_the_reference(adapted, records, tmp_path):
    base = RDPOTrainer(
        str(ASSETS), config(tmp_path, max_steps=1), records, peft_config=LoraConfig(**LORA)
    )
    base.train()
    shared = {path.name for path in (tmp_path / "cache").iterdir()}
    trainer = RDPOTrainer(adapted, config(tmp_path, max_steps=2), records)
    trainer.train()
    for found in (base, trainer):
        assert history(found)[0] == pytest.approx(EQUAL, abs=1e-4)
        assert history(found, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    # The reference differs from the base, so its log-probs are cached separately.
    assert len({path.name for path in (tmp_path / "cache").iterdir()} - shared) == 1
    difference = (trainer.references - base.references).abs().mean()
    assert difference > 0.1  # nats; rounding errors are 1e-5
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(ASSETS), str(tmp_path / "saved")
    )
    trained = {n.removeprefix("vlm."): p for n, p in trainer.model.state_dict().items()}
    for name, value in loaded.base_model.model.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_adapters_equal_to_the_base_share_its_references(records, tmp_path):
    fresh = get_peft_model(load_model(ASSETS), LoraConfig(**LORA))
    dora = LoraConfig(**LORA, use_dora=True)  # rounds, so in bf16 it differs from its base
    for model, peft, folders in [(fresh, None, 1), (str(ASSETS), None, 1), (str(ASSETS), dora, 2)]:
        trainer = RDPOTrainer(model, config(tmp_path, max_steps=1), records, peft_config=peft)
        trainer.train()
        assert history(trainer)[0] == pytest.approx(EQUAL, abs=1e-6)
        assert len(list((tmp_path / "cache").iterdir())) == folders


def test_adapters_that_cannot_be_trained_are_rejected(adapted, records, tmp_path):
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    settings = config(tmp_path)
    with pytest.raises(ValueError, match="is an adapter. Merge it first"):
        RDPOTrainer(str(folder), settings, records, peft_config=LoraConfig(**LORA))
    frozen = PeftModel.from_pretrained(load_model(ASSETS), str(folder))
    with pytest.raises(ValueError, match="no weight of the model is trained.*is_trainable=True"):
        RDPOTrainer(frozen, settings, records)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(?i).*LANGUAGE_MODEL.*q_proj"},
        {"target_modules": ".*[é_]proj"},
        {"rank_pattern": {f"q.*{i}": 2 for i in range(200)}},
        {"r": 10_000},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_loaded_again_is_refused_before_training(
    fields, records, tmp_path
):
    with pytest.raises(ValueError, match="peft_config could not be loaded again after training"):
        RDPOTrainer(str(ASSETS), config(tmp_path), records, peft_config=LoraConfig(**LORA | fields))


def test_keys_of_patterns_that_are_expressions_train_and_load_again(records, tmp_path):
    patterns = {
        "rank_pattern": {r"language_model\.layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {r".*language_model.*q_proj": 8},
    }
    settings = config(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    adapter = LoraConfig(**LORA | patterns)
    trainer = RDPOTrainer(str(ASSETS), settings, records, peft_config=adapter)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    (base, trained) = (load_model(ASSETS), load_trained(tmp_path / "saved"))
    truth = PeftModel.from_pretrained(base, str(tmp_path / "saved")).base_model.model.state_dict()
    found = trained.state_dict()
    assert found.keys() == truth.keys()
    assert all(torch.equal(value, truth[name]) for name, value in found.items())
    resumed = RDPOTrainer(
        str(ASSETS),
        config(tmp_path, max_steps=2),
        records,
        peft_config=LoraConfig(**LORA | patterns),
    )
    resumed.train(resume_from_checkpoint=True)


def test_named_sets_are_evaluated_and_others_rejected(records, tmp_path):
    sets = {"near": records[:3], "far": records[3:]}
    trainer = RDPOTrainer(
        str(ASSETS), config(tmp_path, max_steps=1, learning_rate=1e-4), records, sets,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    one = RDPOTrainer(str(ASSETS), config(tmp_path), records, sets["far"])
    for name in ("logps/chosen", "logps/visual"):  # of one step apart
        assert found[f"eval_far_{name}"] == pytest.approx(one.evaluate()[f"eval_{name}"], rel=0.05)
        assert found[f"eval_far_{name}"] != found[f"eval_near_{name}"]
    assert trainer.evaluate("near")["eval_loss"] == found["eval_near_loss"]
    with pytest.raises(ValueError, match="evaluation records must be passed to the trainer"):
        trainer.evaluate(records[:2])
    with pytest.raises(ValueError, match=r"predict is not supported.*no logits.*evaluate\(\)"):
        trainer.predict(records[:2])
    with pytest.raises(ValueError, match="no eval_dataset|requires an eval_dataset"):
        RDPOTrainer(str(ASSETS), config(tmp_path), records).evaluate()


def test_pushing_keeps_the_card(records, tmp_path, monkeypatch):
    settings = config(tmp_path, max_steps=1, objective="dpo")
    trainer = RDPOTrainer(str(ASSETS), settings, records, peft_config=LoraConfig(**LORA))
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "out" / "README.md").read_text()
    trainer.create_model_card(model_name="mine", tags=["x"])  # as Trainer.push_to_hub does
    assert (tmp_path / "out" / "README.md").read_text() == before
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and "| schedule | constant |" in card.text
    assert "visual weight" not in card.text  # dpo has none


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compute_metrics": len}, "compute_metrics would have no effect"),
        ({"data_collator": len}, "data_collator would have no effect"),
        ({"deepspeed": True}, "DeepSpeed is not supported. Shard with FSDP2"),
        ({"gpus": 2}, "2 GPUs are visible.*accelerate launch"),
    ],
)
def test_arguments_without_effect_are_refused(more, message, records, tmp_path, monkeypatch):
    settings = config(tmp_path)
    if more.pop("deepspeed", False):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    settings._n_gpu = more.pop("gpus", 0)
    with pytest.raises(ValueError, match=message):
        RDPOTrainer(str(ASSETS), settings, records, **more)


def test_transforms_of_a_data_set_are_applied(pairs_file):
    rows = datasets.load_dataset("parquet", data_files=str(pairs_file), split="train")

    def shout(batch):
        texts = [[m | {"content": m["content"].upper()} for m in one] for one in batch["chosen"]]
        return batch | {"chosen": texts}

    plain, loud = records_of(rows), records_of(rows.with_transform(shout))
    assert [r.chosen for r in loud] == [r.chosen.upper() for r in plain]
    with pytest.raises(ValueError, match="is a dictionary of .*train.*test.*Give one"):
        records_of(datasets.DatasetDict(train=rows, test=rows))


EXPERTS = {
    "r": 4,
    "target_modules": r".*language_model.*\.(q|v)_proj",
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


@pytest.mark.parametrize("way", ["peft_config", "PeftModel"])
def test_adapters_on_fused_experts_train_and_resume(way, tmp_path, capsys):
    """PEFT nests the layers of a module's two parameters."""
    examples = made("qwen3_vl_moe")[1]

    def trainer(folder, **settings):
        vlm, processor = make("qwen3_vl_moe")
        torch.manual_seed(3)
        peft = LoraConfig(**EXPERTS)
        model, peft = (vlm, peft) if way == "peft_config" else (get_peft_model(vlm, peft), None)
        settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2} | settings
        settings |= {"disable_tqdm": False, "per_device_train_batch_size": 2}
        return RDPOTrainer(
            model,
            config(folder, **settings),
            examples,
            processing_class=processor,
            peft_config=peft,
        )

    whole = trainer(tmp_path, max_steps=2)
    whole.train()
    line = "4 of 8 linear layers, 2 of 2 modules of fused experts; routers stay frozen"
    assert line in capsys.readouterr().out
    assert history(whole)[0] == pytest.approx(EQUAL, abs=1e-5)
    resumed = trainer(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    trained = whole.adapter.state_dict()
    learned = [n for n, v in trained.items() if "lora_B" in n and v.any()]
    assert sum(".experts." in name for name in learned) == 4
    assert all(torch.equal(v, trained[n]) for n, v in resumed.adapter.state_dict().items())
    whole.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make("qwen3_vl_moe")[0], str(tmp_path / "saved"))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_targets_that_peft_changed_have_the_settings_of_their_checkpoint(tmp_path):
    """PEFT replaces targets of glm4v_moe, and then holds a set until it is saved."""
    vlm, _ = make("glm4v_moe")
    names = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    adapted = get_peft_model(vlm, LoraConfig(target_modules=names))
    live = adapted.peft_config["default"]
    assert isinstance(live.target_parameters, set)
    for order in (sorted(live.target_parameters), sorted(live.target_parameters)[::-1]):
        saved = LoraConfig(**live.to_dict() | {"target_parameters": order})
        assert adapters.settings(saved) == adapters.settings(live)
    assert lora_targets.share(vlm).count("2 of 14 linear layers") == 1
