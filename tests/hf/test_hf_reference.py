"""RDPOConfig.reference_model: references of another model, their place in memory, and refusals."""

import gc
import json
import shutil
import weakref

import pytest
from hf_runs import LORA, config, history
from peft import LoraConfig
from runs import run

from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer
from realign.hf import reference as hf_reference
from realign.modeling.loading import load_model

KEYS = ("loss", "rewards/chosen", "rewards/margins", "rewards/visual_margins")


def trainer_of(pairs_file, folder, reference, **settings):
    settings = config(folder, reference_model=str(reference) if reference else None, **settings)
    return RDPOTrainer(str(ASSETS), settings, str(pairs_file), peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_first_step_is_that_of_realign_train(kind, other, pairs_file, tmp_path):
    """Without a random order: one batch of all records."""
    count = len(read_pairs(pairs_file))
    given = ("--reference-model", other[kind], "--batch-size", count)
    expected = run(pairs_file, tmp_path / "train", *given, steps=1)[0]
    trainer = trainer_of(
        pairs_file, tmp_path, other[kind], per_device_train_batch_size=count, max_steps=1
    )
    trainer.train()
    for key in KEYS:
        assert history(trainer, key) == pytest.approx([expected[key]], abs=2e-5), key
    assert abs(expected["rewards/chosen"]) > 5e-4


def test_all_weights_and_a_held_out_set(other, pairs_file, tmp_path):
    records = read_pairs(pairs_file)
    settings = config(tmp_path, reference_model=str(other["merged"]), max_steps=1)
    trainer = RDPOTrainer(str(ASSETS), settings, records[:16], eval_dataset=records[16:24])
    before = trainer.evaluate()
    plain = RDPOTrainer(
        str(ASSETS), config(tmp_path, max_steps=1), records[:16], eval_dataset=records[16:24]
    )
    moved = RDPOTrainer(
        str(other["merged"]), config(tmp_path, max_steps=1), records[16:24], records[:8]
    )
    for one in (plain, moved):
        one._fill_references()
    # The policy is the model of the assets in both, so rewards differ by the references only.
    ours, theirs = (one.references for one in (plain, moved))
    assert ours is not None and theirs is not None
    gap = ours[:, 16:24] - theirs[:, :8]
    expected = 0.1 * gap.mean(1).double()
    assert before["eval_rewards/chosen"] == pytest.approx(float(expected[0]), abs=1e-5)
    assert before["eval_rewards/rejected"] == pytest.approx(float(expected[1]), abs=1e-5)
    assert plain.evaluate()["eval_rewards/chosen"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    assert "| reference | model |" in card and "Digest of the reference weights: `" in card


def test_the_other_model_is_freed_and_shares_the_cache(other, pairs_file, tmp_path, capsys):
    run(
        pairs_file, tmp_path / "from", "--model", other["merged"],
        "--reference-cache", tmp_path / "cache", steps=1,
    )  # fmt: skip
    capsys.readouterr()
    trainer = trainer_of(pairs_file, tmp_path, other["merged"], disable_tqdm=False, max_steps=1)
    loaded, load = [], hf_reference.load_model

    def noted(path, *more, **options):
        model = load(path, *more, **options)
        loaded.append((str(path), weakref.ref(model)))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_reference, "load_model", noted)
        gc.unfreeze()  # undoes the freeze of tests/conftest.py
        trainer.train()
    assert [path for path, _ in loaded] == [str(other["merged"])]
    assert loaded[0][1]() is None
    words = capsys.readouterr().out.split(" leaves known")[0].split()
    assert words[-1] == words[-3] != "0"


def test_resuming_needs_the_same_setting_and_reference(other, pairs_file, tmp_path):
    """The uninterrupted run and the resumed one are equal; other references are refused."""
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer_of(pairs_file, tmp_path, other["merged"], **given)
    whole.train()
    saved = str(tmp_path / "out/checkpoint-2")
    again = trainer_of(pairs_file, tmp_path, other["merged"], **given)
    again.train(resume_from_checkpoint=saved)
    assert history(again) == history(whole)
    with pytest.raises(ValueError, match="began with a reference_model. Resume it with one"):
        trainer_of(pairs_file, tmp_path, None, **given).train(resume_from_checkpoint=saved)
    with pytest.raises(ValueError, match="is not the given model .log-probs differ by"):
        trainer_of(pairs_file, tmp_path, ASSETS, **given).train(resume_from_checkpoint=saved)
    file = tmp_path / "out/checkpoint-2/reference.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": "0" * 32}))
    with pytest.raises(ValueError, match="belong to another base"):
        trainer_of(pairs_file, tmp_path, other["merged"], **given).train(
            resume_from_checkpoint=saved
        )


def test_another_encoding_is_refused_before_weights_are_read(pairs_file, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(ASSETS, folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + "{{ 'a' }}")
    (folder / "model.safetensors").write_bytes(b"not read" * 1000)
    with pytest.raises(ValueError, match="reference_model .* they differ in chat template"):
        trainer_of(pairs_file, tmp_path, folder)


def test_settings_without_effect(pairs_file, tmp_path):
    with pytest.raises(ValueError, match="reference_model would have no effect: simpo needs no"):
        config(tmp_path, objective="simpo", reference_model=str(ASSETS))
    with pytest.raises(ValueError, match=r"RDPOConfig\(reference_model=...\), a folder or Hub"):
        RDPOTrainer(str(ASSETS), config(tmp_path), str(pairs_file), ref_model=load_model(ASSETS))
