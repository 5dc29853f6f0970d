"""What a step takes beyond its inputs, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads peaks from Linux's /proc"
)

STEP = """
import json, sys, torch
import realign_kernels as rk
length, trainable, examples, response, width, vocabulary = json.loads(sys.argv[1])
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
hidden = torch.randn(3, examples, length, width, generator=g).bfloat16().requires_grad_()
weight = torch.randn(vocabulary, width, generator=g).bfloat16().requires_grad_(trainable)
labels = torch.randint(vocabulary, (3, examples, length), generator=g)
labels[..., : length - response] = -100
reference = torch.zeros(3, examples)
def step(hidden, labels):
    rk.rdpo_loss(hidden, weight, labels, reference).loss.backward()
small = hidden[:, :, -2:].detach().requires_grad_()  # loads code, starts threads
step(small, labels[:, :, -2:])
weight.grad = None

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from what is resident now
before = status("VmRSS")
step(hidden, labels)
print(json.dumps([status("VmHWM") - before, hidden.grad.nbytes]))
"""
EXAMPLES, RESPONSE, WIDTH, VOCABULARY = 4, 64, 256, 32000
ROWS = 3 * EXAMPLES * RESPONSE


def peak(length, trainable=False):
    """Bytes beyond the inputs and the gradient of hidden, which autograd has to return."""
    args = json.dumps([length, trainable, EXAMPLES, RESPONSE, WIDTH, VOCABULARY])
    done = subprocess.run(
        [sys.executable, "-c", STEP, args], capture_output=True, text=True, check=True
    )
    extra, gradient = json.loads(done.stdout)
    return extra - gradient


def test_a_frozen_step_takes_its_workspace_and_a_direction_per_response_row(capsys):
    """Whatever the image and prompt tokens: 1,024 and 8,192 positions, the same 768 responses."""
    short, long = peak(1024), peak(8192)
    workspace = 384 * VOCABULARY * 4  # two chunks of 384 rows, fp32 logits
    rows = ROWS * WIDTH * (4 + 2)  # direction in fp32, the rows themselves
    print(f"\nextra bytes at T = 1024: {short / 2**20:.1f} MiB, at 8192: {long / 2**20:.1f} MiB")
    budget = workspace + rows + 4 * 2**20
    assert short < budget
    assert long < budget + 6 * 2**20  # masks and row numbers of 98,304 positions


def test_a_trainable_head_adds_its_gradient():
    extra = peak(1024, trainable=True)
    workspace, gradient = ROWS * VOCABULARY * 4, VOCABULARY * WIDTH * 2
    assert extra < workspace + gradient + ROWS * WIDTH * (4 + 2) + 4 * 2**20
