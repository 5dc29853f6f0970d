"""Every VLM family: forests equal plain transformers forwards, however the model is trained.

Each function of `COLUMNS` checks one property of one family and returns its cell in the table of
docs/families.md. The last test compares the table with the page. To write the table again:

    REALIGN_WRITE_DOCS=1 python -m pytest tests/modeling/test_families.py
"""

import functools
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_cases import (
    CPU,
    DOCS,
    FAMILIES,
    LOGP_TOLERANCE,
    OBJECTIVE,
    ROW_TOKENS,
    assert_same_gradients,
    encoded,
    forest_loss,
    gradients,
    lines,
    made,
    outputs_of,
    true_loss,
    truth,
    with_lora,
)
from tiny_vlms import make

from realign import distributed
from realign.data.records import write_pairs
from realign.files import read_jsonl
from realign.modeling import layouts
from realign.modeling.encode import encode_records
from realign.modeling.feature_cache import FeatureCache
from realign.modeling.forest import build_batch
from realign.modeling.layouts import Layout
from realign.modeling.loading import load_model
from realign.modeling.model import ForestModel
from realign.train import main
from realign.training import fsdp
from realign_kernels import objectives


@functools.cache
def log_probs_are_the_same(family, attention="sdpa"):
    vlm, _ = make(family, attention=attention)
    model = ForestModel(vlm).eval()
    examples, store = encoded(family, model)
    with torch.no_grad():
        true = truth(vlm, family, examples)
        for row_tokens in ROW_TOKENS:
            batch = build_batch(examples, store, row_tokens=row_tokens)
            found = batch.leaf_sums(model.logps(batch))
            assert (found - true).abs().max() < LOGP_TOLERANCE, (row_tokens, found - true)
        assert len(batch.input_ids) == 1 or not model.layout.shares_prefix
        batch = build_batch(examples, store, row_tokens=1, shared=False)
        assert len(batch.input_ids) == 3 * len(examples)
        assert (batch.leaf_sums(model.logps(batch)) - true).abs().max() < LOGP_TOLERANCE
    assert true.std() > 1
    return "yes" if model.layout.shares_prefix else "no"


def attentions(family):
    """The attention implementations of the language model, the default first."""
    used = []
    for attention in ("tree", "flash", "sdpa", "eager"):
        log_probs_are_the_same(family, attention)
        used.append(ForestModel(make(family, attention=attention)[0]).attention)
    return ", ".join(dict.fromkeys(used))


def images_pass_the_tower_once(family):
    vlm, _ = make(family)
    model = ForestModel(vlm).eval()
    examples, store = encoded(family, model)
    tower, sizes = vlm.model.get_encoder("image"), []
    tower.register_forward_hook(lambda _, args, out: sizes.append(out[0].numel()))
    distinct = {key for example in examples for root in example.roots for key in root.images}
    slots = sum(len(root.images) for example in examples for root in example.roots)
    assert len(distinct) == 13 < slots == 14
    with torch.no_grad():
        model.image_features(store.batch(sorted(distinct)))
        layouts = sorted({False, model.layout.shares_prefix})
        for shared in layouts:
            batch = build_batch(examples, store, row_tokens=4096, shared=shared)
            assert len(batch.slots) == (13 if shared else 14 + 7)  # roots; leaves
            model.logps(batch)
    assert sizes == sizes[:1] * (1 + len(layouts))
    return "yes"


def full_gradients_are_the_same(family):
    """With the tower trained, and with it frozen, when the layers after it still learn."""
    for train_vision in (True, False):
        vlm, _ = make(family)
        model = ForestModel(vlm, train_vision=train_vision)
        examples, store = encoded(family, model)
        outputs = outputs_of(vlm.model.get_encoder("image"))
        loss, targets = forest_loss(model, examples, store)
        found = gradients(vlm)
        vlm.zero_grad()
        true = true_loss(truth(vlm, family, examples), targets)
        true.backward()
        assert loss.item() == pytest.approx(true.item(), rel=1e-5)
        moved = assert_same_gradients(found, gradients(vlm))
        assert moved >= (45 if train_vision else 21)
        kept = [out.requires_grad for out in outputs]
        if train_vision:
            assert any(kept)
            continue
        others = ("language_model", "text_model", "lm_head")
        joins = [name for name in found if not any(other in name for other in others)]
        assert joins and all(found[name] is not None for name in joins)
        if not any("merger" in name for name in joins):  # frozen towers keep nothing for backward
            assert kept and not any(kept)
    return "yes"


def lora_gradients_are_the_same(family):
    vlm, model, examples, store = with_lora(family)
    language = vlm.model.get_decoder()
    inside = {id(p) for p in language.parameters()}
    trained = [p for p in vlm.parameters() if p.requires_grad]
    assert all(id(p) in inside for p in trained)
    _, targets = forest_loss(model, examples, store)
    found = gradients(vlm)
    vlm.zero_grad()
    true_loss(truth(vlm, family, examples), targets).backward()
    assert assert_same_gradients(found, gradients(vlm)) == len(trained)
    return "yes"


