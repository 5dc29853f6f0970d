"""Builds `realign_kernels._C` with CMake. All other package settings are in pyproject.toml.

The extension is optional. If CMake or the C++ compiler fails, the install continues in pure Python,
and `realign_kernels` warns at first use (realign_kernels/_extension.py). `pip install -v` shows the
compiler's messages.

REALIGN_CUDA=auto|on|off controls the CUDA code. With auto, the default, it is built if a CUDA
compiler works. If CUTLASS or CUDA does not compile, the build continues without it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA = os.environ.get("REALIGN_CUDA", "auto")
if CUDA not in ("auto", "on", "off"):
    raise SystemExit(f"REALIGN_CUDA is {CUDA!r}, but must be auto, on or off")


def cutlass() -> str:
    """Folder of CUTLASS's headers, from CUTLASS_DIR or the package nvidia-cutlass, or empty.

    An isolated build cannot import packages of the target environment, but can read its files.
    """
    package = Path(sysconfig.get_path("purelib"), "cutlass_library", "source")
    folder = Path(os.environ.get("CUTLASS_DIR") or package) / "include"
    return str(folder) if (folder / "cutlass").is_dir() else ""


class CMakeBuild(build_ext):
    """Runs CMake and Ninja instead of setuptools' compiler."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if self.editable_mode:
            # A failed build must not leave an old binary with new Python code.
            (ROOT / "realign_kernels" / target.name).unlink(missing_ok=True)
        # CMake's cache would point to the ninja and pybind11 of the last isolated build, whose
        # directory no longer exists.
        scratch = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            import pybind11

            configure = [
                *("cmake", "-S", str(ROOT), "-B", str(scratch), "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                # CMake does not look for these two in a cross build (cmake/aarch64.cmake).
                f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
                f"-DPYTHON_MODULE_EXTENSION={target.name.removeprefix('_C')}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
            ways = [(CUDA, cutlass())]
            if CUDA == "auto":
                # CUTLASS may have the wrong version, and takes 3 GB of memory to compile. A CUDA
                # compiler may pass CMake's test but fail on our code.
                ways = list(dict.fromkeys([*ways, (CUDA, ""), ("off", "")]))
            for cuda, headers in ways:
                try:
                    self.cmake([*configure, f"-DREALIGN_CUTLASS={headers}"], scratch, cuda)
                    break
                except subprocess.CalledProcessError:
                    if (cuda, headers) == ways[-1]:
                        raise
                    without = "CUTLASS" if headers else "CUDA"
                    print(f"The build failed. Trying again without {without}.", flush=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # After a CompileError setuptools continues without an optional extension.
            raise CompileError(f"{ext.name} was not built: {error}") from error

    def cmake(self, configure: list[str], scratch: Path, cuda: str) -> None:
        """Builds `_C` with REALIGN_CUDA=cuda."""
        subprocess.run([*configure, f"-DREALIGN_CUDA={cuda}"], check=True)
        subprocess.run(["cmake", "--build", str(scratch), "--target", "_C"], check=True)


# With REALIGN_CUDA=on the extension is not optional: a package without CUDA would be an error.
setup(
    ext_modules=[Extension("realign_kernels._C", sources=[], optional=CUDA != "on")],
    cmdclass={"build_ext": CMakeBuild},
)
