// The staging ring over host memory. push computes the sums before it returns.
#pragma once

#include <memory>

#include "staging/staging.h"

namespace realign {

std::unique_ptr<Staging> make_host_staging(int slots);

}  // namespace realign
