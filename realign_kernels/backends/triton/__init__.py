"""Triton kernels of the head and of the loss, for CUDA.

`rows` reads rows of logits, `forward` gets the same figures from hidden states without writing
logits, `loss` goes from log-probs of tokens to the loss and its coefficients in one launch,
`configs` holds the tile sizes, `compile` builds every kernel ahead of time and reports on it,
`backend` is what dispatch asks for.

Nothing is imported here: Triton is loaded by the modules that define kernels, when they are needed.
"""
