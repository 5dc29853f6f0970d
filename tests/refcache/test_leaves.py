"""Leaves of an objective: token ids, images, log-probs and metrics.

Every preset trains from records that have its fields. For other records, the error names the
missing field.
"""

from dataclasses import fields, replace
from math import factorial, log

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from realign.config import LossConfig, parse
from realign.data.record_table import table_of
from realign.data.records import RecordError, StoredImage, read_pairs, write_pairs
from realign.files import read_jsonl
from realign.modeling.encode import encode_records, make_objective
from realign.modeling.forest import build_batch
from realign.modeling.layouts import Layout
from realign.train import main, train
from realign.training import metrics
from realign_kernels import Objective, PreferenceOutput, leaf_keys, objectives

NEGATIVES = 3


@pytest.fixture(scope="module")
def pairs(pairs_file):
    """Pairs in the format of `realign.pairs`: one retrieved image without a preferred response."""
    return read_pairs(pairs_file)


@pytest.fixture(scope="module")
def rich(pairs):
    """The same pairs with three retrieved images, and a response preferred for the first."""
    made = []
    for i, record in enumerate(pairs):
        others = [pairs[(i + k) % len(pairs)] for k in (5, 9)]
        images = record.retrieved_images + others[0].images + others[1].images
        text = others[0].chosen
        made.append(replace(record, retrieved_images=images, retrieved_chosen=text))
    return made


def encode(records, processor, name, **settings):
    objective = make_objective(LossConfig(objective=name, **settings), table_of(records))
    examples, store = encode_records(
        records,
        processor,
        objective,
        layout=Layout(4),
        max_response_tokens=64,
        max_tokens=512,
        progress=False,
    )
    return objective, examples, store


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_leaves_match_their_names(rich, processor, name):
    objective, examples, store = encode(rich[:3], processor, name)
    for record, example in zip(rich, examples, strict=False):
        texts = {r: getattr(record, r) for r in ("chosen", "rejected", "retrieved_chosen")}
        first = record.images[0].open("r")
        images = {"image": first, "blank_image": Image.new("RGB", first.size, (0, 0, 0))}
        for k, stored in enumerate(record.retrieved_images):
            images["retrieved_image" + (f"_{k + 1}" if k else "")] = stored.open("r")
        assert len(example.roots) == len({leaf.image for leaf in objective.leaves})
        for named, leaf in zip(objective.leaves, example.leaves, strict=True):
            assert processor.decode(leaf.ids) == f"{texts[named.response]} </s>"
            wanted = processor.image_processor(images=[images[named.image]], return_tensors="pt")
            (key,) = example.roots[leaf.root].images
            assert torch.equal(store.bundle(key)["pixel_values"][0], wanted["pixel_values"][0])
            assert leaf.rival == named.rival


SMOOTHED = 1e-3  # of exo_pair
AT_THE_REFERENCE = {  # all log-ratios are 0 there
    "dpo": log(2),
    "rdpo": 1.5 * log(2),
    "mdpo": 2.5 * log(2),
    "mfpo": 2.5 * log(2),
    "svco": 4 * log(2),
    "symmpo": (1 + 0.5 * 2 + 2) * log(2),
    "ovip": 3 * log(2),
    "adavip": log(3),
    "mispdpo": log(2) + log(1 + NEGATIVES),
    "lpoi": 2 * log(2) + 0.5 * log(factorial(NEGATIVES + 1)),
    "chip": log(2),
    "cdpo": log(2),
    "robust": log(2),
    "ipo": 0.25 / 0.2**2,
    "ipo_norm": 0.25 / 0.2**2,
    "hinge": 1.0,
    "sigmoid_norm": log(2),
    "exo_pair": -log(2) - 0.5 * log(SMOOTHED * (1 - SMOOTHED)),
    "nca_pair": 2 * log(2),
    "bco_pair": 2 * log(2),
    "sppo_hard": 2 * 0.25 / 0.2**2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * log(2) + 0.5,
    "rpo": log(2),
    "mpo": (0.8 + 0.2 * 2) * log(2),
    "simpo": 0.0,
    "cpo": 0.0,
    "orpo": 0.0,
    "sft": 0.0,
    "released": 1.5 * log(2),
}


