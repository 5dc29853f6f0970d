// The sum of one leaf's per-token log-probs, in double. The order is the same on host and device,
// so that a cached value does not depend on where it was computed.
//
// Lane i of 32 adds values i, i + 32, i + 64, ... of the leaf. Then the lanes are added as a tree:
// lane i adds lane i + 16, then i + 8, 4, 2 and 1. Lane 0 holds the sum. There are no products that
// a compiler could contract into an FMA. -ffast-math would change the sum.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace realign {

constexpr int kLanes = 32;

REALIGN_HOST_DEVICE inline double lane_sum(const float* values,
                                           int64_t begin,
                                           int64_t end,
                                           int lane) {
  double sum = 0;
  for (int64_t i = begin + lane; i < end; i += kLanes) sum += static_cast<double>(values[i]);
  return sum;
}

// The sum of values[begin:end], 0 if empty. On a device a warp computes it (staging.cu).
inline double segment_sum(const float* values, int64_t begin, int64_t end) {
  double lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane_sum(values, begin, end, lane);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  }
  return lanes[0];
}

}  // namespace realign
