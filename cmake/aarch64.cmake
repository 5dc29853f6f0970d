# Toolchain for cross compilation to aarch64 on Linux, with Debian's g++-aarch64-linux-gnu.
# qemu-user-static runs the tests (tests/csrc/test_aarch64.py). To build a wheel for the Python
# version that runs the build:
#
#   export CMAKE_TOOLCHAIN_FILE=$PWD/cmake/aarch64.cmake REALIGN_CUDA=off
#   export SETUPTOOLS_EXT_SUFFIX=.cpython-311-aarch64-linux-gnu.so
#   pip wheel --no-deps --config-settings=--build-option=--plat-name=linux_aarch64 .
#
# The wheel needs at least the C and C++ libraries of the cross compiler. Its tag is linux_aarch64.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
