#!/usr/bin/env bash
# GPU check on a CUDA machine without network, virtual environment or pip index.
# Usage: benchmarks/gpu/run.sh DIR [arguments of python -m benchmarks.gpu]
#
# The script installs .gpu-wheels (`make gpu-wheels`) to a temporary folder. It builds
# realign_kernels/_C if that is missing, and runs the check. DIR gets the results and the logs.
# PYTHON selects the interpreter: PYTHON=python3.12 benchmarks/gpu/run.sh DIR
set -euo pipefail

out=$(realpath -m "${1:?usage: benchmarks/gpu/run.sh DIR [arguments]}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"

build() {
    local suffix
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    if [ -e "realign_kernels/_C$suffix" ]; then
        return
    fi
    # 90-real is machine code for Hopper only. It compiles in a third of the default list's time.
    PATH=$PATH:/usr/local/cuda/bin cmake -S . -B "$scratch/build" -G Ninja \
        -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=90-real \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/realign_kernels" \
        -DPython_EXECUTABLE="$(command -v "$python")" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
        cmake --build "$scratch/build" --target _C
}

install() {
    if ! compgen -G '.gpu-wheels/*.whl' >/dev/null; then
        echo 'There is no .gpu-wheels folder. Run `make gpu-wheels` on a machine with a network.' >&2
        return
    fi
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$scratch/site" .gpu-wheels/*.whl
}

build >>"$out/build.txt" 2>&1 &
building=$!
install
wait "$building" || echo "_C was not built (see $out/build.txt). The check runs without it." >&2

export PYTHONPATH=$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Without a network the host name may not resolve, and gloo and NCCL ranks would not connect.
export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
"$python" -m benchmarks.gpu --out "$out" "$@"
