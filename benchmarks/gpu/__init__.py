"""GPU check: measures on a CUDA machine, in minutes, every figure that docs/gpu.md calculates."""
