// Marks functions that CUDA compiles for host and device, and a C++ compiler for the host.
#pragma once

#if defined(__CUDACC__)
#define REALIGN_HOST_DEVICE __host__ __device__
#else
#define REALIGN_HOST_DEVICE
#endif
