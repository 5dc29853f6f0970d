"""--reference-model: log-probs of another model, its order in memory, and refusals."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from forked_ranks import run_command, run_ranks
from runs import arguments, assert_same_curves, curve, encoded, run

from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.files import read_jsonl
from realign.modeling.loading import load_model, load_processor
from realign.train import main
from realign.training import setup


def plain_logps(model, pairs_file):
    """Log-probs of chosen and rejected responses by plain forwards, (2, records)."""
    processor, model = load_processor(ASSETS), load_model(model).eval()
    records = read_pairs(pairs_file)
    examples, _ = encoded(records)
    found = []
    with torch.no_grad():
        for record, example in zip(records, examples, strict=True):
            pixels = processor.image_processor(record.images[0].open("x"), return_tensors="pt")
            sums = []
            for leaf in example.leaves[:2]:
                prompt = example.roots[leaf.root].ids
                ids = torch.from_numpy(np.concatenate([prompt, leaf.ids])).long()[None]
                logits = model(input_ids=ids, pixel_values=pixels["pixel_values"]).logits
                logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                sums.append(float(logps.gather(1, ids[0, len(prompt) :, None]).sum()))
            found.append(sums)
    return np.array(found).T


def test_rewards_are_relative_to_a_plain_forward_of_the_other_model(
    other, pairs_file, tmp_path, capsys
):
    count = len(read_pairs(pairs_file))
    given = ("--reference-model", other["merged"], "--batch-size", count)
    first = run(pairs_file, tmp_path / "merged", *given, steps=1)[0]
    ours, theirs = (plain_logps(model, pairs_file) for model in (ASSETS, other["merged"]))
    chosen, rejected = 0.1 * (ours - theirs).mean(1)
    assert first["rewards/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert first["rewards/rejected"] == pytest.approx(rejected, abs=1e-4)
    assert abs(rejected) > 1e-3
    given = ("--reference-model", other["adapter"], "--batch-size", count)
    again = run(pairs_file, tmp_path / "adapter", *given, steps=1)[0]
    assert again["rewards/chosen"] == pytest.approx(chosen, abs=1e-3)
    out = capsys.readouterr().out
    assert f"references are those of {other['merged']}: llava, weights " in out
    card = (tmp_path / "merged/model/README.md").read_text()
    assert "| reference | model |" in card and "Digest of the reference weights: `" in card


def test_the_cache_is_that_of_runs_that_start_from_the_other_model(
    other, pairs_file, tmp_path, capsys, monkeypatch
):
    cache = ("--reference-cache", tmp_path / "cache")
    run(pairs_file, tmp_path / "from", "--model", other["merged"], *cache, steps=1)
    capsys.readouterr()
    given = ("--reference-model", other["merged"], *cache)
    run(pairs_file, tmp_path / "to", *given, steps=1)
    words = capsys.readouterr().out.split(" leaves known")[0].split()
    assert words[-1] == words[-3] != "0"
    # Everything is known now, so the reference is not loaded again.
    loaded, load = [], setup.load_model

    def noted(path, *more, meta=False, **options):
        loaded.append(str(path)) if not meta else None
        return load(path, *more, meta=meta, **options)

    monkeypatch.setattr(setup, "load_model", noted)
    run(pairs_file, tmp_path / "again", *given, steps=1)
    assert loaded == [str(ASSETS)]
    plan = [*arguments(pairs_file, tmp_path / "plan"), *map(str, given), "--dry-run"]
    assert main(plan) == 0
    assert f", of {other['merged']}" in capsys.readouterr().out


def test_the_two_models_are_never_in_memory_together(other, pairs_file, tmp_path, monkeypatch):
    alive, seen, load = [], [], setup.load_model

    def noted(path, *more, meta=False, **options):
        if not meta:
            seen.append([one() is not None for one in alive])
        model = load(path, *more, meta=meta, **options)
        if not meta:
            alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(setup, "load_model", noted)
    gc.unfreeze()  # undoes the freeze of tests/conftest.py
    cache = ("--reference-cache", tmp_path / "cache", "--dtype", "bf16")
    run(pairs_file, tmp_path / "run", "--reference-model", other["adapter"], *cache, steps=1)
    assert seen == [[], [False]]


def test_a_changed_file_is_digested_again(other, pairs_file, tmp_path):
    """The digest of weights is remembered for unchanged files only."""
    folder = tmp_path / "reference"
    shutil.copytree(other["merged"], folder)
    given = ("--reference-model", folder)
    digests = []
    for name, model in (("one", "merged"), ("two", None)):
        if model is None:
            shutil.copy(ASSETS / "model.safetensors", folder / "model.safetensors")
        run(pairs_file, tmp_path / name, *given, steps=1)
        digests.append(json.loads((tmp_path / name / "run.json").read_text())["reference"])
    assert digests[0] != digests[1]


def test_two_ranks_and_full_training_have_the_same_curve(other, pairs_file, tmp_path):
    given = ("--reference-model", other["merged"], "--tune", "full")
    one = run(pairs_file, tmp_path / "one", *given, steps=2)
    cache = ("--reference-cache", tmp_path / "cache", "--micro-batch-size", 4)
    words = arguments(pairs_file, tmp_path / "two", "--fsdp", *given, *cache, steps=2)
    shown = run_ranks(run_command, 2, str(tmp_path / "log"), "realign.train", words)
    assert "reference log-probs: 0 of " in shown
    assert_same_curves(read_jsonl(tmp_path / "two" / "metrics.jsonl"), one)


def test_quantization_applies_to_both_models(other, pairs_file, tmp_path):
    """With the policy's own weights as the reference, rewards start at zero."""
    given = ("--reference-model", ASSETS, "--quantize", "8bit")
    first = run(pairs_file, tmp_path / "same", *given, steps=1)[0]
    assert first["rewards/margins"] == first["rewards/chosen"] == 0
    with pytest.raises(ValueError, match="is an adapter, and merging it needs the weights that"):
        given = ("--reference-model", other["adapter"], "--quantize", "8bit")
        run(pairs_file, tmp_path / "adapter", *given, steps=1)


