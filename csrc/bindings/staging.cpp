// Bindings of the staging ring for realign_kernels/refcache/staging.py. They take addresses: the
// caller owns the values and has checked their dtype and device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "staging/staging_host.h"
#if defined(REALIGN_HAS_CUDA)
#include "staging/staging_cuda.h"
#endif

namespace py = pybind11;

namespace {

using realign::at;
using realign::Staging;

std::unique_ptr<Staging> make_staging(int slots, int device) {
  if (device < 0) return realign::make_host_staging(slots);
#if defined(REALIGN_HAS_CUDA)
  return realign::make_cuda_staging(device, slots);
#else
  throw py::value_error("device is " + std::to_string(device) +
                        ", but this build has no CUDA. Put nvcc on PATH and run REALIGN_CUDA=on "
                        "pip install -v --force-reinstall --no-deps . in the checkout, or pass -1");
#endif
}

// Keeps the GIL, because it only enqueues. The GIL also protects `offsets`.
void push(Staging& ring, uintptr_t values, int64_t count,
          const py::array& offsets, uintptr_t stream) {
  const auto* from = realign::flat<int64_t>(offsets, "offsets", "int64");
  if (offsets.size() < 1) {
    throw py::value_error("offsets must be 1-D, with one entry more than the number of leaves");
  }
  if (count > 0) realign::check_given({values});
  ring.push(at<const float>(values), count, from, offsets.size() - 1, at(stream));
}

py::array_t<double> pop(Staging& ring) {
  std::vector<double> sums;
  {
    py::gil_scoped_release release;
    sums = ring.pop();
  }
  return py::array_t<double>(static_cast<py::ssize_t>(sums.size()), sums.data());
}

}  // namespace

void bind_staging(py::module_& module) {
#if defined(REALIGN_HAS_CUDA)
  module.attr("CUDA_ARCHITECTURES") = realign::cuda_architectures();
#else
  module.attr("CUDA_ARCHITECTURES") = "";
#endif
  py::class_<Staging>(module, "StagingRing")
      .def(py::init(&make_staging), py::arg("slots"), py::arg("device") = -1)
      .def("push", &push, py::arg("values"), py::arg("count"), py::arg("offsets"),
           py::arg("stream") = 0)
      .def("pop", &pop)
      .def_property_readonly("pending", &Staging::pending)
      .def_property_readonly("slots", &Staging::slots);
}