def checkpointed_layers_are_the_same(family, attention="sdpa"):
    vlm, model, examples, store = with_lora(family, attention)
    forest_loss(model, examples, store)
    plain = gradients(vlm)
    vlm.zero_grad()
    calls = []
    layers = fsdp.trained_layers(model)
    assert len(layers) == 2
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    fsdp.wrap_layers(layers, compiled=False, checkpointed=True)
    forest_loss(model, examples, store)
    assert len(calls) == 2  # computed again in backward
    assert_same_gradients(gradients(vlm), plain)
    return "yes"


def sharded_models_are_the_same(family, attention="sdpa"):
    """One rank has all hooks of FSDP2. test_scale.py tests several ranks."""
    plain, _ = make(family, attention=attention)
    model = ForestModel(plain)
    examples, store = encoded(family, model)
    loss, _ = forest_loss(model, examples, store)
    vlm, _ = make(family, attention=attention)
    model = ForestModel(vlm)
    distributed.start(single=True, fsdp=False)
    try:
        fsdp.shard(model, CPU, torch.float32)
        found, _ = forest_loss(model, examples, store)
        whole = {n: g if g is None else g.full_tensor() for n, g in gradients(vlm).items()}
    finally:
        distributed.stop()
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(whole, gradients(plain))
    return "yes"


COLUMNS = {
    "shares prefix": log_probs_are_the_same,
    "vision once": images_pass_the_tower_once,
    "full": functools.cache(full_gradients_are_the_same),
    "LoRA": functools.cache(lora_gradients_are_the_same),
    "FSDP": functools.cache(sharded_models_are_the_same),
    "checkpointing": functools.cache(checkpointed_layers_are_the_same),
    "attention": attentions,
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_property_of_a_family(family, column):
    assert COLUMNS[column](family)


@pytest.mark.parametrize("column", ["FSDP", "checkpointing"])
def test_varlen_attention_trains_the_same(column):
    assert COLUMNS[column]("llava", "flash")


def test_the_table_in_docs_matches_these_results():
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        cells = [found(family) for found in COLUMNS.values()]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    before, begin, rest = DOCS.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    assert begin and end
    text = before + begin + "\n".join(lines) + "\n" + end + after
    if os.environ.get("REALIGN_WRITE_DOCS"):
        DOCS.write_text(text)
    assert DOCS.read_text() == text, "write the table again with REALIGN_WRITE_DOCS=1"
    assert set(FAMILIES) == layouts.TESTED


def test_a_turn_ends_as_the_template_ends_it():
    """Gemma's template ends a turn with another token than the tokenizer's eos."""
    model = ForestModel(make("gemma3")[0])
    examples, _ = encoded("gemma3", model)
    tokenizer = make("gemma3")[1].tokenizer
    for example in examples:
        for leaf in example.leaves:
            words = tokenizer.convert_ids_to_tokens(leaf.ids.tolist())
            assert words.count("<end_of_turn>") == 1 and "<eos>" not in words


def test_one_image_twice_in_a_prompt():
    for family in FAMILIES:
        vlm, _ = make(family)
        model = ForestModel(vlm).eval()
        record = replace(made(family)[1][0], images=made(family)[1][0].images * 2)
        examples, store = encoded(family, model, objectives.dpo(), [record])
        batch = build_batch(examples, store, row_tokens=4096)
        assert len(store) == 1 and batch.slots == (0, 0) * (1 if batch.shared else 2)
        with torch.no_grad():
            true = truth(vlm, family, examples, objectives.dpo(), [record])
            assert (batch.leaf_sums(model.logps(batch)) - true).abs().max() < LOGP_TOLERANCE


def test_cached_features_replace_the_tower(tmp_path):
    for family in FAMILIES:
        vlm, _ = make(family)
        model = ForestModel(vlm).eval()
        examples, store = encoded(family, model)
        keys = list(store.keys())
        with torch.no_grad():
            expected = model.logps(build_batch(examples, store, row_tokens=150))
            cache = FeatureCache(tmp_path, {"family": family})
            for some in (keys[:3], keys[3:4], keys[4:]):
                cache.add(dict(zip(some, model.image_features(store.batch(some)), strict=True)))
            store.features = cache
            vlm.model.get_encoder("image").register_forward_hook(lambda *_: pytest.fail("ran"))
            found = model.logps(build_batch(examples, store, row_tokens=150).to(CPU))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_processor_of_another_model_is_refused():
    model = ForestModel(make("llava")[0]).eval()
    processor = make("llava")[1]
    processor.num_additional_image_tokens = 0
    examples, store = encode_records(
        made("llava")[1], processor, OBJECTIVE, layout=model.layout, max_response_tokens=64,
        max_tokens=512, progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="takes 15 image tokens .* produces 16 .*Check its patch"):
        lines(model, examples, store)


def test_a_forest_that_differs_from_separate_forwards_is_not_used(monkeypatch):
    vlm, _ = make("qwen2_vl")
    model = ForestModel(vlm).eval()
    examples, store = encoded("qwen2_vl", model)
    assert lines(model, examples, store) == []
    right = Layout.positions
    monkeypatch.setattr(Layout, "positions", lambda self, ids, grids: right(self, ids, {}))
    (line,) = lines(model, examples, store)
    assert line.startswith("each response gets its own copy of the prompt: with a shared copy log-")
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
        monkeypatch.setattr(layouts, "TESTED", set())
        monkeypatch.setattr("realign.modeling.model.TESTED", {"paligemma", "qwen3_5"})
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
