// E of one logit in the epilogue of exp_head.cu. The test runs it on the host.
#pragma once

#include <cmath>

#include "host_device.h"

namespace realign {

// exp2(scale * z - shift), or 0 if `left_out`. Results below 2^-126 are 0.
REALIGN_HOST_DEVICE inline float masked_exp2(float z, float scale, float shift, bool left_out) {
  const float exponent = fmaf(z, scale, -shift);
  float value;
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(exponent));
#else
  value = exponent < -126.0f ? 0.0f : std::exp2(exponent);
#endif
  return left_out ? 0.0f : value;
}

}  // namespace realign
