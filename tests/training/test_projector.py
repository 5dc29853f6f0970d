"""The projector at its own learning rate, with LoRA (`modules_to_save`) and in full training."""

import shutil

import pytest
import torch
from family_cases import encoded
from forked_ranks import run_command, run_ranks
from peft import PeftModel
from runs import arguments, assert_same_curves, assert_same_run, curve, run, weights
from tiny_vlms import make
from transformers import AutoModelForImageTextToText

from realign.digits import ASSETS
from realign.files import read_jsonl
from realign.modeling import projector
from realign.modeling.forest import build_batch
from realign.modeling.loading import adapters_off, add_lora, load_model, load_trained
from realign.modeling.model import ForestModel

MODULES = {
    "llava_next": ["model.multi_modal_projector"],
    "qwen3_vl": [
        "model.visual.merger",
        "model.visual.deepstack_merger_list.0",
        "model.visual.deepstack_merger_list.1",
    ],
    "glm4v": ["model.visual.merger"],
    "gemma4_unified": ["model.embed_vision"],
    "idefics2": ["model.connector"],
    "ovis2": ["model.visual_embeddings_table"],
    "video_llava": ["model.multi_modal_projector"],
    "deepseek_vl_hybrid": [
        "model.high_res_vision_neck", "model.high_res_vision_proj", "model.aligner",
    ],
}  # fmt: skip
"""Modules between tower and language model, from the models' code."""
ALL = (
    "--projector-learning-rate", 1e-3, "--use-dora", "--use-rslora", "--save-every", 2,
    "--lora-targets", "q_proj,v_proj,up_proj",
)  # fmt: skip
COPY = "base_model.model.model.multi_modal_projector."
BASE = "model.multi_modal_projector."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_of_the_projector_learns_and_the_reference_keeps_the_original(name, dtype):
    vlm, _ = make(name)
    model = ForestModel(vlm.to(dtype), dtype=dtype)
    examples, store = encoded(name, model)
    shared = model.layout.shares_prefix
    batch = build_batch(examples[:1], store, row_tokens=4096, shared=shared)
    with torch.no_grad():
        base = model.logps(batch)
        before = projector.modules_to_save(vlm)
        assert sorted(before) == sorted(MODULES[name])
        add_lora(vlm, 2, 4, save=before)
        torch.testing.assert_close(model.logps(batch), base)
        copies = projector.trained(vlm)
        assert {p.dtype for p in copies} == {torch.float32}  # bf16 would round steps of 2e-5 away
        for value in copies:
            value += 0.2 * torch.randn_like(value)
    changed = model.logps(batch)
    assert (changed - base).abs().max() > 1e-3
    with torch.no_grad(), adapters_off(model):
        torch.testing.assert_close(model.logps(batch), base)
    changed.sum().backward()
    assert all(p.grad is not None for p in copies) and all(p.grad.any() for p in copies[:2])
    originals = [p for n, p in vlm.named_parameters() if ".original_module." in n]
    assert originals and not any(p.requires_grad for p in originals)


def test_parameters_outside_of_modules_are_named_and_missing_projectors_refused():
    vlm, _ = make("llava_next")
    add_lora(vlm, 2, 4, save=projector.modules_to_save(vlm))
    line = projector.summary(vlm, 2e-5)
    assert "at 2e-05: model.multi_modal_projector; model.image_newline stays frozen" in line
    vlm, _ = make("llava")
    vlm.model.vision_tower.multi_modal_projector = vlm.model.multi_modal_projector
    del vlm.model.multi_modal_projector
    with pytest.raises(ValueError, match="of type 'llava' have no projector apart from their vis"):
        projector.modules_to_save(vlm)


@pytest.fixture(scope="module")
def finished(pairs_file, tmp_path_factory):
    """A run of four steps with DoRA and rsLoRA beside the projector."""
    output = tmp_path_factory.mktemp("projector")
    entries = run(pairs_file, output, *ALL, steps=4)
    assert entries[0]["rewards/margins"] == entries[0]["rewards/visual_margins"] == 0
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.05
    return output


