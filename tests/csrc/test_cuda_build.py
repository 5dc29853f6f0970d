"""The CUDA code of the extension: compiled code, dependencies, and builds without CUDA."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from realign_kernels._extension import extension, missing_reason

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)
REGISTERS = 32  # 65536 registers of a multiprocessor / 2048 threads

with_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")
with_extension = pytest.mark.skipif(
    missing_reason() is not None, reason=f"no extension: {missing_reason()}"
)
with_cmake = pytest.mark.skipif(
    not shutil.which("cmake") or not importlib.util.find_spec("pybind11"),
    reason="needs cmake and pybind11",
)


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of ptxas on csrc/staging/staging.cu, by architecture."""
    target = tmp_path_factory.mktemp("cuda") / "staging.o"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    source = ROOT / "csrc" / "staging" / "staging.cu"
    command = ["nvcc", "-c", source, "-o", target, "-I", ROOT / "csrc", "-std=c++17", "-O3"]
    define = '-DREALIGN_CUDA_ARCHITECTURES=""'
    done = subprocess.run(
        [*command, define, "-Xptxas", "-v", *codes], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    parts = re.split(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", done.stderr)[1:]
    kernels = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {int(architecture): (name, words) for name, architecture, words in kernels}


@with_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_spills_nothing_and_fills_a_multiprocessor(report, architecture):
    name, words = report[architecture]
    assert "sum_segments" in name
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in words
    registers = int(re.search(r"Used (\d+) registers", words)[1])
    print(f"{architecture:4} sum_segments {registers:3} registers")
    assert registers <= REGISTERS


@with_nvcc
@with_extension
def test_the_module_holds_code_for_every_architecture():
    architectures = extension().CUDA_ARCHITECTURES.split()
    assert {f"{a}-real" for a in ARCHITECTURES} | {"100-virtual"} <= set(architectures)


@with_extension
@pytest.mark.skipif(not shutil.which("ldd"), reason="needs ldd")
def test_the_module_needs_neither_driver_nor_toolkit():
    file = extension().__file__
    needed = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed and "libcuda" not in needed and "libcudart" not in needed
    # torch's CUDA runtime must not replace the module's copy either.
    symbols = subprocess.run(["nm", "-D", file], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols and not re.search(r"\bcu(da)?[A-Z]\w+", symbols)


@with_extension
@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
def test_a_ring_without_cuda_or_a_driver_gives_the_reason():
    error, reason = ValueError, "device is 0, but this build has no CUDA. Put nvcc on"
    if extension().CUDA_ARCHITECTURES:
        error, reason = RuntimeError, "cudaGetDevice: .*driver.*cudaErrorInsufficientDriver"
    with pytest.raises(error, match=reason):
        extension().StagingRing(2, device=0)


def configure(folder, *options, **environment):
    import pybind11

    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    return subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, *generator, *python, *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def script(path, *lines):
    """An executable file."""
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return str(path)


def build_ext(folder, **environment):
    """`setup.py build_ext` into `folder`."""
    folders = ("--build-temp", folder / "temp", "--build-lib", folder / "lib")
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# A compiler that does nothing for our C++ files. The tests only need the path through CMake and
# Ninja.
HOLLOW = """import os, sys
words = sys.argv[1:]
if "/csrc/" in words[-1]:
    words[-1:] = ["-x", "c++", os.devnull]
os.execv({0!r}, [{0!r}, *words])"""


@with_cmake
@pytest.mark.skipif(not shutil.which("ninja"), reason="needs ninja")
def test_an_install_continues_without_cuda_where_our_code_does_not_compile(tmp_path):
    nvcc = script(
        tmp_path / "nvcc",
        "#!/bin/sh",
        'case "$*" in *staging.cu*) exit 1;; esac',
        f'exec {shutil.which("nvcc") or "false"} "$@"',
    )
    compiler = script(
        tmp_path / "c++", f"#!{sys.executable} -S", HOLLOW.format(shutil.which("c++"))
    )
    environment = {"CXX": compiler, "CUDACXX": nvcc, "REALIGN_CUDA": "auto"}
    done = build_ext(tmp_path, **environment, CUTLASS_DIR=str(tmp_path))  # has no CUTLASS
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("Trying again without CUDA" in done.stdout) == bool(shutil.which("nvcc"))
    assert len(list(tmp_path.glob("lib/realign_kernels/_C*.so"))) == 1


@pytest.mark.parametrize(
    ("cuda", "fails", "tried"),
    [
        ("auto", "CUTLASS=/", [("auto", True), ("auto", False)]),
        ("auto", "CUDA=auto", [("auto", True), ("auto", False), ("off", False)]),
        ("on", "CUDA=on", [("on", True)]),
    ],
    ids=["CUTLASS", "CUDA", "asked for"],
)
def test_a_failed_build_is_repeated_without_cutlass(tmp_path, cuda, fails, tried):
    """If CUTLASS does not compile, CUDA is still built. cmake only records its arguments."""
    pytest.importorskip("pybind11")
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    notes = (f'echo "$*" >> {log}', f'case "$*" in *{fails}*) exit 1;; esac')
    script(tmp_path / "bin" / "cmake", "#!/bin/sh", *notes)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = build_ext(tmp_path, PATH=path, CUTLASS_DIR=str(tmp_path), REALIGN_CUDA=cuda)
    assert (done.returncode == 0) == (cuda == "auto")
    calls = [line for line in log.read_text().splitlines() if "REALIGN_CUDA" in line]
    words = [dict(re.findall(r"-DREALIGN_(CUDA|CUTLASS)=(\S*)", line)) for line in calls]
    assert [(one["CUDA"], bool(one["CUTLASS"])) for one in words] == tried


@with_cmake
def test_off_does_not_look_for_a_compiler(tmp_path):
    done = configure(tmp_path, "-DREALIGN_CUDA=off")
    assert done.returncode == 0 and "CUDA" not in done.stdout, done.stdout + done.stderr


@with_cmake
def test_only_a_request_for_cuda_needs_a_compiler(tmp_path):
    broken = script(tmp_path / "nvcc", "#!/bin/sh", "exit 1")
    done = configure(tmp_path / "on", "-DREALIGN_CUDA=on", CUDACXX=broken)
    assert done.returncode != 0
    assert "REALIGN_CUDA=on, but no CUDA compiler works here" in done.stderr
    done = configure(tmp_path / "auto", CUDACXX=broken)
    assert done.returncode == 0, done.stderr
    assert "REALIGN_CUDA: no CUDA compiler works here, so the module is built" in done.stdout


@with_cmake
def test_unknown_values_are_rejected(tmp_path):
    done = configure(tmp_path, "-DREALIGN_CUDA=yes")
    assert (
        done.returncode != 0 and "REALIGN_CUDA is 'yes', but must be auto, on or off" in done.stderr
    )
    setup = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        setup, cwd=ROOT, env={**os.environ, "REALIGN_CUDA": "yes"}, capture_output=True, text=True
    )
    assert (
        done.returncode != 0 and "REALIGN_CUDA is 'yes', but must be auto, on or off" in done.stderr
    )
