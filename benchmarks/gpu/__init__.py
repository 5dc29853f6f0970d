"""GPU check: measures on a CUDA machine, in minutes, every figure that docs/gpu.md calculates.

`python -m benchmarks.gpu --out DIR --budget 470` runs the parts, most valuable first. Each part is
a process with a time limit. `--rehearse` runs the same code at toy sizes on a CPU.
"""
