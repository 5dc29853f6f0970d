// Checks of arrays and addresses, shared by all bindings. An access through a misaligned pointer is
// undefined, and numpy makes such arrays, for example with np.frombuffer(..., offset=1).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

namespace realign {

inline void check_flat(const pybind11::array& array, const char* name, const char* dtype) {
  constexpr int aligned = pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_;
  constexpr int needed = pybind11::array::c_style | aligned;
  if (array.ndim() != 1 || (array.flags() & needed) != needed) {
    throw pybind11::value_error(std::string(name) + " must be a contiguous 1-D " + dtype +
                                " array, aligned in memory");
  }
}

// The entries of an aligned, contiguous 1-D array of dtype T in the machine's byte order.
template <class T>
const T* flat(const pybind11::array& array, const char* name, const char* dtype) {
  if (!pybind11::isinstance<pybind11::array_t<T>>(array)) {
    throw pybind11::value_error(std::string(name) + " must be a contiguous 1-D " + dtype +
                                " array, in the byte order of this machine");
  }
  check_flat(array, name, dtype);
  return static_cast<const T*>(array.data());
}

// A pointer from the address of a tensor. torch.frombuffer makes misaligned tensors.
template <class T = void>
T* at(uintptr_t address) {
  if constexpr (!std::is_void_v<T>) {
    if (address % alignof(T) != 0) {
      throw pybind11::value_error("a tensor is not aligned to its dtype. Pass a copy of it.");
    }
  }
  return reinterpret_cast<T*>(address);
}

// An access to address 0 ends the process. Tensors without elements have this address.
inline void check_given(std::initializer_list<uintptr_t> addresses) {
  for (const uintptr_t address : addresses) {
    if (address == 0) {
      throw pybind11::value_error("a tensor has the address 0. Pass a tensor with elements.");
    }
  }
}

}  // namespace realign