def of_logps(name, logps, counts):
    """The part of a loss that depends on log-probs without a reference, mean over examples."""
    chosen, *_ = means = logps / counts
    sigmoid = torch.nn.functional.logsigmoid
    odds = [p - torch.log1p(-p.exp()) for p in means]
    comparison = {
        "simpo": lambda: -sigmoid(0.2 * (means[0] - means[1]) - 1.0),
        "cpo": lambda: -sigmoid(0.2 * (logps[0] - logps[1])),
        "orpo": lambda: -0.2 * sigmoid(odds[0] - odds[1]),
    }.get(name, lambda: torch.zeros(()))()
    nll = -chosen if name in ("rpo", "mpo", "cpo", "orpo", "sft") else torch.zeros(())
    return (comparison + nll).mean().item()


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_preset_computes_its_loss(rich, processor, forest_model, name):
    weight = {"visual_weight": 0.5} if "visual_weight" in objectives.settings(name) else {}
    weight |= {"beta": 0.2} if name != "sft" else {}
    objective, examples, store = encode(rich[:4], processor, name, **weight)
    assert objective.beta == 0.2 or name == "sft"
    batch = build_batch(examples, store, row_tokens=200)
    with torch.no_grad():
        logps = batch.leaf_sums(forest_model.logps(batch))
        out = forest_model(batch, objective, logps.float())
    assert logps.shape == (len(objective.leaves), 4)
    counts = torch.tensor([[len(leaf.ids) for leaf in e.leaves] for e in examples]).T
    expected = AT_THE_REFERENCE[name] + of_logps(name, logps.double(), counts)
    assert out.loss.item() / 4 == pytest.approx(expected, abs=2e-5)
    reported = metrics.sums(out, objective)
    assert all(value.isfinite() for value in reported.values())
    for leaf, total in zip(metrics.leaf_names(objective), logps.sum(1), strict=True):
        assert reported[f"logps/{leaf}"].item() == pytest.approx(total.item(), rel=1e-5)


def test_an_objective_with_rival_leaves_trains(rich, tmp_path):
    write_pairs(tmp_path / "pairs.parquet", rich)
    words = ["--pairs", str(tmp_path / "pairs.parquet"), "--output", str(tmp_path / "run")]
    words += ["--objective", "released", "--steps", "3", "--quiet"]
    words += ["--batch-size", str(len(rich)), "--micro-batch-size", "8"]
    train(parse(words))
    entries = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert entries[0]["loss"] == pytest.approx(2 * log(2), abs=1e-5)
    assert entries[-1]["loss"] < entries[0]["loss"]


def test_blank_images_are_keyed_by_their_size(rich, processor):
    """A blank image has the size of its record's image."""
    small = rich[0]
    image = small.images[0].open("r")
    large = replace(small, images=(StoredImage.from_pil(image.resize((40, 24))),))
    _, examples, store = encode([small, large, rich[1]], processor, "ovip")
    blanks = [example.roots[1].images for example in examples]
    assert blanks[0] == blanks[2] != blanks[1]
    assert len(store) == 3 + 2 + 2  # ovip lists image, blank_image and retrieved_image


