// Functions that CUDA compiles for both, and a C++ compiler for the host.
#pragma once

#if defined(__CUDACC__)
#define REALIGN_HOST_DEVICE __host__ __device__
#else
#define REALIGN_HOST_DEVICE
#endif
