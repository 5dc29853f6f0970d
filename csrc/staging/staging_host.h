// The staging ring over host memory: the sums are there when push returns.
#pragma once

#include <memory>

#include "staging/staging.h"

namespace realign {

std::unique_ptr<Staging> make_host_staging(int slots);

}  // namespace realign
