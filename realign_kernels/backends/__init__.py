"""Log-prob backends: chunked GEMM and row kernels by torch, C++ and Triton."""
