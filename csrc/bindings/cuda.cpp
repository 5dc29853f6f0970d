// Bindings of CUDA kernels for realign_kernels/backends/triton. They take addresses: the caller
// owns the tensors and has checked their dtypes, devices and strides. A build without a kernel
// lacks its function.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#if defined(REALIGN_HAS_EXP_HEAD)
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "gemm/exp_head.h"
#endif

namespace py = pybind11;

#if defined(REALIGN_HAS_EXP_HEAD)
namespace {

using realign::at;

// Keeps the GIL, because it only enqueues.
void exp_head(uintptr_t hidden,
              uintptr_t weight,
              uintptr_t exp_logits,
              uintptr_t shift,
              uintptr_t labels,
              uintptr_t sums,
              uintptr_t rounded_sums,
              const std::array<int, 3>& shape,
              const std::array<int64_t, 3>& strides,
              int device,
              uintptr_t stream) {
  const realign::ExpHead head{
      at<const void>(hidden), at<const void>(weight), at<void>(exp_logits),
      at<const float>(shift), at<const int32_t>(labels), at<float>(sums), at<float>(rounded_sums),
      shape[0], shape[1], shape[2], strides[0], strides[1], strides[2]};
  realign::exp_head(head, device, at<void>(stream));
}

}  // namespace
#endif

void bind_cuda(py::module_& module) {
#if defined(REALIGN_HAS_EXP_HEAD)
  module.attr("EXP_HEAD_TILE") = py::make_tuple(realign::kExpHeadRows, realign::kExpHeadColumns);
  module.def("exp_head", &exp_head);
#else
  static_cast<void>(module);
#endif
}