REFUSED = [
    ("svco", {"retrieved_chosen": ""}, "'svco' needs 'retrieved_chosen' but the record has none. "
     "Add a column `retrieved_chosen`, the response preferred for the retrieved image"),
    ("symmpo", {"retrieved_chosen": ""}, "'symmpo' needs 'retrieved_chosen'"),
    ("ovip", {"retrieved_images": ()}, "'ovip' needs 'retrieved_image' but the record has none. "
     "Add `retrieved_images`"),
    ("lpoi", {"retrieved_images": 1}, "it has 1 visual negative.s.; the objective 'lpoi' compares "
     "several. List two or more in `retrieved_images`, nearest first"),
    ("mispdpo", {"retrieved_images": 0}, "it has 0 visual negative.s.; the objective 'mispdpo'"),
    ("mispdpo", {"retrieved_images": 2}, "it has 2 visual negatives and 'scene-.*' has 3; the "
     "objective 'mispdpo' needs the same number in all"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_a_missing_field_is_named(rich, processor, name, changes, message):
    if isinstance(count := changes.get("retrieved_images"), int):
        changes = {"retrieved_images": rich[1].retrieved_images[:count]}
    bad = replace(rich[1], name="odd", **changes)
    with pytest.raises(RecordError, match=message) as error:
        encode([rich[0], bad], processor, name)
    assert error.value.record == "odd"


def test_a_missing_field_is_one_line_of_the_trainer(pairs_file, tmp_path, capsys):
    for name, field in (("svco", "retrieved_chosen"), ("lpoi", "retrieved_images")):
        words = ["--pairs", str(pairs_file), "--output", str(tmp_path), "--objective", name]
        assert main([*words, "--quiet"]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: record 'scene-") and shown.count("\n") == 1
        assert f"`{field}`" in shown


def test_retrieved_images_come_in_groups(rich, processor):
    """With two images in the prompt, every visual negative has two images."""
    prompt = ({"role": "user", "content": [{"type": "image"}] * 2},)
    six = tuple(record.images[0] for record in rich[:6])
    record = replace(rich[0], prompt=prompt, images=six[:2], retrieved_images=six[2:])
    objective, (example,), _ = encode([record], processor, "mispdpo")
    assert len(objective.leaves) == 4
    keys = [example.roots[leaf.root].images for leaf in example.leaves]
    assert [len(group) for group in keys] == [2] * 4
    assert len({*keys[0], *keys[2], *keys[3]}) == 6
    odd = replace(record, retrieved_images=six[1:])
    with pytest.raises(RecordError, match="5 retrieved images for 2 images. For each visual neg"):
        encode([odd], processor, "rdpo")


def test_an_unknown_image_is_named(rich, processor):
    limits = {"layout": Layout(4), "max_response_tokens": 64, "max_tokens": 512, "progress": False}
    for name in ("cropped_image", "retrieved_image_0", "retrieved_image_1"):
        leaves = (objectives.CHOSEN, objectives.Leaf("chosen", name))
        odd = Objective("odd", leaves, objectives.dpo().terms)
        with pytest.raises(RecordError, match=f"'odd' needs an image '{name}'. Records hold"):
            encode_records(rich[:1], processor, odd, **limits)
    too_few = "'lpoi' needs 'retrieved_image_4' but the record has 3 retrieved image.s.. Add"
    with pytest.raises(RecordError, match=too_few):
        encode_records(rich[:1], processor, objectives.lpoi(negatives=4), **limits)


def test_records_keep_the_response_for_the_retrieved_image(rich, pairs, tmp_path):
    one = replace(rich[1], retrieved_chosen="")
    write_pairs(tmp_path / "rich.parquet", [rich[0], one])
    assert read_pairs(tmp_path / "rich.parquet") == [rich[0], one]
    write_pairs(tmp_path / "plain.parquet", pairs[:2])
    assert "retrieved_chosen" not in pq.read_schema(tmp_path / "plain.parquet").names
    rows = pq.read_table(tmp_path / "rich.parquet").to_pylist()
    assert rows[0]["retrieved_chosen"] == [
        {"role": "assistant", "content": rich[0].retrieved_chosen}
    ]
    datasets = pytest.importorskip("datasets")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "rich.parquet"))
    assert loaded[0]["retrieved_chosen"][0]["content"] == rich[0].retrieved_chosen


NAMES = {
    "rdpo": ["chosen", "rejected", "visual"],
    "lpoi": ["chosen", "rejected", "visual", "visual_2", "visual_3", "visual_4"],
    "ovip": ["chosen", "rejected", "chosen_under_blank_image", "visual"],
    "released": ["chosen", "rejected_rival", "visual_rival"],
    "symmpo": [
        "chosen",
        "rejected",
        "retrieved_chosen_under_image",
        "retrieved_chosen_under_retrieved_image",
        "visual",
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_metric_names(name):
    objective = objectives.get(name)
    assert metrics.leaf_names(objective) == NAMES[name]
    rewards = torch.arange(len(NAMES[name]) * 2.0).view(-1, 2).flip(0)
    blank, losses = torch.zeros(2), torch.zeros(len(objective.terms), 2)
    out = PreferenceOutput(blank.sum(), rewards, rewards, None, losses)
    found = metrics.sums(out, objective)
    margins = {key.removeprefix("rewards/") for key in found if key.endswith("margins")}
    compared = {"rejected": "margins", "visual": "visual_margins"}
    compared |= {f"visual_{k}": f"visual_{k}_margins" for k in (2, 3, 4)}
    assert margins == {compared[n] for n in NAMES[name] if n in compared}
    for place, leaf in enumerate(NAMES[name]):
        if leaf in compared:
            assert found[f"rewards/{compared[leaf]}"].item() == 4 * place  # 2 more for each leaf
            share = f"rewards/{compared[leaf].replace('margins', 'accuracies')}"
            assert found[share].item() == 2


def test_a_rival_leaf_is_marked_and_has_a_key_of_its_own(rich, processor):
    _, plain, store = encode(rich[:4], processor, "rdpo")
    _, rival, _ = encode(rich[:4], processor, "released")
    assert build_batch(plain, store, row_tokens=200).rival is None
    batch = build_batch(rival, store, row_tokens=200)
    assert torch.equal(batch.rival, batch.sequence_ids >= 4)  # rejected and visual
    assert torch.equal(batch.to("cpu").rival, batch.rival)
    same = build_batch(plain, store, row_tokens=200)
    for field in fields(batch):
        if isinstance(value := getattr(batch, field.name), torch.Tensor) and field.name != "rival":
            assert torch.equal(value, getattr(same, field.name)), field.name
    keys = leaf_keys([*plain, *rival]).view("u8").reshape(8, 3, 2)[..., 0]
    assert (keys[:4, 0] == keys[4:, 0]).all()
    assert not set(keys[:4, 1:].flat) & set(keys[4:, 1:].flat)


def test_released_scores_the_strongest_other_token(rich, processor, vlm, forest_model):
    """Compares with the authors' rule for one sequence: top-1, or top-2 if top-1 is the label."""
    _, examples, store = encode(rich[:3], processor, "released")
    with torch.no_grad():
        batch = build_batch(examples, store, row_tokens=200)
        found = batch.leaf_sums(forest_model.logps(batch))
        for column, example in enumerate(examples):
            for row, leaf in enumerate(example.leaves):
                root = example.roots[leaf.root]
                ids = torch.tensor(np.concatenate([root.ids, leaf.ids]))[None]
                pixels = torch.stack([store.bundle(key)["pixel_values"][0] for key in root.images])
                logits = vlm(input_ids=ids, pixel_values=pixels).logits[0, len(root.ids) - 1 : -1]
                logps, labels = logits.double().log_softmax(-1), ids[0, len(root.ids) :]
                (best, second), (top, _) = (t.T for t in logps.topk(2))
                other = torch.where(top == labels, second, best)
                label = logps.gather(1, labels[:, None])[:, 0]
                expected = (other if leaf.rival else label).sum()
                assert found[row, column].item() == pytest.approx(expected.item(), abs=5e-5)
