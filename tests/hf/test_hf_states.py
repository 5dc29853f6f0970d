"""Adapter states that RDPOTrainer rejects, fingerprints of valid ones, and foreign checkpoints."""

import math

import pytest
import torch
from hf_runs import LORA, config, history
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    ShiraConfig,
    get_peft_model,
)
from peft import inject_adapter_in_model as inject
from safetensors.torch import load_file

from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer, adapters
from realign.modeling.loading import load_model, load_processor

ON = LORA["target_modules"]


@pytest.fixture(scope="module")
def records(pairs_file):
    return read_pairs(pairs_file)[:4]


def filled(model, seed=0):
    """A model with non-zero LoRA weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.05 * torch.randn(value.shape, generator=generator)
    return model


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    return filled(get_peft_model(load_model(ASSETS), LoraConfig(**LORA)))


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    model.requires_grad_(True)
    return model


def disabled_in_one_layer(model):
    next(m for m in model.modules() if hasattr(m, "lora_A")).enable_adapters(False)
    return model


def scaled(model):
    next(m for m in model.modules() if hasattr(m, "lora_A")).set_scale("default", 0.5)
    return model


def scaled_loha(model):
    model = get_peft_model(model.unload(), LoHaConfig(r=4, alpha=4, target_modules=ON))
    next(m for m in model.modules() if hasattr(m, "hada_w1_a")).scale_layer(0.5)
    return model


def scaled_shira(model):
    model = get_peft_model(model.unload(), ShiraConfig(r=4, random_seed=0, target_modules=ON))
    next(m for m in model.modules() if hasattr(m, "shira_weight")).set_scale("default", 0.5)
    return model


def both_are_active(model):
    model.add_adapter("second", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "second"])
    return model


def base_learns(model):
    model.get_base_model().model.multi_modal_projector.requires_grad_(True)
    return model


def another_is_active(model):
    model.add_adapter("second", LoraConfig(**LORA))
    model.set_adapter("second")
    for name, value in model.named_parameters():
        value.requires_grad_(".default." in name)
    return model


def without_configuration(model):
    inner = model.get_base_model()
    inner.peft_config = {}
    return inner


def twice(model):
    return get_peft_model(model.get_base_model(), IA3Config(target_modules=ON,
                                                            feedforward_modules=[]))  # fmt: skip


def in_a_peft_model(model):
    return PeftModel(model, LoraConfig(target_modules=["o_proj"]))


def on_a_merged_base(model):
    return get_peft_model(model.merge_and_unload(), LoraConfig(**LORA))


def on_resized_ends(model):
    base = load_model(ASSETS)
    base.resize_token_embeddings(base.config.text_config.vocab_size + 3)
    return get_peft_model(base, LoraConfig(**LORA))


def mixed(model):
    return PeftMixedModel(model.unload(), LoraConfig(**LORA))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (merged, "are merged into its weights.*unmerge_adapter"),
        (disabled, "are disabled.*enable_adapter_layers"),
        (disabled_in_one_layer, "are disabled in some or all layers"),
        (scaled, "q_proj scales adapter 'default' by 1, but its configuration gives 2"),
        (scaled_loha, "q_proj scales adapter 'default' by 0.5, but its configuration gives 1"),
        (scaled_shira, "q_proj scales adapter 'default' by 0.5, but its configuration gives 1"),
        (base_learns, "multi_modal_projector.* would be trained.*modules_to_save"),
        (
            another_is_active,
            "no weight of the model is trained.*default, second.*active one is second",
        ),
        (both_are_active, "adapters default, second are active together.*add_weighted_adapter"),
        (without_configuration, "layers of the adapter.s. default, but not their configurations"),
        (twice, "default|on top of another one"),
        (in_a_peft_model, "a PeftModel around one"),
        (on_a_merged_base, "proj.weight of the model is not that of .*as its base.*save_pre"),
        (on_resized_ends, "(lm_head|embed_tokens).weight of the model is not that of"),
        (mixed, "model is a PeftMixedModel"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_adapter_states_that_cannot_be_saved_are_rejected(
    adapted, change, message, records, tmp_path
):
    with pytest.raises(ValueError, match=message):
        RDPOTrainer(change(adapted), config(tmp_path), records,
                    processing_class=load_processor(ASSETS))  # fmt: skip


def test_a_new_adapter_needs_a_model_without_adapters(adapted, records, tmp_path):
    injected = inject(LoraConfig(**LORA), load_model(ASSETS))
    for model in (adapted, adapted.get_base_model(), injected):
        with pytest.raises(ValueError, match="already has adapters. Leave out peft_config"):
            RDPOTrainer(model, config(tmp_path), records, peft_config=LoraConfig(**LORA))
    unloaded = adapted.unload()  # it keeps the attribute peft_config, but no adapter
    trainer = RDPOTrainer(unloaded, config(tmp_path, max_steps=1), records,
                          peft_config=LoraConfig(**LORA))  # fmt: skip
    assert isinstance(trainer.adapter, PeftModel)


def test_two_models_that_compute_differently_have_two_digests(adapted):
    digests = {adapters.model_digest(adapted.get_base_model())}

    def changed():
        digests.add(adapters.model_digest(adapted.get_base_model()))
        return len(digests)

    assert changed() == 1
    for i, change in enumerate([disabled_in_one_layer, scaled, merged, another_is_active]):
        change(adapted)
        assert changed() == i + 2, change
    weight = next(p for n, p in adapted.named_parameters() if "lora_A" in n)
    weight.data.view(-1)[0] += 1e-7 * weight.data.view(-1)[0].abs()  # lost in bf16
    assert changed() == 6


@pytest.mark.parametrize("adapts", [False, True])
def test_a_second_trainer_starts_from_the_weights_of_the_first(adapts, adapted, records, tmp_path):
    model = adapted if adapts else load_model(ASSETS)
    options = {"max_steps": 1, "learning_rate": 1e-2}
    trainers = [
        RDPOTrainer(
            model, config(tmp_path, **options), some, processing_class=load_processor(ASSETS)
        )
        for some in (records[:2], records[2:])
    ]
    for trainer in trainers:
        trainer.train()
        assert history(trainer)[0] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert (
        trainers[0]._fingerprint != trainers[1]._fingerprint
    )  # else their cached log-probs would be mixed


def test_a_digest_does_not_depend_on_the_holder(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    by_peft = PeftModel.from_pretrained(load_model(ASSETS), tmp_path, is_trainable=True)
    by_transformers = load_model(ASSETS)
    by_transformers.load_adapter(str(tmp_path), is_trainable=True)
    digests = {adapters.model_digest(by_peft.get_base_model()),
               adapters.model_digest(by_transformers)}  # fmt: skip
    assert len(digests) == 1
    assert adapters.base_digest(by_transformers) == adapters.base_digest(load_model(ASSETS))


def test_an_adapter_on_the_vision_tower_learns(records, tmp_path):
    config_of_tower = LoraConfig(r=4, target_modules=r".*vision_tower.*(q_proj|v_proj)")
    torch.manual_seed(0)
    model = get_peft_model(load_model(ASSETS), config_of_tower)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n}
    RDPOTrainer(model, config(tmp_path, max_steps=1), records).train()
    after = dict(model.named_parameters())
    assert before and not any(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_new_adapter_learns_wherever_its_configuration_puts_it(targets, records, tmp_path):
    adapter = LoraConfig(r=4, target_modules=targets)
    trainer = RDPOTrainer(str(ASSETS), config(tmp_path, max_steps=1), records, peft_config=adapter)
    trainer.train()
    learned = {n: p for n, p in trainer.model.vlm.named_parameters() if "lora_B" in n}
    assert {"vision_tower" in name for name in learned} == {True, False}
    assert all(p.requires_grad and p.any() for p in learned.values())


def test_inactive_adapters_do_not_change(adapted, records, tmp_path):
    adapted.add_adapter("second", LoraConfig(**LORA))
    adapted.set_adapter("second")
    filled(adapted, seed=1)
    before = {n: p.clone() for n, p in adapted.named_parameters() if ".default." in n}
    trainer = RDPOTrainer(adapted, config(tmp_path, max_steps=1), records)
    trainer.train()
    trainer.save_model()
    assert before and all(torch.equal(before[n], dict(adapted.named_parameters())[n])
                          for n in before)  # fmt: skip
    first = load_file(tmp_path / "out" / "adapter_model.safetensors")
    second = load_file(tmp_path / "out" / "second" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    name = next(name for name in first if "lora_B" in name)
    assert not torch.equal(first[name], second[name])
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER/second")' in card


@pytest.fixture(scope="module")
def checkpoint(records, tmp_path_factory):
    """A checkpoint of a fresh LoRA after one step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    settings = config(folder, max_steps=1, save_strategy="steps", save_steps=1)
    RDPOTrainer(str(ASSETS), settings, records, peft_config=LoraConfig(**LORA)).train()
    return str(folder / "out" / "checkpoint-1")


