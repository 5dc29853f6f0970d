"""Triton kernels of the head and of the loss, for CUDA.

- `row_kernel`: statistics and E from rows of logits
- `forward`: the same statistics from hidden states, without logits in memory
- `exp_head`: E from hidden states, without logits in memory
- `epilogue`, `scatter`: the last steps of the gradients
- `loss`: from token log-probs to the loss and its coefficients in one launch
- `configs`: tile sizes
- `compile`: ahead-of-time compilation of all kernels, with a report
- `backend`: the class that `dispatch` loads

This package imports nothing, so that Triton is loaded only when a kernel is needed.
"""
