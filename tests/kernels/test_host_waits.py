"""Host waits of a head call: one, for the flags of its results."""

import pytest
import torch
from host_waits import counted

import realign_kernels as rk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = ["cpu", "cuda"] if DEVICE == "cuda" else ["cpu"]
"""Where labels and sequence_ids are. On the device they are read first, which is a second wait."""


def batch(packed, ignored, place):
    """Arguments of rdpo_loss for 4 examples, hidden apart."""
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
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_loss_waits_once(packed, ignored, frozen, dtype, place):
    hidden, rest = batch(packed, ignored, place)
    hidden = hidden.to(dtype).requires_grad_()
    weight = torch.randn(50, 16, device=DEVICE).to(dtype).requires_grad_(not frozen)
    for _ in range(2):  # the first call compiles kernels
        with counted() as forward:
            output = rk.rdpo_loss(hidden, weight, **rest, chunk_rows=20)
        with counted() as backward:
            output.loss.backward()
    assert forward.total() == (1 if place == "cpu" else 2)
    # On the CPU the scalar spares a pass over the gradient of the weight.
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
