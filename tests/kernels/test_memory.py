"""Memory of a step beyond its inputs, each measured in a separate process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads peaks from Linux's /proc"
)

EXAMPLES, RESPONSE, WIDTH, VOCABULARY = 4, 64, 256, 32000
ROWS = 3 * EXAMPLES * RESPONSE
STEP = """
import json, os, sys, torch
import realign_kernels as rk
examples, response, width, vocabulary = json.loads(sys.argv[1])
torch.set_num_threads(1)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

def extra(length, trainable):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, examples, length, width, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g).bfloat16().requires_grad_(trainable)
    labels = torch.randint(vocabulary, (3, examples, length), generator=g)
    labels[..., : length - response] = -100
    def step(hidden, labels):
        rk.rdpo_loss(hidden, weight, labels, torch.zeros(3, examples)).loss.backward()
    small = hidden[:, :, -2:].detach().requires_grad_()  # loads code, starts threads
    step(small, labels[:, :, -2:])
    weight.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    step(hidden, labels)
    return status("VmHWM") - before - hidden.grad.nbytes

for arguments in ((1024, False), (8192, False), (1024, True)):
    if (child := os.fork()) == 0:
        print(extra(*arguments), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def extra():
    """Bytes beyond the inputs and the gradient of hidden, which autograd has to return.

    A frozen head with 1,024 and 8,192 positions, and a trained head with 1,024 positions.
    """
    args = json.dumps([EXAMPLES, RESPONSE, WIDTH, VOCABULARY])
    done = subprocess.run(
        [sys.executable, "-c", STEP, args], capture_output=True, text=True, check=True
    )
    return [int(line) for line in done.stdout.split()]


def test_memory_of_a_frozen_step(extra):
    """768 response rows need the same memory for any number of image and prompt tokens."""
    short, long, _ = extra
    workspace = 384 * VOCABULARY * 4  # two chunks of 384 rows, fp32 logits
    rows = ROWS * WIDTH * (4 + 2)  # dlogp_dh in fp32, and the rows
    print(f"\nextra bytes at T = 1024: {short / 2**20:.1f} MiB, at 8192: {long / 2**20:.1f} MiB")
    budget = workspace + rows + 4 * 2**20
    assert short < budget
    assert long < budget + 6 * 2**20  # masks and row numbers of 98,304 positions


def test_a_trainable_head_adds_its_gradient(extra):
    workspace, gradient = ROWS * VOCABULARY * 4, VOCABULARY * WIDTH * 2
    assert extra[2] < workspace + gradient + ROWS * WIDTH * (4 + 2) + 4 * 2**20
