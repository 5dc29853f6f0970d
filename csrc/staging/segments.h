// The sum of one leaf's per-token log-probs, in double and in one order on host and device: a
// cached value must not depend on which of them added it up.
//
// Lane i of 32 adds values i, i + 32, i + 64, ... of the leaf. Then the lanes are added as a tree:
// lane i takes lane i + 16, then i + 8, 4, 2 and 1, and lane 0 holds the sum. There is no product,
// so nothing that a compiler could contract; built with -ffast-math it would be another sum.
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

// The sum of values[begin:end]; 0 where there are none. On a device a warp does this (staging.cu).
inline double segment_sum(const float* values, int64_t begin, int64_t end) {
  double lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane_sum(values, begin, end, lane);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  }
  return lanes[0];
}

}  // namespace realign
