"""Visual margins: correct values, computed once, and found in the cache by training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from realign.config import LossConfig
from realign.data.records import Record, RecordError, StoredImage, write_pairs
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, caption_of, make_scenes
from realign.modeling import reference_logps
from realign.modeling.loading import DTYPES, load_model, load_processor
from realign.pairs.filters import margin
from realign.pairs.filters.margin import visual_margins
from realign.training.setup import load_inputs
from realign_kernels import ReferenceCache

PROMPT = ({"role": "user", "content": CAPTION_PROMPT},)
SCENES = make_scenes(24, biased=False, seed=5)


def record(i, shown=None, chosen=None) -> Record:
    """A record with the true caption of a scene, and the next scene as visual negative."""
    other = SCENES[(i + 1) % len(SCENES)] if shown is None else shown
    return Record(
        f"scene-{i}",
        PROMPT,
        chosen or SCENES[i].caption,
        "",
        (StoredImage.from_pil(SCENES[i].image),),
        (StoredImage.from_pil(other.image),),
    )


@torch.no_grad()
def plain_logp(vlm, processor, image, text) -> float:
    """Log-prob of a response with its end token, from one forward pass over the whole text."""
    prompt = f"<s> user : <image> {CAPTION_PROMPT} assistant :"
    made = processor(
        images=[[image]],
        text=[f"{prompt} {text} </s>"],
        add_special_tokens=False,
        return_tensors="pt",
    )
    ids = made["input_ids"][0]
    length = len(text.split()) + 1
    logps = vlm(**made).logits[0, -length - 1 : -1].double().log_softmax(-1)
    return float(logps.gather(1, ids[-length:, None]).sum())


def test_margins_are_those_of_plain_forwards(vlm, processor, tmp_path):
    records = [record(i) for i in range(10)]
    found = visual_margins(vlm, processor, records, cache=str(tmp_path))
    assert found.shape == (10,) and found.dtype == np.float64
    for i, one in enumerate(records):
        own, other = (plain_logp(vlm, processor, SCENES[i + j].image, one.chosen) for j in (0, 1))
        assert found[i] == pytest.approx(own - other, abs=1e-4)
    # The model reads digits, so a true caption is more likely on its own image.
    assert (found > 0).mean() >= 0.9 and found.mean() > 5


def test_a_response_that_fits_the_negative_better_is_reported(vlm, processor, tmp_path):
    swapped = record(0, shown=SCENES[3], chosen=SCENES[3].caption)
    same = record(1, shown=SCENES[1])
    found = visual_margins(vlm, processor, [swapped, same, record(2)], cache=str(tmp_path))
    assert found[0] < -5 and found[1] == 0 and found[2] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_finds_what_margins_computed(dtype, tmp_path, monkeypatch):
    kind, counted, lines = DTYPES[dtype], [], []
    build = reference_logps.build_batch

    def counting(examples, store, **options):
        counted.extend(leaf for example in examples for leaf in example.leaves)
        return build(examples, store, **options)

    monkeypatch.setattr(reference_logps, "build_batch", counting)
    records = [record(i) for i in range(6)]
    given = {"cache": str(tmp_path / "cache"), "log": lines.append}
    vlm, processor = load_model(ASSETS, kind).eval(), load_processor(ASSETS)
    first = visual_margins(vlm, processor, records, **given)
    assert len(counted) == 12
    # A second call computes nothing, with the same model and with a reloaded one.
    again = visual_margins(vlm, processor, records, **given)
    reloaded = visual_margins(load_model(ASSETS, kind).eval(), processor, records, **given)
    assert len(counted) == 12
    assert np.array_equal(first, again) and np.array_equal(first, reloaded)
    assert lines[0].startswith("reference log-probs: 0 of 12 leaves known")
    assert lines[-1].startswith("reference log-probs: 12 of 12 leaves known")
    # Training loads the model and records separately. It lacks only the rejected log-probs.
    wrong = caption_of((1, 2, 3, 4))
    pairs = tmp_path / "pairs.parquet"
    write_pairs(pairs, [replace(one, rejected=wrong) for one in records])
    inputs = load_inputs(
        ASSETS,
        pairs,
        LossConfig(),
        dtype=kind,
        weights_dtype=kind,
        train_vision=False,
        max_response_tokens=64,
        progress=False,
    )
    inputs.model.eval()
    fingerprint = reference_logps.fingerprint(
        inputs.model.vlm, inputs.processor, kind, torch.device("cpu")
    )
    with ReferenceCache.open(tmp_path / "cache", fingerprint) as table:
        missing = table.missing(inputs.examples).reshape(6, 3)
        assert missing.tolist() == [[False, True, False]] * 6  # chosen, rejected, visual
        logps = reference_logps.fill(
            table,
            inputs.model,
            inputs.examples,
            inputs.store,
            row_tokens=inputs.examples.longest_tree,
            batch_rows=8,
            device=torch.device("cpu"),
            progress=False,
            log=lambda line: None,
        )
    assert len(counted) <= 12 + 18  # it may repeat log-probs of the same batch
    assert np.array_equal((logps[0] - logps[2]).numpy(), first)


def test_a_later_shard_passes_images_as_the_check_decided(vlm, processor, tmp_path, monkeypatch):
    def one_image_a_call(model, *given):
        model.layout.one_by_one = True
        return iter(())

    calls = []

    def counted(model, batch, right=margin.ForestModel.logps):
        calls.append(len(batch.images.calls))
        return right(model, batch)

    monkeypatch.setattr(margin, "_fingerprints", {})
    monkeypatch.setattr(margin.ForestModel, "check_forest", one_image_a_call)
    monkeypatch.setattr(margin.ForestModel, "logps", counted)
    for start in (0, 4):
        records = [record(i) for i in range(start, start + 4)]
        visual_margins(vlm, processor, records, cache=str(tmp_path), log=lambda line: None)
    assert len(calls) >= 2 and min(calls) > 1


def test_bad_records_are_listed_and_the_others_computed(vlm, processor, tmp_path, monkeypatch):
    records = [record(i) for i in range(5)]
    opened, plain = [], StoredImage.open
    monkeypatch.setattr(
        StoredImage, "open", lambda self, name: (opened.append(name), plain(self, name))[1]
    )
    broken = StoredImage(b"no image", None)
    records[1] = replace(records[1], retrieved_images=(broken,))
    records[3] = replace(records[3], retrieved_images=())
    listed: list[tuple[str, str]] = []
    found = visual_margins(
        vlm,
        processor,
        records,
        cache=str(tmp_path),
        on_bad=lambda one, error: listed.append((one.name, str(error))),
    )
    # Each usable record has two images, which are decoded once.
    assert opened == [f"scene-{i}" for i in (0, 0, 2, 2, 4, 4)]
    assert [math.isnan(value) for value in found] == [False, True, False, True, False]
    assert [name for name, _ in listed] == ["scene-1", "scene-3"]
    assert "cannot be read" in listed[0][1] and "has none" in listed[1][1]
    good = [records[i] for i in (0, 2, 4)]
    assert np.array_equal(
        found[[0, 2, 4]], visual_margins(vlm, processor, good, cache=str(tmp_path))
    )
    with pytest.raises(RecordError, match="'scene-1'"):
        visual_margins(vlm, processor, records, cache=str(tmp_path))
    every = visual_margins(
        vlm, processor, records[1:2], cache=str(tmp_path), on_bad=lambda *_: None
    )
    assert np.isnan(every).all()


def test_no_records_and_the_model_as_it_was(processor, tmp_path):
    vlm = load_model(ASSETS)
    vlm.train()
    assert visual_margins(vlm, processor, [], cache=str(tmp_path)).shape == (0,)
    assert vlm.training
    visual_margins(vlm, processor, [record(0)], cache=str(tmp_path))
    assert vlm.training
    count = len(margin._fingerprints)
    del vlm
    # The stored fingerprint does not keep the model alive.
    assert len(margin._fingerprints) == count - 1
