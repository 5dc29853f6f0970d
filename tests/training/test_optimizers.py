"""Optimizers and schedules by name, against the classes by hand and transformers' schedules."""

import math
import shutil

import bitsandbytes
import pytest
import torch
from runs import assert_same_run, run
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from realign import config
from realign.config import OPTIMIZERS, OptimConfig, parse
from realign.training import optimizers, step
from realign.training.schedule import learning_rate, projector_rate, total_steps

RATE, DECAY = 1e-2, 0.1
ADAM = {"betas": (0.8, 0.99), "eps": 1e-6}
BY_HAND = {
    "adamw": (torch.optim.AdamW, ADAM | {"fused": True}),
    "sgd": (torch.optim.SGD, {}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "adamw_8bit": (bitsandbytes.optim.AdamW8bit, ADAM),
    "paged_adamw_8bit": (bitsandbytes.optim.AdamW8bit, ADAM),  # a CPU has no pages
    "paged_adamw_32bit": (bitsandbytes.optim.AdamW32bit, ADAM),
    "lion": (bitsandbytes.optim.Lion32bit, {}),
    "lion_8bit": (bitsandbytes.optim.Lion8bit, {}),
}


def settings(name):
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}
    given = adam if name in config.OF_ADAM else {}
    return OptimConfig(learning_rate=RATE, weight_decay=DECAY, optimizer=name, **given)


def weights():
    """A matrix that bitsandbytes keeps in 8 bits, and a vector that it does not."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in ((80, 80), (7,))]


def gradients(count):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator) for p in weights()] for _ in range(count)]


def trained(optimizer, parameters, steps):
    """The parameters after updates with some gradients."""
    for grads in steps:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize(
    ("count", "epochs", "steps"),
    [
        (33, 1.0, 2),
        (32, 1.0, 1),
        (64, 3.0, 6),
        (47, 2.0, 3),
        (320, 1.1, 11),
        (320, 0.3, 3),
        (1, 1.0, 1),
    ],
)
def test_an_epoch_leaves_no_record_out(count, epochs, steps):
    """1.1 * 320 / 32 and 0.3 * 320 / 32 are 11 and 3 but for rounding."""
    assert total_steps(count, OptimConfig(epochs=epochs, batch_size=32)) == steps
    assert total_steps(count, OptimConfig(epochs=epochs, batch_size=32, steps=7)) == 7


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_updates_as_its_class_by_hand(name):
    ours, theirs = weights(), weights()
    kind, options = BY_HAND[name]
    by_hand = kind(theirs, lr=RATE, weight_decay=DECAY, **options)
    made = optimizers.make(settings(name), ours)
    grads = gradients(4)
    for found, truth in zip(
        trained(made, ours, grads), trained(by_hand, theirs, grads), strict=True
    ):
        assert torch.equal(found, truth)
    assert not torch.equal(found, weights()[1])


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(name, spoilt):
    """Neither weights nor state, counts included: the next steps equal those of a run without."""
    results = []
    for bad in (True, False):
        parameters = weights()
        optimizer = optimizers.make(settings(name), parameters)
        for index, grads in enumerate(gradients(3)):
            for spoil in (True, False)[not bad or index != 1 :]:
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad.clone()
                if spoil and spoilt == "gradient":
                    parameters[0].grad[0, 0] = torch.nan
                loss = torch.tensor(torch.nan if spoil and spoilt == "loss" else 1.0)
                norm = step.clip(parameters, 0)
                step.update_and_read(optimizer, {"loss": loss}, norm, 1, False)
        state = [v for one in optimizer.state.values() for v in one.values()]
        assert all(isinstance(value, torch.Tensor) for value in state)  # a checkpoint has them all
        results.append([*parameters, *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plan_counts_the_bytes_of_the_state(name):
    parameter = nn.Parameter(torch.zeros(512, 512))
    optimizer = optimizers.make(settings(name), [parameter])
    trained(optimizer, [parameter], [[torch.ones(512, 512)]])
    found = sum(v.nbytes for v in optimizer.state[parameter].values() if v is not None)
    estimated = optimizers.state_bytes(settings(name), parameter.numel())
    assert estimated == pytest.approx(found, rel=0.03, abs=8192)


@pytest.mark.parametrize(
    "name", [n for n in OPTIMIZERS if n not in (*config.OF_TORCH, *config.PAGED)]
)
def test_a_restored_state_keeps_its_dtypes_and_its_tensors(name):
    """The method of bitsandbytes copies all tensors, which would leave their pages."""
    parameters = weights()
    optimizer = optimizers.make(settings(name), parameters)
    trained(optimizer, parameters, gradients(2))
    saved = optimizer.state_dict()
    restored = optimizers.make(settings(name), parameters)
    restored.load_state_dict(saved)
    for index, parameter in enumerate(parameters):
        for key, value in saved["state"][index].items():
            assert restored.state[parameter][key] is value
    assert {v["step"].dtype for v in restored.state.values()} == {torch.int64}


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit", "lion_8bit"])
def test_a_run_resumes_with_the_same_bits(name, pairs_file, tmp_path):
    given = ("--optimizer", name, "--save-every", 2, "--learning-rate", 1e-3)
    entries = run(pairs_file, tmp_path / "whole", *given, steps=4)
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.01
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in ("checkpoints/step-000004", "model"):
        shutil.rmtree(tmp_path / "cut" / later)
    run(pairs_file, tmp_path / "cut", *given, "--resume", steps=4)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", steps=4)


def test_optimizers_that_need_something_are_refused_by_name(monkeypatch):
    for name in config.PAGED:
        with pytest.raises(ValueError, match=f"--optimizer {name} would have no effect: a CPU"):
            parse(["--optimizer", name])
    for name in set(OPTIMIZERS) - set(config.OF_TORCH):
        with pytest.raises(ValueError, match=f"--optimizer {name} keeps a state that FSDP2 cannot"):
            parse(["--optimizer", name, "--fsdp"])
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--optimizer lion needs bitsandbytes.*realign\[quantize"):
        parse(["--optimizer", "lion"])


@pytest.mark.parametrize(
    ("name", "theirs", "more"),
    [
        ("cosine", "cosine", {}),
        ("linear", "linear", {}),
        ("constant", "constant_with_warmup", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr": 0.3}),
    ],
)
def test_schedules_are_those_of_transformers(name, theirs, more):
    """After the warm-up. Ours starts one step further, so that no step has a rate of zero."""
    steps, warm, rate = 50, 5, 2.0
    optim = OptimConfig(
        learning_rate=rate, schedule=name, warmup=warm / steps, steps=steps,
        min_learning_rate=more.get("min_lr", 0.0), projector_learning_rate=0.5,
    )  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(theirs, optimizer, warm, steps, scheduler_specific_kwargs=more)
    truth = []
    for _ in range(steps):
        truth.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    total = total_steps(400, optim)
    found = [learning_rate(at, total, optim) for at in range(steps)]
    assert found[warm:] == pytest.approx(truth[warm:], abs=1e-12)
    assert found[:warm] == pytest.approx([*truth[1 : warm + 1]], abs=1e-12)
    shares = [projector_rate(at, total, optim) / found[at] for at in range(steps) if found[at]]
    assert shares == pytest.approx([0.25] * len(shares))
    assert math.isclose(max(found), rate)
