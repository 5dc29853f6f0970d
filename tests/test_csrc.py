"""The C++ core: its own tests under sanitizers, the threads it uses, the CPU it is told to use."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import realign_kernels as rk

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    rk.explain().find("backend cpp") < 0, reason="the C++ extension is not built"
)


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_core_is_right_and_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    options = ("-DREALIGN_PYTHON=OFF", "-DREALIGN_TESTS=ON", "-DREALIGN_SANITIZE=address,undefined")
    configure = ("cmake", "-S", ROOT, "-B", tmp_path, *options)
    for command in (configure, ("cmake", "--build", tmp_path, "--parallel", "2")):
        subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([tmp_path / "core_tests"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("0 failures\n"), done.stdout + done.stderr

    # An inline library function compiled for AVX-512 here and merged by the linker with the copies
    # of other files would crash an older CPU.
    objects = [path for path in tmp_path.rglob("*.o") if path.name.startswith(("gemm", "rows_avx"))]
    assert len(objects) == 4
    symbols = subprocess.run(["nm", *objects], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if " W " in line or " u " in line]


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


THREADS = """
import threading, torch
import realign_kernels as rk
torch.set_num_threads(3)
hidden, weight = torch.randn(96, 64).bfloat16(), torch.randn(4000, 64).bfloat16()
torch.mm(hidden, weight.T)
def threads():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Threads:")).split()[1])
before = threads()
rk.linear_logprobs(hidden.requires_grad_(), weight, torch.zeros(96, dtype=torch.int64))
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(before, threads(), len(libraries))
"""


def test_the_kernels_run_on_the_threads_of_torch():
    before, after, libraries = run(THREADS, OMP_NUM_THREADS="3").stdout.split()
    assert before == after and libraries == "1"


RESULTS = """
import hashlib, torch
import realign_kernels as rk
g = torch.Generator()
for threads, dtype in ((1, torch.float32), (2, torch.float32), (5, torch.float32),
                       (1, torch.bfloat16), (2, torch.bfloat16), (5, torch.bfloat16)):
    torch.set_num_threads(threads)
    g.manual_seed(0)
    hidden = torch.randn(3, 7, 11, 96, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(1003, 96, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(1003, (3, 7, 11), generator=g)
    out = rk.rdpo_loss(hidden, weight, labels, torch.zeros(3, 7), chunk_rows=64)
    out.loss.backward()
    tensors = (out.loss.detach(), out.logps.detach(), hidden.grad, weight.grad)
    parts = [t.float().contiguous().numpy().tobytes() for t in tensors]
    print(*(hashlib.sha256(part).hexdigest()[:12] for part in parts))
"""


def test_results_are_bitwise_the_same_with_any_number_of_threads():
    lines = run(RESULTS).stdout.splitlines()
    assert len(lines) == 6
    assert len(set(lines[:3])) == 1 and len(set(lines[3:])) == 1


@pytest.mark.parametrize(("level", "message"), [("sse", "use scalar, avx2 or avx512"), ("", "")])
def test_cpu_level_from_the_environment(level, message):
    done = run("import realign_kernels as rk; print(rk.explain())", REALIGN_CPU=level)
    if message:
        assert f"REALIGN_CPU={level}: {message}" in done.stderr
    else:
        assert "rows, GEMM" in done.stdout