def test_resuming_needs_the_same_reference(other, pairs_file, tmp_path):
    run(pairs_file, tmp_path, "--reference-model", other["merged"], "--save-every", 1, steps=1)
    copy = tmp_path / "elsewhere"
    shutil.copytree(other["merged"], copy)
    for more in ((), ("--reference-model", ASSETS)):
        with pytest.raises(ValueError, match=r"Changed: the reference\."):
            run(pairs_file, tmp_path, *more, "--save-every", 1, "--resume", steps=1)
    given = ("--reference-model", copy, "--save-every", 1, "--resume")
    assert curve(run(pairs_file, tmp_path, *given, steps=1), "step").tolist() == [1]


def changed_mean(folder):
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    file.write_text(json.dumps(content))


def changed_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + "{{ 'a' }}")


def changed_vocabulary(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    one, two = "one", "two"
    words[one], words[two] = words[two], words[one]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (changed_mean, "image processor"),
        (changed_template, "chat template"),
        (changed_vocabulary, "vocabulary"),
    ],
)
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
def test_another_encoding_is_refused_before_weights_are_read(
    change, part, dry, pairs_file, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "other"
    shutil.copytree(ASSETS, folder)
    change(folder)
    (folder / "model.safetensors").write_bytes(b"not read" * 1000)
    given = [*arguments(pairs_file, tmp_path / "run"), "--reference-model", str(folder)]
    assert main([*given, *["--dry-run"] * dry]) == 1
    message = capsys.readouterr().err
    what = "images" if part == "image processor" else "record '"
    assert f"--reference-model {folder} encodes {what}" in message
    assert f"they differ in {part}" in message and "Use a reference with the same" in message
