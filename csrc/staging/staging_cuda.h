// The staging ring of a CUDA device. Needs no CUDA header.
#pragma once

#include <memory>

#include "staging/staging.h"

namespace realign {

// Throws std::runtime_error with CUDA's message if the device or its driver is unusable.
std::unique_ptr<Staging> make_cuda_staging(int device, int slots);

// The architectures of the compiled kernels, with CMake's names: "80-real 90-real".
const char* cuda_architectures();

}  // namespace realign
