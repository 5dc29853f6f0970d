"""Runs on records with and without an image: train, its plan, the cache and RDPOTrainer."""

from dataclasses import replace

import datasets
import pytest
import torch
from hf_runs import config
from runs import arguments, encoded, run, without_timing
from tiny_truth import separate_logps

from realign import cache
from realign.data.records import read_pairs, write_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer
from realign.modeling.chat import ChatTemplate, TextInputs
from realign.modeling.loading import load_model, load_processor
from realign.train import main
from realign_kernels import objectives

DPO = ("--objective", "dpo")


@pytest.fixture(scope="module")
def files(pairs_file, tmp_path_factory):
    """The pairs with images only, with four others among them, and these others."""
    folder = tmp_path_factory.mktemp("text")
    with_images = read_pairs(pairs_file)[:8]
    texts = [
        replace(record, name=f"text {i}", images=(), retrieved_images=())
        for i, record in enumerate(with_images[:4])
    ]
    mixed = [record for pair in zip(texts, with_images, strict=False) for record in pair]
    found = {"images": with_images, "mixed": mixed + with_images[4:], "texts": texts}
    for name, records in found.items():
        write_pairs(folder / f"{name}.parquet", records)
    return {name: folder / f"{name}.parquet" for name in found}


def true_references(records):
    """(2, B) log-probs of the shipped model, by plain forwards over the processor's output."""
    vlm, processor = load_model(ASSETS).eval(), load_processor(ASSETS)
    rows = []
    examples, _ = encoded(records, objective=objectives.dpo())
    for record, example in zip(records, examples, strict=True):
        text = ChatTemplate(processor).prompt(record.prompt, len(record.images)).text
        images = {"images": [image.open("") for image in record.images]} if record.images else {}
        inputs = processor(**images, return_tensors="pt", **TextInputs(processor)([text]))
        with torch.no_grad():
            logps = separate_logps(vlm, dict(inputs), [leaf.ids for leaf in example.leaves])
        rows.append(torch.stack([one.sum() for one in logps]))
    return torch.stack(rows, 1)


def test_both_kinds_of_records_train_and_are_planned(files, tmp_path, capsys):
    whole = run(files["mixed"], tmp_path / "whole", *DPO, "--batch-size", 4, steps=3)
    line = "4 of 12 records have no image, and are trained as text"
    assert line in capsys.readouterr().out
    # Micro-batches of one record have no image, or one.
    single = ("--batch-size", 4, "--micro-batch-size", 1)
    split = run(files["mixed"], tmp_path / "single", *DPO, *single, steps=3)
    for one, other in zip(whole, split, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5)
    capsys.readouterr()
    for name, images in (("mixed", 8), ("texts", 0)):
        words = arguments(files[name], tmp_path / "plan", *DPO, *single, "--dry-run")
        assert main(words) == 0
        plan = capsys.readouterr().out
        assert f"{12 if images else 4}, {images} distinct images" in " ".join(plan.split())


def test_only_text_trains_and_the_cache_fills(files, tmp_path, capsys):
    entries = run(files["texts"], tmp_path / "run", *DPO, "--batch-size", 2, "--lora-rank", 2)
    assert entries[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and len(entries) == 6
    capsys.readouterr()
    words = ["fill", "--pairs", str(files["mixed"]), "--reference-cache", str(tmp_path / "cache")]
    assert cache.main([*words, *DPO, "--quiet"]) == 0
    assert "4 of 12 records have no image, and are trained as text" in capsys.readouterr().out
    assert cache.main([*words, "--quiet"]) == 0
    assert "skipped 4 of 12 records, which have no image" in capsys.readouterr().out
    words[2] = str(files["texts"])
    assert cache.main([*words, "--quiet"]) == 1
    assert "neither has any other of 4 records" in capsys.readouterr().err


def test_an_objective_with_a_visual_term_trains_on_the_others(files, tmp_path, capsys):
    found = run(files["mixed"], tmp_path / "mixed", steps=2)
    assert "skipped 4 of 12 records, which have no image" in capsys.readouterr().out
    expected = run(files["images"], tmp_path / "images", steps=2)
    assert without_timing(found) == without_timing(expected)


@pytest.mark.parametrize("form", ["path", "rows", "datasets", "records"])
def test_every_form_of_rows_reaches_the_trainer(form, files, tmp_path, capsys):
    records = read_pairs(files["mixed"])
    rows = [
        {
            "id": record.name,
            "prompt": list(record.prompt),
            "chosen": record.chosen,
            "rejected": record.rejected,
            "images": [image.open("") for image in record.images],
        }
        for record in records
    ]
    given = {
        "path": lambda: str(files["mixed"]),
        "rows": lambda: rows,
        "datasets": lambda: datasets.Dataset.from_list(rows),
        "records": lambda: records,
    }[form]()
    settings = config(tmp_path, objective="dpo", max_steps=2, disable_tqdm=False)
    trainer = RDPOTrainer(str(ASSETS), settings, given)
    assert "4 of 12 records have no image" in capsys.readouterr().out
    assert [example.name for example in trainer.examples] == [r.name for r in records]
    trainer.train()
    assert (trainer.references - true_references(records)).abs().max() < 1e-3
