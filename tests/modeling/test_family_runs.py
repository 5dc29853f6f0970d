"""Tiny models of VLM families in use: end of turns, cached features, refusals, whole runs."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_cases import (
    CPU,
    LOGP_TOLERANCE,
    MODELS,
    OBJECTIVE,
    encoded,
    lines,
    made,
    true_logps,
    truth,
)
from tiny_vlms import make

from realign.data.records import write_pairs
from realign.files import read_jsonl
from realign.modeling import layouts
from realign.modeling.attention import IMPLEMENTATIONS
from realign.modeling.encode import encode_records
from realign.modeling.feature_cache import FeatureCache
from realign.modeling.forest import build_batch
from realign.modeling.layouts import Layout
from realign.modeling.loading import load_model
from realign.modeling.model import ForestModel
from realign.train import main
from realign_kernels import objectives


def test_a_turn_ends_as_the_template_ends_it():
    """Gemma's template ends a turn with another token than the tokenizer's eos."""
    model = ForestModel(make("gemma3")[0])
    examples, _ = encoded("gemma3", model)
    tokenizer = make("gemma3")[1].tokenizer
    for example in examples:
        for leaf in example.leaves:
            words = tokenizer.convert_ids_to_tokens(leaf.ids.tolist())
            assert words.count("<end_of_turn>") == 1 and "<eos>" not in words


@pytest.mark.parametrize("family", MODELS)
def test_towers_are_frozen_unless_they_are_the_model(family):
    vlm, _ = make(family)
    tower, decoder = vlm.model.get_encoder("image"), vlm.model.get_decoder()
    learning = [p for p in decoder.parameters() if p.requires_grad]
    ForestModel(vlm)
    assert learning and all(p.requires_grad for p in learning)
    inside = {id(p) for p in decoder.parameters()}
    frozen = [p for n, p in tower.named_parameters() if id(p) not in inside and "merger" not in n]
    assert not any(p.requires_grad for p in frozen) or tower is vlm.model
    assert frozen


@pytest.mark.parametrize("family", MODELS)
def test_one_image_twice_in_a_prompt(family):
    vlm, _ = make(family)
    model = ForestModel(vlm).eval()
    record = replace(made(family)[1][0], images=made(family)[1][0].images * 2)
    examples, store = encoded(family, model, objectives.dpo(), [record])
    batch = build_batch(examples, store, row_tokens=4096)
    assert len(store) == 1 and batch.slots == (0, 0) * (1 if batch.shared else 2)
    with torch.no_grad():
        true = truth(vlm, family, examples, objectives.dpo(), [record])
        assert (batch.leaf_sums(model.logps(batch)) - true).abs().max() < LOGP_TOLERANCE


@pytest.mark.parametrize("family", MODELS)
def test_cached_features_replace_the_tower(family, tmp_path, monkeypatch):
    vlm, _ = make(family)
    model = ForestModel(vlm).eval()
    examples, store = encoded(family, model)
    keys = list(store.keys())
    with torch.no_grad():
        expected = model.logps(build_batch(examples, store, row_tokens=150))
        cache = FeatureCache(tmp_path, {"family": family})
        for some in (keys[:3], keys[3:4], keys[4:]):
            if some:
                made_of = model.image_features(store.batch(some))
                cache.add(dict(zip(some, made_of, strict=True)))
        store.features = cache
        monkeypatch.setattr(vlm.model, "get_image_features", lambda *_, **__: pytest.fail("ran"))
        found = model.logps(build_batch(examples, store, row_tokens=150).to(CPU))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["tree", "flash"])
def test_attention_sinks_are_not_left_out(attention):
    """The same weights under eager attention, as transformers loads the model, are the truth."""
    family = "internvl-gpt_oss"
    kinds = {"": "sdpa", "text_config": IMPLEMENTATIONS[attention]}
    try:
        model = ForestModel(make(family, attention=kinds)[0]).eval()
    except ValueError as error:
        assert "sink" in str(error)
        return
    examples, store = encoded(family, model)
    batch = build_batch(examples, store, row_tokens=4096)
    with torch.no_grad():
        found = batch.leaf_sums(model.logps(batch))
    assert (found - true_logps(family)).abs().max() < LOGP_TOLERANCE


def test_a_processor_of_another_model_is_refused():
    model = ForestModel(make("llava")[0]).eval()
    processor = make("llava")[1]
    processor.num_additional_image_tokens = 0
    examples, store = encode_records(
        made("llava")[1], processor, OBJECTIVE, layout=model.layout, max_response_tokens=64,
        max_tokens=512, progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="plain forward of .* 'llava' fails .*Check its pat"):
        lines(model, examples, store)


def test_a_forest_that_differs_from_separate_forwards_is_not_used(monkeypatch):
    vlm, _ = make("qwen2_vl")
    model = ForestModel(vlm).eval()
    examples, store = encoded("qwen2_vl", model)
    assert lines(model, examples, store) == []
    right = Layout.positions
    monkeypatch.setattr(Layout, "positions", lambda self, ids, grids, c: right(self, ids, {}, c))
    (line,) = lines(model, examples, store)
    assert line.startswith("each response gets its own copy of the prompt: positions differ in a ")
    with torch.no_grad():
        batch = build_batch(examples, store, row_tokens=4096)
        assert len(batch.input_ids) == 3 * len(examples)
        true = truth(vlm, "qwen2_vl", examples)
        assert (batch.leaf_sums(model.logps(batch)) - true).abs().max() < LOGP_TOLERANCE


def test_deviations_from_the_settings_are_reported(monkeypatch):
    for family, expected in {
        "paligemma": "attention is eager: Gemma2Model supports no sdpa",
        "qwen3_5": "own copy of the prompt: in its linear_attention layers no mask hides one",
        "idefics3": "type 'idefics3' are untested: .* differ from .* by [1-9]e-0[5-9]",
    }.items():
        tested = {"paligemma", "qwen3_5"}
        monkeypatch.setattr(layouts, "TESTED", tested)
        monkeypatch.setattr("realign.modeling.start_check.TESTED", tested)
        model = ForestModel(make(family)[0]).eval()
        (line,) = lines(model, *encoded(family, model))
        assert re.search(expected, line)


def test_attention_that_takes_no_forest_is_refused():
    vlm, _ = make("llava")
    vlm.model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="by 'flash_attention_2', .* Load it .* tree_varlen"):
        ForestModel(vlm)


def test_models_without_support_for_forests_are_refused():
    model = make("llava")[0]
    model.config.get_text_config().logit_scale = 0.5
    with pytest.raises(ValueError, match="scales its logits .logit_scale = 0.5"):
        ForestModel(model)


@pytest.mark.parametrize("family", ["paligemma", "qwen2_5_vl", "idefics3"])
def test_training_ends_in_a_model_that_loads(family, tmp_path, capsys):
    vlm, processor = make(family)
    folder, pairs, output = tmp_path / "model", tmp_path / "pairs.parquet", tmp_path / "run"
    vlm.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_pairs(pairs, made(family)[1])
    options = {
        "--model": folder, "--pairs": pairs, "--output": output, "--steps": 2, "--batch-size": 2,
        "--reference-cache": tmp_path / "reference", "--learning-rate": 1e-2, "--lora-rank": 2,
    }  # fmt: skip
    words = [str(part) for option in options.items() for part in option]
    assert main([*words, "--dry-run"]) == 0 and not output.exists()
    assert f": {family}, " in capsys.readouterr().out
    assert main([*words, "--quiet"]) == 0
    assert ("attention is eager" in capsys.readouterr().out) == (family == "paligemma")
    losses = [entry["loss"] for entry in read_jsonl(output / "metrics.jsonl")]
    assert len(losses) == 2 and losses[0] == pytest.approx(2 * np.log(2), abs=1e-4)
    trained = ForestModel(load_model(output / "model")).eval()
    model = ForestModel(vlm).eval()
    examples, store = encoded(family, model)
    batch = build_batch(examples, store, row_tokens=1)
    with torch.no_grad():
        moved = (trained.logps(batch) - model.logps(batch)).abs()
    assert 1e-3 < moved.max() < 20
