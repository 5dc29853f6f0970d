// The module realign_kernels._C, and the binding of pack_forest for numpy arrays. The public
// functions of the package validate arguments for users. The checks here only prevent accesses
// outside the arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "refcache/packing.h"

namespace py = pybind11;

namespace {

// Passes the vector's memory to numpy without a copy.
py::array_t<int64_t> to_numpy(std::vector<int64_t>&& values) {
  auto owned = std::make_unique<std::vector<int64_t>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owned->size());
  const int64_t* data = owned->data();
  py::capsule owner(owned.get(), [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  owned.release();
  return py::array_t<int64_t>(size, data, owner);
}

py::tuple pack_forest(const py::array& root_lengths,
                      const py::array& leaf_lengths,
                      const py::array& leaf_roots,
                      int64_t budget) {
  const int64_t* roots = realign::flat<int64_t>(root_lengths, "root_lengths", "int64");
  const int64_t* leaves = realign::flat<int64_t>(leaf_lengths, "leaf_lengths", "int64");
  const int64_t* parents = realign::flat<int64_t>(leaf_roots, "leaf_roots", "int64");
  const int64_t num_roots = root_lengths.size();
  const int64_t num_leaves = leaf_lengths.size();
  if (leaf_roots.size() != num_leaves) {
    throw py::value_error("leaf_roots and leaf_lengths must have the same size");
  }
  realign::ForestPacking packing;
  {
    py::gil_scoped_release release;
    realign::check_forest(roots, num_roots, leaves, parents, num_leaves, budget);
    packing = realign::pack_forest(roots, num_roots, leaves, parents, num_leaves, budget);
  }
  return py::make_tuple(
      to_numpy(std::move(packing.tree_root)), to_numpy(std::move(packing.tree_row)),
      to_numpy(std::move(packing.tree_start)), to_numpy(std::move(packing.leaf_tree)),
      to_numpy(std::move(packing.leaf_start)), to_numpy(std::move(packing.row_lengths)));
}

}  // namespace

void bind_cuda(py::module_& module);     // cuda.cpp
void bind_kernels(py::module_& module);  // kernels.cpp
void bind_staging(py::module_& module);  // staging.cpp
void bind_table(py::module_& module);    // table.cpp

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ core of realign_kernels, called through its public functions.";
  module.def("pack_forest", &pack_forest, py::arg("root_lengths"), py::arg("leaf_lengths"),
             py::arg("leaf_roots"), py::arg("budget"));
  bind_cuda(module);
  bind_kernels(module);
  bind_staging(module);
  bind_table(module);
}
