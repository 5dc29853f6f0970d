// Bindings of row kernels and GEMM for realign_kernels/backends/cpp.py. They take addresses: the
// caller owns the tensors and has checked shapes, strides and dtypes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/arrays.h"
#include "cpu.h"
#include "gemm/gemm.h"
#include "rows/rows.h"

namespace py = pybind11;

namespace {

using realign::at;
using realign::check_given;
using realign::Dtype;

constexpr int kMostThreads = 4096;

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "bfloat16") return Dtype::bf16;
  throw py::value_error("dtype must be float32 or bfloat16, got " + name);
}

void* at(uintptr_t address, Dtype dtype) {
  return dtype == Dtype::f32 ? static_cast<void*>(at<float>(address)) : at<uint16_t>(address);
}

// Loops and offsets in bytes are in int64 and int, so other sizes would be undefined. A pair holds
// a number of rows, and the elements of a row or between rows.
void check_sizes(std::initializer_list<std::pair<int64_t, int64_t>> sizes, int threads) {
  constexpr int64_t most = std::numeric_limits<int64_t>::max() / 16;
  for (const auto [rows, stride] : sizes) {
    if (rows < 0 || stride < 0) {
      throw py::value_error("a size is negative: " + std::to_string(std::min(rows, stride)));
    }
    if (stride > 0 && rows > most / stride) {
      throw py::value_error("a matrix of " + std::to_string(rows) + " x " +
                            std::to_string(stride) + " elements is too large");
    }
  }
  // The OpenMP library ends the process if the system refuses a thread.
  if (threads < 1 || threads > kMostThreads) {
    throw py::value_error("threads must be at least 1 and at most " +
                          std::to_string(kMostThreads) + ", got " + std::to_string(threads));
  }
}

py::dict cpu_features() {
  const realign::Cpu& cpu = realign::cpu();
  py::dict features;
  features["level"] = realign::kLevels[static_cast<int>(cpu.level)];
  features["bf16"] = cpu.bf16;
  features["amx"] = cpu.amx;
  features["gemm_f32"] = realign::gemm_of_f32() != nullptr;
  features["gemm_bf16"] = realign::gemm_of_bf16() != nullptr;
  return features;
}

void gemm(const std::string& dtype, int64_t m, int64_t n, int64_t k, uintptr_t a, int64_t a_row,
          int64_t a_column, uintptr_t b, int64_t b_row, int64_t b_column, uintptr_t c,
          int64_t c_row, const std::string& c_dtype, bool accumulate, int threads) {
  check_sizes({{m, n}, {m, k}, {k, n}, {m, a_row}, {k, a_column}, {k, b_row}, {n, b_column},
               {m, c_row}},
              threads);
  if (m > 0 && n > 0) check_given({c});
  if (m > 0 && n > 0 && k > 0) check_given({a, b});
  const realign::Matrix left{at(a, dtype_of(dtype)), a_row, a_column};
  const realign::Matrix right{at(b, dtype_of(dtype)), b_row, b_column};
  if ((a_row != 1 && a_column != 1) || (b_row != 1 && b_column != 1)) {
    throw py::value_error("a and b must be contiguous along one axis");
  }
  const bool half = dtype_of(dtype) == Dtype::bf16, half_out = dtype_of(c_dtype) == Dtype::bf16;
  if (half_out && (!half || accumulate)) {
    throw py::value_error("a bfloat16 product needs bfloat16 matrices and cannot accumulate");
  }
  const realign::Gemm multiply = half ? realign::gemm_of_bf16() : realign::gemm_of_f32();
  if (multiply == nullptr) {
    throw py::value_error("there is no " + dtype + " GEMM for this CPU. Check cpu_features().");
  }
  const realign::Product product{at(c, dtype_of(c_dtype)), c_row, half_out, accumulate};
  py::gil_scoped_release release;
  multiply(m, n, k, left, right, product, threads);
}

void row_stats(uintptr_t logits, const std::string& logits_dtype, int64_t logits_stride,
               int64_t rows, int64_t vocabulary, uintptr_t labels, uintptr_t bias, float softcap,
               float temperature, uintptr_t runner_up, uintptr_t exp_logits,
               const std::string& exp_logits_dtype, int64_t exp_logits_stride, uintptr_t target,
               uintptr_t logit, uintptr_t max_logit, uintptr_t sum_exp, uintptr_t dz_dlogit,
               int threads) {
  check_sizes({{rows, vocabulary}, {rows, logits_stride}, {rows, exp_logits_stride}}, threads);
  if (rows > 0) check_given({labels, target, logit, max_logit, sum_exp, dz_dlogit});
  if (rows > 0 && vocabulary > 0) check_given({logits});
  const Dtype from = dtype_of(logits_dtype), to = dtype_of(exp_logits_dtype);
  const realign::RowInputs in{at(logits, from), from,       logits_stride,
                              rows,             vocabulary, at<const int64_t>(labels),
                              at<float>(bias),  softcap,    temperature,
                              at<const bool>(runner_up)};
  const realign::RowOutputs out{
      at(exp_logits, to),   to,                         exp_logits_stride,  at<int64_t>(target),
      at<float>(logit),     at<float>(max_logit),       at<float>(sum_exp), at<float>(dz_dlogit)};
  realign::cpu();  // may throw for REALIGN_CPU, so call it before the GIL is released
  py::gil_scoped_release release;
  realign::row_stats(in, out, threads);
}

