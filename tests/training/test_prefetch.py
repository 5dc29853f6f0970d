"""Prefetch: batches ahead of the step in order and bitwise equal, errors, and host reads."""

import math
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial

import numpy as np
import pytest
import torch
from host_waits import counted
from runs import arguments, assert_same_run, loaded, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from realign import distributed
from realign.data import record_table
from realign.files import read_jsonl
from realign.modeling.images import ImageStore
from realign.modeling.loading import add_lora
from realign.modeling.model import ForestModel
from realign.modeling.prefetch import ahead, pinned
from realign.train import main
from realign.training import step

CPU = torch.device("cpu")
BATCHES = ("--micro-batch-size", 3, "--save-every", 2)


def threads():
    """Live prefetch threads."""
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture
def nothing_kept(monkeypatch):
    """Every image of a batch is read and preprocessed again."""
    bundle = ImageStore.bundle

    def again(store, key):
        store._bundles.clear()
        return bundle(store, key)

    monkeypatch.setattr(ImageStore, "bundle", again)


# --- the thread ---


def test_results_come_in_order_and_few_are_built_ahead():
    built = []

    def build(i):
        built.append((i, threading.current_thread() is threading.main_thread()))
        return i

    most = 0
    with ahead((partial(build, i) for i in range(20)), CPU, depth=3) as results:
        for i, result in enumerate(results):
            assert result == i
            time.sleep(0.01)  # the thread builds as many as it may
            most = max(most, len(built) - (i + 1))
    assert built == [(i, False) for i in range(20)]
    assert 1 <= most <= 3 and not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_early_end_drops_waiting_tasks(error):
    begun, second = [], threading.Event()

    def build(i):
        begun.append(i)
        if i == 1:
            second.set()
            time.sleep(0.2)

    with pytest.raises(error), ahead((partial(build, i) for i in range(9)), CPU) as results:
        next(results)
        second.wait()
        raise error
    assert not threads() and begun == [0, 1]


def test_an_error_is_raised_when_its_result_is_requested():
    got = []
    with (
        pytest.raises(ZeroDivisionError),
        ahead((partial(lambda i: 1 / (3 - i), i) for i in range(9)), CPU) as results,
    ):
        got.extend(results)
    assert got == [1 / 3, 1 / 2, 1] and not threads()


def tensors(value):
    """Every tensor inside `value`, with its path."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    if is_dataclass(value):
        parts = vars(value)
    elif hasattr(value, "_asdict"):
        parts = value._asdict()
    elif isinstance(value, dict | tuple):
        parts = value if isinstance(value, dict) else dict(enumerate(value))
    else:
        return {}
    return {f"{name}.{at}": t for name, one in parts.items() for at, t in tensors(one).items()}


def test_all_tensors_of_a_micro_batch_are_pinned_for_cuda(pairs_file, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    inputs = loaded(pairs_file)
    references = torch.zeros(3, len(inputs.examples))
    part = step.Feed(inputs.examples, references, inputs.store, "sdpa", 0, CPU)([0, 1, 2])
    assert pinned(part, CPU) is part
    found = pinned(part, torch.device("cuda"))
    before, after = tensors(part), tensors(found)
    assert len(before) > 15 and before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
        assert after[name].data_ptr() != tensor.data_ptr() or tensor.numel() == 0, name
    assert found.to(CPU).batch.sequences._fields == part.batch.sequences._fields
    assert found.batch.names == part.batch.names and found.last is part.last


# --- in training ---


def test_the_next_batch_is_built_while_the_model_computes(pairs_file, tmp_path, monkeypatch):
    """Each forward waits until the next forward's batch is built, also across steps."""
    feed, forward, built, begun = step.Feed.__call__, ForestModel.forward, [], []

    def building(self, *part):
        built.append(part)
        return feed(self, *part)

    def computing(self, *given):
        begun.append(given)
        deadline = time.monotonic() + 30
        while len(built) < min(len(begun) + 1, 6):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return forward(self, *given)

    monkeypatch.setattr(step.Feed, "__call__", building)
    monkeypatch.setattr(ForestModel, "forward", computing)
    run(pairs_file, tmp_path, "--save-every", 0)
    assert len(built) == len(begun) == 6


