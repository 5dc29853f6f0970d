"""The C++ code: C++ tests under sanitizers, threads, and CPU levels."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import realign_kernels as rk
from realign_kernels import _extension

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    rk.explain().find("backend cpp") < 0, reason="the C++ extension is not built"
)


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def built(request, tmp_path_factory):
    """The sanitizer and a folder with the C++ tests built for it."""
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    folder = tmp_path_factory.mktemp("csrc")
    options = ("-DREALIGN_PYTHON=OFF", "-DREALIGN_TESTS=ON", f"-DREALIGN_SANITIZE={request.param}")
    targets = ["table_tests"]  # the only target with its own threads
    if request.param != "thread":  # the thread sanitizer does not support GCC's OpenMP
        targets += ["core_tests", "staging_tests", "fuzz_tests"]
    configure = ("cmake", "-S", ROOT, "-B", folder, *options)
    build = ("cmake", "--build", folder, "--parallel", "2", "--target", *targets)
    for command in (configure, build):
        subprocess.run(command, check=True, capture_output=True)
    return request.param, folder


def assert_clean(*command, **environment):
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer cannot run under this kernel's address randomisation")
    output = done.stdout + done.stderr
    assert done.returncode == 0 and done.stdout.endswith("0 failures\n"), output


def test_the_core_and_the_staging_ring_are_right_and_clean(built):
    sanitizer, folder = built
    if sanitizer != "thread":
        assert_clean(folder / "staging_tests")
        assert_clean(folder / "core_tests")
        if _extension.extension().cpu_features()["amx"]:  # test the same products with AVX-512
            assert_clean(folder / "core_tests", REALIGN_CPU="avx512")


def test_the_table_is_right_and_clean(built, tmp_path):
    """500 damaged logs (50 under the thread sanitizer), and concurrent writers and readers."""
    sanitizer, folder = built
    stress = float(os.environ.get("REALIGN_STRESS_SECONDS", "1"))
    faults, seconds = ("50", stress) if sanitizer == "thread" else ("500", 0.5)
    assert_clean(folder / "table_tests", tmp_path, faults, str(seconds))


def test_random_faults_of_logs_and_forests(built, tmp_path):
    """3 s of random inputs. `make fuzz SECONDS=600` runs longer, with another seed each time."""
    sanitizer, folder = built
    if sanitizer != "thread":
        assert_clean(folder / "fuzz_tests", "3", "1", tmp_path)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of files for x86")
def test_avx512_code_is_not_shared_with_other_files(built):
    """The linker could merge an inline function compiled for AVX-512 with copies of other files.

    That would crash an older CPU.
    """
    sanitizer, folder = built
    wide = ("gemm.", "gemm_amx", "rows_avx", "crc32c_sse42")
    objects = [path for path in folder.rglob("*.o") if path.name.startswith(wide)]
    assert len(objects) == (1 if sanitizer == "thread" else 6)
    symbols = subprocess.run(["nm", *objects], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if " W " in line or " u " in line]


SCRIPT = """
import hashlib, threading, torch
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
print(before == threads(), len(libraries))

g = torch.Generator()
for dtype in (torch.float32, torch.bfloat16):
    for threads in (1, 2, 5):
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


def run(script, **environment):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_the_kernels_run_on_the_threads_of_torch_with_one_result():
    """Kernels start no threads and load no other OpenMP library.

    Results are bitwise equal for 1, 2 and 5 threads.
    """
    done = run(SCRIPT, OMP_NUM_THREADS="3", REALIGN_CPU="")
    shared, *lines = done.stdout.splitlines()
    assert shared == "True 1" and len(lines) == 6, done.stderr
    assert len(set(lines[:3])) == 1 and len(set(lines[3:])) == 1


def test_an_unknown_cpu_level_is_refused():
    done = run("import realign_kernels as rk; print(rk.explain())", REALIGN_CPU="sse")
    assert "REALIGN_CPU=sse is unknown. Use one of scalar, " in done.stderr
