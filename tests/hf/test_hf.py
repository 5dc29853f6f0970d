"""RDPOTrainer: the curve of `realign.train` and of a plain loop, adapters, ranks, resuming."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from hf_runs import BATCH, LORA, SEED, STEPS, config, history
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback

from realign import export
from realign.config import OptimConfig
from realign.data.records import RecordError, StoredImage, read_pairs, write_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer
from realign.hf.records import records_of
from realign.train import main
from realign.training.schedule import batches, learning_rate
from realign_kernels import rdpo_loss

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OPTIM = OptimConfig(learning_rate=5e-5, batch_size=BATCH, steps=STEPS)


class InOurOrder(RDPOTrainer):
    """A trainer with the batches and learning rates of `realign.train`."""

    def _get_train_sampler(self, *_):
        steps = batches(len(self.train_dataset), BATCH, SEED, first=0, last=STEPS)
        return [int(i) for _, batch in steps for i in batch]

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate(step, STEPS, OPTIM) / OPTIM.learning_rate,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler


@pytest.fixture(scope="module")
def ours(pairs_file, tmp_path_factory):
    """The curve of `realign.train`."""
    folder = tmp_path_factory.mktemp("ours")
    options = ["--pairs", pairs_file, "--tune", "full", "--steps", STEPS, "--batch-size", BATCH]
    options += ["--learning-rate", OPTIM.learning_rate, "--seed", SEED, "--quiet"]
    options += ["--output", folder / "run", "--reference-cache", folder / "cache"]
    assert main([str(option) for option in options]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def test_the_trainer_gives_the_curve_of_realign_train(ours, pairs_file, tmp_path):
    trainer = InOurOrder(str(ASSETS), config(tmp_path), str(pairs_file))
    trainer.train()
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/visual_margins", "logps/chosen"):
        expected = [entry[name] for entry in ours]
        assert history(trainer, name) == pytest.approx(expected, rel=2e-4, abs=2e-5), name
    assert history(trainer)[0] == pytest.approx(2 * 0.693147, abs=1e-5)


def test_a_plain_loop_gives_the_curve_of_realign_train(ours, pairs_file):
    """The curve of the plain-loop example, with the batches of `realign.train`."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import sequences
    finally:
        sys.path.pop(0)
    records = read_pairs(pairs_file)
    processor = AutoProcessor.from_pretrained(ASSETS)
    model = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
    model.model.get_encoder("image").requires_grad_(False)
    encoded = [
        sequences.batch_of(processor, [records[i] for i in batch])
        for _, batch in batches(len(records), BATCH, SEED, first=0, last=STEPS)
    ]
    references = [sequences.reference_logps(model, *one) for one in encoded]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.learning_rate, weight_decay=0.0)
    for step, ((inputs, labels), reference) in enumerate(zip(encoded, references, strict=True)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, OPTIM)
        hidden = sequences.hidden_states(model, inputs, BATCH)
        out = rdpo_loss(hidden, model.lm_head.weight, labels, reference, beta=0.1)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert out.loss.item() == pytest.approx(ours[step]["loss"], rel=2e-4)
        assert norm.item() == pytest.approx(ours[step]["grad_norm"], rel=2e-3)


@pytest.fixture(scope="module")
def rows(pairs_file):
    """A data set in TRL's form: decoded images, messages and an extra column."""
    loaded = datasets.load_dataset("parquet", data_files=str(pairs_file), split="train")
    kept = ["prompt", "chosen", "rejected", "images", "retrieved_images"]
    return loaded.select_columns(kept)