def test_adams_first_step_moves_each_group_by_its_rate(pairs_file, tmp_path):
    """Adam's first update is the learning rate times the sign of the gradient."""
    rates = ("--projector-learning-rate", 3e-4, "--learning-rate", 2e-5)
    base = load_model(ASSETS).state_dict()
    for name, more in (("lora", ()), ("full", ("--tune", "full"))):
        output = tmp_path / name
        run(pairs_file, output, *rates, *more, steps=1)
        if name == "lora":
            found = weights(output)
            projected = found[f"{COPY}linear_1.weight"] - base[f"{BASE}linear_1.weight"]
            others = [value for key, value in found.items() if "lora_B" in key]
        else:
            found = load_model(output / "model").state_dict()
            projected = found[f"{BASE}linear_1.weight"] - base[f"{BASE}linear_1.weight"]
            others = [found[key] - base[key] for key in found if "language_model.layers" in key]
        assert projected.abs().max() == pytest.approx(3e-4, rel=0.01)
        assert max(float(v.abs().max()) for v in others) == pytest.approx(2e-5, rel=0.05)
        assert f"of the projector | {3e-4}" in (output / "model" / "README.md").read_text()


def test_a_stopped_run_resumes_with_the_same_bits(finished, pairs_file, tmp_path):
    """Also if references are computed again, beside the trained projector of a checkpoint."""
    shutil.copytree(finished, tmp_path / "cut")
    for later in ("checkpoints/step-000004", "model"):
        shutil.rmtree(tmp_path / "cut" / later)
    cache = ("--reference-cache", tmp_path / "cache")
    run(pairs_file, tmp_path / "cut", *ALL, *cache, "--resume", steps=4)
    assert_same_run(tmp_path / "cut", finished, steps=4)
    changed = r"use_rslora \(True -> False\), use_dora .*projector_learning_rate \(0.001 -> 0.0\)"
    with pytest.raises(ValueError, match=changed):
        run(pairs_file, tmp_path / "cut", "--save-every", 2, "--resume", steps=4)


def test_two_ranks_train_as_one(finished, pairs_file, tmp_path):
    output = tmp_path / "two"
    words = arguments(pairs_file, output, "--fsdp", *ALL, "--micro-batch-size", 4, steps=4)
    run_ranks(run_command, 2, str(tmp_path / "log"), "realign.train", words)
    assert_same_curves(read_jsonl(output / "metrics.jsonl"), read_jsonl(finished / "metrics.jsonl"))
    ours, truth = weights(output), weights(finished)
    assert ours.keys() == truth.keys()
    assert max(float((ours[n] - truth[n]).abs().max()) for n in truth) < 2e-3


def test_stock_peft_restores_the_projector_and_merging_keeps_it(finished, pairs_file, processor):
    found = weights(finished)
    original = load_model(ASSETS).get_parameter(f"{BASE}linear_1.weight")
    assert (found[f"{COPY}linear_1.weight"] - original).abs().max() > 1e-3
    folder = finished / "model"
    fresh = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
    truth = PeftModel.from_pretrained(fresh, folder).eval()
    ids = torch.tensor([[1] + [processor.image_token_id] * 16 + list(range(5, 15))])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = {"input_ids": ids, "pixel_values": pixels}
        logits = truth(**given).logits
        plain = load_model(ASSETS)(**given).logits
        for model in (load_trained(folder), load_model(folder)):
            assert (model(**given).logits - logits).abs().max() < 1e-3
        assert (plain - logits).abs().max() > 0.1
    assert curve(read_jsonl(finished / "metrics.jsonl"), "step").tolist() == [1, 2, 3, 4]


def test_adapters_in_the_tower_train_on_one_rank_and_two(pairs_file, tmp_path):
    """The start-up check accepts them, and features that they compute are not cached."""
    given = ("--lora-targets", "q_proj,out_proj", "--learning-rate", 1e-3)
    one = run(pairs_file, tmp_path / "one", *given, steps=2)
    words = arguments(pairs_file, tmp_path / "two", "--fsdp", *given, steps=2)
    run_ranks(run_command, 2, str(tmp_path / "log"), "realign.train", words)
    assert_same_curves(read_jsonl(tmp_path / "two" / "metrics.jsonl"), one)
    names = [name for name in weights(tmp_path / "one") if "out_proj.lora_B" in name]
    assert names and all("vision_tower" in name for name in names)
    assert all(weights(tmp_path / "one")[name].any() for name in names)
    with pytest.raises(ValueError, match="--cache-vision keeps.*--lora-targets q_proj,out_proj ad"):
        run(pairs_file, tmp_path / "cached", *given, "--cache-vision", steps=2)
