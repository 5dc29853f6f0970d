"""RDPOTrainer builds batches ahead: equal results, named records, and no leaked threads."""

import threading
from contextlib import nullcontext

import pytest
import torch
from hf_runs import LORA, config, history
from host_waits import counted
from peft import LoraConfig

from realign.data import record_table
from realign.data.records import RecordError, read_pairs
from realign.digits import ASSETS
from realign.hf import RDPOTrainer
from realign.modeling.model import ForestModel
from realign.training.step import Feed


@pytest.fixture
def built_by(monkeypatch):
    """Names of the threads that build batches."""
    found, feed = [], Feed.__call__

    def noted(self, *part):
        found.append(threading.current_thread().name.split("_")[0])
        return feed(self, *part)

    monkeypatch.setattr(Feed, "__call__", noted)
    return found


def trained(pairs_file, folder, **settings):
    """Log of a run with an evaluation between its steps."""
    records = read_pairs(pairs_file)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3} | settings
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = RDPOTrainer(
        str(ASSETS), config(folder, **settings), records[:16], records[16:21],
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    names = ("loss", "grad_norm", "logps/chosen", "eval_loss", "eval_rewards/visual_margins")
    return {name: history(trainer, name) for name in names}


@pytest.fixture(scope="module")
def in_place(pairs_file, tmp_path_factory):
    """The same log when each forward builds its own batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RDPOTrainer, "_building", lambda _: nullcontext())
        return trained(pairs_file, tmp_path_factory.mktemp("in_place"))


def test_batches_built_ahead_give_bitwise_equal_results(in_place, pairs_file, tmp_path, built_by):
    assert trained(pairs_file, tmp_path) == in_place
    assert len(in_place["loss"]) == 3 and len(in_place["eval_loss"]) == 2
    assert set(built_by) == {"prefetch"}


@pytest.mark.parametrize(
    "settings",
    [{"dataloader_num_workers": 1}, {"accelerator_config": {"dispatch_batches": True}}],
    ids=["workers", "dispatched"],
)
def test_other_ways_of_loading_give_the_same(in_place, pairs_file, tmp_path, built_by, settings):
    assert trained(pairs_file, tmp_path, **settings) == in_place
    assert set(built_by) == {"MainThread"}


def test_an_image_that_changes_is_named(pairs_file, tmp_path, monkeypatch):
    trainer = RDPOTrainer(str(ASSETS), config(tmp_path), str(pairs_file))
    feed, fed = Feed.__call__, []

    def spoil(self, part):
        fed.append(part)
        if len(fed) == 3:
            self.store._bundles.clear()
            monkeypatch.setattr(record_table, "digest_of_bytes", lambda _: b"")
        return feed(self, part)

    monkeypatch.setattr(Feed, "__call__", spoil)
    with pytest.raises(RecordError, match="record 'scene-.* has changed since"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_loss_that_is_not_finite_is_named_before_the_update(pairs_file, tmp_path, monkeypatch):
    """The first of two micro-batches has a non-finite loss, the second a finite one."""
    records = read_pairs(pairs_file)[:4]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = RDPOTrainer(
        str(ASSETS), config(tmp_path, **settings), records, peft_config=LoraConfig(**LORA)
    )
    forward, seen = ForestModel.forward, []

    def spoil(self, batch, *more):
        out = forward(self, batch, *more)
        if not more:
            return out
        seen.append(batch.names)
        return out._replace(loss=out.loss * torch.nan) if len(seen) == 1 else out

    monkeypatch.setattr(ForestModel, "forward", spoil)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match="the loss of records .* is nan") as error:
        trainer.train()
    assert str(error.value).startswith(f"the loss of records {', '.join(seen[0])} is nan.")
    assert len(seen) == 2
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_a_step_waits_once_outside_its_forwards(pairs_file, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"max_steps": 4, "logging_steps": 100}
    torch.backends.cuda.enable_cudnn_sdp(True)
    trainer = RDPOTrainer(str(ASSETS), config(tmp_path, **settings), str(pairs_file))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    trainer._fill_references()
    with counted() as waits:
        trainer.train()
    assert waits["realign/hf/parts.py"] == 4
    assert waits["transformers/trainer.py"] <= 1  # the loss of the whole run


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_update(clip, pairs_file, tmp_path):
    records = read_pairs(pairs_file)[:4]
    settings = config(tmp_path, max_steps=2, per_device_train_batch_size=2, max_grad_norm=clip)
    trainer = RDPOTrainer(str(ASSETS), settings, records, peft_config=LoraConfig(**LORA))
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    weights[0].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        ValueError, match="gradient norm is (nan|inf), though the losses of process 0 are"
    ):
        trainer.train()
    assert all(map(torch.equal, weights, before))
