"""Records without an image beside others: log-probs, gradients, ranks and the start-up check."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from family_cases import (
    CPU,
    LOGP_TOLERANCE,
    OBJECTIVE,
    assert_same_gradients,
    encoded,
    gradients,
    lines,
    made,
    truth,
)
from forked_ranks import run_ranks
from runs import arguments, run
from text_only_ranks import run_all
from tiny_vlms import make

from realign.config import LossConfig
from realign.data.errors import RecordError
from realign.data.record_table import table_of
from realign.data.records import Record, read_pairs, write_pairs
from realign.files import read_jsonl
from realign.modeling.encode import encode_table, make_objective
from realign.modeling.forest import build_batch
from realign.modeling.images import ImageStore
from realign.modeling.model import ForestModel
from realign_kernels import objectives

FAMILIES = (
    "llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "gemma3",
    "gemma4-vision",
    "minicpmv4_6",
    "ernie4_5_vl_moe",
    "molmo2",
)
DPO = objectives.dpo(beta=0.3)
SYSTEM = {"role": "system", "content": "the small blue bar"}
TEXTS = (
    ({"role": "user", "content": "one two of the dot"},),
    (
        SYSTEM,
        {"role": "user", "content": "is a red bar"},
        {"role": "assistant", "content": "four of the dot"},
        {"role": "user", "content": "and of three"},
    ),
)


@functools.cache
def mixed(family):
    """Records with one image, none, several, and none."""
    images = made(family)[1]
    texts = [
        Record(f"text {i}", prompt, "red bar of the dot", f"{'blue ' * (i + 1)}bar", ())
        for i, prompt in enumerate(TEXTS)
    ]
    return [images[0], texts[0], images[-1], texts[1]]


def dpo_loss(sums, rows=slice(None)):
    """The loss of (2, B) log-probs of these records, with references that differ."""
    chosen, rejected = 0.3 * (sums - references(4)[:, rows].double())
    return -F.logsigmoid(chosen - rejected).sum()


def references(count):
    return -10 + torch.arange(2.0 * count).view(2, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_plain_forwards(family, monkeypatch):
    vlm, _ = make(family)
    model = ForestModel(vlm).train()
    records = mixed(family)
    examples, store = encoded(family, model, DPO, records)
    assert [bool(example.roots[0].images) for example in examples] == [True, False] * 2
    plain = make(family)[0]
    ForestModel(plain).train()  # freezes the tower
    true = truth(plain, family, examples, DPO, records)
    dpo_loss(true).backward()
    for row_tokens in (1, 4096):
        batch = build_batch(examples, store, row_tokens=row_tokens)
        with torch.no_grad():
            found = batch.leaf_sums(model.logps(batch))
        assert (found - true).abs().max() < LOGP_TOLERANCE
    model(batch, DPO, references(4)).loss.backward()
    assert assert_same_gradients(gradients(vlm), gradients(plain)) > 8
    monkeypatch.setattr(vlm.model, "get_image_features", lambda *_, **__: pytest.fail("called"))
    batch = build_batch([examples[1], examples[3]], store, row_tokens=4096)
    assert batch.images is None and not batch.slots
    with torch.no_grad():
        found = batch.leaf_sums(model.logps(batch))
    assert (found - true[:, 1::2]).abs().max() < LOGP_TOLERANCE


def test_ranks_without_an_image_train_as_the_others(tmp_path, pairs_file):
    """One of two ranks has records without an image only, then both. Then `realign.train` runs."""
    records = read_pairs(pairs_file)[:3]
    texts = [replace(r, name=f"text {r.name}", images=(), retrieved_images=()) for r in records]
    write_pairs(tmp_path / "mixed.parquet", [*records, *texts])
    given = ["--objective", "dpo", "--tune", "full", "--batch-size", 2, "--micro-batch-size", 1]
    given += ["--reference-cache", tmp_path / "cache"]
    words = arguments(tmp_path / "mixed.parquet", tmp_path / "two", *given, "--fsdp", steps=6)
    families = ("llava", "minicpmv4_6", "ernie4_5_vl_moe")
    output = run_ranks(run_all, 2, tmp_path / "log", families, words)
    for family in families:
        assert f"compared {family}: True" in output, output
    one = run(tmp_path / "mixed.parquet", tmp_path / "one", *given[:-1], tmp_path / "other")
    for entry, other in zip(read_jsonl(tmp_path / "two" / "metrics.jsonl"), one, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert entry[name] == pytest.approx(other[name], abs=1e-5, rel=1e-4), name


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_start_up_check_has_a_record_without_an_image(family, monkeypatch):
    model = ForestModel(make(family)[0]).eval()
    checked = []
    plain = model.plain_logits
    monkeypatch.setattr(model, "plain_logits", lambda x: checked.append(x) or plain(x))
    for records, count in ((mixed(family)[::2], 2), (mixed(family), 3)):
        examples, store = encoded(family, model, DPO, records)
        assert lines(model, examples, store) == []
        checked.clear()
        list(model.check_forest(examples[0], store, CPU))
        images = [any("pixel" in name for name in inputs) for inputs in checked]
        assert images == [True, True, False][:count] + [True]  # rounding is measured once more


def test_the_check_catches_wrong_positions_without_an_image(monkeypatch):
    model = ForestModel(make("qwen2_5_vl")[0]).eval()
    examples, store = encoded("qwen2_5_vl", model, DPO, mixed("qwen2_5_vl"))
    right = type(model.layout).positions

    def wrong(self, ids, grids, columns):
        return right(self, ids, grids, columns) + (0 if grids else 1)

    monkeypatch.setattr(type(model.layout), "positions", wrong)
    (line,) = lines(model, examples, store)
    assert "own copy of the prompt: positions differ" in line


def table_and_examples(family, records, objective, log):
    model, processor = ForestModel(make(family)[0]), make(family)[1]
    table = table_of(records)
    examples = encode_table(
        table,
        processor,
        objective,
        layout=model.layout,
        max_response_tokens=64,
        max_tokens=512,
        progress=False,
        log=log,
    )
    return table, examples, ImageStore(processor, model.layout, examples)


def test_records_without_an_image_are_skipped_with_a_count_where_one_is_needed():
    records = [mixed("llava")[i] for i in (1, 0, 3, 2)]
    names = [record.name for record in records]
    for family, objective, kept, line in (
        ("llava", DPO, names, "2 of 4 records have no image, and are trained as text"),
        ("llava", OBJECTIVE, names[1::2],
         "skipped 2 of 4 records, which have no image. The objective 'rdpo' compares images. "
         "Objectives without a visual term, such as dpo, take these records too."),
        ("paligemma", DPO, names[1::2],
         "skipped 2 of 4 records, which have no image. PaliGemmaProcessor takes no prompt without "
         "an image (ValueError: `images` are expected as arguments to a `PaliGemmaProcessor` "
         "instance.)."),
    ):  # fmt: skip
        logged = []
        mine = records[:]
        if family == "paligemma":
            mine[1::2] = [
                replace(r, name=n) for r, n in zip(made(family)[1][:2], names[1::2], strict=True)
            ]
        _, examples, store = table_and_examples(family, mine, objective, logged.append)
        assert [example.name for example in examples] == kept and logged == [line]
        for example in examples:
            for root in example.roots:
                assert set(root.images) <= set(store.keys())
        wanted = {r.name: r.images for r in mine}
        for place, example in enumerate(examples):
            chunk = examples.chunks[0]
            row = chunk.table[chunk.row(place)]
            assert row.name == example.name and len(row.images) == len(wanted[row.name])


def test_only_records_without_an_image(monkeypatch):
    records = mixed("llava")[1::2]
    _, examples, store = table_and_examples("llava", records, DPO, lambda line: None)
    assert len(store) == 0 and store.first() is None and store.spare is None
    with pytest.raises(RecordError, match="'text 0': it has no image, and neither .* of 2 records"):
        table_and_examples("llava", records, OBJECTIVE, print)
    loss = LossConfig(objective="mdpo")
    assert make_objective(loss, table_of(records)).name == "mdpo"


def test_visual_negatives_are_counted_in_records_with_an_image():
    first, text = made("llava")[1][0], mixed("llava")[1]
    several = replace(first, retrieved_images=first.retrieved_images * 2)
    names = [n for n in objectives.PRESETS if "negatives" in objectives.settings(n)]
    loss = LossConfig(objective=names[0])
    assert make_objective(loss, table_of([text, several])).leaves
    with pytest.raises(RecordError, match=f"{first.name!r}: it has 1 visual negative"):
        make_objective(loss, table_of([text, first]))


@pytest.mark.parametrize(
    "text", ["<video>\nWhat is it?", "<|vision_start|><|video_pad|><|vision_end|> one", "<|video|>"]
)
def test_a_video_tag_is_refused_by_name(text):
    model = ForestModel(make("llava")[0])
    record = mixed("llava")[1]
    for changed, where in (
        (replace(record, prompt=({"role": "user", "content": text},)), "prompt"),
        (replace(record, chosen=text), "chosen response"),
    ):
        with pytest.raises(RecordError, match=f"'text 0': its {where} .*videos are not supported"):
            encoded("llava", model, DPO, [changed])


def test_a_video_part_of_a_record_is_no_image():
    part = [{"type": "video"}, {"type": "text", "text": "one"}]
    record = replace(mixed("llava")[0], prompt=({"role": "user", "content": part},))
    with pytest.raises(RecordError, match="Videos are not supported"):
        encoded("llava", ForestModel(make("llava")[0]), DPO, [record])
