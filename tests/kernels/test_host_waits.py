"""Host waits of a head call: one, for the check of its results."""

import pytest
import torch
from host_waits import counted
from torch._subclasses.fake_tensor import FakeTensorMode

import realign_kernels as rk
from realign_kernels import row_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = ["cpu", "cuda"] if DEVICE == "cuda" else ["cpu"]
"""Device of labels and sequence_ids. On the GPU they are read first, which is a second wait."""


def batch(packed, ignored, place):
    """Arguments of rdpo_loss for 4 examples, with hidden separate."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 8, 16, generator=g)
    labels = torch.randint(50, (3, 4, 8), generator=g)
    if ignored:
        labels[..., :3] = -100
    rest = {"reference_logps": torch.zeros(3, 4, device=DEVICE)}
    if packed:
        hidden, labels = hidden.flatten(0, 2), labels.flatten()
        rest["sequence_ids"] = torch.arange(12).repeat_interleave(8).to(place)
    return hidden.to(DEVICE), rest | {"labels": labels.to(place)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("ignored", [True, False], ids=["some ignored", "none ignored"])
@pytest.mark.parametrize("form", ["packed", "padded", "shifted"])
def test_a_loss_waits_once(form, ignored, frozen, dtype, place):
    hidden, rest = batch(form == "packed", ignored, place)
    if form == "shifted":  # as in hidden[:, :, :-1], whose rows are not adjacent
        hidden = torch.cat([hidden, hidden[:, :, :1]], 2)[:, :, :-1]
    hidden = hidden.to(dtype).requires_grad_()
    weight = torch.randn(50, 16, device=DEVICE).to(dtype).requires_grad_(not frozen)
    for _ in range(2):  # the first call compiles kernels
        with counted() as forward:
            output = rk.rdpo_loss(hidden, weight, **rest, chunk_rows=20)
        with counted() as backward:
            output.loss.backward()
    assert forward.total() == (1 if place == "cpu" else 2)
    # On the CPU reading the scalar saves a pass over the gradient of the weight.
    scalar = not frozen and dtype != torch.float16 and DEVICE == "cpu"
    assert backward.total() == scalar


def test_log_probs_and_a_loss_of_log_probs_wait_once():
    hidden, rest = batch(packed=True, ignored=True, place="cpu")
    weight = torch.randn(50, 16, device=DEVICE)
    for _ in range(2):
        with counted() as waits:
            rk.linear_logprobs(hidden, weight, rest["labels"])
        assert waits.total() == 1
    with counted() as waits:
        table = torch.zeros(3, 4, device=DEVICE)
        rk.preference_loss(table - 1, table, rk.objectives.rdpo())
    assert waits.total() == 1


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_labels_may_be_overwritten_before_the_backward(frozen):
    """A data loader fills its buffer again between forward and backward."""
    hidden, rest = batch(packed=True, ignored=False, place="cpu")
    weight = torch.randn(50, 16, device=DEVICE)
    found = []
    for overwrite in (False, True):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        given = {name: value.clone() for name, value in rest.items()}
        logps = rk.linear_logprobs(*inputs, given["labels"])
        output = rk.rdpo_loss(*inputs, **given)
        if overwrite:
            given["labels"].fill_(-100)
            given["sequence_ids"].fill_(0)
        (logps.sum() + output.loss).backward()
        found.append([t.grad for t in inputs if t.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_host_tensors_are_pinned_except_fake_ones(monkeypatch):
    """A traced backward moves fake labels to a device, but torch has no fake pinned memory."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    labels = torch.zeros(3, dtype=torch.int64)
    row_plan.to_device(labels, torch.device("cuda"))
    with FakeTensorMode():
        row_plan.to_device(torch.zeros(3, dtype=torch.int64), torch.device("cuda"))
    assert len(pinned) == 1 and pinned[0] is labels
