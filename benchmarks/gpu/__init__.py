"""GPU check: measures the figures of docs/gpu.md on a CUDA machine, in eight minutes."""
