"""Triton kernels of the head and of the loss, for CUDA.

`row_kernel` reads rows of logits, `forward` computes the same statistics from hidden states without
logits, `epilogue` and `scatter` finish the gradients. `loss` goes from log-probs of tokens to the
loss and its coefficients in one launch. `configs` holds the tile sizes, `compile` builds every
kernel ahead of time and reports on it, `backend` holds the class that `dispatch` loads.

Nothing is imported here: Triton is loaded by the modules that define kernels, when they are needed.
"""