def test_a_foreign_checkpoint_is_not_resumed(checkpoint, adapted, records, tmp_path):
    def resume(model, folder=checkpoint, **more):
        trainer = RDPOTrainer(model, config(tmp_path, max_steps=2), records, **more)
        trainer.train(resume_from_checkpoint=str(folder))
        return trainer

    with pytest.raises(ValueError, match="is not the given model.*differ by .* per token"):
        resume(adapted)
    other = LoraConfig(**(LORA | {"r": 4}))
    with pytest.raises(
        ValueError, match="its checkpoint in .* have different settings.*r is 4, was 8"
    ):
        resume(str(ASSETS), peft_config=other)
    with pytest.raises(ValueError, match="holds an adapter. Resume with its peft_config"):
        resume(str(ASSETS))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no reference.json"):
        resume(str(ASSETS), tmp_path / "empty", peft_config=LoraConfig(**LORA))
    # Another random A with the same zero B gives the same reference.
    torch.manual_seed(17)
    again = get_peft_model(load_model(ASSETS), LoraConfig(**LORA))
    assert len(history(resume(again))) == 2


def test_processes_with_different_weights_are_an_error(adapted, records, tmp_path, monkeypatch):
    monkeypatch.setattr("realign.hf.checks.gather_object", lambda own: [*own, "of rank 1"])
    trainer = RDPOTrainer(adapted, config(tmp_path, max_steps=1), records)
    with pytest.raises(ValueError, match="processes have different weights.*set_seed"):
        trainer.train()


def test_the_best_adapters_are_loaded_by_name(records, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load_model(ASSETS), LoraConfig(**LORA), adapter_name="mine")
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins"}
    # Training increases the metric, so the first step is the best.
    settings = config(tmp_path, max_steps=3, **steps, **best, greater_is_better=False)
    trainer = RDPOTrainer(model, settings, records, records[:2])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    file = tmp_path / "out" / "checkpoint-1" / "mine" / "adapter_model.safetensors"
    for name, value in adapters.state_of(model, "mine").items():
        assert torch.equal(value, load_file(file)[name]), name
