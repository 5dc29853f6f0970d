"""Every VLM family: forests equal plain transformers forwards, however the model is trained.

Each function of `COLUMNS` checks one property of one family and returns its cell in the table of
docs/families.md. The last test compares the table with the page. To write the table again:

    REALIGN_WRITE_DOCS=1 python -m pytest tests/modeling/test_families.py
"""

import functools
import os
import re
import tempfile

import pytest
import torch
from family_cases import (
    CPU,
    DOCS,
    FAMILIES,
    LOGP_TOLERANCE,
    MODELS,
    REFUSED,
    ROW_TOKENS,
    assert_same_gradients,
    encoded,
    forest_loss,
    gradients,
    made,
    outputs_of,
    prompts,
    small_config,
    true_logps,
    true_loss,
    truth,
    truth_of_prompts,
    with_lora,
)
from family_ranks import run
from forked_ranks import run_ranks
from tiny_more import CASES
from tiny_vlms import make
from transformers import AutoModelForImageTextToText

from realign import distributed
from realign.files import replacing
from realign.modeling import layouts
from realign.modeling.forest import build_batch
from realign.modeling.model import ForestModel
from realign.training import fsdp
from realign_kernels import objectives


@functools.cache
def log_probs_are_the_same(family, attention):
    vlm, _ = make(family, attention=attention)
    model = ForestModel(vlm).eval()
    examples, store = encoded(family, model)
    true = true_logps(family)
    with torch.no_grad():
        for row_tokens in ROW_TOKENS if family in FAMILIES else ROW_TOKENS[-1:]:
            batch = build_batch(examples, store, row_tokens=row_tokens)
            found = batch.leaf_sums(model.logps(batch))
            assert (found - true).abs().max() < LOGP_TOLERANCE, (row_tokens, found - true)
        assert len(batch.input_ids) == 1 or not model.layout.shares_prefix
        batch = build_batch(examples, store, row_tokens=1, shared=False)
        assert len(batch.input_ids) == 3 * len(examples)
        assert (batch.leaf_sums(model.logps(batch)) - true).abs().max() < LOGP_TOLERANCE
    assert true.std() > 1
    return "yes" if model.layout.shares_prefix else "no", model.attention


def shares_prefix(family):
    """Whether responses share their prompt; log-probs are the same either way."""
    return log_probs_are_the_same(family, "sdpa")[0]


@functools.cache
def prompts_are_the_same(family):
    """With a system prompt, an image amid a text, several turns, and thoughts in some templates."""
    vlm, _ = make(family)
    model = ForestModel(vlm).eval()
    examples, store = encoded(family, model, objectives.dpo(), prompts(family))
    batch = build_batch(examples, store, row_tokens=4096)
    with torch.no_grad():
        true = truth_of_prompts(make(family)[0], family, examples)
        assert (batch.leaf_sums(model.logps(batch)) - true).abs().max() < LOGP_TOLERANCE
    ends = [CASES[family].ends] if family in CASES else []
    ends = {*sum(ends, ()), *END_TOKENS}
    for leaf in (leaf for example in examples for leaf in example.leaves):
        words = made(family)[0].tokenizer.convert_ids_to_tokens(leaf.ids.tolist())
        assert {*words[-2:]} & ends and len({*words} & ends) == 1, words
    return "yes"


@functools.cache
def attentions(family):
    """The attention implementations of the language model, the default first."""
    used = []
    for attention in ("tree", "flash", "sdpa", "eager"):
        used.append(log_probs_are_the_same(family, attention)[1])
    return ", ".join(dict.fromkeys(used))


@functools.cache
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


@functools.cache
def full_gradients_are_the_same(family):
    """With the tower trained, and with it frozen, when the layers after it still learn.

    The frozen tower is tested for the families with every property.
    """
    for train_vision in (True, False) if family in FAMILIES else (True,):
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
        if family not in FAMILIES:
            used = [name for name in found if "video_tower" not in name]
            assert moved >= 0.7 * len(used), (moved, len(used))
            continue
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


@functools.cache
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
    # Tokens of an image influence no response after the last layer, whose experts for them rest.
    resting = [name for name in found if ".layers.1.mlp.vision_moe." in name]
    assert assert_same_gradients(found, gradients(vlm)) == len(trained) - len(resting)
    return "yes, with experts" if any(".experts." in name for name in found) else "yes"