void hidden_grad_epilogue(int64_t rows, int64_t width, uintptr_t exp_w, uintptr_t weight,
                          int64_t weight_stride, const std::string& weight_dtype, uintptr_t target,
                          uintptr_t dz_dlogit, uintptr_t sum_exp, uintptr_t factor, uintptr_t out,
                          const std::string& out_dtype, int threads) {
  check_sizes({{rows, width}, {1, weight_stride}}, threads);
  if (rows > 0) check_given({target, dz_dlogit, sum_exp, factor});
  if (rows > 0 && width > 0) check_given({exp_w, weight, out});
  const Dtype from = dtype_of(weight_dtype), to = dtype_of(out_dtype);
  const auto* exp_w_data = at<const float>(exp_w);
  const void* weight_data = at(weight, from);
  const auto* targets = at<const int64_t>(target);
  const auto* slopes = at<const float>(dz_dlogit);
  const auto* sums = at<const float>(sum_exp);
  const auto* factors = at<const float>(factor);
  void* const out_data = at(out, to);
  py::gil_scoped_release release;
  realign::hidden_grad_epilogue(rows, width, exp_w_data, weight_data, weight_stride, from, targets,
                                slopes, sums, factors, out_data, to, threads);
}

// Memory for a large result. The last tensor returns it to a pool. The first touch of 128 MiB takes
// up to 109 ms, and 13 ms in large pages. Memory that was touched before takes 5 ms.
class Block {
 public:
  explicit Block(size_t bytes) {
    if (bytes > std::numeric_limits<py::ssize_t>::max() / 2) {
      throw py::value_error("a block of " + std::to_string(bytes) + " bytes is too large");
    }
    std::lock_guard<std::mutex> lock(mutex());
    auto& kept = pool();
    for (auto it = kept.begin(); it != kept.end(); ++it) {
      if (it->second < bytes || it->second > bytes + bytes / 4) continue;
      std::tie(data_, size_) = *it;
      kept.erase(it);
      return;
    }
    constexpr size_t page = 2 << 20;
    size_ = (bytes + page - 1) / page * page;
    data_ = std::aligned_alloc(page, size_);
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data_, size_, MADV_HUGEPAGE);  // a hint that may fail
#endif
  }

  ~Block() {
    std::lock_guard<std::mutex> lock(mutex());
    auto& kept = pool();
    size_t held = size_;
    for (const auto& block : kept) held += block.second;
    if (held <= kKept) {
      kept.emplace_back(data_, size_);
    } else {
      std::free(data_);
    }
  }

  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  py::buffer_info buffer() const {
    return py::buffer_info(static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(size_));
  }

  static constexpr size_t kKept = 192 << 20;

 private:
  // Never destroyed: tensors may outlive static objects.
  static std::vector<std::pair<void*, size_t>>& pool() {
    static auto* kept = new std::vector<std::pair<void*, size_t>>;
    return *kept;
  }
  static std::mutex& mutex() {
    static auto* one = new std::mutex;
    return *one;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

py::array_t<float> exponential(const py::array& x) {
  const float* from = realign::flat<float>(x, "x", "float32");
  py::array_t<float> out(x.size());
  realign::row_kernels().back().exp(from, out.mutable_data(), x.size());
  return out;
}

}  // namespace

void bind_kernels(py::module_& module) {
  module.attr("ABI") = 5;  // incremented when a signature changes (see _extension.py)
  module.def("cpu_features", &cpu_features, "CPU features that the kernels use.");
  module.def("gemm", &gemm, py::arg("dtype"), py::arg("m"), py::arg("n"), py::arg("k"),
             py::arg("a"), py::arg("a_row"), py::arg("a_column"), py::arg("b"), py::arg("b_row"),
             py::arg("b_column"), py::arg("c"), py::arg("c_row"), py::arg("c_dtype"),
             py::arg("accumulate"), py::arg("threads"));
  module.def("read_rows", &row_stats, py::arg("logits"), py::arg("logits_dtype"),
             py::arg("logits_stride"), py::arg("rows"), py::arg("vocabulary"), py::arg("labels"),
             py::arg("bias"), py::arg("softcap"), py::arg("temperature"), py::arg("rival"),
             py::arg("others"), py::arg("others_dtype"), py::arg("others_stride"),
             py::arg("target"), py::arg("logit"), py::arg("peak"), py::arg("total"),
             py::arg("slope"), py::arg("threads"));
  module.def("finish_direction", &hidden_grad_epilogue, py::arg("rows"), py::arg("width"),
             py::arg("pull"), py::arg("weight"), py::arg("weight_stride"), py::arg("weight_dtype"),
             py::arg("target"), py::arg("slope"), py::arg("total"), py::arg("factor"),
             py::arg("out"), py::arg("out_dtype"), py::arg("threads"));
  py::class_<Block>(module, "Block", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer(&Block::buffer);
  module.def("exponential", &exponential, py::arg("x"), "exp as the row kernels compute it.");
}
