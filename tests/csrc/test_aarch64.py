"""The C++ code for aarch64: cross-compilation, C++ tests under qemu, and the Python module."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-g++"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
SYSROOT = "/usr/aarch64-linux-gnu"
SUFFIX = ".cpython-0-aarch64-linux-gnu.so"

pytestmark = pytest.mark.skipif(
    not shutil.which(COMPILER) or not shutil.which("cmake"), reason=f"needs {COMPILER} and cmake"
)
with_qemu = pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64, of qemu-user-static")


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    """Returns a function that builds targets for aarch64 and returns their folder."""
    folder = tmp_path_factory.mktemp("aarch64")
    pybind = importlib.util.find_spec("pybind11")
    options = [
        f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64.cmake'}",
        "-DCMAKE_BUILD_TYPE=None",  # compiles bindings faster, kernels always use -O3
        f"-DREALIGN_PYTHON={'ON' if pybind else 'OFF'}",
        *("-DREALIGN_TESTS=ON", "-DREALIGN_CUDA=off", "-DCMAKE_CXX_FLAGS=-Werror"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
        f"-DPYTHON_MODULE_EXTENSION={SUFFIX}",
    ]
    if pybind:
        import pybind11

        options.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")

    def build(*targets):
        compile_ = ("cmake", "--build", folder, "--parallel", "2", "--target", *targets)
        for command in (("cmake", "-S", ROOT, "-B", folder, *options), compile_):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        return folder

    return build


def emulated(cpu, *command, **environment):
    done = subprocess.run(
        [QEMU, "-L", SYSROOT, "-cpu", cpu, *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0 and done.stdout.endswith("0 failures\n"), output
    return done.stdout


@with_qemu
@pytest.mark.parametrize(
    ("cpu", "level", "rows", "gemm"),
    [
        ("max", "", "neon", "own"),  # with BF16, like Grace and Graviton 3
        ("cortex-a72", "", "neon", "of torch"),  # without BF16, like Graviton 1
        ("max", "scalar", "scalar", "of torch"),
    ],
)
def test_the_core_under_qemu(cross, cpu, level, rows, gemm):
    output = emulated(cpu, cross("core_tests") / "core_tests", REALIGN_CPU=level)
    assert f"exp {rows}" in output and f"GEMM bf16 {gemm}, f32 of torch" in output
    assert ("exp neon" in output) == (rows == "neon")


@with_qemu
def test_the_table_and_the_staging_ring_under_qemu(cross, tmp_path):
    folder = cross("table_tests", "staging_tests")
    emulated("max", folder / "table_tests", tmp_path, "50", "1")
    emulated("max", folder / "staging_tests")


def test_only_the_gemm_needs_bf16(cross):
    """The GEMM's file must share no function with the other files, which run without BF16."""
    objects = list(cross("realign_core").rglob("gemm_neon.cpp.o"))
    assert len(objects) == 1
    nm = COMPILER.replace("g++", "nm")
    symbols = subprocess.run([nm, *objects], capture_output=True, text=True, check=True).stdout
    assert "gemm_bf16" in symbols
    assert not [line for line in symbols.splitlines() if " W " in line or " u " in line]


@pytest.mark.skipif(not importlib.util.find_spec("pybind11"), reason="needs pybind11")
def test_the_module_links_without_python(cross):
    module = cross("_C") / f"_C{SUFFIX}"
    readelf = COMPILER.replace("g++", "readelf")
    output = subprocess.run(
        [readelf, "-h", "-d", module], capture_output=True, text=True, check=True
    ).stdout
    assert "AArch64" in output and "libstdc++" in output and "libpython" not in output
    nm = [COMPILER.replace("g++", "nm"), "-DCu", module]
    missing = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
    assert "PyObject" in missing and "realign::" not in missing