@functools.cache
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


@functools.cache
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


def two_ranks_are_the_same(families):
    """Each trains half of the records."""
    with tempfile.TemporaryDirectory() as folder:
        output = run_ranks(run, 2, f"{folder}/log", families)
    moved = dict(re.findall(r"(\S+) gradients: (\d+)", output))
    assert [*moved] == [*families] and all(int(count) >= 20 for count in moved.values()), output
    return "yes"


@functools.cache
def refusal(kind):
    """The first sentence of the error for a type of model that is not supported."""
    if kind in CASES:
        vlm, _ = make(kind)
    else:
        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(small_config(kind))
    with pytest.raises(ValueError) as caught:
        ForestModel(vlm)
    return str(caught.value).partition(". ")[0].removesuffix(".")


COLUMNS = {
    "shares prefix": shares_prefix,
    "prompts": prompts_are_the_same,
    "full": full_gradients_are_the_same,
    "LoRA": lora_gradients_are_the_same,
    "vision once": images_pass_the_tower_once,
    "2 ranks": two_ranks_are_the_same,
    "FSDP": sharded_models_are_the_same,
    "checkpointing": checkpointed_layers_are_the_same,
    "attention": attentions,
}
OF_ALL = ("shares prefix", "prompts", "full", "LoRA")
MOST_USED = (
    "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen2_5_vl", "internvl-qwen3", "glm4v_moe", "gemma3",
    "gemma4-vision", "minicpmv4_6", "mistral3",
)  # fmt: skip
"""The families that two ranks train, one after the other."""

ATTENDING = (*FAMILIES, *MOST_USED, "kimi_k25", "internvl-gpt_oss", "molmo2", "lfm2_vl")
"""The families whose attention implementations are all run."""

CELLS = [
    (family, column) for family in MODELS for column in COLUMNS
    if column in OF_ALL
    or family in {"2 ranks": (), "attention": ATTENDING}.get(column, FAMILIES)
]  # fmt: skip
END_TOKENS = {
    "</s>", "<|im_end|>", "<end_of_utterance>", "<end_of_turn>", "<turn|>", "<eos>", "<|eot_id|>",
    "<|end_of_sentence|>",
}  # fmt: skip


@pytest.fixture(scope="session")
def cell(tmp_path_factory):
    """Runs a property of a family once per session, for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def run_once(family, column):
        done = folder / f"{column} of {family if isinstance(family, str) else len(family)}"
        if not done.exists():
            found = COLUMNS[column](family)
            with replacing(done) as file:
                file.write(found.encode())
        return done.read_text()

    return run_once


@pytest.mark.parametrize(("family", "column"), CELLS)
def test_a_property_of_a_family(cell, family, column):
    assert cell(family, column)


def test_two_ranks(cell):
    assert cell(MOST_USED, "2 ranks")


@pytest.mark.parametrize("kind", REFUSED)
def test_other_families_are_refused_by_name(kind):
    assert repr(kind) in refusal(kind) or "logit_scale" in refusal(kind)


@pytest.mark.parametrize("column", ["FSDP", "checkpointing"])
def test_varlen_attention_trains_the_same(column):
    assert COLUMNS[column]("llava", "flash")


def test_the_table_in_docs_matches_these_results(cell):
    lines = ["| models | type | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for family, models in MODELS.items():
        cells = [cell(family, name) if (family, name) in CELLS else "" for name in COLUMNS]
        if family in MOST_USED:
            cells[[*COLUMNS].index("2 ranks")] = cell(MOST_USED, "2 ranks")
        kind = CASES[family].kind if family in CASES else family
        lines.append(f"| {models} | `{kind}` | " + " | ".join(cells) + " |")
    lines += ["", "| models | type | refused |", "|---|---|---|"]
    for kind, models in REFUSED.items():
        lines.append(f"| {models} | `{kind}` | {refusal(kind)} |")
    before, begin, rest = DOCS.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    assert begin and end
    text = before + begin + "\n".join(lines) + "\n" + end + after
    if os.environ.get("REALIGN_WRITE_DOCS"):
        DOCS.write_text(text)
    assert DOCS.read_text() == text, "write the table again with REALIGN_WRITE_DOCS=1"
    kinds = {CASES[family].kind if family in CASES else family for family in MODELS}
    assert kinds == layouts.TESTED
