// Matrix products with fp32 results from bf16 or fp32 inputs, for CPUs with AVX-512, and
// from bf16 for aarch64 CPUs with BF16.
//
// Torch has no bf16 x bf16 -> fp32 product on the CPU: it rounds to bf16, which costs 1e-2 in a
// log-prob. This one keeps the fp32 sums, and is as fast with AVX512_BF16. With AMX it takes up to
// twice the time, as more is written.
#pragma once

#include <cstdint>

namespace realign {

struct Matrix {
  const void* data;
  int64_t row;     // elements from one row to the next
  int64_t column;  // elements from one column to the next; row or column is 1
};

struct Product {
  void* data;
  int64_t row;      // elements from one row to the next
  bool half;        // bf16, rounded once from the fp32 sums; else fp32
  bool accumulate;  // c += a @ b; fp32 only
};

// c (m, n) = a (m, k) @ b (k, n).
// Every element is summed in one order, whatever m, n and threads are: results are bitwise equal
// under any number of threads and any split into chunks of rows (not between AMX and AVX-512, which
// add up in another order). Denormal bf16 inputs count as 0, with AMX denormal sums do, too.
//
// The product for this CPU, or null where torch has to multiply.
using Gemm = void (*)(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads);
Gemm gemm_of_bf16();
Gemm gemm_of_f32();

void gemm_bf16(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads);
void gemm_f32(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads);

}  // namespace realign
