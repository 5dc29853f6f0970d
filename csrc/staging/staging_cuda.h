// The staging ring of a CUDA device. Needs no CUDA header.
#pragma once

#include <memory>

#include "staging/staging.h"

namespace realign {

// Throws std::runtime_error, in CUDA's words, where the device or its driver cannot be used.
std::unique_ptr<Staging> make_cuda_staging(int device, int slots);

// What the kernels were compiled for, as CMake names it: "80-real 90-real".
const char* cuda_architectures();

}  // namespace realign