@pytest.fixture(scope="module")
def plain(pairs_file, tmp_path_factory):
    """The folder of a run that builds batches without a thread."""
    output = tmp_path_factory.mktemp("plain")

    @contextmanager
    def in_place(tasks, device):
        yield (task() for task in tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "ahead", in_place)
        run(pairs_file, output, *BATCHES)
    return output


def test_a_run_has_the_bits_of_one_without_prefetch(pairs_file, plain, tmp_path, nothing_kept):
    run(pairs_file, tmp_path, *BATCHES)
    assert_same_run(tmp_path, plain)
    assert not threads()


def test_an_image_that_changes_is_named_where_it_is_needed(
    pairs_file, tmp_path, monkeypatch, capsys
):
    feed, fed = step.Feed.__call__, []

    def spoil(self, part, last=True):
        fed.append(part)
        if len(fed) == 4:
            self.store._bundles.clear()
            monkeypatch.setattr(record_table, "digest_of_bytes", lambda _: b"")
        return feed(self, part, last)

    monkeypatch.setattr(step.Feed, "__call__", spoil)
    assert main(arguments(pairs_file, tmp_path)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: record 'scene-") and "has changed since" in shown
    assert [entry["step"] for entry in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert not threads()


# --- host reads ---


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_step_waits_once_for_its_metrics_and_once_for_each_head(pairs_file, tune):
    """Over two micro-batches, clipping, metrics and the optimizer."""
    inputs = loaded(pairs_file)
    model = inputs.model
    if tune == "lora":
        add_lora(model.vlm, 4, 8.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    references = torch.full((3, len(inputs.examples)), -25.0)
    feed = step.Feed(inputs.examples, references, inputs.store, model.attention, 0, CPU)
    parts = [feed(*part) for part in step.micro_batches(np.arange(8), 4)]
    with counted() as waits:
        totals = step.accumulate(model, parts, inputs.objective, batch_size=8, device=CPU)
        norm = step.clip(trained, 1.0)
        found, _ = step.update_and_read(optimizer, totals, norm, 8, False)
    ours = Counter(file.split("/")[0] for file in waits.elements() if file.startswith("realign"))
    # On a CPU a trained head also reads the gradient of the loss, which saves a pass.
    heads = 4 if tune == "full" else 2
    assert ours == {"realign": 1, "realign_kernels": heads}
    # transformers compares the numbers of image tokens and features, and formats its message.
    assert waits.total() == 1 + heads + 4
    grads = torch.stack([p.grad.norm() for p in trained if p.grad is not None])
    assert min(found["grad_norm"], 1.0) == pytest.approx(float(grads.norm()), rel=1e-4)


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "FSDP2"])
def test_a_step_that_is_not_finite_updates_nothing(sharded, spoilt):
    """The update is queued before the host reads. The second step ignores the first."""
    distributed.start(single=True)
    results = []
    for spoil in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for bad in (True, False)[not spoil :]:
            model(torch.ones(2, 4)).pow(2).sum().backward()
            if bad and spoilt == "gradient":
                model.weight.grad.mul_(torch.inf)
            loss = torch.tensor(torch.nan if bad and spoilt == "loss" else 3.0)
            norm = step.clip(list(model.parameters()), 1.0)
            totals = {"other": torch.ones(()), "loss": loss}
            found, _ = step.update_and_read(optimizer, totals, norm, 2, False)
            finite = math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])
            assert finite is not bad
            optimizer.zero_grad()
        state = [value for one in optimizer.state.values() for value in one.values()]
        results.append([
            t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
            for t in (*(p.detach() for p in model.parameters()), *state)
        ])  # fmt: skip
    assert len(results[0]) == 8  # two parameters with two moments and a count each
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_flag_of_a_step_is_where_the_parameters_are():
    """Offloaded parameters are on the CPU, where AdamW could read the flag before its copy."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, device="meta"))], fused=False)
    optimizer.step = lambda: None
    totals = {"loss": torch.ones(())}
    step.update_and_read(optimizer, totals, torch.ones(()), 1, False)
    assert optimizer.found_inf.device.type == "meta"
