"""Runs of objectives that read more than rewards: MPO with its running mean, and SimPO."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_runs import BATCH, SEED, STEPS, InOrder, config, history
from runs import assert_same_run, curve, run
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign.config import OptimConfig
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.files import read_jsonl
from realign.training.schedule import batches, learning_rate

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sequences  # noqa: E402

RATE = 1e-3
"""Large, so that rewards and their running mean leave 0."""
FULL = ("--tune", "full", "--learning-rate", RATE, "--seed", SEED)
OPTIM = OptimConfig(learning_rate=RATE, batch_size=BATCH, steps=STEPS)


def plain_loop(pairs_file, loss_of):
    """Losses and gradient norms of a run in plain torch, with all logits.

    Args:
        pairs_file: the pairs.
        loss_of: function of log-probs, references and token counts, each (3, B).
    """
    records, processor = read_pairs(pairs_file), AutoProcessor.from_pretrained(ASSETS)
    model = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
    model.model.get_encoder("image").requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def logps(inputs, labels):
        logits = model(**inputs, use_cache=False).logits.unflatten(0, labels.shape[:2])
        every = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])
        return (every.squeeze(-1) * (labels >= 0)).sum(-1)

    steps = batches(len(records), BATCH, SEED, first=0, last=STEPS)
    encoded = [sequences.batch_of(processor, [records[i] for i in part]) for _, part in steps]
    with torch.no_grad():
        references = [logps(*one) for one in encoded]
    result = []
    for step, ((inputs, labels), reference) in enumerate(zip(encoded, references, strict=True)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, OPTIM)
        loss = loss_of(logps(inputs, labels), reference, (labels >= 0).sum(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.append((loss.item(), norm.item()))
    return result


class MPO:
    """InternVL's loss by hand, over the text and with weight 0.5 over the image.

    The shift is the mean of all rewards of earlier steps.
    """

    def __init__(self):
        self.seen = []
        self.shifts = []

    def __call__(self, logps, reference, counts):
        chosen, rejected, visual = rewards = 0.1 * (logps - reference)
        shift = torch.cat(self.seen, 1).mean() if self.seen else 0.0
        self.shifts.append(float(shift))
        self.seen.append(rewards.detach())
        text = -0.8 * F.logsigmoid(chosen - rejected) - 0.2 * F.logsigmoid(shift - rejected)
        image = -0.8 * F.logsigmoid(chosen - visual) - 0.2 * F.logsigmoid(shift - visual)
        once = -0.2 * F.logsigmoid(chosen - shift) - logps[0] / counts[0]
        return (text + 0.5 * image + once).mean()


MPO_FLAGS = ("--objective", "rdpo", "--link", "mpo", "--visual-weight", 0.5)


@pytest.fixture(scope="module")
def mpo(pairs_file, tmp_path_factory):
    """A run of MPO with a visual term, a checkpoint every two steps."""
    output = tmp_path_factory.mktemp("mpo")
    run(pairs_file, output, *FULL, *MPO_FLAGS, "--save-every", 2, "--keep", 9, steps=STEPS)
    return output


@pytest.fixture(scope="module")
def by_hand(pairs_file):
    loss = MPO()
    return plain_loop(pairs_file, loss), loss.shifts


def test_mpo_is_a_plain_loop_with_its_formula(mpo, by_hand):
    expected, shifts = by_hand
    assert max(map(abs, shifts)) > 0.1  # the mean has an effect
    entries = read_jsonl(mpo / "metrics.jsonl")
    for entry, (loss, norm) in zip(entries, expected, strict=True):
        assert entry["loss"] == pytest.approx(loss, rel=2e-4)
        assert entry["grad_norm"] == pytest.approx(norm, rel=5e-3)
    names = {"preference", "bco_pair_chosen", "bco_pair_visual", "sft", "preference_visual"}
    assert names <= {name.removeprefix("loss/") for name in entries[0]}


def test_mpo_resumes_with_its_running_mean(mpo, pairs_file, tmp_path):
    words = (*FULL, *MPO_FLAGS, "--save-every", 2, "--keep", 9)
    run(pairs_file, tmp_path, *words, steps=STEPS)
    for step in (4, 6):
        for file in (tmp_path / "checkpoints" / f"step-{step:06d}").iterdir():
            file.unlink()
        (tmp_path / "checkpoints" / f"step-{step:06d}").rmdir()
    run(pairs_file, tmp_path, *words, "--resume", steps=STEPS)
    assert_same_run(tmp_path, mpo)


class InOurOrder(InOrder):
    """A trainer with the batches and learning rates of `realign.train`."""

    def _get_train_sampler(self, *_):
        steps = batches(len(self.train_dataset), BATCH, SEED, first=0, last=STEPS)
        return [int(i) for _, batch in steps for i in batch]

    def create_scheduler(self, num_training_steps, optimizer=None):
        rate = lambda step: learning_rate(step, STEPS, OPTIM) / RATE  # noqa: E731
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def test_the_trainer_gives_the_same_curve_and_resumes(by_hand, pairs_file, tmp_path):
    settings = {"link": "mpo", "visual_weight": 0.5, "learning_rate": RATE}
    settings |= {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": 2}
    trainer = InOurOrder(str(ASSETS), config(tmp_path, **settings), str(pairs_file))
    trainer.train()
    expected = [loss for loss, _ in by_hand[0]]
    assert history(trainer) == pytest.approx(expected, rel=2e-4)
    again = InOurOrder(str(ASSETS), config(tmp_path, **settings), str(pairs_file))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert history(again)[-2:] == pytest.approx(expected[-2:], rel=2e-4)
    assert again._shift.count == trainer._shift.count == STEPS * BATCH
    assert again._shift.value == pytest.approx(trainer._shift.value, rel=1e-6)


def test_simpo_needs_no_reference(pairs_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    flags = ("--objective", "simpo", "--beta", 1.5, "--gamma", 0.3)
    entries = run(pairs_file, tmp_path / "run", *FULL, *flags, steps=STEPS)
    assert "simpo needs no reference log-probs" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "reference").exists()

    def loss(logps, _, counts):
        means = 1.5 * logps / counts
        return -F.logsigmoid(means[0] - means[1] - 0.3).mean()

    for entry, (value, norm) in zip(entries, plain_loop(pairs_file, loss), strict=True):
        assert entry["loss"] == pytest.approx(value, rel=2e-4)
        assert entry["grad_norm"] == pytest.approx(norm, rel=5e-3)
    assert curve(entries, "rewards/chosen")[0] < 0