def test_rows_of_a_data_set_equal_the_records(rows, pairs_file):
    records = read_pairs(pairs_file)
    for forms in (rows, list(rows.select(range(8))), rows.select(range(8)).to_list()):
        for row, record in zip(records_of(forms), records, strict=False):
            assert (row.prompt, row.chosen) == (record.prompt, record.chosen)
            assert row.rejected == record.rejected
            for a, b in zip(row.images, record.images, strict=True):
                assert a.open("a").tobytes() == b.open("b").tobytes()
            assert len(row.retrieved_images) == 1
    preferred = [row | {"retrieved_chosen": "What is there."} for row in rows.select(range(2))]
    for forms in (preferred, datasets.Dataset.from_list([r | {"id": "x"} for r in preferred])):
        assert [r.retrieved_chosen for r in records_of(forms)] == ["What is there."] * 2
    with pytest.raises(ValueError, match="streaming data set has no length"):
        records_of(rows.to_iterable_dataset())


def test_adapters_are_trained_logged_saved_and_evaluated(rows, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            seen.append(logs)

    trainer = RDPOTrainer(
        str(ASSETS),
        config(tmp_path, max_steps=3),
        rows.select(range(14)),
        eval_dataset=rows.select(range(14, 20)),
        peft_config=LoraConfig(**LORA),
        callbacks=[Watch()],
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name for name in changed)
    named = {"rewards/chosen", "rewards/accuracies", "rewards/visual_margins", "logps/rejected"}
    assert named <= seen[0].keys()
    assert seen[0]["rewards/margins"] == pytest.approx(
        0, abs=1e-4
    )  # policy and reference are equal
    found = trainer.evaluate()
    assert found["eval_loss"] < 2 * 0.6932
    assert 0 <= found["eval_rewards/accuracies"] <= 1
    trainer.save_model(str(tmp_path / "saved"))
    base = AutoModelForImageTextToText.from_pretrained(ASSETS)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    trained = {n.removeprefix("vlm."): p for n, p in trainer.model.state_dict().items()}
    for name, value in loaded.base_model.model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    AutoProcessor.from_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "peft" and "rdpo" in card.data.tags
    assert "14 preference records with" in card.text and "The last step (3)" in card.text
    merged = ["--model", str(tmp_path / "saved"), "--output", str(tmp_path / "merged")]
    assert export.main(merged) == 0
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "transformers" and "PeftModel" not in card.text


def trained(rows, folder, **settings) -> list[float]:
    """Losses and norms of two steps."""
    settings = config(folder, max_steps=2, **settings)
    some = rows.select(range(16))
    trainer = RDPOTrainer(str(ASSETS), settings, some, peft_config=LoraConfig(**LORA))
    trainer.train()
    return [*history(trainer), *history(trainer, "grad_norm")]


@pytest.fixture(scope="module")
def plain_steps(rows, tmp_path_factory):
    return trained(rows, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_equivalent_settings_give_the_same_steps(rows, tmp_path, settings, plain_steps):
    assert trained(rows, tmp_path, **settings) == pytest.approx(plain_steps, rel=2e-5)


def test_references_under_autocast_are_cached_separately(rows, tmp_path):
    for count, bf16 in enumerate((True, False), 1):
        settings = config(tmp_path, max_steps=1, bf16=bf16)
        RDPOTrainer(str(ASSETS), settings, rows.select(range(4))).train()
        assert len(list((tmp_path / "cache").iterdir())) == count


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(rows, tmp_path, tune):
    def trainer(folder, **settings):
        peft = LoraConfig(**LORA) if tune == "lora" else None
        options = {"output_dir": str(tmp_path / folder), "max_steps": 4}
        options |= {"per_device_train_batch_size": 4} | settings
        settings = config(tmp_path, **options)
        return RDPOTrainer(str(ASSETS), settings, rows.select(range(10)), peft_config=peft)

    whole = trainer("whole")
    whole.train()
    first = trainer("cut", max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer("cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert history(second) == pytest.approx(history(whole), rel=1e-5)


def test_invalid_records_and_settings_are_named(rows, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor would have no effect"):
        config(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="objective is 'kto'"):
        config(tmp_path, objective="kto")
    bare = rows.select(range(4)).remove_columns("retrieved_images")
    with pytest.raises(RecordError, match="needs 'retrieved_image'.*--objective dpo"):
        RDPOTrainer(str(ASSETS), config(tmp_path), bare)
    broken = [row | {"rejected": " "} if i == 2 else row for i, row in enumerate(bare)]
    with pytest.raises(RecordError, match="row 2"):
        RDPOTrainer(str(ASSETS), config(tmp_path), broken)
    with pytest.raises(ValueError, match="holds no records"):
        RDPOTrainer(str(ASSETS), config(tmp_path), [])


def test_a_path_has_a_split_an_image_folder_and_a_count_of_skipped(pairs_file, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "data").mkdir()
    given = []
    for i, record in enumerate(read_pairs(pairs_file)[:4]):
        (tmp_path / "images" / f"{i}.png").write_bytes(record.images[0].data)
        given.append(replace(record, images=(StoredImage(path=f"{i}.png"),)))
    bare = replace(given[0], name="bare", images=(), retrieved_images=())
    write_pairs(tmp_path / "data" / "train-0.parquet", [*given[:3], bare])
    write_pairs(tmp_path / "data" / "test-0.parquet", given[3:])
    settings = {"image_folder": str(tmp_path / "images"), "disable_tqdm": False}
    train = config(tmp_path, split="train", **settings)
    trainer = RDPOTrainer(str(ASSETS), train, str(tmp_path / "data"))
    assert [example.name for example in trainer.examples] == [r.name for r in given[:3]]
    assert "skipped 1 of 4 records, which have no image" in capsys.readouterr().out
    data = str(tmp_path / "data")
    for split, name, shared in (("test", given[3].name, 0), (None, given[0].name, 3)):
        both = config(
            tmp_path, split="train", eval_split=split, image_folder=settings["image_folder"]
        )
        trainer = RDPOTrainer(str(ASSETS), both, data, eval_dataset=data)
        assert trainer.examples[trainer.eval_dataset[0]].name == name
        out = capsys.readouterr().out  # also with disable_tqdm
        assert "skipped 1 of 4 records, which have no image" in out
        assert (f"{shared} of 3 records of eval_dataset share images" in out) == (shared > 0)
    with pytest.raises(ValueError, match="splits test, train. Add --split, or load one"):
        RDPOTrainer(str(ASSETS), config(tmp_path, **settings), str(tmp_path / "data"))
    with pytest.raises(ValueError, match="image_workers is -1; it must be 0 or more"):
        config(tmp_path, image_workers=-1)
    with pytest.raises(ValueError, match="the data set is a dictionary of .'train'"):
        rows = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])})
        RDPOTrainer(str(ASSETS), config(tmp_path), rows)


def test_steps_after_a_failed_evaluation_are_counted(pairs_file, tmp_path, monkeypatch):
    records = read_pairs(pairs_file)[:4]
    trainer = RDPOTrainer(str(ASSETS), config(tmp_path, max_steps=2), records, records)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluation_loop", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate()
    trainer.train()
    assert len(history(trainer, "rewards/margins")) == 2


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_projector_has_its_own_learning_rate(tune, pairs_file, tmp_path):
    """Adam's first step moves each weight by the rate of its group, times a sign."""
    lora = LoraConfig(**LORA, modules_to_save=["multi_modal_projector"])
    rates = {"learning_rate": 2e-5, "projector_learning_rate": 3e-4, "max_steps": 1}
    trainer = RDPOTrainer(
        str(ASSETS),
        config(tmp_path, **rates, max_grad_norm=0.0),
        str(pairs_file),
        peft_config=lora if tune == "lora" else None,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {
        name: float((p.detach() - before[name]).abs().max())
        for name, p in trainer.model.named_parameters()
        if name in before
    }
    largest = {
        apart: max(v for n, v in moved.items() if ("multi_modal_projector" in n) == apart)
        for apart in (True, False)
    }
    assert largest == {True: pytest.approx(3e-4, rel=0.01), False: pytest.approx(2e-5, rel=0.01)}
    assert len(trainer.optimizer.param_groups) == 4  # with and without weight decay
